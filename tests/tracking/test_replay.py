"""A run's records, replayed into one W&B run."""

import json
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
from PIL import Image

from alexnet_dist import replay
from alexnet_dist.tracking.logger import JsonlSink
from alexnet_dist.tracking.run_dir import lock, save_config, set_status
from tests.conftest import error_of, succeed
from tests.tracking.offline import read_back


def record(run: Path, attempt: int, *events: tuple[str, int], truncated: str = "") -> None:
    """Records of one attempt of a run: kinds of events, images by name, with their steps. Losses
    and errors tell which attempt it was."""
    path = run / "metrics.jsonl"
    sink = JsonlSink(path)
    for kind, step in events:
        values: dict[str, Any] = {"step": step, "epoch": step / 4}
        if kind in ("train", "eval", "best", "finished"):
            values |= {"loss": attempt + step / 100, "top1_error": 50.0 - attempt}
        if kind == "train":
            values |= {"images_per_second": 10.0, "lrs": {"weights": 0.1}}
        if kind in ("first_batch", "curves", "kernels"):  # wherever the run's folder lay then
            values |= {"name": kind, "path": f"elsewhere/{kind}.png", "caption": "a"}
        sink.log({"event": "image" if "name" in values else kind, **values})
    with path.open("a") as file:
        file.write(truncated)


def steps(first: int, last: int) -> list[tuple[str, int]]:
    return [("train", step) for step in range(first, last + 1)]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Four attempts: the first without a checkpoint, then one killed after its checkpoint of step
    4, one that was preempted, and one that came to the run's end."""
    run = tmp_path / "my run"
    lock(run)
    save_config(run, {"optim": {"lr": 0.25}, "wandb": {"project": "p"}})
    set_status(run, "ended")
    for name in ("first_batch", "curves"):
        Image.new("RGB", (8, 8)).save(run / f"{name}.png")
    record(run, 1, ("start", 0), *steps(1, 3))
    second = [("start", 0), ("first_batch", 0), *steps(1, 4), ("eval", 4), ("best", 4)]
    second += [("curves", 4), *steps(5, 6), ("eval", 6), ("best", 6)]
    record(run, 2, *second, truncated='{"event": "train", "step": 7, "lo')
    record(run, 3, ("resume", 4), *steps(5, 7), ("preempted", 7), truncated='{"event": "resu')
    fourth = [("resume", 6), *steps(7, 8), ("eval", 8), ("curves", 8), ("kernels", 8)]
    record(run, 4, *fourth, ("finished", 8))  # the file of kernels is gone
    return run


ATTEMPTS = {1: 2, 2: 2, 3: 2, 4: 2, 5: 3, 6: 3, 7: 4, 8: 4}
"""The attempt of each step that counts."""


def test_many_attempts_become_one_curve(run: Path) -> None:
    result = succeed(0, "replay", str(run), "--wandb=offline")
    assert "8 train events, 2 evaluations and 2 images" in result.out
    (folder,) = run.glob("replay/wandb/offline-run-*")
    assert result.out.splitlines()[-1] == f"wandb sync '{folder}'"
    history, summary, ids, config = read_back(run / "replay")
    assert len(ids) == 1
    trained = {int(row["global_step"]): row for row in history if "train/loss" in row}
    losses = {step: float(row["train/loss"]) for step, row in trained.items()}
    assert losses == {step: number + step / 100 for step, number in ATTEMPTS.items()}
    evaluated = {row["global_step"]: row for row in history if "eval/loss" in row}
    assert [float(row["eval/top1_error"]) for row in evaluated.values()] == [48.0, 46.0]
    assert list(evaluated) == ["4", "8"]
    order = [int(row["global_step"]) for row in history]
    assert order == sorted(order)
    names = {key.split("/")[0] for row in history for key in row}
    assert {"first_batch", "curves"} <= names
    assert "kernels" not in names
    kept = {name: json.loads(summary[name]) for name in summary if "/" in name}
    assert (kept["best/step"], kept["best/top1_error"]) == (4, 48.0)
    assert (kept["finished/step"], kept["finished/top1_error"]) == (8, 46.0)
    assert json.loads(config["optim"]) == {"lr": 0.25}


def test_online_it_prints_the_address_or_what_was_refused(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sent = MagicMock(url="https://wandb.example/run")
    init_run = MagicMock(return_value=sent)
    monkeypatch.setattr(replay, "init_run", init_run)
    replay.main([str(run), "--wandb=online", "--id=a", "--name=b", "--project=c"])
    assert capsys.readouterr().out.endswith("W&B run a:\nhttps://wandb.example/run\n")
    options = init_run.call_args.kwargs
    assert (options["name"], options["project"], options["resume"]) == ("b", "c", "never")
    sent.finish.assert_called_once()
    init_run.side_effect = RuntimeError("run a\nexists")
    message = error_of(replay.main, [str(run), "--wandb=online", "--id=a"])
    assert "run a exists): give --wandb offline" in message


def test_nothing_to_replay(tmp_path: Path) -> None:
    assert "there are no records at" in error_of(replay.main, [str(tmp_path / "nowhere")])
    record(tmp_path, 1, ("start", 0))
    assert "no step of training yet" in error_of(replay.main, [str(tmp_path)])
    assert not (tmp_path / "replay").exists()
