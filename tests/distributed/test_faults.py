"""Whatever befalls a run, it goes on and ends with the bits of one that nobody touched."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from alexnet_dist.tracking.logger import read_events
from tests.conftest import TINY, Result, command, environment, events, launch, losses, train
from tests.distributed.groups import alive, running, started, tensors, wait_for, workers

FEW = "--train.epochs=10"
"""40 steps, of which each test disturbs some."""


@pytest.fixture(scope="module")
def calm(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("calm")
    train(2, images, runs, "--run.name=run", FEW)
    return runs / "run"


def same(run: Path, calm: Path) -> None:
    """The run has ended with the calm one's bits, its records have no gap, nothing is left."""
    assert losses(run) == losses(calm)
    assert tensors(run) == tensors(calm)
    kept = read_events(run)
    assert [e["step"] for e in kept if e["event"] == "train"] == list(range(1, 41))
    for kind in ("epoch", "eval"):
        assert [e["step"] for e in kept if e["event"] == kind] == list(range(4, 41, 4))
    digests = [[e["sample_order_hash"] for e in events(calm, "epoch")],
               [e["sample_order_hash"] for e in kept if e["event"] == "epoch"]]  # fmt: skip
    assert digests[0] == digests[1]
    assert json.loads((run / "status.json").read_text())["status"] == "ended"
    assert not [p for p in run.rglob("*") if ".partial" in p.name or p.name == "PREEMPT"]
    assert not alive(str(run.parent))


def _by_one_rank(launcher: "subprocess.Popen[str]", run: Path) -> None:
    os.kill(workers(launcher.pid)[1], signal.SIGUSR2)


# SIGTERM, a file and every kind of death are among the faults of benchmarks/chaos.py
WAYS = {
    "SIGUSR2 to one process": (_by_one_rank, "preempted", 0),
    "Ctrl-C": (lambda p, _: p.send_signal(signal.SIGINT), "stopped", 1),
}
HANDLED = ("--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR2",)


@pytest.mark.slow
@pytest.mark.parametrize("way", list(WAYS))
def test_a_run_that_is_told_to_leave_saves_and_goes_on(
    way: str, images: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    tell, status, code = WAYS[way]
    run = tmp_path / "run"
    with running(2, images, tmp_path, FEW, torchrun=HANDLED) as launcher:
        tell(launcher, run)
        began = time.monotonic()
        out, _ = launcher.communicate(timeout=60)
    assert time.monotonic() - began < 20
    assert launcher.returncode == code  # torchrun itself ends so, where it was told
    record = json.loads((run / "status.json").read_text())
    assert record["status"] == status
    (left,) = events(run, "preempted")
    assert left["step"] == record["step"] == max(losses(run))
    assert f"step-{left['step']:08d}" == (run / "checkpoints/last").resolve().name
    assert "alexnet_dist/" not in out
    assert not alive(str(tmp_path))
    train(2, images, tmp_path, "--run.name=run", FEW)
    assert [e["step"] for e in events(run, "resume")] == [left["step"]]
    same(run, request.getfixturevalue("calm"))


@pytest.mark.slow
def test_signals_to_every_process_do_not_take_the_images_away(images: Path, tmp_path: Path) -> None:
    """As a cluster sends them: to the processes that load images for training, too."""
    engine = ["--data.loader=torch", "--runtime.threads=2", FEW]
    run = tmp_path / "run"
    with running(2, images, tmp_path, *engine) as launcher:
        trainers = workers(launcher.pid)
        loaders = [pid for trainer in trainers for pid in workers(trainer)]
        assert len(loaders) >= 4
        for name in ("SIGTERM", "SIGUSR2"):
            for pid in (*loaders, *trainers):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.Signals[name])
        out, _ = launcher.communicate(timeout=60)
    assert launcher.returncode == 0, out[-2000:]
    assert json.loads((run / "status.json").read_text())["status"] == "preempted"
    wait_for(lambda: not alive(str(tmp_path)), 10)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_chaos(tmp_path: Path) -> None:
    """Eight faults of different kinds; fifty in benchmarks/results/."""
    script = [sys.executable, "-m", "benchmarks.chaos", "--faults=8", "--steps=112"]
    done = subprocess.run(
        [*script, f"--out={tmp_path / 'result.json'}"],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    result = json.loads((tmp_path / "result.json").read_text())
    assert len({fault["fault"] for fault in result["faults"]}) == len(result["faults"]) == 8
    assert result["same_bits"]
    assert result["same_order"]
    assert len(result["corrupt_images"]) == 3


@pytest.mark.slow
def test_a_second_interrupt_leaves_at_once(images: Path, tmp_path: Path) -> None:
    with running(2, images, tmp_path) as launcher:
        launcher.send_signal(signal.SIGINT)
        time.sleep(0.05)
        launcher.send_signal(signal.SIGINT)
        began = time.monotonic()
        launcher.communicate(timeout=60)
    assert time.monotonic() - began < 5
    wait_for(lambda: not alive(str(tmp_path)), 5)


@pytest.mark.slow
def test_a_run_leaves_in_the_middle_of_an_evaluation(
    calm: Path, images: Path, tmp_path: Path
) -> None:
    """Nothing of the epoch is lost, and its evaluation is made up for."""
    script = (
        "import sys, time; from alexnet_dist import train; from pathlib import Path\n"
        "from alexnet_dist.errors import run_command\n"
        "plain = train.evaluate\n"
        "def slow(layout, batches, device, between):\n"
        "    def touch():\n"
        "        Path(sys.argv[1], 'PREEMPT').touch(); time.sleep(1.1); between()\n"
        "    return plain(layout, batches, device, touch)\n"
        "if not Path(sys.argv[1]).exists(): train.evaluate = slow\n"
        "run_command(train.main)\n"
    )
    file = tmp_path / "slow_evaluation.py"
    file.write_text(script.replace("sys.argv[1]", repr(str(tmp_path / "run"))))
    options = [
        *TINY,
        f"--data.root={images}",
        f"--run.output_dir={tmp_path}",
        "--run.name=run",
        FEW,
    ]
    words = command(2, "x", *options)
    words[words.index("-m", 3) : words.index("x") + 1] = [str(file)]
    done = subprocess.run(words, capture_output=True, text=True, env=environment(), timeout=120)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    assert [e["step"] for e in events(run, "preempted")] == [4]
    assert events(run, "eval") == []
    train(2, images, tmp_path, "--run.name=run", FEW)
    same(run, calm)


@pytest.mark.slow
def test_a_life_ends_before_its_time_is_up(images: Path, tmp_path: Path) -> None:
    born = time.time()
    train(2, images, tmp_path, "--run.name=run", "--train.epochs=10000", "--run.time_limit=30")
    run = tmp_path / "run"
    (left,) = events(run, "preempted")
    assert left["cause"] == "time that runs out"
    assert left["time"] - born < 35 or left["step"] <= 2  # on a machine too slow to begin in time
    assert f"step-{left['step']:08d}" == (run / "checkpoints/last").resolve().name
    assert json.loads((run / "status.json").read_text())["status"] == "preempted"


@pytest.mark.slow
def test_torchrun_starts_a_group_again(calm: Path, images: Path, tmp_path: Path) -> None:
    """Where a process hangs, which is found by its silence, named, and then dies."""
    options = [
        FEW,
        "--checkpoint.interval_steps=2",
        "--runtime.hang_timeout=5",
        "--run.resume=never",
    ]
    restarts = ("--max-restarts=2",)
    with running(2, images, tmp_path, *options, torchrun=restarts) as launcher:
        wait_for(lambda: started(tmp_path / "run", 4))
        os.kill(workers(launcher.pid)[1], signal.SIGSTOP)
        out, _ = launcher.communicate(timeout=240)
    assert launcher.returncode == 0, out[-3000:]
    assert "process 1 (host " in out
    assert "gave no sign of life for 5 s" in out
    run = tmp_path / "run"
    assert [e["restarts"]["torchrun_restarts"] for e in events(run, "resume")] == ["1"]
    same(run, calm)


@pytest.mark.slow
def test_a_host_that_leaves_is_done_without(calm: Path, images: Path, tmp_path: Path) -> None:
    """Two launchers with a process each; one dies with its process, the other goes on alone."""
    timing = "last_call_timeout=20,keep_alive_interval=1,keep_alive_max_attempt=2"
    rendezvous = [
        "--nnodes=1:2",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=127.0.0.1:29653",
        "--rdzv-id=7",
        f"--rdzv-conf={timing}",
        "--local-addr=127.0.0.1",
        "--max-restarts=3",
    ]
    wanted = [*TINY, f"--data.root={images}", f"--run.output_dir={tmp_path}", "--run.name=run", FEW]
    words = command(1, "alexnet_dist.train", *wanted, "--checkpoint.interval_steps=2")
    at = words.index("--standalone")
    words[at : at + 1] = rendezvous
    run = tmp_path / "run"
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True,
               "env": environment(), "start_new_session": True}  # fmt: skip
    with subprocess.Popen(words, **options) as stays:
        wait_for(lambda: _listens(29653))  # who comes first has the store, and must not die
        with subprocess.Popen(words, **options) as goes:
            wait_for(lambda: started(run, 6))
            for pid in (*workers(goes.pid), goes.pid):
                os.kill(pid, signal.SIGKILL)
        out, _ = stays.communicate(timeout=240)
        assert stays.returncode == 0, out[-3000:]
    first, *later = events(run, "start", "resume")
    assert first["world_size"] == 2
    assert later[-1]["world_size"] == 1
    assert losses(run) == pytest.approx(losses(calm), rel=1e-4)
    kept = read_events(run)
    assert [e["sample_order_hash"] for e in kept if e["event"] == "epoch"] == [
        e["sample_order_hash"] for e in events(calm, "epoch")
    ]


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.slow
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    calm: Path, images: Path, tmp_path: Path
) -> None:
    train(2, images, tmp_path, "--run.name=run", FEW, "--train.max_steps=13")
    run = tmp_path / "run"
    last = (run / "checkpoints/last").resolve()
    assert last.name == "step-00000013"
    file = sorted(last.glob("*.safetensors"))[1]  # of the second process
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
    result = train(2, images, tmp_path, "--run.name=run", FEW)
    sentence = f"the checkpoint {last} is corrupt ({file.name} has changed since it was written)"
    assert sentence in result.out
    assert [e["step"] for e in events(run, "resume")] == [12]
    assert (run / "checkpoints" / f"corrupt-{last.name}").is_dir()
    same(run, calm)


def spoilt(what: str, images: Path, runs: Path, *options: str) -> Result:
    wanted = [*TINY, f"--data.root={images}", f"--run.output_dir={runs}", "--run.name=run", FEW]
    return launch(
        2,
        *wanted,
        *options,
        module="tests.distributed.fault_injection",
        SPOIL=what,
        SPOIL_ONCE=str(runs / "once"),
    )


@pytest.mark.slow
@pytest.mark.parametrize("every", ["1", "7"])
def test_an_update_that_is_not_finite_is_skipped(every: str, images: Path, tmp_path: Path) -> None:
    logged = f"--train.log_interval={every}"
    result = spoilt("IMAGES:6,18", images, tmp_path, "--train.on_nonfinite=skip", logged)
    assert result.code == 0, result.err
    run = tmp_path / "run"
    bad = events(run, "nonfinite")
    assert [(e["step"], e["skipped"]) for e in bad] == [(6, True), (18, True)]
    assert all("loss is nan" in e["what"] and len(e["paths"]) == 7 for e in bad)
    assert all(Path(path).is_file() for e in bad for path in e["paths"])
    trained = [e for e in events(run, "train") if e["loss"] is not None]
    assert sum(e["steps"] for e in trained) == 38


@pytest.mark.slow
def test_a_run_that_is_not_finite_any_more_stops(images: Path, tmp_path: Path) -> None:
    always = "IMAGES:" + ",".join(map(str, range(6, 40)))
    for number, policy in enumerate(("stop", "skip")):
        runs = tmp_path / str(number)
        result = spoilt(always, images, runs, f"--train.on_nonfinite={policy}")
        assert result.code != 0
        assert "take a smaller --optim.lr" in result.said[0]
        assert events(runs / "run", "nonfinite")[0]["step"] == 6
        assert json.loads((runs / "run/status.json").read_text())["status"] == "failed"


@pytest.mark.slow
def test_a_checkpoint_never_holds_a_weight_that_is_not_finite(images: Path, tmp_path: Path) -> None:
    result = spoilt("WEIGHTS:8", images, tmp_path)
    assert result.code != 0
    assert "a weight is not finite at step 8" in result.said[0]
    checkpoints = tmp_path / "run/checkpoints"
    assert sorted(p.name for p in checkpoints.glob("step-*")) == ["step-00000004"]
