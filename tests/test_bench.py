"""The parts of training, timed on tiny images; and the line that names the bottleneck."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from alexnet_dist.bench import BenchCase, bottleneck, main, summarize, time_interleaved
from alexnet_dist.model.layer_stats import training_flops
from tests.conftest import TINY, error_of, succeed
from tests.networks import command

TIMED = {
    *("limit: matrix product", "limit: memory copy", "computing alone"),
    *("training end to end", "loading alone: dali", "loading alone: torch"),
}


@pytest.mark.slow
@pytest.mark.parametrize("processes", [0, 2])
def test_bench_measures_every_part(processes: int, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    options = [*TINY, f"--data.root={images}", f"--run.output_dir={tmp_path}", f"--out={out}"]
    result = succeed(processes, "bench", "--rounds=1", "--seconds=0.1", *options)
    record = json.loads(out.read_text())
    medians = {name: result["median"] for name, result in record["results"].items()}
    assert {name for name, result in record["results"].items() if "low" in result} == TIMED
    assert 0 <= medians["  of it waiting for data"] < 100
    assert (medians["  of it waiting for other ranks"] > 0) == (processes == 2)
    assert 0.1 < medians["peak memory of training"] < 50
    assert result.out.splitlines()[-1] == f"bottleneck: {record['bottleneck']}"
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]


def test_cases_take_turns_for_the_time_asked_for() -> None:
    runs: list[str] = []

    def case(name: str, seconds: float) -> BenchCase:
        def run() -> float:
            runs.append(name)
            time.sleep(seconds)
            return 10.0

        return BenchCase(run, warmup=2)

    results = time_interleaved({"a": case("a", 0.01), "b": case("b", 0.06)}, rounds=2, seconds=0.05)
    order = "".join(runs)
    assert order.count("b") == 6  # b takes longer than a round: two warmups, one timed run
    assert order.index("b") < order.rindex("a")
    assert [len(rounds) for rounds in results.values()] == [2, 2]
    assert 0 < max(results["b"]) < min(results["a"]) <= 10 / 0.01
    assert summarize([2.0, 30.0, 8.00009]) == {"median": 8.0, "low": 2.0, "high": 30.0}


def test_operations_of_a_training_step_are_those_of_its_products() -> None:
    first = 64 * 55 * 55 * 3 * 11 * 11  # nothing is computed for the gradient of the image
    assert training_flops("torchvision", 1000, 224) == 6 * 714_188_480 - 2 * first


def _record(data: float, ranks: float, dataset: str = "folders") -> dict[str, Any]:
    medians = {"limit: matrix product": 8e-6, "computing alone": 400.0}
    medians |= {"  of it waiting for data": data, "  of it waiting for other ranks": ranks}
    results = {name: {"median": median} for name, median in medians.items()}
    return {"results": results, "flops_per_image": 10, "dataset": dataset}


@pytest.mark.parametrize(
    ("record", "line"),
    [
        (_record(1, 2), "computing, at 50% of what matrix products alone would allow"),
        (_record(31, 2), "waiting for data, 31% of the time: prepare raw pixels"),
        (_record(31, 2, "pixels"), "waiting for data, 31% of the time: take more --runtime.thr"),
        (_record(31, 40), "waiting for other ranks, 40% of the time: take a larger data.batch"),
    ],
)
def test_the_bottleneck_is_named_with_its_fix(record: dict[str, Any], line: str) -> None:
    assert bottleneck(record).startswith(line)


def test_a_record_needs_a_folder(images: Path) -> None:
    words = (*TINY, f"--data.root={images}", "--out=nowhere/bench.json")
    assert "there is no folder for --out nowhere" in error_of(command, main, *words)
