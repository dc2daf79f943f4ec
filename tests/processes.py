"""Processes that have their imports behind them, and groups of them.

Importing torch and what belongs to it takes longer than most of what the tests ask of a command.
Python's fork server imports it once; each process that it forks has its own environment, output,
signals and exit code.
"""

import atexit
import importlib
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

_FORKSERVER = multiprocessing.get_context("forkserver")
_FORKSERVER.set_forkserver_preload(["alexnet_dist.train", "alexnet_dist.evaluate"])


def run_group(
    processes: int, env: dict[str, str], timeout: float, target: Callable[..., None], *args: Any
) -> tuple[int, str, str]:
    """Call ``target`` in a process of its own, or in each of a group that is told its ranks as by
    torchrun; the first exit code that is not 0, and what was written to stdout and stderr."""
    with tempfile.TemporaryDirectory() as folder:
        group = [
            _FORKSERVER.Process(target=_begin, args=(folder, env | ranks, target, args))
            for ranks in _ranks(processes)
        ]
        for process in group:
            process.start()
        try:
            code = _wait(group, timeout)
        finally:
            for process in group:
                process.kill()
        return code, Path(folder, "out").read_text(), Path(folder, "err").read_text()


def run_main(module: str, *options: str) -> None:
    """Be the command ``module``."""
    sys.argv = [module, *options]
    command = importlib.import_module(module)
    command.run_command(command.main)


def _ranks(processes: int) -> list[dict[str, str]]:
    """What torchrun tells each process of a group of one machine; for one alone, nothing."""
    if processes == 0:
        return [{}]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    world = str(processes)
    shared = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def _wait(group: list[Any], timeout: float) -> int:
    """Wait for all; where one fails, the others have 5 s to end by themselves."""
    running, failed, until = {one.sentinel: one for one in group}, 0, time.monotonic() + timeout
    while running:
        ended = wait(list(running), until - time.monotonic())
        if not ended:
            if failed:
                return failed
            raise subprocess.TimeoutExpired("a group of processes", timeout)
        for sentinel in ended:
            code = running.pop(sentinel).exitcode
            if code and not failed:
                failed, until = code, time.monotonic() + 5
    return failed


def _begin(
    folder: str, env: dict[str, str], target: Callable[..., None], args: tuple[Any, ...]
) -> None:
    os.environ.clear()
    os.environ.update(env)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    try:
        target(*args)
    finally:  # as at the end of a program
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
