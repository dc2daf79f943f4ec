"""The model of a step's time against cases made by hand."""

from dataclasses import replace

import pytest

from benchmarks.step_fit import fit, fit_lines
from benchmarks.step_model import (
    LayerSpec,
    Parts,
    buckets,
    network,
    overlapped,
    power_values,
    predict,
)

LINES = {kind: (0.0, 4.0) for kind in ("all_reduce", "all_reduce_bf16", "all_gather", "all_to_all")}
PARTS = Parts(
    name="by hand",
    assumed=(),
    width=2,
    convolutions_forward=(1.0, 0.5),
    convolutions_backward=(2.0, 1.0),
    connected=(0.0, 0.0),
    connected_backward=0.5,
    update=0.0,
    sending={"none": 0.0, "bf16": 0.0, "powersgd": 0.0},
    processes_a_node=1,
    inside=None,
    between=LINES,
    hops="ring",
    taken=0.0,
    powersgd_waits=True,
    loader=None,
)
CONV, FC = LayerSpec("conv1", 1, 1, work=1.0), LayerSpec("fc6", 1, 3, reads=3)


def test_travel_in_a_ring_and_over_nodes() -> None:
    slow = {kind: (0.1, 2.0) for kind in LINES}
    ring = replace(PARTS, between=slow)
    # three hops there and back, three quarters of the bytes each way
    assert ring.travel("all_reduce", 8.0, 4) == pytest.approx(2 * (3 * 0.1 + 0.75 * 8 / 2))
    assert ring.travel("all_gather", 8.0, 4) == pytest.approx(3 * 0.1 + 0.75 * 8 / 2)
    assert ring.travel("all_reduce", 8.0, 1) == 0
    nodes = replace(ring, processes_a_node=4, inside=LINES, hops="tree")
    # within: 3 of 4 parts; between 4 nodes: 3 of 4 parts of the quarter that each process has
    within, between = 0.75 * 8 / 4, 2 * 0.1 + 0.75 * (8 / 4) / 2
    assert nodes.travel("all_gather", 8.0, 16) == pytest.approx(within + between)
    assert nodes.travel("all_reduce", 8.0, 16) == pytest.approx(2 * (within + between))
    # of 16 blocks 3 stay within, and 12 leave the node by this process's own line
    straight = 3 / 16 * 8 / 4 + 2 * 0.1 + 12 / 16 * 8 / 2
    assert nodes.travel("all_to_all", 8.0, 16) == pytest.approx(straight)


def test_what_travels_hides_under_what_is_computed_behind_it() -> None:
    assert overlapped([(1, 2), (3, 0)], 0.0) == 4
    assert overlapped([(1, 5), (3, 0)], 0.0) == 6
    assert overlapped([(1, 2), (1, 2)], 0.0) == 5  # the second waits for the first
    # while 2 s travel, half of the speed: 1 s of the work is done, 2 s are left
    assert overlapped([(1, 2), (3, 0)], 0.5) == 5
    # it takes the whole processor: nothing is hidden
    assert overlapped([(1, 2), (3, 0)], 1.0) == 6


def test_data_parallel_step_by_hand() -> None:
    # 4 images of each of 2: 1 + 0.5 * 4 forward, 2 + 1 * 4 backward
    alone = predict([CONV, FC], PARTS, "ddp", 1, 4)
    assert (alone.computing, alone.waiting, alone.bound) == (9, 0, "compute")
    # one bucket, 6 values of 4 bytes, half of it there and back at 4 a second, behind all
    both = predict([CONV, FC], PARTS, "ddp", 2, 8)
    assert (both.computing, both.waiting) == (9, 6)
    assert predict([CONV, FC], PARTS, "ddp+bf16", 2, 8).waiting == 3
    # rows and columns of fc6 are no less than the matrix
    assert predict([CONV, FC], PARTS, "ddp+powersgd", 2, 8).waiting == 6
    costly = replace(PARTS, sending={"none": 0.5}, update=0.25)
    assert predict([CONV, FC], costly, "ddp", 2, 8).computing == 9 + 6 * 0.5 + 6 * 0.25
    slow = replace(PARTS, loader=(0.1, 2.0))
    loading = predict([CONV, FC], slow, "ddp", 2, 8)
    assert (loading.seconds, loading.bound) == (pytest.approx(4 / 0.2), "loader")


def test_split_step_by_hand() -> None:
    parts = replace(PARTS, connected=(1.0, 0.5))
    step = predict([CONV, FC], parts, "whole", 2, 8)
    # half of fc6, for the 8 images of both
    assert step.computing == 9 + 4 / 2 * (1 + 0.5 * 8)
    # labels, losses and 3 inputs an image there and back, half of each; conv1's two gradients
    gathered = (8 * 8 + 8 * 2 * 16 + 8 * 3 * 2 + 8 * 3 * 2) / 2 / 4
    assert step.waiting == pytest.approx(gathered + 2 * 4 / 4)
    # data parallel sees 4 images with the whole layer
    assert predict([CONV, FC], parts, "ddp", 2, 8).computing == 9 + 4 * (1 + 0.5 * 4)


def test_gradients_of_the_large_layers_leave_under_the_convolutions() -> None:
    layers = network()
    assert sum(layer.parameters for layer in layers) == 60_965_224
    assert sum(layer.work for layer in layers) == pytest.approx(1)
    names = [[layer.name for layer in bucket] for bucket in buckets(layers)]
    assert names == [["fc8", "fc7"], ["fc6"], ["conv5", "conv4", "conv3", "conv2", "conv1"]]
    fast = {kind: (0.0, 1e9) for kind in LINES}
    hidden = predict(layers, replace(PARTS, between=fast), "ddp", 2, 8)
    last = 4 * sum(layer.parameters for layer in layers if layer.work) / 1e9
    assert hidden.waiting == pytest.approx(last)


def test_power_sgd_sends_thin_matrices() -> None:
    assert power_values(LayerSpec("fc7", 4096, 4096)) == 4096 + 4 * (4096 + 4096)
    assert power_values(LayerSpec("small", 8, 8)) == 8 + 8 * 8


def test_fits_find_what_the_times_were_made_of() -> None:
    assert fit([(4, 0.5 + 4 * 0.25), (12, 0.5 + 12 * 0.25)]) == pytest.approx((0.5, 0.25))
    assert fit([(1, 1.0), (3, 3.5)])[0] == 0
    assert fit([(1, 2.0), (3, 1.5)])[1] == 0
    made = replace(PARTS, between={kind: (0.01, 1e3) for kind in LINES})
    found = {
        kind: [(size, made.travel(kind, size, 4)) for size in (100, 1000, 10000)] for kind in LINES
    }
    for line in fit_lines(found, 4, "ring").values():
        assert line == pytest.approx((0.01, 1e3))
