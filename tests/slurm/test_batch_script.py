"""What a batch script decides, with stand-ins for SLURM's programs and for torchrun."""

import contextlib
import os
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SRUN = """while [[ $1 == --* ]]; do shift; done; echo again >>started; exec "$@" """
SQUEUE = """echo 2030-01-01T00:00:00"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder to submit from, with srun, squeue and scontrol."""
    (tmp_path / "slurm").symlink_to(ROOT / "slurm")
    (tmp_path / "bin").mkdir()
    for name, text in {"srun": SRUN, "squeue": SQUEUE, "scontrol": "echo $* >>asked"}.items():
        program = tmp_path / "bin" / name
        program.write_text(f"#!/usr/bin/env bash\n{text}\n")
        program.chmod(0o755)
    return tmp_path


def job(place: Path, *words: str, steps: int = 0, ends: str, **env: str) -> tuple[int, str, bool]:
    """A life of job 7: its exit code, what it says last, and whether it is queued again."""
    environment = {
        "PATH": f"{place / 'bin'}:{os.environ['PATH']}",
        "PYTHON": str(HERE / "standin.sh"),
        "STEPS": str(steps),
        "ENDS": ends,
        "SLURM_SUBMIT_DIR": str(place),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NAME": "job",
        "SLURM_JOB_NODELIST": "here",
        "SLURM_NNODES": "1",
    }
    (place / "asked").unlink(missing_ok=True)
    script = [str(ROOT / "slurm" / "train.sbatch"), *words]
    done = subprocess.run(
        ["bash", *script], cwd=place, env=environment | env, text=True, capture_output=True
    )
    assert not done.stderr
    said = done.stdout.splitlines()[-1].split(" slurm: ", 1)[1]
    requeued = (place / "asked").exists() and (place / "asked").read_text() == "requeue 7\n"
    return done.returncode, said, requeued


@pytest.mark.parametrize(
    ("ends", "code", "said", "requeued"),
    [
        ("ended", 0, "the run in runs/job-7 has ended", False),
        ("stopped", 0, "the run in runs/job-7 has stopped", False),
        ("failed", 1, "the run in runs/job-7 has failed for a reason", False),
        ("nothing", 1, "the run in runs/job-7 has not begun", False),
        ("preempted", 0, "is saved and waits to be started again: job 7 is queued again", True),
        ("running", 0, "was lost in the middle (srun ended with 1): job 7 is queued again", True),
    ],
)
def test_what_follows_how_a_run_stands(
    ends: str, code: int, said: str, requeued: bool, place: Path
) -> None:
    result = job(place, ends=ends)
    assert result[0] == code
    assert said in result[1]
    assert result[2] == requeued


def test_a_run_that_had_got_on_is_started_again_at_once(place: Path) -> None:
    assert job(place, steps=1, ends="running")[2]  # the second time it had not
    assert (place / "started").read_text() == "again\n" * 2


def test_a_limit_on_lives_without_a_checkpoint(place: Path) -> None:
    def life(number: int) -> str:
        code, said, requeued = job(place, ends="running", SLURM_RESTART_COUNT=str(number))
        assert requeued == (code == 0)
        return "queued again" if requeued else said

    checkpoints = place / "runs/job-7/checkpoints"
    assert [life(0), life(1)] == ["queued again"] * 2
    (checkpoints / "last").symlink_to("step-00000003")  # the second life brought something
    assert [life(2), life(3)] == ["queued again"] * 2
    assert "started 3 times without a new checkpoint (its last one is step-00000003)" in life(4)
    assert "started 3 times without a new checkpoint" in life(5)  # by SLURM, after a lost node
    assert life(0) == "queued again"  # a person starts the run again


def test_where_the_run_lies(place: Path) -> None:
    assert "in there/job-7 has" in job(place, "--run.output_dir", "there", ends="ended")[1]
    assert "in runs/mine has" in job(place, "--run.name=mine", ends="ended")[1]
    assert job(place, "--run.name=mine", ends="ended")[:2] == (
        1,
        "the run in runs/mine has ended already",
    )
    again = job(place, "--run.name=mine", ends="ended", SLURM_RESTART_COUNT="1")
    assert again[:2] == (0, "the run in runs/mine has ended already")
    array = {"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "3"}
    assert "in runs/job-5-3 has" in job(place, ends="ended", **array)[1]
    assert "in runs/mine-3 has" in job(place, "--run.name=mine", ends="ended", **array)[1]


def test_ports_that_answer_are_passed_over() -> None:
    low = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])

    def port() -> str:
        script = f"source {ROOT / 'slurm/lib.sh'}; free_port 127.0.0.1 4567 || echo none"
        return subprocess.run(["bash", "-c", script], text=True, capture_output=True).stdout.strip()

    with contextlib.ExitStack() as taken:
        for _ in range(8):
            chosen = int(port())
            assert chosen < low
            taken.enter_context(socket.create_server(("127.0.0.1", chosen)))
        assert port() == "none"


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="there is no shellcheck here")
def test_shell_scripts_are_clean() -> None:
    scripts = [p for f in ("slurm", "launch", "tests/slurm") for p in (ROOT / f).glob("*.s[hb]*")]
    done = subprocess.run(["shellcheck", "-x", *scripts], text=True, capture_output=True)
    assert done.returncode == 0, done.stdout
