"""When a run has to stop: what one process receives. What many agree on is in tests/distributed."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from alexnet_dist.training import preemption
from alexnet_dist.training.preemption import Preempted, PreemptionHandler, deadline
from tests.networks import alone


@pytest.fixture
def handler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PreemptionHandler]:
    """One with a minute, and a PREEMPT file that was meant for an earlier process."""
    alone()
    monkeypatch.setattr(preemption, "_PROCESS_START", time.time())
    (tmp_path / "PREEMPT").touch()
    os.utime(tmp_path / "PREEMPT", (1, 1))
    options: dict[str, Any] = {"time_limit": 60, "grace": 60, "before_exit": lambda: None}
    handler = PreemptionHandler(tmp_path, dist.group.WORLD, signals=("SIGUSR2",), **options)
    yield handler
    handler.close()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    dist.destroy_process_group()


def reason(handler: PreemptionHandler, need: float = 0.0) -> str:
    """Why it stops within two seconds, or ""."""
    until = time.monotonic() + 2
    while time.monotonic() < until:
        try:
            handler.check_stop(need)
        except Preempted as stop:
            return str(stop.reason)
        time.sleep(0.05)
    return ""


@pytest.mark.parametrize("set_back", [0, 3600])
def test_preempt_file_stops_once(
    set_back: int, handler: PreemptionHandler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the clock is set back meanwhile."""
    handler.check_stop()
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() - set_back)
    (tmp_path / "PREEMPT").touch()
    assert reason(handler) == "a file PREEMPT"
    assert not (tmp_path / "PREEMPT").exists()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR2", "SIGINT"])
def test_preemption_by_a_signal(name: str, handler: PreemptionHandler) -> None:
    os.kill(os.getpid(), signal.Signals[name])
    assert reason(handler) == ("Ctrl-C" if name == "SIGINT" else "a signal")


def test_preemption_ignores_signals_of_others(handler: PreemptionHandler) -> None:
    """To a child; and SIGCHLD, which torch's DataLoader handles in Python."""
    before = signal.signal(signal.SIGCHLD, lambda *_: None)
    child = os.fork()
    if child == 0:
        time.sleep(30)
        os._exit(0)
    time.sleep(0.2)
    os.kill(child, signal.SIGTERM)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGTERM
    time.sleep(0.2)
    handler.check_stop()
    signal.signal(signal.SIGCHLD, before)


def test_preemption_reserves_time_for_a_step_and_a_save(handler: PreemptionHandler) -> None:
    handler.check_stop(need=45)
    assert reason(handler, need=55) == "time that runs out"


def test_preemption_deadline_is_of_the_limit_or_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
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
handler = PreemptionHandler(Path(sys.argv[1]), dist.group.WORLD, signals=(), time_limit=None,
                            grace=float(sys.argv[2]), before_exit=lambda: None)
if sys.argv[3:]:
    handler.check_stop(patience=float(sys.argv[3]))
print("waiting", flush=True)
store = dist.TCPStore("127.0.0.1", 0, None, True)
store.wait(["what nobody sends"], datetime.timedelta(seconds=300))
"""


@pytest.mark.parametrize(
    ("signals", "options", "message"),
    [
        ("SIGTERM", ["1"], "could not save within 1 s of SIGTERM"),
        ("SIGTERM", ["60", "0.1"], "could not save within 8.1 s of SIGTERM"),  # no step meanwhile
        ("SIGINT SIGINT", ["1"], ""),
        ("SIGINT SIGTERM", ["1"], ""),
    ],
)
def test_preemption_ends_a_process_that_is_stuck(
    signals: str, options: list[str], message: str, tmp_path: Path
) -> None:
    """In C++, where no Python handler runs, as in a collective whose peer has died."""
    command = [sys.executable, "-c", STUCK, str(tmp_path), *options]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "waiting\n"
        time.sleep(0.5)
        for name in signals.split():
            process.send_signal(signal.Signals[name])
            time.sleep(0.3)
        _, err = process.communicate(timeout=20)
    assert process.returncode == (1 if message else 130)
    assert message in err
    assert message or "could not save" not in err
