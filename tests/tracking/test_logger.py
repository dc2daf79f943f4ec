"""The records of a run, and its folder."""

import io
import json
import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from alexnet_dist.tracking.console import ConsoleSink
from alexnet_dist.tracking.logger import JsonlSink, read_events
from alexnet_dist.tracking.run_dir import (
    lock,
    read_status,
    resolve_run_dir,
    save_config,
    set_status,
)
from tests.conftest import TINY, error_of, full_disk
from tests.processes import terminal


def test_records_survive_a_truncated_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    JsonlSink(path).log({"event": "train", "step": 1, "loss": 0.1 + 0.2})
    with path.open("a") as file:
        file.write('{"event": "train", "st')
    JsonlSink(path).log({"event": "train", "step": 2, "loss": 1.0})
    assert [(e["step"], e["loss"]) for e in read_events(tmp_path)] == [(1, 0.1 + 0.2), (2, 1.0)]


def test_records_wait_for_a_full_disk(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    file, room = sink._file, [9, 0, 0]

    sink._file = SimpleNamespace(write=lambda c: file.write(c[: room.pop(0)]) or full_disk())
    for step in (1, 2):
        sink.log({"event": "train", "step": step})
    sink._file = file
    sink.log({"event": "train", "step": 3})
    assert room == []
    assert [e["step"] for e in read_events(tmp_path)] == [1, 2, 3]


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


CONTROL = r"\x1b\[\??[0-9;]*[A-Za-z]"
TRAIN = {"event": "train", "loss": 6.9077, "top1_error": 98.21, "lrs": {"weights": 0.01}}


def test_a_file_gets_a_line_for_an_interval_and_no_control_characters(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    sink = ConsoleSink(tmp_path, total_steps=6, steps_per_epoch=3)
    speeds = {"images_per_second": 9, "data_time_fraction": 0.25, "comm_time_fraction": 0}
    sink.log(TRAIN | {"event": "eval", "epoch": 1, "step": 3, "top5_error": 9, "seconds": 4})
    # where no step was finite, there is no loss
    sink.log(TRAIN | speeds | {"step": 4, "seconds": 5, "loss": None, "top1_error": None})
    sink.log({"event": "warning", "step": 4, "message": "[a] {b}" + 99 * " c"})
    sink.log({"event": "checkpoint", "step": 4})  # is not shown
    sink.stop()
    assert capsys.readouterr().out.splitlines() == [
        "epoch 1  validation top-1 1.79 %  (errors: top-1 98.21 %, top-5 9.00 %)  loss 6.9077",
        "epoch 2/2 step 4/6 loss nan top-1 nan% lr 0.01 9 img/s data 25% "
        "left 10s of the epoch, 14s of the run",
        "warning: [a] {b}" + 99 * " c",
    ]


SHORT = "ep 12/90 step 14020 loss 6.91 top-1 2% 24013/s data 12% comm 100% 42s, 1h10m"
LONG = (
    "epoch 12/90 step 14020/112590 loss 6.9077 top-1 1.8% lr 0.01 24013 img/s data 12% comm 100% "
    "left 42s of the epoch, 1h10m of the run"
)


@pytest.mark.parametrize(("width", "expected"), [(80, SHORT), (200, LONG)])
def test_a_terminal_has_one_line_of_progress(tmp_path: Path, width: int, expected: str) -> None:
    """Of a run on ImageNet with 1,024 images a step, on 8 processes."""
    stream = io.StringIO()
    console = Console(width=width, force_terminal=True, file=stream, highlight=False)
    sink = ConsoleSink(tmp_path, total_steps=112590, steps_per_epoch=1251, console=console)
    speeds = {"images_per_second": 24013, "data_time_fraction": 0.12, "comm_time_fraction": 1}
    path, sink._step = 16 * "/a_folder", 14000
    sink.log(TRAIN | speeds | {"step": 14020, "seconds": 20 * 1024 / 24013})
    sink.log({"event": "warning", "step": 14020, "message": 40 * "word " + path})
    sink.stop()
    shown = [text.strip() for text in re.split(f"{CONTROL}|[\r\n]", stream.getvalue())]
    assert len(expected) <= width
    assert {text for text in shown if text.startswith("ep")} == {expected}
    assert {text for text in shown if len(text) > width} <= {path}  # which can be copied


def test_ctrl_c_in_a_terminal_is_answered_at_once(images: Path, tmp_path: Path) -> None:
    options = [*TINY, f"--data.root={images}", f"--run.output_dir={tmp_path}"]
    words = ["alexnet_dist.train", *options, "--run.name=a", "--train.epochs=1000"]
    with terminal(80, *words) as (process, read_until, write):
        shown = read_until("left ", 60)
        write(b"\x03")
        begin = time.monotonic()
        shown += read_until("ends it unsaved", 10)
        assert time.monotonic() - begin < 2
        assert "stopped by" not in shown
        shown += read_until("saved; the same command resumes", 60)
    assert process.exitcode == 130
    lines = [text.strip() for text in re.split(rf"{CONTROL}|[\r\n]|\^C", shown)]
    assert any(re.match(r"epoch 1/1000 step \d+/4000 loss .* left ", line) for line in lines)
    assert any(line.startswith("alexnet_dist: Ctrl-C: the run is saved and ends") for line in lines)
    assert max(map(len, set(lines) - {f"the run is in {tmp_path}/a"})) <= 80
    assert "stopped by Ctrl-C" in shown
    assert "…" not in shown
    assert "Traceback" not in shown
    assert read_status(tmp_path / "a")["status"] == "stopped"


def make_run(path: Path, **status: Any) -> Path:
    lock(path)
    save_config(path, {"x": 1})
    set_status(path, "running", **status)
    return path


def test_a_failed_run_is_not_restarted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the torchruns of other hosts, whose processes have lost the one that named the error."""
    run = make_run(tmp_path / "a")
    set_status(run, "failed")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert "not restarted after an error" in error_of(lock, run)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    lock(run)
    assert read_status(run)["status"] == "running"


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
    message = error_of(resolve_run_dir, str(tmp_path), "a", "b", "auto")
    assert "a has ended: give another --run.name" in message
    assert resolve_run_dir(str(tmp_path), "a", "b", "never") == (tmp_path / "a-2", {})
    assert resolve_run_dir(str(tmp_path), "b", "b", str(run)) == (run, {"x": 1})
    nowhere = str(tmp_path / "c")
    assert "no run at" in error_of(resolve_run_dir, str(tmp_path), "b", "b", nowhere)


def test_a_restarted_job_resumes_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
        assert message in error_of(resolve_run_dir, str(tmp_path), name, "c", resume)
    assert resolve_run_dir(str(tmp_path), "a", "c", "never") == (tmp_path / "a-2", {})
