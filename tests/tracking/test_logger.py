"""The records of a run, and its folder."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alexnet_dist.errors import UserError
from alexnet_dist.tracking import plots
from alexnet_dist.tracking.logger import EventLog, JsonlSink, Logger, drop_superseded, read_events
from alexnet_dist.tracking.run_dir import RunDir, read_config, read_status, resolve_run_dir


def test_records_survive_a_truncated_line(tmp_path: Path) -> None:
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


def full_disk(*_: object) -> int:
    raise OSError(28, "No space left on device")


def test_records_wait_for_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = EventLog(JsonlSink(tmp_path / "metrics.jsonl"))
    write = os.write

    def almost_full(file: int, content: bytes) -> int:
        write(file, content[:9])  # what there is room for
        monkeypatch.setattr(os, "write", full_disk)
        return 9

    monkeypatch.setattr(os, "write", almost_full)
    log.emit("train", step=1)
    log.emit("train", step=2)
    monkeypatch.setattr(os, "write", write)
    log.emit("train", step=3)
    log.close()
    assert [e["step"] for e in read_events(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_a_full_disk_costs_a_plot_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = Logger(RunDir(tmp_path), {}, total_steps=9, steps_per_epoch=3)
    monkeypatch.setattr(plots, "save_figure", full_disk)
    logger.log_kernels(9, np.ones((96, 3, 11, 11), np.float32), 2)
    logger.close("ended", 9)
    assert "kernels.png could not be written (No space left on device)" in capsys.readouterr().out
    assert read_status(tmp_path)["status"] == "ended"
    assert [e["event"] for e in read_events(tmp_path / "metrics.jsonl")] == ["warning"]


def test_steps_after_the_checkpoint_are_superseded() -> None:
    kinds = [("train", 1), ("train", 2), ("train", 3), ("resume", 2), ("train", 3)]
    events = [{"event": kind, "step": step, "n": n} for n, (kind, step) in enumerate(kinds)]
    assert [event["n"] for event in drop_superseded(events)] == [0, 1, 3, 4]
    again = [*events, {"event": "start", "step": 0, "n": 5}, {"event": "train", "step": 1, "n": 6}]
    assert [event["n"] for event in drop_superseded(again)] == [5, 6]


def make_run(path: Path, **status: Any) -> RunDir:
    run_dir = RunDir(path)
    run_dir.lock()
    run_dir.save_config({"x": 1})
    run_dir.set_status("running", **status)
    return run_dir


def test_names_of_runs(tmp_path: Path) -> None:
    def next_name(resume: str = "auto") -> tuple[str, bool]:
        path, resumes = resolve_run_dir(str(tmp_path), "a", resume)
        return path.name, resumes

    assert next_name() == ("a", False)
    run_dir = make_run(tmp_path / "a")
    assert next_name() == ("a", True)
    assert next_name("never") == ("a-2", False)
    run_id = read_status(run_dir.path)["wandb_id"]
    run_dir.set_status("ended")
    assert read_status(run_dir.path)["wandb_id"] == run_id
    assert next_name() == ("a-2", False)
    assert resolve_run_dir(str(tmp_path), "b", str(run_dir.path)) == (run_dir.path, True)
    with pytest.raises(UserError, match="no run at"):
        resolve_run_dir(str(tmp_path), "b", str(tmp_path / "c"))


def test_a_restarted_launcher_resumes_its_own_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    make_run(tmp_path / "a")
    assert resolve_run_dir(str(tmp_path), "a", "never") == (tmp_path / "a", True)
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    assert resolve_run_dir(str(tmp_path), "a", "never") == (tmp_path / "a-2", False)


def test_a_run_of_the_old_names_is_refused(tmp_path: Path) -> None:
    path = make_run(tmp_path / "a").path
    status = read_status(path)
    del status["format"]
    (path / "status.json").write_text(json.dumps(status))
    message = "a was written by alexnet_dist 0.1.0, whose options and records have other names"
    with pytest.raises(UserError, match=message):
        read_config(path)
    for name, resume in (("a", "auto"), ("b", str(path))):
        with pytest.raises(UserError, match=message):
            resolve_run_dir(str(tmp_path), name, resume)
    assert resolve_run_dir(str(tmp_path), "a", "never") == (tmp_path / "a-2", False)
