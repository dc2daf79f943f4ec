"""Whatever disturbs a run, it resumes and ends with the bits of an undisturbed one."""

import itertools
import json
import os
import re
import signal
import sys
import time
from collections.abc import Container
from pathlib import Path
from typing import Any

import pytest
import torch

from alexnet_dist import setup
from alexnet_dist import train as trainer
from alexnet_dist.tracking.logger import read_events
from alexnet_dist.tracking.run_dir import read_status
from tests.conftest import TINY, Result, call, environment, events, losses, train
from tests.distributed.groups import alive, running, sample_order, tensors, wait_for, workers
from tests.processes import run_group, run_main

FEW = "--train.epochs=10"
"""40 steps, of which each test disturbs some."""


@pytest.fixture(scope="module")
def reference(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run."""
    runs = tmp_path_factory.mktemp("reference")
    train(2, images, runs, "--run.name=run", FEW)
    return runs / "run"


def check_same(run: Path, reference: Path) -> None:
    """The run has ended with the reference's bits, its records have no gap, nothing is left."""
    assert losses(run) == losses(reference)
    assert tensors(run) == tensors(reference)
    kept = read_events(run)
    assert [e["step"] for e in kept if e["event"] == "train"] == list(range(1, 41))
    assert [e["step"] for e in kept if e["event"] == "eval"] == list(range(4, 41, 4))
    assert sample_order(run) == sample_order(reference)
    assert read_status(run)["status"] == "ended"
    assert not [p for p in run.rglob("*") if ".partial" in p.name or p.name == "PREEMPT"]
    assert not alive(str(run.parent))


# SIGTERM, a file and every kind of death are among the faults of benchmarks/chaos.py
@pytest.mark.slow
@pytest.mark.parametrize("way", ["SIGUSR2 to one process", "Ctrl-C"])
def test_a_preempted_run_saves_and_resumes(
    way: str, images: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    run, handled = tmp_path / "run", "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR2"
    with running(2, images, tmp_path, FEW, torchrun=(handled,)) as launcher:
        if way == "Ctrl-C":
            launcher.send_signal(signal.SIGINT)
        else:
            os.kill(workers(launcher.pid)[1], signal.SIGUSR2)
        out, _ = launcher.communicate(timeout=20)
    assert launcher.returncode == int(way == "Ctrl-C")  # torchrun itself ends so, where it was told
    assert read_status(run)["status"] == ("stopped" if way == "Ctrl-C" else "preempted")
    (preempted,) = events(run, "preempted")
    assert preempted["step"] == max(losses(run))
    assert f"step-{preempted['step']:08d}" == (run / "checkpoints/last").resolve().name
    assert "alexnet_dist/" not in out
    assert not alive(str(tmp_path))
    train(2, images, tmp_path, "--run.name=run", FEW)
    assert [e["step"] for e in events(run, "resume")] == [preempted["step"]]
    check_same(run, request.getfixturevalue("reference"))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(os.geteuid() != 0, reason="hosts are network namespaces, made by root")
def test_chaos(tmp_path: Path) -> None:
    """Faults on two hosts; many more, on four, in benchmarks/results/."""
    kinds = ["process killed", "process stopped", "host gone for good", "disk full for 10 s"]
    kinds.append("checkpoint cut short")
    script = [sys.executable, "-m", "benchmarks.chaos", "--hosts=2", f"--faults={len(kinds)}"]
    done = call([*script, "--kinds", *kinds, f"--out={tmp_path / 'result.json'}"], 600)
    assert done.code == 0, done.out[-3000:] + done.err[-3000:]
    result = json.loads((tmp_path / "result.json").read_text())
    faults = {fault["fault"]: fault for fault in result["faults"]}
    assert set(faults) == set(kinds)
    assert faults["host gone for good"]["world_sizes"] == [1, 2]
    assert faults["host gone for good"]["agents_started"] == 1  # the others let it join
    for kind, said in {
        "process stopped": r"no sign of life of process 1 \(host |store, does not answer",  # of 0
        "host gone for good": r"no sign of life of process 1 \(host host1, .* after 10 s",
        "disk full for 10 s": "could not be written",
        "checkpoint cut short": "is corrupt",
    }.items():
        assert any(re.search(said, line) for line in faults[kind]["said"]), faults[kind]


@pytest.mark.slow
def test_a_second_interrupt_ends_at_once(images: Path, tmp_path: Path) -> None:
    with running(2, images, tmp_path) as launcher:
        launcher.send_signal(signal.SIGINT)
        time.sleep(0.05)
        launcher.send_signal(signal.SIGINT)
        launcher.communicate(timeout=5)
    wait_for(lambda: not alive(str(tmp_path)), 5)


def train_with(fault: Any, what: Any, images: Path, run: Path, *options: str) -> Result:
    """A run of two processes, each of which is a ``fault`` of ``what``."""
    words = [*TINY, f"--data.root={images}", f"--run.output_dir={run.parent}", "--run.name=run"]
    return Result(*run_group(2, environment(), 240, fault, what, *words, FEW, *options))


def preempted_in_evaluation(run: Path, *words: str) -> None:
    """Train; a file PREEMPT appears during the first evaluation."""

    class EvalMetrics(trainer.EvalMetrics):
        def update(self, counts: torch.Tensor) -> None:
            super().update(counts)
            (run / "PREEMPT").touch()
            time.sleep(1.1)

    trainer.EvalMetrics = EvalMetrics
    run_main("alexnet_dist.train", *words)


SKIP = "--train.on_nonfinite=skip"


def not_finite(steps: Container[int], *words: str) -> None:
    """Train; the images of ``steps`` are not finite."""
    train_step, count = setup.train_step, itertools.count(1)

    def faulty(layout: Any, optimizer: Any, images: torch.Tensor, *others: Any) -> torch.Tensor:
        images.mul_(float("nan") if next(count) in steps else 1)
        return train_step(layout, optimizer, images, *others)

    setup.train_step = faulty
    run_main("alexnet_dist.train", *words)


@pytest.mark.slow
def test_a_run_preempted_in_an_evaluation(reference: Path, images: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    result = train_with(preempted_in_evaluation, run, images, run)
    assert result.code == 0, result.err
    assert [e["step"] for e in events(run, "preempted")] == [4]
    assert events(run, "eval") == []
    train(2, images, tmp_path, "--run.name=run", FEW)
    check_same(run, reference)


@pytest.mark.slow
def test_a_run_ends_before_its_time_limit(images: Path, tmp_path: Path) -> None:
    begun, run = time.time(), tmp_path / "run"
    train(2, images, tmp_path, "--run.name=run", "--train.epochs=10000", "--run.time_limit=30")
    (preempted,) = events(run, "preempted")
    assert preempted["cause"] == "time that runs out"
    assert preempted["time"] - begun < 35
    assert f"step-{preempted['step']:08d}" == (run / "checkpoints/last").resolve().name
    assert read_status(run)["status"] == "preempted"


@pytest.mark.slow
def test_torchrun_restarts_a_group_in_which_a_process_hangs(
    reference: Path, images: Path, tmp_path: Path
) -> None:
    """Which is found by its silence, named, and killed."""
    options = [FEW, "--checkpoint.interval_steps=2", "--runtime.hang_timeout=5"]
    options += ["--run.resume=never"]
    restarts, run = ("--max-restarts=2",), tmp_path / "run"
    with running(2, images, tmp_path, *options, torchrun=restarts) as launcher:
        wait_for(lambda: len(losses(run)) > 4)
        os.kill(workers(launcher.pid)[1], signal.SIGSTOP)
        out, _ = launcher.communicate(timeout=120)
    assert launcher.returncode == 0, out[-3000:]
    assert "no sign of life of process 1 (host " in out
    assert "after 5 s without progress" in out
    assert [e["restarts"]["torchrun_restarts"] for e in events(run, "resume")] == ["1"]
    check_same(run, reference)


@pytest.mark.slow
@pytest.mark.parametrize("interval", ["1", "7"])
def test_a_step_that_is_not_finite_is_skipped(interval: str, images: Path, tmp_path: Path) -> None:
    run, log_interval = tmp_path / "run", f"--train.log_interval={interval}"
    result = train_with(not_finite, (6, 18), images, run, SKIP, log_interval)
    assert result.code == 0, result.err
    bad = events(run, "nonfinite")
    assert [(e["step"], e["skipped"]) for e in bad] == [(6, True), (18, True)]
    assert all("loss is nan" in e["what"] and len(e["paths"]) == 7 for e in bad)
    assert all(Path(path).is_file() for e in bad for path in e["paths"])
    trained = [e for e in events(run, "train") if e["loss"] is not None]
    assert sum(e["steps"] for e in trained) == 38


@pytest.mark.slow
def test_a_run_that_is_never_finite_again_stops(images: Path, tmp_path: Path) -> None:
    result = train_with(not_finite, range(6, 40), images, tmp_path / "run", SKIP)
    assert result.code != 0
    assert "take a smaller --optim.lr" in result.said[0]
    assert events(tmp_path / "run", "nonfinite")[0]["step"] == 6
    assert read_status(tmp_path / "run")["status"] == "failed"
