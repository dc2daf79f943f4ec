"""When a run is to stop and save: signals, a file, and time that runs out.

A signal's handler does nothing; the C library's own writes the signal's number into a pipe, which
a thread reads even while the main thread is stuck in a collective. At each step boundary the
processes compare notes: the answer to the question of one boundary is read at the next, when it
has long arrived, so that nobody waits, and all stop at the same step.
"""

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from alexnet_dist.errors import print_error

FILE = "PREEMPT"

CAUSES = ("", f"a file {FILE}", "time that runs out", "a signal", "Ctrl-C")
"""Why a run stops, by the number that processes tell each other; the greatest one wins."""
_FILE, _TIME, _SIGNAL, _INTERRUPT = range(1, 5)

INTERRUPT = CAUSES[_INTERRUPT]

_BORN = time.time()
_LOOK_SECONDS = 1.0
"""Between two looks for the file: storage on a network answers slowly."""
_RESERVE_SECONDS = 10.0
"""Kept free at the end of a life, besides what steps and saves have taken so far."""


class Preempted(Exception):  # noqa: N818 (a way to end, not an error)
    """All processes stop here, at a step boundary, for this ``cause``."""

    def __init__(self, cause: str) -> None:
        super().__init__(cause)
        self.cause = cause


class PreemptionHandler:
    """What this process has been told, and what all have.

    Args:
        run: the run's folder; a file PREEMPT in it stops the run.
        group: the processes of the run.
        signals: names of those that stop the run, besides SIGTERM and Ctrl-C.
        time_limit: seconds of this life.
        grace: seconds after SIGTERM when this process ends, whatever it is at: the signal may have
            come because another process died, for which collectives wait for ever.
        leave: puts the terminal in order before this process ends on the spot.
    """

    def __init__(
        self,
        run: Path,
        group: dist.ProcessGroup,
        *,
        signals: tuple[str, ...],
        time_limit: float | None,
        grace: float,
        leave: Callable[[], None],
    ) -> None:
        self._file, self._group, self._grace, self._leave = run / FILE, group, grace, leave
        self._rank, self._alone = dist.get_rank(), dist.get_world_size() == 1
        self._first = self._rank == 0
        self._told = 0
        self._timer: threading.Timer | None = None
        self._looked = 0.0
        self._answer: tuple[dist.Work | None, torch.Tensor] | None = None
        self._end = end_of_life(time_limit)
        if self._first and self._file.exists() and self._file.stat().st_mtime < _BORN:
            self._file.unlink()  # it was meant for a life that is over
        self._listen(("SIGTERM", "SIGINT", *signals))

    def check(self, need: float = 0.0) -> None:
        """Compare notes; all processes call it at the same step boundaries.

        Args:
            need: seconds until the next boundary, and for a save there.

        Raises:
            Preempted: any process has been told to stop, at this boundary or the one before.
        """
        mine = self._look(need)
        if self._alone:
            heard = mine
        else:
            heard = self._hear()
            if not heard:
                flag = torch.tensor(mine)
                work = dist.all_reduce(flag, dist.ReduceOp.MAX, self._group, async_op=True)
                self._answer = work, flag
        if heard:
            if self._first:
                self._file.unlink(missing_ok=True)
            raise Preempted(CAUSES[heard])

    def close(self) -> None:
        """The run is over: signals mean what they mean elsewhere."""
        self._hear()
        if self._timer is not None:
            self._timer.cancel()
        signal.set_wakeup_fd(-1)
        for name in self._names:
            signal.signal(name, signal.SIG_DFL)

    def _hear(self) -> int:
        """The answer to the last question."""
        if self._answer is None:
            return 0
        (work, flag), self._answer = self._answer, None
        if work is not None:
            work.wait()
        return int(flag)

    def _look(self, need: float) -> int:
        told, now = self._told, time.time()
        if self._first and now - self._looked > _LOOK_SECONDS:
            self._looked = now
            if self._file.exists():
                told = max(told, _FILE)
        if self._first and self._end is not None and now + need + _RESERVE_SECONDS > self._end:
            told = max(told, _TIME)
        return told

    def _listen(self, names: tuple[str, ...]) -> None:
        self._names = [signal.Signals[name] for name in dict.fromkeys(names)]
        ear, mouth = os.pipe()
        os.set_blocking(mouth, False)
        signal.set_wakeup_fd(mouth, warn_on_full_buffer=False)
        for name in self._names:
            signal.signal(name, lambda *_: None)
        # a signal to a child that has not forgotten yet would be heard here
        os.register_at_fork(
            before=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, self._names),
            after_in_parent=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, self._names),
            after_in_child=self._forget,
        )
        threading.Thread(target=self._attend, args=(ear,), name="signals", daemon=True).start()

    def _forget(self) -> None:
        """In a child process, whose signals are not this one's."""
        signal.set_wakeup_fd(-1)
        for name in self._names:
            signal.signal(name, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self._names)

    def _attend(self, ear: int) -> None:
        while True:
            for number in os.read(ear, 64):
                # all that has a handler in Python comes here, such as SIGCHLD with a DataLoader
                if number in self._names:
                    self._take(signal.Signals(number))

    def _take(self, name: signal.Signals) -> None:
        again = self._told == _INTERRUPT
        if again and name in (signal.SIGINT, signal.SIGTERM):  # torchrun passes the second on as
            self._leave()  # SIGTERM
            os._exit(130)
        self._told = max(self._told, _INTERRUPT if name == signal.SIGINT else _SIGNAL)
        if name == signal.SIGTERM and self._timer is None:
            self._timer = threading.Timer(self._grace, self._time_is_up)
            self._timer.daemon = True
            self._timer.start()

    def _time_is_up(self) -> None:
        self._leave()
        print_error(
            f"process {self._rank} could not save within {self._grace:g} s of SIGTERM, and "
            "ends; the checkpoint before is intact"
        )
        os._exit(1)


def end_of_life(time_limit: float | None) -> float | None:
    """When this life has to be over, in seconds of time.time(): by ``time_limit`` seconds, or by
    the end of the SLURM job, whichever comes first; None where nothing limits it."""
    ends = [] if time_limit is None else [_BORN + time_limit]
    slurm = os.environ.get("SLURM_JOB_END_TIME", "")
    if slurm.isdigit() and int(slurm) > 0:
        ends.append(float(slurm))
    return min(ends, default=None)
