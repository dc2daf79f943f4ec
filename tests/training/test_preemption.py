"""When a run is to stop: what one process hears. What many agree on is in tests/distributed."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from alexnet_dist.training import preemption
from alexnet_dist.training.preemption import Preempted, PreemptionHandler, deadline


@pytest.fixture
def group() -> Iterator[dist.ProcessGroup]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    dist.destroy_process_group()


def hearing(
    run: Path, group: dist.ProcessGroup, time_limit: float | None = None
) -> PreemptionHandler:
    return PreemptionHandler(
        run, group, signals=("SIGUSR2",), time_limit=time_limit, grace=60, before_exit=lambda: None
    )


def cause(of: PreemptionHandler, need: float = 0.0) -> str:
    """The cause that it finds within two seconds, or ""."""
    until = time.monotonic() + 2
    while time.monotonic() < until:
        try:
            of.check_stop(need)
        except Preempted as stop:
            return stop.reason
        time.sleep(0.05)
    return ""


def test_a_file_is_obeyed_once(tmp_path: Path, group: dist.ProcessGroup) -> None:
    (tmp_path / "PREEMPT").touch()
    os.utime(tmp_path / "PREEMPT", (1, 1))  # meant for a life that is over
    told = hearing(tmp_path, group)
    try:
        told.check_stop()
        (tmp_path / "PREEMPT").touch()
        assert cause(told) == "a file PREEMPT"
        assert not (tmp_path / "PREEMPT").exists()
    finally:
        told.close()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR2", "SIGINT"])
def test_a_signal_is_heard_at_the_next_boundary(
    name: str, tmp_path: Path, group: dist.ProcessGroup
) -> None:
    told = hearing(tmp_path, group)
    try:
        os.kill(os.getpid(), signal.Signals[name])
        assert cause(told) == ("Ctrl-C" if name == "SIGINT" else "a signal")
    finally:
        told.close()
        signal.signal(signal.SIGINT, signal.default_int_handler)


def test_a_child_does_not_speak_for_its_parent(tmp_path: Path, group: dist.ProcessGroup) -> None:
    told = hearing(tmp_path, group)
    try:
        child = os.fork()
        if child == 0:
            time.sleep(30)
            os._exit(0)
        time.sleep(0.2)
        os.kill(child, signal.SIGTERM)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGTERM
        time.sleep(0.2)
        told.check_stop()
    finally:
        told.close()


def test_only_its_own_signals_count(tmp_path: Path, group: dist.ProcessGroup) -> None:
    """torch's DataLoader handles SIGCHLD in Python, and its workers end with each epoch."""
    before = signal.signal(signal.SIGCHLD, lambda *_: None)
    told = hearing(tmp_path, group)
    try:
        os.kill(os.getpid(), signal.SIGCHLD)
        time.sleep(0.3)
        told.check_stop()
    finally:
        told.close()
        signal.signal(signal.SIGCHLD, before)


def test_time_is_kept_for_a_last_step_and_a_save(
    tmp_path: Path, group: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preemption, "_PROCESS_START", time.time())
    told = hearing(tmp_path, group, time_limit=60)
    try:
        told.check_stop(need=45)
        assert cause(told, need=55) == "time that runs out"
    finally:
        told.close()


def test_the_end_of_a_life(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    assert deadline(None) is None
    assert deadline(60) == preemption._PROCESS_START + 60
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1000")
    assert deadline(60) == deadline(None) == 1000
    monkeypatch.setenv("SLURM_JOB_END_TIME", "Unknown")
    assert deadline(None) is None


STUCK = """
import sys, datetime
from pathlib import Path
import torch.distributed as dist
from alexnet_dist.training.preemption import PreemptionHandler
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
PreemptionHandler(Path(sys.argv[1]), dist.group.WORLD, signals=(), time_limit=None, grace=1.0,
           before_exit=lambda: None)
print("waiting", flush=True)
store = dist.TCPStore("127.0.0.1", 0, None, True)
store.wait(["what nobody sends"], datetime.timedelta(seconds=300))
"""


@pytest.mark.parametrize(("signals", "code"), [(["SIGTERM"], 1), (["SIGINT", "SIGINT"], 130),
                                               (["SIGINT", "SIGTERM"], 130)])  # fmt: skip
def test_a_process_that_is_stuck_ends_nevertheless(
    signals: list[str], code: int, tmp_path: Path
) -> None:
    """In C++, where no Python handler runs, as in a collective whose peer has died."""
    with subprocess.Popen(
        [sys.executable, "-c", STUCK, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "waiting\n"
        time.sleep(0.5)
        for name in signals:
            process.send_signal(signal.Signals[name])
            time.sleep(0.3)
        _, err = process.communicate(timeout=20)
    assert process.returncode == code
    assert ("could not save within 1 s of SIGTERM" in err) == (code == 1)
