"""Finds the process that a run waits for in vain, names it, and ends the run.

A process that is stopped, or hangs in a read from storage, keeps all others waiting in a collective
that cannot tell for whom. So each tells the launcher's store, from a thread, how far it is; one
that has not got on for too long looks who is furthest behind.
"""

import contextlib
import json
import os
import signal
import socket
import threading
import time
from typing import Any, NoReturn

from torch.distributed.distributed_c10d import _get_default_store

from alexnet_dist.errors import print_error
from alexnet_dist.parallel.mesh import Mesh


class HangDetector:
    """Watches the process that makes it, from now until ``close``.

    Args:
        patience: seconds without a ``heartbeat`` after which the run ends.
    """

    def __init__(self, mesh: Mesh, patience: float) -> None:
        self._rank, self._world, self._patience = mesh.rank, mesh.world_size, patience
        store: Any = _get_default_store()
        # of its own: a client of the store is busy while the main thread waits for something in it
        self._store = store.clone() if hasattr(store, "clone") else store
        self._period = min(patience / 10, 5.0)
        self._beats, self._doing, self._since = 0, "starting", time.monotonic()
        self._closed = threading.Event()
        threading.Thread(target=self._watch, name="watch-progress", daemon=True).start()

    def heartbeat(self, doing: str) -> None:
        """This process gets on: from here it is ``doing`` that."""
        self._beats, self._doing, self._since = self._beats + 1, doing, time.monotonic()

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()

    def _watch(self) -> None:
        told = 0
        while not self._closed.wait(self._period):
            told += 1
            self._tell(told)
            if time.monotonic() - self._since > self._patience:
                self._judge(told)

    def _tell(self, told: int) -> None:
        record = {
            "told": told,
            "beats": self._beats,
            "doing": self._doing,
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }
        with contextlib.suppress(RuntimeError):  # the store's host is gone: others will tell
            self._store.set(f"watch/{self._rank}", json.dumps(record))

    def _judge(self, told: int) -> None:
        """Name whom the run waits for, and end; come back where it gets on after all."""
        try:
            before = self._read()
            for more in (1, 2, 3):
                time.sleep(self._period)
                self._tell(told + more)
            after = self._read()
        except RuntimeError:
            self._end(f"nothing has moved for {self._patience:g} s, and the store is gone", {})
        if time.monotonic() - self._since <= self._patience:
            return
        silent = {r: one for r, one in after.items() if one["told"] == before[r]["told"]}
        least = min(one["beats"] for one in after.values())
        behind = silent or {r: one for r, one in after.items() if one["beats"] == least}
        names = ", ".join(f"{r} (host {one['host']}, {one['doing']})" for r, one in behind.items())
        process = "process" if len(behind) == 1 else "processes"
        if silent:
            what = f"{process} {names} gave no sign of life for {self._patience:g} s"
        elif len(behind) == self._world > 1:
            what = f"all processes have waited {self._patience:g} s for each other: {names}"
        else:
            what = f"{process} {names} has not got on for {self._patience:g} s"
        self._end(what, behind, kill=silent)

    def _read(self) -> dict[int, dict[str, Any]]:
        keys = [f"watch/{rank}" for rank in range(self._world)]
        return {rank: json.loads(self._store.get(key)) for rank, key in enumerate(keys)}

    def _end(
        self,
        what: str,
        behind: dict[int, dict[str, Any]],
        kill: dict[int, dict[str, Any]] | None = None,
    ) -> NoReturn:
        others = [rank for rank in range(self._world) if rank not in behind]
        if self._rank == (others[0] if others else 0):
            print_error(
                f"{what}: the run ends, and the same command goes on from its last checkpoint "
                "(slow storage wants a higher --runtime.hang_timeout)"
            )
        for one in (kill or {}).values():
            if one["host"] == socket.gethostname():  # a stopped process heeds no gentler signal
                with contextlib.suppress(ProcessLookupError):
                    os.kill(one["pid"], signal.SIGKILL)
        time.sleep(1)  # the launcher ends the others once one has ended: let the sentence be said
        os._exit(1)
