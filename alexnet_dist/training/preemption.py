"""When a run has to save and stop: a signal, a PREEMPT file, or time that runs out.

A Python signal handler would not run while the main thread is stuck in a collective. So a thread
reads signals from the pipe into which the C library's handler writes them. At each step boundary
the processes all-reduce what they know, asynchronously: the result is read at the next boundary,
when it has long arrived, so that nobody waits, and all stop at the same step.
"""

import os
import signal
import threading
import time
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path

import torch
import torch.distributed as dist

from alexnet_dist.errors import print_error

_PROCESS_START = time.time()
_POLL_SECONDS = 1.0
"""Between two looks for the file: network storage answers slowly."""
_RESERVE_SECONDS = 10.0
"""Kept free before the deadline, besides what steps and saves have taken so far."""
_STUCK_SECONDS = 8.0
"""If after SIGTERM no step boundary comes in the time that one takes and so much more, a collective
waits for a process that has died (NCCL's do so for ever): this process exits."""


class StopReason(IntEnum):
    """Why a run stops. Processes all-reduce it: the greatest one wins."""

    NONE, FILE, TIME, SIGNAL, INTERRUPT = range(5)

    def __str__(self) -> str:
        return ("", "a file PREEMPT", "time that runs out", "a signal", "Ctrl-C")[self]


class Preempted(Exception):  # noqa: N818 (a way to end, not an error)
    """All processes stop here, at a step boundary, for this ``reason``."""

    def __init__(self, reason: StopReason) -> None:
        self.reason = reason


class PreemptionHandler:
    """Tells all processes to stop at the same step boundary.

    Args:
        run_dir: a file PREEMPT in it stops the run.
        group: the processes of the run.
        signals: names of those that stop the run, besides SIGTERM and Ctrl-C.
        time_limit: seconds from the start of this process.
        grace: seconds after SIGTERM when this process exits, whatever it does; sooner where it is
            stuck.
        before_exit: puts the terminal in order before such an exit.
    """

    def __init__(
        self,
        run_dir: Path,
        group: dist.ProcessGroup,
        *,
        signals: tuple[str, ...],
        time_limit: float | None,
        grace: float,
        before_exit: Callable[[], None],
    ) -> None:
        self._file, self._group = run_dir / "PREEMPT", group
        self._grace, self._before_exit = grace, before_exit
        self._rank = dist.get_rank()
        self._received = StopReason.NONE
        self._timers: list[threading.Timer] = []
        self._boundaries = 0
        self._patience: float | None = None
        self._last_poll = float("-inf")
        self._result: tuple[dist.Work, torch.Tensor] | None = None
        self._deadline = deadline(time_limit)
        if self._rank == 0 and self._file.exists() and self._file.stat().st_mtime < _PROCESS_START:
            self._file.unlink()  # it was meant for an earlier process
        self._signals = [signal.Signals[name] for name in {"SIGTERM", "SIGINT", *signals}]
        self._install_handlers()

    def check_stop(self, need: float = 0.0, patience: float | None = None) -> None:
        """All processes call it at the same step boundaries.

        Args:
            need: seconds until the next boundary, and for a save there.
            patience: seconds within which the next boundary comes; None where that is not known.

        Raises:
            Preempted: some process had to stop at this boundary or the one before.
        """
        self._boundaries, self._patience = self._boundaries + 1, patience
        mine = self._poll(need)
        stop = mine if dist.get_world_size() == 1 else self._pop_result()
        if stop:
            if self._rank == 0:
                self._file.unlink(missing_ok=True)
            raise Preempted(StopReason(stop))
        if dist.get_world_size() > 1:
            flag = torch.tensor(mine)
            work = dist.all_reduce(flag, dist.ReduceOp.MAX, self._group, async_op=True)
            assert work is not None
            self._result = work, flag

    def close(self) -> None:
        """The run is over: signals mean what they mean elsewhere."""
        self._pop_result()
        for timer in self._timers:
            timer.cancel()
        self._reset_handlers()

    def _poll(self, need: float) -> int:
        """What this process knows."""
        if self._rank > 0:
            return self._received
        stop, now = self._received, time.monotonic()  # a clock that is set back would stop the poll
        if now - self._last_poll > _POLL_SECONDS:
            self._last_poll = now
            if self._file.exists():
                stop = max(stop, StopReason.FILE)
        if self._deadline is not None and time.time() + need + _RESERVE_SECONDS > self._deadline:
            stop = max(stop, StopReason.TIME)
        return stop

    def _pop_result(self) -> int:
        """What the processes knew at the last boundary."""
        if self._result is None:
            return 0
        (work, flag), self._result = self._result, None
        work.wait()
        return int(flag)

    def _install_handlers(self) -> None:
        read_end, write_end = os.pipe()
        os.set_blocking(write_end, False)
        signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        for number in self._signals:
            signal.signal(number, lambda *_: None)
        # else a signal to a child that has not reset its handlers yet would be received here
        os.register_at_fork(
            before=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, self._signals),
            after_in_parent=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, self._signals),
            after_in_child=self._reset_handlers,
        )
        threading.Thread(target=self._signal_thread, args=(read_end,), daemon=True).start()

    def _reset_handlers(self) -> None:
        signal.set_wakeup_fd(-1)
        for number in self._signals:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self._signals)

    def _signal_thread(self, read_end: int) -> None:
        while True:
            for number in os.read(read_end, 64):
                if number in self._signals:  # others have handlers too, such as SIGCHLD
                    self._receive(number)

    def _receive(self, number: int) -> None:
        # the second Ctrl-C; torchrun passes it on as SIGTERM
        if self._received == StopReason.INTERRUPT and number in (signal.SIGINT, signal.SIGTERM):
            self._before_exit()
            os._exit(130)
        reason = StopReason.INTERRUPT if number == signal.SIGINT else StopReason.SIGNAL
        if reason == StopReason.INTERRUPT and self._rank == 0:
            print_error("Ctrl-C: the run is saved and ends; a second one ends it unsaved")
        self._received = max(self._received, reason)
        if number == signal.SIGTERM and not self._timers:
            waits: list[tuple[float, int | None]] = [(self._grace, None)]
            if self._patience is not None:
                stuck = self._patience + _STUCK_SECONDS
                waits.append((min(stuck, self._grace), self._boundaries))
            for seconds, boundaries in waits:
                timer = threading.Timer(seconds, self._exit, [seconds, boundaries])
                timer.daemon = True
                timer.start()
                self._timers.append(timer)

    def _exit(self, seconds: float, stuck_at: int | None) -> None:
        """End this process, so long after SIGTERM; unless it has left the boundary ``stuck_at``."""
        if stuck_at not in (None, self._boundaries):
            return
        self._before_exit()
        print_error(
            f"process {self._rank} could not save within {seconds:g} s of SIGTERM, and exits; the "
            "checkpoint before is intact"
        )
        os._exit(1)


def deadline(time_limit: float | None) -> float | None:
    """When this process has to end, in seconds of time.time(): ``time_limit`` seconds after its
    start, or when the SLURM job ends, whichever is earlier; None where nothing limits it."""
    ends = [] if time_limit is None else [_PROCESS_START + time_limit]
    slurm = os.environ.get("SLURM_JOB_END_TIME", "")
    if slurm.isdigit() and int(slurm) > 0:
        ends.append(float(slurm))
    return min(ends, default=None)
