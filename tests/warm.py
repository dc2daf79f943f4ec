"""Commands of the package in processes that have their imports behind them.

Importing torch and what belongs to it takes longer than most of what the tests ask of a command.
So one process imports it, and is forked for each command that runs without torchrun: a process of
its own, with its own environment, files, signals and exit code.
"""

import atexit
import importlib
import json
import os
import subprocess
import sys
import tempfile
import threading
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
        self, module: str, options: list[str], environment: dict[str, str], timeout: float
    ) -> tuple[int, str, str]:
        """Run a command to its end: its exit code, and what it wrote."""
        with self._lock, tempfile.TemporaryDirectory() as folder:
            order = {"module": module, "options": options, "environment": environment}
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
        child = os.fork()
        if child == 0:
            _obey(json.loads(line))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), file=answers, flush=True)


def _obey(order: dict[str, Any]) -> None:
    """In the child: be the command, to the end of its process."""
    os.chdir(order["cwd"])
    os.environ.clear()
    os.environ.update(order["environment"])
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(f"{order['folder']}/{name}", os.O_WRONLY | os.O_CREAT, 0o600)
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
