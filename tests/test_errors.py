"""How commands end on errors of the machine."""

import subprocess
import sys

import pytest

from tests.conftest import environment


@pytest.mark.parametrize(
    ("work", "line"),
    [
        (
            "open('/proc/none/best.png', 'w')",
            "/proc/none/best.png: No such file or directory:",
        ),
        ("open('/dev/full', 'w', 1).write('x\\n')", "a file: No space left on device: give a path"),
    ],
)
def test_a_file_that_cannot_be_written_is_one_sentence(work: str, line: str) -> None:
    code = f"from alexnet_dist.errors import run_command; run_command(lambda _: {work})"
    for options, traceback in (((), False), (("--debug",), True)):
        command = [sys.executable, "-c", code, *options]
        done = subprocess.run(command, capture_output=True, text=True, env=environment())
        assert done.returncode == 1
        assert ("Traceback" in done.stderr) == traceback
        assert done.stderr.startswith(f"alexnet_dist: {line}") == (not traceback)
