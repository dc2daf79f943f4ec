"""The model of a step's time against cases computed by hand."""

from dataclasses import replace

import pytest

from benchmarks.scaling import fit, fit_links, table
from benchmarks.step_model import Layer, Network, buckets, overlapped, paper_layers, waiting

LINKS = {kind: (0.0, 4.0) for kind in ("all_reduce", "all_reduce_bf16", "all_gather", "all_to_all")}
NETWORK = Network(LINKS)
CONV, FC = Layer("conv1", 1, 1, 1, 1), Layer("fc6", 1, 3, 1, 1)


def test_a_collective_in_a_ring_and_over_nodes() -> None:
    ring = replace(NETWORK, between={kind: (0.1, 2.0) for kind in LINKS})
    # three hops there and back, three quarters of the bytes each way
    assert ring.collective("all_reduce", 8.0, 4) == pytest.approx(2 * (3 * 0.1 + 0.75 * 8 / 2))
    assert ring.collective("all_gather", 8.0, 4) == pytest.approx(3 * 0.1 + 0.75 * 8 / 2)
    assert ring.collective("all_reduce", 8.0, 1) == 0
    nodes = replace(ring, node_size=4, within=LINKS, topology="tree")
    # within: 3 of 4 parts; between 4 nodes: 3 of 4 parts of the quarter that each rank has
    within, between = 0.75 * 8 / 4, 2 * 0.1 + 0.75 * (8 / 4) / 2
    assert nodes.collective("all_gather", 8.0, 16) == pytest.approx(within + between)
    assert nodes.collective("all_reduce", 8.0, 16) == pytest.approx(2 * (within + between))
    # of 16 blocks 3 stay within, and 12 leave the node by this rank's own link
    direct = 3 / 16 * 8 / 4 + 2 * 0.1 + 12 / 16 * 8 / 2
    assert nodes.collective("all_to_all", 8.0, 16) == pytest.approx(direct)


def test_communication_hides_behind_what_is_computed_after_it() -> None:
    assert overlapped([(1, 2), (3, 0)], 0.0) == 4
    assert overlapped([(1, 5), (3, 0)], 0.0) == 6
    assert overlapped([(1, 2), (1, 2)], 0.0) == 5  # the second waits for the first
    # for 2 s computing has half the speed: 1 s of it is done, 2 s are left
    assert overlapped([(1, 2), (3, 0)], 0.5) == 5
    assert overlapped([(1, 2), (3, 0)], 1.0) == 6  # communication takes the whole processor


def test_what_layouts_wait_for() -> None:
    layers, backward = [CONV, FC], [1.0, 1.0]
    assert waiting(layers, backward, NETWORK, "ddp", 1, 4) == 0
    # one bucket, 6 values of 4 bytes, half of it there and back at 4 a second, behind all
    assert waiting(layers, backward, NETWORK, "ddp", 2, 8) == 6
    assert waiting(layers, backward, NETWORK, "ddp+bf16", 2, 8) == 3
    # rows and columns of fc6 are no less than the matrix
    assert waiting(layers, backward, NETWORK, "ddp+powersgd", 2, 8) == 6
    # labels, losses and 3 inputs per image there and back, half of each; conv1's two gradients
    gathered = (8 * 8 + 8 * 2 * 16 + 8 * 3 * 2 + 8 * 3 * 2) / 2 / 4
    waits = waiting(layers, backward, NETWORK, "sharded", 2, 8)
    assert waits == pytest.approx(gathered + 2 * 4 / 4)


def test_gradients_of_the_large_layers_leave_before_those_of_convolutions() -> None:
    layers = paper_layers()
    assert sum(layer.parameters for layer in layers) == 60_965_224
    names = [[layer.name for layer in bucket] for bucket in buckets(layers)]
    assert names == [["fc8", "fc7"], ["fc6"], ["conv5", "conv4", "conv3", "conv2", "conv1"]]
    # PowerSGD sends thin matrices
    assert Layer("fc7", 4096, 4096, 0, 0).powersgd_values == 4096 + 4 * (4096 + 4096)
    assert Layer("small", 8, 8, 0, 0).powersgd_values == 8 + 8 * 8


def test_fits_find_what_the_times_were_made_of() -> None:
    assert fit([(4, 0.5 + 4 * 0.25), (12, 0.5 + 12 * 0.25)]) == pytest.approx((0.5, 0.25))
    assert fit([(1, 1.0), (3, 3.5)])[0] == 0
    assert fit([(1, 2.0), (3, 1.5)])[1] == 0
    network = replace(NETWORK, between={kind: (0.01, 1e3) for kind in LINKS})
    sizes = (100, 1000, 10000)
    found = {kind: [(size, network.collective(kind, size, 4)) for size in sizes] for kind in LINKS}
    for link in fit_links(found, 4).values():
        assert link == pytest.approx((0.01, 1e3))


def test_efficiency_falls_with_the_number_of_gpus() -> None:
    rows = [r for r in table() if (r["scaling"], r["layout"]) == ("weak", "ddp")]
    efficiencies = [row["efficiency_percent"] for row in rows]
    assert efficiencies == sorted(efficiencies, reverse=True)
    assert efficiencies[0] == 100
