"""The records of a run, and its folder."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alexnet_dist.errors import UserError
from alexnet_dist.tracking import plots
from alexnet_dist.tracking.console import ConsoleSink
from alexnet_dist.tracking.logger import JsonlSink, Logger, read_events
from alexnet_dist.tracking.run_dir import (
    lock,
    read_status,
    resolve_run_dir,
    save_config,
    set_status,
)


def test_records_survive_a_truncated_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    JsonlSink(path).log({"event": "train", "step": 1, "loss": 0.1 + 0.2})
    with path.open("a") as file:
        file.write('{"event": "train", "st')
    JsonlSink(path).log({"event": "train", "step": 2, "loss": 1.0})
    assert [(e["step"], e["loss"]) for e in read_events(tmp_path)] == [(1, 0.1 + 0.2), (2, 1.0)]


def full_disk(*_: object) -> int:
    raise OSError(28, "No space left on device")


def test_records_wait_for_a_full_disk(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    file, room = sink._file, [9, 0, 0]

    class AlmostFull:
        def write(self, content: bytes) -> int:
            return file.write(content[: room.pop(0)]) or full_disk()

    sink._file = AlmostFull()  # type: ignore[assignment]
    for step in (1, 2):
        sink.log({"event": "train", "step": step})
    sink._file = file
    sink.log({"event": "train", "step": 3})
    assert room == []
    assert [e["step"] for e in read_events(tmp_path)] == [1, 2, 3]


def test_a_full_disk_costs_a_plot_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = Logger(tmp_path, {"wandb": {"mode": "off"}}, total_steps=9, steps_per_epoch=3)
    monkeypatch.setattr(plots, "save_figure", full_disk)
    kernels = np.ones((96, 3, 11, 11), np.float32)
    logger.plot("kernels", 9, plots.plot_kernels, kernels, 2)
    logger.close("ended", 9)
    assert "kernels.png could not be written (No space left on device)" in capsys.readouterr().out
    assert read_status(tmp_path)["status"] == "ended"
    assert [e["event"] for e in read_events(tmp_path)] == ["warning"]


def test_steps_after_the_checkpoint_are_superseded(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "metrics.jsonl")

    def log(*kinds: tuple[str, int]) -> list[tuple[str, int]]:
        for kind, step in kinds:
            sink.log({"event": kind, "step": step})
        return [(event["event"], event["step"]) for event in read_events(tmp_path)]

    first = [("train", 1), ("train", 2)]
    resumed = [("resume", 2), ("train", 3)]
    assert log(*first, ("train", 3), *resumed) == first + resumed
    assert log(("start", 0), ("train", 1)) == [("start", 0), ("train", 1)]
    assert len(read_events(tmp_path, superseded=True)) == 7


def test_the_console_has_a_line_for_a_step_where_there_is_no_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sink = ConsoleSink(tmp_path, total_steps=6, steps_per_epoch=3)
    event = {"event": "train", "step": 4, "epoch": 4 / 3, "loss": None, "lrs": {"weights": 0.01}}
    event["top1_error"] = None  # as the loss, where no step was finite
    speeds = {"images_per_second": 9, "data_time_fraction": 0.25, "comm_time_fraction": 0}
    sink.log(event | speeds)
    sink.log({"event": "warning", "step": 4, "message": "[a] {b}"})
    sink.log({"event": "checkpoint", "step": 4})  # is not shown
    assert capsys.readouterr().out.splitlines() == [
        "epoch 2/2  step 4/6  loss nan  lr 0.01  9 img/s  data 25%",
        "warning: [a] {b}",
    ]


def make_run(path: Path, **status: Any) -> Path:
    lock(path)
    save_config(path, {"x": 1})
    set_status(path, "running", **status)
    return path


def test_names_of_runs(tmp_path: Path) -> None:
    def next_name(resume: str = "auto") -> tuple[str, bool]:
        path, kept = resolve_run_dir(str(tmp_path), None, "a", resume)
        assert kept in ({}, {"x": 1})
        return path.name, bool(kept)

    assert next_name() == ("a", False)
    run = make_run(tmp_path / "a")
    assert next_name() == ("a", True)
    assert next_name("never") == ("a-2", False)
    run_id = read_status(run)["wandb_id"]
    set_status(run, "ended")
    assert read_status(run)["wandb_id"] == run_id
    assert next_name() == ("a-2", False)
    with pytest.raises(UserError, match=r"a has ended: give another --run\.name"):
        resolve_run_dir(str(tmp_path), "a", "b", "auto")
    assert resolve_run_dir(str(tmp_path), "a", "b", "never") == (tmp_path / "a-2", {})
    assert resolve_run_dir(str(tmp_path), "b", "b", str(run)) == (run, {"x": 1})
    with pytest.raises(UserError, match="no run at"):
        resolve_run_dir(str(tmp_path), "b", "b", str(tmp_path / "c"))


def test_a_restarted_launcher_resumes_its_own_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    make_run(tmp_path / "a")
    assert resolve_run_dir(str(tmp_path), "a", "b", "never") == (tmp_path / "a", {"x": 1})
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    assert resolve_run_dir(str(tmp_path), "a", "b", "never") == (tmp_path / "a-2", {})


def test_a_run_of_the_old_names_is_refused(tmp_path: Path) -> None:
    path = make_run(tmp_path / "a")
    status = read_status(path)
    del status["format"]
    (path / "status.json").write_text(json.dumps(status))
    message = "a was written by alexnet_dist 0.1.0, whose options and records have other names"
    for name, resume in (("a", "auto"), ("b", str(path))):
        with pytest.raises(UserError, match=message):
            resolve_run_dir(str(tmp_path), name, "c", resume)
    assert resolve_run_dir(str(tmp_path), "a", "c", "never") == (tmp_path / "a-2", {})
