"""Taking the time of works in turns, and what is said of it."""

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from alexnet_dist.measuring import report
from alexnet_dist.measuring.turns import Figure, Work, in_turns
from alexnet_dist.model.accounting import rows, training_operations
from alexnet_dist.parallel import mesh
from tests.networks import alone


def test_works_take_turns_of_the_time_asked_for() -> None:
    done: list[str] = []

    def work(name: str, seconds: float) -> Work:
        def once() -> float:
            done.append(name)
            time.sleep(seconds)
            return 10.0

        return Work(once, warm=2)

    alone()
    this = mesh.Mesh(0, 1, 0, 1, torch.device("cpu"), 1, None, dist.group.WORLD)  # type: ignore[arg-type]
    found = in_turns({"a": work("a", 0.01), "b": work("b", 0.06)}, this, rounds=2, seconds=0.05)
    mesh.destroy_distributed()
    # b lasts longer than a turn: what is measured is its first time, after the warm-up
    assert "".join(done).replace("a", "") == "b" * 6
    assert done[:3] == ["a"] * 3
    assert done.index("b") < len(done) - 1 - done[::-1].index("a")
    for name, seconds in (("a", 0.01), ("b", 0.06)):
        assert len(found[name].turns) == 2
        assert 0 < found[name].median <= 10 / seconds
    assert found["a"].over(found["b"]) > 1


def test_ratios_are_of_turns_and_not_of_medians() -> None:
    ours, theirs = Figure((2.0, 30.0, 8.0)), Figure((1.0, 10.0, 1.0))
    assert ours.over(theirs) == 3.0
    assert ours.record() == {"median": 8.0, "low": 2.0, "high": 30.0}


def test_operations_of_a_step_are_those_of_its_products() -> None:
    layers = rows("torchvision")
    assert sum(row.multiply_adds for row in layers) == 714_188_480
    first = 64 * 55 * 55 * 3 * 11 * 11
    assert training_operations(layers) == 6 * 714_188_480 - 2 * first


def _record(wait: float, others: float, kind: str = "folders", **more: Any) -> dict[str, Any]:
    return {
        "limits": {"matrix_product": {"median": 8000.0}},
        "compute": {"operations_per_image": 10},
        "training": {
            "images_per_second": {"median": 400.0},
            "data_time_fraction": wait,
            "comm_time_fraction": others,
            "engine": "DALI on cpu, decoding the region, 2 threads",
        },
        "images": {"kind": kind},
        "machine": {},
        "loading": {"dali": {}, "gpu_cache": {}},
    } | more


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        (_record(0.01, 0.02), "computing 97 % of the time, at 50 % of the images"),
        (_record(0.31, 0.02), "waiting for images 31 %: prepare raw pixels"),
        (_record(0.31, 0.02, "pixels"), "waiting for images 31 %: take --data.loader gpu_cache"),
        (_record(0.31, 0.4), "waiting for other processes 40 %: take a larger data.batch_size"),
    ],
)
def test_the_verdict_names_what_costs_most_and_the_mend(
    record: dict[str, Any], sentence: str
) -> None:
    assert report.verdict(record).startswith(sentence)
