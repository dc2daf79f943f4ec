"""Jobs on a real SLURM of two nodes: the time limit, a lost node, a signal; the run ends as an
undisturbed one."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from tests.conftest import TINY, call, environment, events, losses, train, write_images
from tests.distributed.groups import wait_for

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PROGRAMS = ("sbatch", "scontrol", "slurmctld", "slurmd", "munged")
LACKING = [name for name in PROGRAMS if shutil.which(name) is None]
pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(bool(LACKING), reason=f"no {LACKING}: apt-get install slurm-wlm munge"),
    pytest.mark.skipif(os.geteuid() != 0, reason="a SLURM cluster is made by root"),
]
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


class Cluster:
    """A SLURM of two nodes, and a folder to submit from."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # a socket's path must be short
        self.env = environment(SLURM_CONF=str(self.folder / "slurm.conf"), PYTHONPATH=str(ROOT))
        self.env["DOCTOR"] = "no"  # which takes as long as these runs; a test of its own has it

    def control(self, action: str, *words: str) -> None:
        subprocess.run([HERE / "cluster.sh", action, self.folder, *words], check=True, timeout=60)

    def run(self, *words: str, **env: str) -> str:
        """A command's output."""
        done = call(words, 60, env=self.env | env, cwd=self.place)
        assert done.code == 0, done.err
        return done.out

    def submit(self, *words: str, **env: str) -> list[str]:
        """Submit; the ids of the jobs."""
        output = self.run(sys.executable, "-m", "alexnet_dist.submit", *words, **env)
        return list(dict.fromkeys(re.findall(r"^job (\d+)", output, re.MULTILINE)))

    def state(self, job: str) -> tuple[str, int]:
        """A job's state, and how often it was restarted."""
        shown = self.run("scontrol", "show", "job", job)
        state, restarts = (re.findall(rf"{n}=(\w+)", shown)[0] for n in ("JobState", "Restarts"))
        return state, int(restarts)

    def output(self, job: str = "*") -> str:
        return "\n".join(path.read_text() for path in self.place.glob(f"*-{job}.out"))

    def wait(self, what: Callable[[], bool], seconds: float) -> None:
        wait_for(what, seconds, lambda: self.output()[-5000:])

    def end_of(self, job: str, seconds: float = 200) -> tuple[str, int]:
        """Wait for the end of a job; its state, and how often it was restarted."""
        self.wait(lambda: self.state(job)[0] in OVER, seconds)
        return self.state(job)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    place = tmp_path_factory.mktemp("place")
    write_images(place / "images", train=71)
    made = Cluster(place)
    try:
        made.control("start")
        yield made
    finally:
        made.control("stop")
        shutil.rmtree(made.folder)


@pytest.fixture(scope="module")
def reference(cluster: Cluster) -> dict[int, float]:
    """The losses of an undisturbed run of 40 steps on two processes."""
    images, runs = cluster.place / "images", cluster.place / "reference"
    train(2, images, runs, "--run.name=run", "--train.epochs=4")
    return losses(runs / "run")


def begin(cluster: Cluster, *words: str) -> tuple[str, Path]:
    """Submit the reference run, one process per node, and wait for its first checkpoint; the job's
    id and the run's folder."""
    options = [*TINY, "--data.root=images", "--train.epochs=4"]
    flags = ["--nodes=2", "--gpus-per-node=0", "--cpus-per-task=2", "--job-name=run"]
    (job,) = cluster.submit(*flags, *words, "--", *options)
    run = cluster.place / "runs" / f"run-{job}"
    cluster.wait((run / "checkpoints" / "last").exists, 150)
    return job, run


def workers(job: str) -> list[int]:
    """The training processes of a job, which this machine runs, whatever node they are on."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().split(b"\0")
            if f"SLURM_JOB_ID={job}".encode() in words and b"WORLD_SIZE=2" in words:
                found.append(int(path.parent.name))
    return found


def send_signal(processes: list[int], what: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):  # on a slow machine it is over already
            os.kill(process, what)


def test_slurm_time_limit_requeues_the_job(cluster: Cluster, reference: dict[int, float]) -> None:
    job, run = begin(cluster, "--time=1", "--signal=B:USR2@20")
    held = workers(job)
    send_signal(held, signal.SIGSTOP)  # lest a fast machine finish before
    cluster.wait(lambda: "close to its time limit" in cluster.output(job), 60)
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=10")  # after the restart
    send_signal(held, signal.SIGCONT)
    assert cluster.end_of(job) == ("COMPLETED", 1)
    assert "is saved, to be restarted" in cluster.output(job)
    assert losses(run) == reference
    assert [event["restarts"]["slurm_restarts"] for event in events(run, "resume")] == ["1"]


def test_slurm_lost_node_restarts_the_job(cluster: Cluster, reference: dict[int, float]) -> None:
    job, run = begin(cluster)
    cluster.control("kill-node", "n2")
    cluster.wait(lambda: cluster.state(job)[1] == 1, 90)
    cluster.control("node", "n2")
    assert cluster.end_of(job)[0] == "COMPLETED"
    assert losses(run) == reference


def test_slurm_signal_requeues_the_job(cluster: Cluster, reference: dict[int, float]) -> None:
    job, run = begin(cluster)
    cluster.run("scancel", "--signal=USR2", job)
    assert cluster.end_of(job) == ("COMPLETED", 1)
    assert "is saved, to be restarted" in cluster.output(job)
    assert losses(run) == reference
    assert [event["cause"] for event in events(run, "preempted")] == ["a signal"]


def test_slurm_array5_trains_five_networks_and_evaluates_their_average(cluster: Cluster) -> None:
    flags = ["--gpus-per-node=0", "--cpus-per-task=3", "--job-name=five"]
    options = [*TINY, "--data.root=images", "--train.epochs=1"]
    array, mean = cluster.submit("array5", *flags, "--", *options)
    assert cluster.end_of(mean, 500)[0] == "COMPLETED"
    runs = [cluster.place / "runs" / f"five-{array}-{number}" for number in range(5)]
    seeds = [yaml.safe_load((run / "config.yaml").read_text())["train"]["seed"] for run in runs]
    assert seeds == [2012, 2013, 2014, 2015, 2016]
    assert len({losses(run)[10] for run in runs}) == 5
    result = json.loads((cluster.place / f"five-mean-{mean}.out").read_text().splitlines()[-1])
    assert result["images"] == 13


def test_slurm_job_submitted_by_hand_finds_its_scripts_and_fails_for_good(cluster: Cluster) -> None:
    by_hand = ["sbatch", "--parsable", "--gpus-per-node=0", str(ROOT / "slurm/train.sbatch")]
    wrong = cluster.run(*by_hand, "--optim.lrr=1", PYTHON=sys.executable).strip()
    standin = {"PYTHON": str(HERE / "standin.sh"), "STEPS": "0", "ENDS": "running"}
    lost = cluster.run(*by_hand, **standin).strip()
    assert cluster.end_of(wrong) == ("FAILED", 0)
    assert "there is no option --optim.lrr; did you mean --optim.lr?" in cluster.output(wrong)
    assert cluster.end_of(lost) == ("FAILED", 2)
    assert "started 3 times without a new checkpoint" in cluster.output(lost)


def test_slurm_doctor_looks_at_the_nodes_and_ends_a_job_that_would_fail(cluster: Cluster) -> None:
    flags = ["--nodes=2", "--gpus-per-node=0", "--cpus-per-task=2"]
    options = [*TINY, "--data.root=images"]
    (well,) = cluster.submit("doctor", *flags, "--", *options)
    assert cluster.end_of(well) == ("COMPLETED", 0), cluster.output(well)
    assert re.search(r"^ok +processes +2 on ", cluster.output(well), re.MULTILINE)
    assert f"job {well} ends in" in cluster.output(well)
    wrong = [*flags, "--job-name=wrong", "--", *options, "--data.root=nowhere"]
    (sick,) = cluster.submit(*wrong, DOCTOR="yes")
    assert cluster.end_of(sick) == ("FAILED", 0)
    output = cluster.output(sick)
    assert re.search("^fails +images +there is no folder .*nowhere: give", output, re.MULTILINE)
    assert f"job {sick} ends before it trains: fix what fails above" in output
    assert not (cluster.place / "runs" / f"wrong-{sick}").exists()
