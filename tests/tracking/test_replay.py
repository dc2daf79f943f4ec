"""A run's records, replayed into one W&B run."""

import json
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
from PIL import Image

from alexnet_dist import replay
from alexnet_dist.errors import UserError
from alexnet_dist.tracking.logger import EventLog, JsonlSink
from alexnet_dist.tracking.run_dir import RunDir
from tests.conftest import launch
from tests.tracking.offline import read_back


class Attempt:
    """One attempt of a run, whose losses tell which attempt it was."""

    def __init__(self, run: Path, number: int, first_event: str, step: int) -> None:
        self.path, self.number = run / "metrics.jsonl", number
        self._log = EventLog(JsonlSink(self.path))
        self.emit(first_event, step)

    def emit(self, event: str, step: int, **values: Any) -> None:
        self._log.emit(event, step=step, epoch=step / 4, **values)

    def train(self, *steps: int) -> None:
        for step in steps:
            values = {"images_per_second": 10.0, "data_time_fraction": 0.1, "lrs": {"weights": 0.1}}
            loss = self.number + step / 100
            self.emit("train", step, loss=loss, top1_error=90.0 - step, **values)

    def evaluate(self, step: int, event: str = "eval") -> None:
        errors = {"top1_error": 50.0 - self.number, "top5_error": 5.0}
        self.emit(event, step, loss=1.0, **errors)

    def image(self, step: int, name: str) -> None:
        """As the run's records name it, wherever the run lay then."""
        self.emit("image", step, name=name, path=f"elsewhere/{name}.png", caption="a")

    def end(self, truncated: str = "") -> None:
        self._log.close()
        with self.path.open("a") as file:
            file.write(truncated)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Four attempts: the first without a checkpoint, then one killed after its checkpoint of step
    4, one that was preempted, and one that came to the run's end."""
    run = tmp_path / "run"
    run_dir = RunDir(run)
    run_dir.lock()
    run_dir.save_config({"optim": {"lr": 0.25}, "wandb": {"project": "p"}})
    run_dir.set_status("ended")
    for name in ("first_batch", "curves"):
        Image.new("RGB", (8, 8)).save(run / f"{name}.png")
    attempt = Attempt(run, 1, "start", 0)
    attempt.train(1, 2, 3)
    attempt.end()
    attempt = Attempt(run, 2, "start", 0)
    attempt.image(0, "first_batch")
    attempt.train(1, 2, 3, 4)
    attempt.evaluate(4)
    attempt.evaluate(4, "best")
    attempt.image(4, "curves")
    attempt.train(5, 6)
    attempt.evaluate(6)
    attempt.evaluate(6, "best")
    attempt.end(truncated='{"event": "train", "step": 7, "lo')
    attempt = Attempt(run, 3, "resume", 4)
    attempt.train(5, 6, 7)
    attempt.emit("preempted", 7, cause="SIGTERM")
    attempt.end(truncated='{"event": "resu')
    attempt = Attempt(run, 4, "resume", 6)
    attempt.train(7, 8)
    attempt.evaluate(8)
    attempt.image(8, "curves")
    attempt.image(8, "kernels")  # whose file is gone
    attempt.evaluate(8, "finished")
    attempt.end()
    return run


ATTEMPTS = {1: 2, 2: 2, 3: 2, 4: 2, 5: 3, 6: 3, 7: 4, 8: 4}
"""The attempt of each step that counts."""


def test_many_attempts_become_one_curve(run: Path) -> None:
    result = launch(0, str(run), "--wandb=offline", module="alexnet_dist.replay")
    assert result.code == 0, result.err
    assert "8 train events, 2 evaluations and 2 images" in result.out
    (folder,) = run.glob("replay/wandb/offline-run-*")
    assert result.out.splitlines()[-1] == f"wandb sync {folder}"
    history, summary, ids, config = read_back(run / "replay")
    assert len(ids) == 1
    trained = {int(row["global_step"]): row for row in history if "train/loss" in row}
    losses = {step: float(row["train/loss"]) for step, row in trained.items()}
    assert losses == {step: number + step / 100 for step, number in ATTEMPTS.items()}
    evaluated = {row["global_step"]: row for row in history if "eval/loss" in row}
    assert [float(row["eval/top1_error"]) for row in evaluated.values()] == [48.0, 46.0]
    assert list(evaluated) == ["4", "8"]
    steps = [int(row["global_step"]) for row in history]
    assert steps == sorted(steps)
    names = {key.split("/")[0] for row in history for key in row}
    assert {"first_batch", "curves"} <= names
    assert "kernels" not in names
    kept = {name: json.loads(summary[name]) for name in summary if "/" in name}
    assert (kept["best/step"], kept["best/top1_error"]) == (4, 48.0)
    assert (kept["finished/step"], kept["finished/top1_error"]) == (8, 46.0)
    assert json.loads(config["optim"]) == {"lr": 0.25}


def test_the_last_image_of_each_name_is_shown(run: Path) -> None:
    images = [event for event in replay.select_events(run) if event["event"] == "image"]
    assert [(event["name"], event["step"]) for event in images] == [
        ("first_batch", 0),
        ("curves", 8),
    ]
    assert all(Path(event["path"]).parent == run for event in images)


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
    with pytest.raises(UserError, match=r"run a exists\): give --wandb offline"):
        replay.main([str(run), "--wandb=online", "--id=a"])


def test_nothing_to_replay(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there are no records at"):
        replay.main([str(tmp_path / "nowhere")])
    Attempt(tmp_path, 1, "start", 0).end()
    with pytest.raises(UserError, match="no step of training yet"):
        replay.main([str(tmp_path)])
    assert not (tmp_path / "replay").exists()
