"""Commands of the package in processes that have their imports behind them.

Importing torch and what belongs to it takes longer than most of what the tests ask of a command.
So one process imports it, and is forked for each command that runs without torchrun, and for each
of a group that wants nothing of torchrun but to be told its places: processes of their own, with
their own environment, files, signals and exit codes.
"""

import atexit
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from select import select
from typing import Any

MODULES = ("alexnet_dist.train", "alexnet_dist.evaluate")


class Warm:
    """The process that is forked, started when it is first needed."""

    def __init__(self) -> None:
        self._server: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    def run(
        self,
        module: str,
        options: list[str],
        environment: dict[str, str],
        timeout: float,
        processes: int = 0,
    ) -> tuple[int, str, str]:
        """Run a command to its end, alone or as so many processes: its exit code, the first that is
        not 0, and what it wrote."""
        with self._lock, tempfile.TemporaryDirectory() as folder:
            order: dict[str, Any] = {"module": module, "options": options}
            order |= {"environment": environment, "processes": processes}
            order |= {"folder": folder, "cwd": str(Path.cwd())}
            server = self._started()
            assert server.stdin is not None
            assert server.stdout is not None
            server.stdin.write(json.dumps(order) + "\n")
            server.stdin.flush()
            if not select([server.stdout], [], [], timeout)[0]:
                self.stop()
                raise subprocess.TimeoutExpired([module, *options], timeout)
            code = int(server.stdout.readline())
            out, err = (Path(folder, name).read_text() for name in ("out", "err"))
            return code, out, err

    def stop(self) -> None:
        """End it, and what it may be running."""
        if self._server is not None:
            os.killpg(self._server.pid, 9)
            self._server.wait()
            self._server = None

    def _started(self) -> "subprocess.Popen[str]":
        if self._server is None:
            self._server = subprocess.Popen(
                [sys.executable, "-m", "tests.warm"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
            atexit.register(self.stop)
        return self._server


def _serve() -> None:
    for module in MODULES:
        importlib.import_module(module)
    orders, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    for line in orders:
        order = json.loads(line)
        group = _places(order["processes"])
        children = set()
        for place in group:
            child = os.fork()
            if child == 0:
                order["environment"] |= place
                _obey(order)
            children.add(child)
        print(_end(children), file=answers, flush=True)


def _places(processes: int) -> list[dict[str, str]]:
    """What torchrun tells each process of a group of one machine; for one alone, nothing."""
    if processes == 0:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = str(processes)
    shared = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def _end(children: set[int]) -> int:
    """Wait for all; where one fails, the others have a moment to end by themselves."""
    failed = 0
    while children:
        child, status = os.wait()
        children.discard(child)
        code = os.waitstatus_to_exitcode(status)
        if code and not failed:
            failed = code
            time.sleep(5 if children else 0)
            for other in children:
                os.kill(other, signal.SIGKILL)
    return failed


def _obey(order: dict[str, Any]) -> None:
    """In the child: be the command, to the end of its process."""
    os.chdir(order["cwd"])
    os.environ.clear()
    os.environ.update(order["environment"])
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(f"{order['folder']}/{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(file, number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.argv = [order["module"], *order["options"]]
    module = importlib.import_module(order["module"])
    code = 1
    try:
        module.run_command(module.main)
    except SystemExit as leaves:
        code = leaves.code if isinstance(leaves.code, int) else int(leaves.code is not None)
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    _serve()
