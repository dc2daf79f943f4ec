"""Records, run folders and pictures."""

import os
from pathlib import Path

import pytest

from alexnet_dist.errors import UserError
from alexnet_dist.tracking.logger import EventLog, JsonlSink, drop_superseded, read_events
from alexnet_dist.tracking.run_dir import RunDir, read_status, resolve_run_dir


def test_records_survive_a_cut_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = EventLog(JsonlSink(path))
    first.emit("train", step=1, loss=0.1 + 0.2)
    first.close()
    with path.open("a") as file:
        file.write('{"event": "train", "st')
    second = EventLog(JsonlSink(path))
    second.emit("train", step=2, loss=1.0)
    second.close()
    assert [(e["step"], e["loss"]) for e in read_events(path)] == [(1, 0.1 + 0.2), (2, 1.0)]


def test_records_wait_for_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = EventLog(JsonlSink(tmp_path / "metrics.jsonl"))
    write = os.write

    def full(file: int, content: bytes) -> int:
        if len(content) > 9:
            write(file, content[:9])  # what there is room for
            monkeypatch.setattr(os, "write", none)
            return 9
        return write(file, content)

    def none(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    stream.emit("train", step=1)
    stream.emit("train", step=2)
    monkeypatch.setattr(os, "write", write)
    stream.emit("train", step=3)
    stream.close()
    assert [e["step"] for e in read_events(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_steps_behind_the_checkpoint_are_void() -> None:
    kinds = [("train", 1), ("train", 2), ("train", 3), ("resume", 2), ("train", 3)]
    events = [{"event": kind, "step": step, "n": n} for n, (kind, step) in enumerate(kinds)]
    assert [event["n"] for event in drop_superseded(events)] == [0, 1, 3, 4]
    again = [*events, {"event": "start", "step": 0, "n": 5}, {"event": "train", "step": 1, "n": 6}]
    assert [event["n"] for event in drop_superseded(again)] == [5, 6]


def test_names_of_runs(tmp_path: Path) -> None:
    def next_name(resume: str = "auto") -> tuple[str, bool]:
        path, goes_on = resolve_run_dir(str(tmp_path), "a", resume)
        return path.name, goes_on

    assert next_name() == ("a", False)
    folder = RunDir(tmp_path / "a")
    folder.lock()
    folder.save_config({"x": 1})
    folder.set_status("running")
    assert next_name() == ("a", True)
    assert next_name("never") == ("a-2", False)
    run_id = read_status(folder.path)["wandb_id"]
    folder.set_status("ended")
    assert read_status(folder.path)["wandb_id"] == run_id
    assert next_name() == ("a-2", False)
    assert resolve_run_dir(str(tmp_path), "b", str(folder.path)) == (folder.path, True)
    with pytest.raises(UserError, match="no run at"):
        resolve_run_dir(str(tmp_path), "b", str(tmp_path / "c"))
