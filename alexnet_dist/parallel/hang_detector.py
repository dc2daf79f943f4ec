"""Finds the process that a run waits for in vain, names it, and ends the run.

A process that is stopped, or hangs in a read from storage, keeps all others waiting in a collective
that cannot tell for whom. So a thread of each process publishes its progress in the launcher's
store; a process that makes none for too long looks who is furthest behind.
"""

import contextlib
import json
import os
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn

from torch.distributed.distributed_c10d import _get_default_store

from alexnet_dist.errors import print_error
from alexnet_dist.parallel.mesh import Mesh

_Status = dict[str, Any]  # of a process, as it is published
_STORE_TIMEOUT = 10.0  # seconds; torch's client waits for ever for a host that is cut off


class HangDetector:
    """Watches the process that makes it, from now until ``close``.

    Args:
        timeout: seconds without a ``heartbeat`` after which the run ends.
    """

    def __init__(self, mesh: Mesh, timeout: float) -> None:
        self._rank, self._world_size, self._timeout = mesh.rank, mesh.world_size, timeout
        store: Any = _get_default_store()
        # a client of its own: one is busy while the main thread waits for something in the store
        self._store = store.clone() if hasattr(store, "clone") else store
        self._reader = ThreadPoolExecutor(1)
        self._period = min(timeout / 10, 5.0)
        self._published = self._beats = 0
        self._doing, self._last_beat = "starting", time.monotonic()
        self._closed = threading.Event()
        threading.Thread(target=self._watch, name="hang-detector", daemon=True).start()

    def heartbeat(self, doing: str) -> None:
        """This process makes progress; from here on it is ``doing`` that."""
        self._beats, self._doing, self._last_beat = self._beats + 1, doing, time.monotonic()

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(self._period):
            self._publish()
            if time.monotonic() - self._last_beat > self._timeout:
                self._find_stragglers()

    def _publish(self) -> None:
        self._published += 1
        status = {
            "published": self._published,
            "beats": self._beats,
            "doing": self._doing,
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }
        with contextlib.suppress(RuntimeError):  # the store's host is gone: others report it
            self._store.set(f"watch/{self._rank}", json.dumps(status))

    def _read(self) -> dict[int, _Status]:
        return {r: json.loads(self._store.get(f"watch/{r}")) for r in range(self._world_size)}

    def _find_stragglers(self) -> None:
        """Name whom the run waits for, and end it; return where it makes progress after all."""
        try:
            before = self._reader.submit(self._read).result(_STORE_TIMEOUT)
            for _ in range(3):
                time.sleep(self._period)
                self._publish()
            now = self._reader.submit(self._read).result(_STORE_TIMEOUT)
        except (RuntimeError, TimeoutError):
            host = f"host {os.environ['MASTER_ADDR']}, which keeps the processes' store"
            self._end(f"no progress for {self._timeout:g} s: {host}, does not answer", {}, {})
        if time.monotonic() - self._last_beat <= self._timeout:
            return
        silent = {r: s for r, s in now.items() if s["published"] == before[r]["published"]}
        least = min(status["beats"] for status in now.values())
        behind = silent or {r: s for r, s in now.items() if s["beats"] == least}
        names = ", ".join(f"{r} (host {s['host']}, {s['doing']})" for r, s in behind.items())
        names = f"{'process' if len(behind) == 1 else 'processes'} {names}"
        if silent:
            message = f"no sign of life of {names} after {self._timeout:g} s without progress"
        elif len(behind) == self._world_size > 1:
            message = f"all have waited {self._timeout:g} s for each other: {names}"
        else:
            message = f"{names} made no progress for {self._timeout:g} s"
        self._end(message, behind, silent)

    def _end(self, message: str, behind: dict[int, _Status], kill: dict[int, _Status]) -> NoReturn:
        others = [rank for rank in range(self._world_size) if rank not in behind] or [0]
        # the first of those that wait says it; where no store tells who waits, each host's first
        if self._rank == others[0] or (not behind and os.environ["LOCAL_RANK"] == "0"):
            print_error(
                f"{message}: the run ends, and the same command resumes from its last checkpoint "
                "(slow storage wants a higher --runtime.hang_timeout)"
            )
        for status in kill.values():
            if status["host"] == socket.gethostname():  # a stopped process obeys no other signal
                with contextlib.suppress(ProcessLookupError):
                    os.kill(status["pid"], signal.SIGKILL)
        time.sleep(1)  # the launcher ends the others once one has ended: let the message be printed
        os._exit(1)
