"""What a batch script decides, with stand-ins for SLURM's programs and for torchrun."""

import contextlib
import os
import shutil
import socket
from pathlib import Path

import pytest

from tests.conftest import call, write_program

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PROGRAMS = {
    "srun": "while [[ $1 == --* ]]; do shift; done\n"
    'grep -oE "alexnet_dist.(doctor|train)" <<<"$*" >>starts; exec "$@"',
    "squeue": "echo 2030-01-01T00:00:00",
    "scontrol": "echo $* >>requests",
}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder to submit from, with srun, squeue and scontrol."""
    for name, text in PROGRAMS.items():
        write_program(tmp_path / "bin" / name, text)
    return tmp_path


def job(place: Path, *words: str, steps: int = 0, ends: str, **env: str) -> tuple[int, str, bool]:
    """One start of job 7: its exit code, its last message, and whether it is requeued."""
    environment = {
        "PATH": f"{place / 'bin'}:{os.environ['PATH']}",
        "PYTHON": str(HERE / "standin.sh"),
        "STEPS": str(steps),
        "ENDS": ends,
        "ALEXNET_DIST_SLURM": str(ROOT / "slurm"),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NAME": "job",
        "SLURM_JOB_NODELIST": "here",
        "SLURM_NNODES": "1",
    }
    requests = place / "requests"
    requests.unlink(missing_ok=True)
    script = ["bash", ROOT / "slurm/train.sbatch", *words]
    done = call(script, cwd=place, env=environment | env)
    assert not done.err
    message = done.out.splitlines()[-1].split(" slurm: ", 1)[1]
    return done.code, message, requests.exists() and requests.read_text() == "requeue 7\n"


@pytest.mark.parametrize(
    ("ends", "code", "message", "requeued"),
    [
        ("ended", 0, "the run in runs/job-7 is finished", False),
        ("stopped", 0, "the run in runs/job-7 has stopped", False),
        ("failed", 1, "the run in runs/job-7 has failed: fix the cause", False),
        ("nothing", 1, "the run in runs/job-7 has not begun", False),
        ("preempted", 0, "is saved, to be restarted: job 7 is requeued", True),
        ("running", 0, "was lost (srun exited with 1): job 7 is requeued", True),
    ],
)
def test_slurm_job_follows_the_runs_status(
    ends: str, code: int, message: str, requeued: bool, place: Path
) -> None:
    found, said, again = job(place, ends=ends)
    assert (found, again) == (code, requeued)
    assert message in said


def test_slurm_job_ends_where_the_doctor_finds_what_fails(place: Path) -> None:
    sick = {"DOCTOR_CODE": "1", "SLURM_RESTART_COUNT": "1"}
    code, message, requeued = job(place, ends="ended", **sick)
    assert (code, requeued) == (1, False)
    assert "job 7 ends before it trains: fix what fails above" in message
    assert not (place / "runs/job-7/status.json").exists()
    assert "is finished" in job(place, ends="ended", DOCTOR="no", **sick)[1]


def test_slurm_job_restarts_at_once_what_was_lost_after_new_checkpoints(place: Path) -> None:
    assert job(place, steps=1, ends="running")[2]  # the second start brought none
    starts = (place / "starts").read_text().replace("alexnet_dist.", "").split()
    assert starts == ["doctor", "train", "train"]


def test_slurm_job_gives_up_after_three_starts_without_a_checkpoint(place: Path) -> None:
    def start(count: int) -> str:
        code, message, requeued = job(place, ends="running", SLURM_RESTART_COUNT=str(count))
        assert requeued == (code == 0)
        return "requeued" if requeued else message

    checkpoints = place / "runs/job-7/checkpoints"
    assert [start(0), start(1)] == ["requeued"] * 2
    (checkpoints / "last").symlink_to("step-00000003")  # the second start brought a new one
    assert [start(2), start(3)] == ["requeued"] * 2
    assert "started 3 times without a new checkpoint (the last is step-00000003)" in start(4)
    assert "started 3 times without a new checkpoint" in start(5)  # by SLURM, after a lost node
    assert start(0) == "requeued"  # a person submits it again


def test_slurm_job_finds_its_run(place: Path) -> None:
    assert "in there/job-7 is" in job(place, "--run.output_dir", "there", ends="ended")[1]
    assert "in runs/mine is" in job(place, "--run.name=mine", ends="ended")[1]
    finished = "the run in runs/mine is finished already"
    assert job(place, "--run.name=mine", ends="ended")[:2] == (1, finished)
    again = job(place, "--run.name=mine", ends="ended", SLURM_RESTART_COUNT="1")
    assert again[:2] == (0, finished)
    array = {"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "3"}
    assert "in runs/job-5-3 is" in job(place, ends="ended", **array)[1]
    assert "in runs/mine-3 is" in job(place, "--run.name=mine", ends="ended", **array)[1]


def test_slurm_job_takes_a_port_that_nobody_listens_on() -> None:
    low = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])

    def port() -> str:
        script = f"source {ROOT / 'slurm/lib.sh'}; free_port 127.0.0.1 4567 || echo none"
        return call(["bash", "-c", script]).out.strip()

    with contextlib.ExitStack() as taken:
        for _ in range(8):
            chosen = int(port())
            assert chosen < low
            taken.enter_context(socket.create_server(("127.0.0.1", chosen)))
        assert port() == "none"


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="there is no shellcheck here")
def test_shell_scripts_are_clean() -> None:
    scripts = [p for f in ("slurm", "launch", "tests/slurm") for p in (ROOT / f).glob("*.s[hb]*")]
    done = call(["shellcheck", "-x", *scripts])
    assert done.code == 0, done.out
