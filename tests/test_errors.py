"""How commands end on errors of the machine."""

import signal
import sys
from pathlib import Path

import pytest

from tests.conftest import call, command, environment


@pytest.mark.parametrize(
    ("work", "line"),
    [
        ("open('/proc/none/best.png', 'w')", "/proc/none/best.png: No such file or directory:"),
        ("open('/dev/full', 'w', 1).write('x\\n')", "a file: No space left on device: give a path"),
    ],
)
def test_a_file_that_cannot_be_written_is_one_sentence(work: str, line: str) -> None:
    code = f"from alexnet_dist.errors import run_command; run_command(lambda _: {work})"
    for options, traceback in (((), False), (("--debug",), True)):
        done = call([sys.executable, "-c", code, *options])
        assert done.code == 1
        assert ("Traceback" in done.err) == traceback
        assert done.err.startswith(f"alexnet_dist: {line}") == (not traceback)


@pytest.mark.parametrize(("machines", "local_rank"), [("2", "0"), ("2", "1"), ("1", "0")])
def test_torchrun_is_ended_where_there_are_several(machines: str, local_rank: str) -> None:
    """As it would wait for a torchrun on another machine that a signal has ended."""
    code = "from alexnet_dist.errors import end_launcher; end_launcher()"
    launcher = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}])"
    env = environment(GROUP_WORLD_SIZE=machines, LOCAL_RANK=local_rank)
    done = call([sys.executable, "-c", launcher], env=env)
    assert (done.code == -signal.SIGTERM) == (machines == "2" and local_rank == "0")


def test_a_path_that_a_terminal_cannot_show_is_printed_with_escapes() -> None:
    run = r"run_command(lambda _: print('\udce9\xe9'))"
    code = f"from alexnet_dist.errors import run_command; {run}"
    done = call([sys.executable, "-c", code], env=environment(PYTHONIOENCODING="ascii"))
    assert (done.code, done.out) == (0, "\\udce9\\xe9\n")


LATE = """
import os, time
from alexnet_dist.errors import UserError, run_command
def main(_):
    time.sleep(4 * (os.environ["RANK"] == "0"))
    raise UserError("what all have to say", on_all_ranks=True)
run_command(main)
"""


def test_what_all_ranks_say_is_said_once_however_late_rank_0_comes(tmp_path: Path) -> None:
    (tmp_path / "late.py").write_text(LATE)
    environ = environment(PYTHONPATH=f"{tmp_path}:{Path(__file__).parents[1]}")
    done = call(command(2, "late"), 25, env=environ)
    assert done.code == 1
    assert done.err.count("alexnet_dist: what all have to say") == 1
