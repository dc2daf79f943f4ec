"""Jobs on a real SLURM of two nodes: their time runs out, nodes are lost, signals come, and the run
ends as one that nobody touched."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from tests.conftest import TINY, environment, events, losses, train, write_images

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PROGRAMS = ("sbatch", "scontrol", "slurmctld", "slurmd", "munged")
LACKING = [name for name in PROGRAMS if shutil.which(name) is None]
pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(
        bool(LACKING), reason=f"there is no {', '.join(LACKING)}: apt-get install slurm-wlm munge"
    ),
    pytest.mark.skipif(os.geteuid() != 0, reason="a SLURM cluster is made by root"),
]
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


class Cluster:
    """A SLURM of two nodes, and a folder to submit from."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # a socket's path must be short
        self.env = environment(SLURM_CONF=str(self.folder / "slurm.conf"), PYTHONPATH=str(ROOT))

    def control(self, action: str, *words: str) -> None:
        subprocess.run([HERE / "cluster.sh", action, self.folder, *words], check=True, timeout=60)

    def run(self, *words: str, **env: str) -> str:
        """What a command of SLURM's writes."""
        done = subprocess.run(
            words, env=self.env | env, cwd=self.place, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def submit(self, *words: str) -> list[str]:
        """Submit what submit makes; the numbers of the jobs."""
        said = self.run(sys.executable, "-m", "alexnet_dist.submit", *words)
        return list(dict.fromkeys(re.findall(r"^job (\d+)", said, re.MULTILINE)))

    def state(self, job: str) -> tuple[str, int]:
        """A job's state, and how often it was started again."""
        shown = self.run("scontrol", "show", "job", job)
        return (
            re.findall(r"JobState=(\w+)", shown)[0],
            int(re.findall(r"Restarts=(\d+)", shown)[0]),
        )

    def output(self, job: str = "*") -> str:
        return "\n".join(path.read_text() for path in self.place.glob(f"*-{job}.out"))

    def wait(self, what: Callable[[], bool], seconds: float) -> None:
        end = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < end, self.output()[-5000:]
            time.sleep(0.2)

    def end_of(self, job: str, seconds: float = 200) -> tuple[str, int]:
        """Wait for the end of a job; its state, and how often it was started again."""
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
def calm(cluster: Cluster) -> dict[int, float]:
    """The losses of a run of 40 steps that nothing happens to, on two processes."""
    train(2, cluster.place / "images", cluster.place / "calm", "--run.name=run", "--train.epochs=4")
    return losses(cluster.place / "calm" / "run")


def begin(cluster: Cluster, *words: str) -> tuple[str, Path]:
    """Submit the calm run's run, one process on each node, and wait for its first checkpoint; the
    job, and the run's folder."""
    options = [*TINY, "--data.root=images", "--train.epochs=4"]
    own = ["--nodes=2", "--gpus=0", "--cpus=2", "--name=run"]
    (job,) = cluster.submit(*own, *words, *options)
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


def tell(processes: list[int], what: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):  # on a slow machine the time is over already
            os.kill(process, what)


def test_the_time_is_over(cluster: Cluster, calm: dict[int, float]) -> None:
    job, run = begin(cluster, "--time=1", "--sbatch=--signal=B:USR2@20")
    held = workers(job)
    tell(held, signal.SIGSTOP)  # lest a fast machine end it before its time
    cluster.wait(lambda: "time is nearly over" in cluster.output(job), 60)
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=10")  # for its other lives
    tell(held, signal.SIGCONT)
    assert cluster.end_of(job) == ("COMPLETED", 1)
    assert "is saved and waits to be started again" in cluster.output(job)
    assert losses(run) == calm
    assert [event["restarts"]["slurm_restarts"] for event in events(run, "resume")] == ["1"]


def test_a_node_is_lost(cluster: Cluster, calm: dict[int, float]) -> None:
    job, run = begin(cluster)
    cluster.control("kill-node", "n2")
    cluster.wait(lambda: cluster.state(job)[1] == 1, 90)
    cluster.control("node", "n2")
    assert cluster.end_of(job)[0] == "COMPLETED"
    assert losses(run) == calm


def test_a_signal(cluster: Cluster, calm: dict[int, float]) -> None:
    job, run = begin(cluster)
    cluster.run("scancel", "--signal=USR2", job)
    assert cluster.end_of(job) == ("COMPLETED", 1)
    assert "is saved and waits to be started again" in cluster.output(job)
    assert losses(run) == calm
    assert [event["cause"] for event in events(run, "preempted")] == ["a signal"]


def test_five_networks_and_their_mean(cluster: Cluster) -> None:
    own = ["--gpus=0", "--cpus=3", "--name=five"]
    array, mean = cluster.submit("array5", *own, *TINY, "--data.root=images", "--train.epochs=1")
    assert cluster.end_of(mean)[0] == "COMPLETED"
    runs = [cluster.place / "runs" / f"five-{array}-{number}" for number in range(5)]
    seeds = [yaml.safe_load((run / "config.yaml").read_text())["train"]["seed"] for run in runs]
    assert seeds == [2012, 2013, 2014, 2015, 2016]
    assert len({losses(run)[10] for run in runs}) == 5
    result = json.loads(cluster.output(mean).splitlines()[-1])
    assert result["images"] == 13


def test_what_is_not_queued_again(cluster: Cluster) -> None:
    (cluster.place / "slurm").symlink_to(ROOT / "slurm")
    by_hand = ["sbatch", "--parsable", "--gpus-per-node=0", "slurm/train.sbatch"]
    wrong = cluster.run(*by_hand, "--optim.lrr=1", PYTHON=sys.executable).strip()
    standin = {"PYTHON": str(HERE / "standin.sh"), "STEPS": "0", "ENDS": "running"}
    lost = cluster.run(*by_hand, **standin).strip()
    assert cluster.end_of(wrong) == ("FAILED", 0)
    assert "there is no option --optim.lrr; did you mean --optim.lr?" in cluster.output(wrong)
    assert cluster.end_of(lost) == ("FAILED", 2)
    assert "started 3 times without a new checkpoint" in cluster.output(lost)
