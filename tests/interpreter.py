"""Triton's kernels without a GPU: in its interpreter, which is chosen before Triton is imported,
and so in a process of its own."""

import subprocess
import sys
from pathlib import Path

from tests.conftest import environment

WANTED = "Triton is not installed here, as it is for Linux only"


def run_interpreted(tests: Path) -> None:
    """Run a file of tests there; fails where one of them does, or none ran."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests)],
        capture_output=True,
        text=True,
        timeout=280,
        env=environment(TRITON_INTERPRET="1"),
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    assert "passed" in done.stdout
