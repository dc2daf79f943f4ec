"""Processes that have their imports behind them, and groups of them.

Importing torch and what belongs to it takes longer than most of what the tests ask of a command.
Python's fork server imports it once; each process that it forks has its own environment, output,
signals and exit code.
"""

import atexit
import contextlib
import fcntl
import functools
import importlib
import multiprocessing
import os
import select
import socket
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
from collections.abc import Callable, Iterator
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
            for ranks in torchrun_env(processes)
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


@contextlib.contextmanager
def terminal(columns: int, *words: str) -> Iterator[tuple[Any, ...]]:
    """The command ``words`` in a terminal of its own: its process; what reads from there until a
    text comes, or fails after so many seconds; and what writes there as a keyboard does."""
    keyboard, screen = os.openpty()
    fcntl.ioctl(screen, termios.TIOCSWINSZ, struct.pack("4H", 30, columns, 0, 0))
    args = (os.ttyname(screen), {**os.environ, "TERM": "xterm", "COLUMNS": ""}, words)
    process = _FORKSERVER.Process(target=_run_in_terminal, args=args)
    process.start()

    def read_until(text: str, seconds: float) -> str:
        found, end = b"", time.monotonic() + seconds
        while text.encode() not in found:
            ready, _, _ = select.select([keyboard], [], [], max(end - time.monotonic(), 0))
            assert ready, f"{text!r} did not come within {seconds} s: {found.decode()}"
            found += os.read(keyboard, 4096)
        return found.decode()

    try:
        yield process, read_until, functools.partial(os.write, keyboard)
        process.join(30)
    finally:
        process.kill()
        os.close(keyboard)
        os.close(screen)


def _run_in_terminal(screen: str, env: dict[str, str], words: tuple[str, ...]) -> None:
    os.environ.clear()
    os.environ.update(env)
    os.setsid()
    terminal = os.open(screen, os.O_RDWR)  # which becomes the controlling one
    for number in (0, 1, 2):
        os.dup2(terminal, number)
    sys.stdout, sys.stderr = (os.fdopen(fd, "w", buffering=1) for fd in (1, 2))
    run_main(*words)


def torchrun_env(processes: int) -> list[dict[str, str]]:
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
