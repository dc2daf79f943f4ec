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


class Life:
    """One life of a run, whose losses tell which life it was."""

    def __init__(self, run: Path, number: int, first: str, step: int) -> None:
        self.run, self.number = run, number
        self._stream = EventLog(JsonlSink(run / "metrics.jsonl"))
        self.emit(first, step)

    def emit(self, event: str, step: int, **values: Any) -> None:
        self._stream.emit(event, step=step, epoch=step / 4, **values)

    def loss(self, step: int) -> float:
        return self.number + step / 100

    def train(self, *steps: int) -> None:
        for step in steps:
            speed = {"images_per_second": 10.0, "data_time_fraction": 0.1}
            error = 90.0 - step
            self.emit("train", step, loss=self.loss(step), top1_error=error, lr=0.1, **speed)

    def evaluate(self, step: int, event: str = "eval") -> None:
        errors = {"top1_error": 50.0 - self.number, "top5_error": 5.0}
        self.emit(event, step, loss=self.loss(step), **errors)

    def picture(self, step: int, name: str) -> None:
        """As the run's records name it, wherever the run lay then."""
        path = f"elsewhere/{name}.png"
        self.emit("image", step, name=name, path=path, caption=f"{self.number}")

    def die(self, cut: str = "") -> None:
        self._stream.close()
        with (self.run / "metrics.jsonl").open("a") as file:
            file.write(cut)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Five lives: the first without a checkpoint, then one killed behind its checkpoint of step 4,
    one that rolled back by itself, one that was preempted, and one that came to its end."""
    run = tmp_path / "run"
    folder = RunDir(run)
    folder.lock()
    folder.save_config({"optim": {"lr": 0.25}, "wandb": {"project": "p"}})
    for name in ("first_batch", "curves"):
        Image.new("RGB", (8, 8)).save(run / f"{name}.png")
    life = Life(run, 1, "start", 0)
    life.train(1, 2, 3)
    life.die()
    life = Life(run, 2, "start", 0)
    life.picture(0, "first_batch")
    life.train(1, 2, 3, 4)
    life.evaluate(4)
    life.evaluate(4, "best")
    life.picture(4, "curves")
    life.train(5, 6)
    life.evaluate(6)
    life.evaluate(6, "best")
    life.die(cut='{"event": "train", "step": 7, "lo')
    life = Life(run, 3, "resume", 4)
    life.train(5, 6, 7)
    life.emit("nan", 8, what="the loss is nan", paths=["a.jpg"])
    life.die()
    life = Life(run, 4, "resume", 6)
    life.train(7, 8, 9)
    life.die()
    life = Life(run, 5, "resume", 8)
    life.train(9)
    life.emit("preempted", 9, cause="SIGTERM")
    life.die(cut='{"event": "resu')
    life = Life(run, 6, "resume", 9)
    life.train(10, 11, 12)
    life.evaluate(12)
    life.picture(12, "curves")
    life.picture(12, "kernels")  # whose file is gone
    life.evaluate(12, "finished")
    life.die()
    return run


LIVES = {1: 2, 2: 2, 3: 2, 4: 2, 5: 3, 6: 3, 7: 4, 8: 4, 9: 5, 10: 6, 11: 6, 12: 6}
"""The life of each step that counts."""


def test_many_lives_become_one_curve(run: Path) -> None:
    result = launch(0, str(run), "--wandb=offline", module="alexnet_dist.replay")
    assert result.code == 0, result.err
    assert "12 records of training up to step 12, 2 evaluations and 2 pictures" in result.out
    (folder,) = run.glob("replay/wandb/offline-run-*")
    assert result.out.splitlines()[-1] == f"wandb sync {folder}"
    history, summary, ids, config = read_back(run / "replay")
    assert len(ids) == 1
    assert result.out.count(ids.pop()) == 2
    trained = [row for row in history if "train/loss" in row]
    assert [int(row["global_step"]) for row in trained] == list(range(1, 13))
    losses = [float(row["train/loss"]) for row in trained]
    assert losses == [life + step / 100 for step, life in LIVES.items()]
    evaluated = {row["global_step"]: row for row in history if "eval/loss" in row}
    assert [float(row["eval/top1_error"]) for row in evaluated.values()] == [48.0, 44.0]
    assert list(evaluated) == ["4", "12"]
    steps = [int(row["global_step"]) for row in history]
    assert steps == sorted(steps)
    names = {key.split("/")[0] for row in history for key in row}
    assert {"first_batch", "curves"} <= names
    assert "kernels" not in names
    kept = {name: json.loads(summary[name]) for name in summary if "/" in name}
    assert (kept["best/step"], kept["best/top1_error"]) == (4, 48.0)
    assert (kept["finished/step"], kept["finished/top1_error"]) == (12, 44.0)
    assert json.loads(config["optim"]) == {"lr": 0.25}


def test_the_last_picture_of_each_name_is_shown(run: Path) -> None:
    pictures = [event for event in replay.shown(run) if event["event"] == "image"]
    assert [(event["name"], event["step"]) for event in pictures] == [
        ("first_batch", 0),
        ("curves", 12),
    ]
    assert all(Path(event["path"]).parent == run for event in pictures)


def test_online_it_tells_the_address_or_what_was_refused(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sent = MagicMock(url="https://wandb.example/run")
    begin = MagicMock(return_value=sent)
    monkeypatch.setattr(replay, "init_run", begin)
    replay.main([str(run), "--wandb=online", "--id=a", "--name=b", "--project=c"])
    assert capsys.readouterr().out.endswith("W&B run a:\nhttps://wandb.example/run\n")
    options = begin.call_args.kwargs
    assert (options["name"], options["project"], options["resume"]) == ("b", "c", "never")
    sent.finish.assert_called_once()
    begin.side_effect = RuntimeError("run a\nexists")
    with pytest.raises(UserError, match=r"run a exists\): give --wandb offline"):
        replay.main([str(run), "--wandb=online", "--id=a"])


def test_nothing_to_replay(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there are no records at"):
        replay.main([str(tmp_path / "nowhere")])
    Life(tmp_path, 1, "start", 0).die()
    with pytest.raises(UserError, match="no step of training yet: give a run"):
        replay.main([str(tmp_path)])
    assert not (tmp_path / "replay").exists()
