"""The scripts that start processes where there is no SLURM."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import TINY, environment, losses
from tests.processes import torchrun_env

LAUNCH = Path(__file__).parents[2] / "launch"


@pytest.mark.slow
def test_one_machine_and_two_train_alike(images: Path, tmp_path: Path) -> None:
    """The two machines are this one, which joins the run twice."""
    options = [*TINY, f"--data.root={images}", f"--run.output_dir={tmp_path}", "--train.epochs=1"]
    port = torchrun_env(1)[0]["MASTER_PORT"]

    def started(processes: int, *words: str) -> "subprocess.Popen[str]":
        env = environment(PYTHON=sys.executable, PROCESSES=str(processes), PORT=port)
        words = (f"{LAUNCH}/{words[0]}", *words[1:], *options)
        out = subprocess.PIPE
        return subprocess.Popen(words, stdout=out, stderr=subprocess.STDOUT, text=True, env=env)

    with started(2, "local.sh", "--run.name=local") as alone:
        assert alone.wait(120) == 0, alone.communicate()[0]
    several = ("multinode.sh", "2", "localhost", "--run.name=several")
    with started(1, *several) as first, started(1, *several) as second:
        for machine in (first, second):
            out, _ = machine.communicate(timeout=120)
            assert machine.returncode == 0, out[-3000:]
    assert losses(tmp_path / "several") == losses(tmp_path / "local")
    assert len(losses(tmp_path / "local")) == 4
