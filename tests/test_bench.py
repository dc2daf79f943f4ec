"""The parts of a recipe, measured for real on tiny images."""

import json
from pathlib import Path

import pytest

from alexnet_dist.bench import main
from alexnet_dist.errors import UserError
from tests.conftest import TINY, launch
from tests.networks import command
from tests.prepare.packed_folder import write_prepared

SHORT = ["--rounds=1", "--seconds=0.1"]
BENCH = "alexnet_dist.bench"


@pytest.mark.slow
def test_one_process_beside_the_usual(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    options = [*TINY, f"--data.root={images}", f"--run.output_dir={tmp_path}", f"--out={out}"]
    result = launch(0, *SHORT, "--baseline", *options, module=BENCH)
    assert result.code == 0, result.err[-3000:]
    record = json.loads(out.read_text())
    assert set(record["limits"]) == {"matrix_product", "memory", "decoder"}
    assert {"dali", "torch"} <= set(record["loading"])
    assert record["limits"]["decoder"]["median"] > record["loading"]["dali"]["low"] / 2
    assert record["training"]["comm_time_fraction"] == 0
    assert record["checkpoint"]["bytes"] > 2 * 4 * 17_000_000
    assert record["checkpoint"]["stall"] < record["checkpoint"]["seconds"]
    training, loading = record["baseline"]["training"], record["baseline"]["loading"]
    assert training["over_example"] > 1  # its images have 224 pixels a side, ours 67
    assert set(loading) == {"engine", "torch", "dali", "over_dataloader", "over_dali"}
    lines = result.out.splitlines()
    assert lines[-1] == f"verdict: {record['verdict']}"
    assert any(line.startswith("loading: NVIDIA's DALI example") for line in lines)
    assert out.with_suffix(".png").stat().st_size > 10_000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bench.json", "bench.png"]


@pytest.mark.slow
def test_several_processes_and_their_layouts(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    options = [*TINY, f"--data.root={images}", f"--run.output_dir={tmp_path}", f"--out={out}"]
    result = launch(2, *SHORT, *options, module=BENCH)
    assert result.code == 0, result.err[-3000:]
    record = json.loads(out.read_text())
    assert set(record["layouts"]) == {"replicated", "towers", "sharded"}
    assert record["limits"]["all_reduce"]["median"] > 0
    assert 0 < record["training"]["comm_time_fraction"] < 1


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--rounds=0"], "--rounds is 0; it must be at least 1"),
        (["--fast"], "unrecognized arguments: --fast; --help shows all options"),
        (["--out=nowhere/bench.json"], "there is no folder for --out nowhere/bench.json: make it"),
        (["--baseline=nowhere"], "there is no folder .*nowhere"),
        (["--baseline"], "holds no folders of images, which the plain loop reads: give --baseline"),
    ],
)
def test_wrong_words_are_named(
    words: list[str], sentence: str, images: Path, tmp_path: Path
) -> None:
    root = write_prepared(images, tmp_path / "shards", "shards")
    with pytest.raises(UserError, match=sentence):
        command(main, *SHORT, *TINY, f"--data.root={root}", *words)
