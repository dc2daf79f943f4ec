"""Errors that users can fix, and how a command ends on one."""

import gc
import io
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from errno import ENOSPC
from typing import NoReturn

LOST_PEER = "closed by peer|reset by peer|Broken pipe|NCCL|Connection refused"


class UserError(Exception):
    """Something the user can fix: one message that names the thing and the fix.

    With ``on_all_ranks`` every process of the run raises the same, and rank 0 alone prints it.
    """

    def __init__(self, message: str, *, on_all_ranks: bool = False) -> None:
        super().__init__(message)
        self.on_all_ranks = on_all_ranks


def refuse(problems: Mapping[str, bool]) -> None:
    """Raise a UserError, the same on all ranks, for the first of ``problems`` that is there."""
    for problem, present in problems.items():
        if present:
            raise UserError(problem, on_all_ranks=True)


def print_error(message: str) -> None:
    """Print one line to stderr."""
    print(f"alexnet_dist: {message}", file=sys.stderr, flush=True)


def run_command(main: Callable[[list[str]], None]) -> NoReturn:
    """Run a command; a UserError ends it with its message, exit code 1 and no traceback."""
    gc.freeze()  # what was imported is not searched for garbage, now or at the end
    gc.enable()
    rank, code = os.environ.get("RANK", "0"), 1
    if isinstance(sys.stdout, io.TextIOWrapper):  # a path may hold what no encoding has
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main(sys.argv[1:])
        sys.exit(0)
    except KeyboardInterrupt:
        if rank == "0":
            print_error("interrupted; the same command resumes from the last checkpoint")
        code = 130
    except BrokenPipeError:  # "... | head" has read enough
        os._exit(1)
    except Exception as error:
        if "--debug" in sys.argv:
            traceback.print_exc()
        if isinstance(error, UserError):
            if rank != "0" and error.on_all_ranks:
                _wait_for_rank0()
            else:
                print_error(str(error))
            _stop_elastic_restarts()
        elif isinstance(error, RuntimeError) and re.search(LOST_PEER, str(error)):
            time.sleep(1)  # the one that exited first says why
            print_error(f"process {rank} exits, since it lost another process of this run")
        elif isinstance(error, OSError) and (error.filename or error.errno == ENOSPC):
            fix = "give a path that can be read and written, with room on its disk"
            print_error(f"{error.filename or 'a file'}: {error.strerror}: {fix}")
        elif "--debug" not in sys.argv:
            traceback.print_exc()
    sys.stdout.flush()
    os._exit(code)  # a normal exit would wait for threads, and for processes that are gone


def _wait_for_rank0() -> None:
    """Let rank 0 print what all have to say: torchrun ends a machine's processes once one of them
    has exited, and rank 0 may come seconds later. It then ends this one, too; on other machines
    nobody does."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(30 if os.environ.get("GROUP_RANK", "0") == "0" else 2)


def end_launcher() -> None:
    """Have torchrun end, where a signal to end may have come to another machine only: torchrun
    waits 300 s for the one there, or starts the run again without it."""
    several = int(os.environ.get("GROUP_WORLD_SIZE", 1)) > 1
    if several and os.environ.get("LOCAL_RANK") == "0":
        os.kill(os.getppid(), signal.SIGTERM)


def _stop_elastic_restarts() -> None:
    """Have torchrun exit instead of restarting (--max-restarts) what a person has to fix."""
    names = ("TORCHELASTIC_MAX_RESTARTS", "TORCHELASTIC_RESTART_COUNT")
    allowed, done = (int(os.environ.get(name, 0)) for name in names)
    if allowed > done and "RANK" in os.environ:
        os.kill(os.getppid(), signal.SIGTERM)
        time.sleep(1)
