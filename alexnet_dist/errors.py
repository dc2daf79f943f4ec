"""Failures that people can mend, and how a command ends on one."""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import NoReturn


class UserError(Exception):
    """Something the user can mend: one sentence that names the thing and the mend.

    ``everywhere`` tells that each process of the run raises the same, so that one may speak for
    all of them.
    """

    def __init__(self, sentence: str, *, on_all_ranks: bool = False) -> None:
        super().__init__(sentence)
        self.on_all_ranks = on_all_ranks

    def __reduce__(self) -> tuple[type["UserError"], tuple[str]]:
        return UserError, (str(self),)


def stderr(sentence: str) -> None:
    """One line to people."""
    print(f"alexnet_dist: {sentence}", file=sys.stderr, flush=True)


def run_command(main: Callable[[list[str]], None]) -> NoReturn:
    """Run a command; a Failure ends it with its sentence, exit code 1 and no traceback."""
    arguments = sys.argv[1:]
    first = os.environ.get("RANK", "0") == "0"
    try:
        main(arguments)
    except UserError as failure:
        if "--debug" in arguments:
            traceback.print_exc()
        if first or not failure.on_all_ranks:
            stderr(str(failure))
        else:
            time.sleep(2)  # torchrun ends the others once one has ended: let the first one speak
        _start_no_more()
        _end(1)
    except KeyboardInterrupt:
        if first:
            stderr("interrupted; the same command goes on from the last checkpoint")
        _end(130)
    except BrokenPipeError:  # whoever read along has heard enough: "... | head"
        os._exit(1)
    except RuntimeError as error:
        if "--debug" not in arguments and _lost_peer(error):
            time.sleep(1)
            stderr(
                f"process {os.environ.get('RANK', '0')} lost another process of this run, and "
                "ends; the message of the one that ended first says why"
            )
            _end(1)
        traceback.print_exc()
        _end(1)
    except Exception:
        traceback.print_exc()
        _end(1)
    sys.exit(0)


def _start_no_more() -> None:
    """Have torchrun end, where it would start this process again (--max-restarts): what a person
    has to mend would only be said again."""
    starts_left = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) - int(
        os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
    )
    if starts_left > 0 and "RANK" in os.environ:
        os.kill(os.getppid(), signal.SIGTERM)
        time.sleep(1)


def _lost_peer(error: RuntimeError) -> bool:
    words = ("closed by peer", "reset by peer", "Broken pipe", "NCCL", "Connection refused")
    return any(word in str(error) for word in words)


def _end(code: int) -> NoReturn:
    """Leave at once: a normal exit would wait for threads, and for processes that are gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
