"""An offline W&B run, read back from its own file; and a W&B that fails or hangs."""

import atexit
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from unittest.mock import MagicMock

import pytest

from alexnet_dist.tracking import wandb as tracking
from tests.conftest import TINY, Result, command, environment, events, losses, train
from tests.distributed.groups import alive
from tests.processes import run_group
from tests.tracking.offline import read_back


def test_an_offline_run_resumes_as_one(images: Path, tmp_path: Path) -> None:
    options = ["--run.name=run", "--wandb.mode=offline", "--train.epochs=1"]
    train(2, images, tmp_path, *options, "--train.max_steps=2")
    train(2, images, tmp_path, *options)
    run = tmp_path / "run"
    history, summary, ids, config = read_back(run)
    assert len(ids) == 1
    steps = [int(row["global_step"]) for row in history if "train/loss" in row]
    assert steps == [1, 2, 3, 4]
    assert [int(r["global_step"]) for r in history if "eval/top1_error" in r] == [2, 4]
    names = {name.split("/")[0] for row in history for name in row}
    assert {"kernels", "predictions", "first_batch", "curves"} <= names
    assert "best/top1_error" in summary
    assert "optim" in config


def sink(folder: Path, mode: str) -> tracking.WandbSink:
    return tracking.WandbSink(folder, "x", {"wandb": {"mode": mode, "project": "p"}})


def test_wandb_that_fails_warns_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    init = MagicMock(side_effect=RuntimeError("no such server"))
    monkeypatch.setitem(sys.modules, "wandb", MagicMock(init=init))
    run = sink(tmp_path, "offline")
    for _ in range(5):
        run.log({"event": "train"})
    run.close(60)
    (message,) = capsys.readouterr().err.splitlines()
    assert "no such server" in message
    assert "metrics.jsonl" in message


def hangs(folder: Path) -> None:
    """Track by a W&B that does not answer, and does not end."""

    def init(**_: object) -> None:
        atexit.register(time.sleep, 600)
        time.sleep(600)

    sys.modules["wandb"] = types.SimpleNamespace(init=init, Settings=lambda **_: None)
    run = sink(folder, "offline")
    time.sleep(0.5)
    run.close(0.5)
    print("written")
    sys.exit(0)


def test_wandb_that_hangs_does_not_hold_the_process(tmp_path: Path) -> None:
    code, out, err = run_group(0, environment(), 60, hangs, tmp_path)
    assert code == 0
    assert "does not answer" in err
    assert "written" in out


def no_network(folder: Path) -> None:
    tracking.INIT_TIMEOUT = 2
    run = sink(folder, "online")
    run.log({"event": "train", "step": 3, "epoch": 1, "loss": 2.0})
    run.close(60)


def test_wandb_without_a_network_continues_offline(tmp_path: Path) -> None:
    nowhere = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": 40 * "0"}
    result = Result(*run_group(0, environment(**nowhere), 60, no_network, tmp_path))
    (message,) = result.said
    assert message.endswith("connection refused; tracking continues offline")
    history, _, ids, _ = read_back(tmp_path)
    assert ids == {"x"}
    assert [row["global_step"] for row in history] == ["3"]


def test_auto_is_online_only_with_a_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert tracking.resolve_mode("auto") == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert tracking.resolve_mode("auto") == "online"


@pytest.mark.slow
def test_wandb_whose_service_is_killed_costs_a_warning(images: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = [*TINY, f"--data.root={images}", f"--run.output_dir={tmp_path}", "--run.name=run"]
    options += ["--data.batch_size=1", "--wandb.mode=offline"]
    words, quiet = command(0, "alexnet_dist.train", *options), subprocess.DEVNULL
    with subprocess.Popen(words, stdout=quiet, stderr=subprocess.PIPE, text=True) as process:
        while not (any(run.glob("wandb/offline-run-*/*.wandb")) and len(losses(run)) > 2):
            assert process.poll() is None, process.communicate()
            time.sleep(0.1)
        killed_at = max(losses(run))
        services = alive("wandb-core").items()  # each is told whose it is
        (service,) = (pid for pid, line in services if str(process.pid) in line.split())
        os.kill(service, signal.SIGKILL)
        _, err = process.communicate(timeout=120)
    ended = time.time()
    assert process.returncode == 0, err
    said = Result(0, "", err).said
    assert len(said) == 1, err
    assert "Weights & Biases failed" in said[0]
    assert "Traceback" not in err
    assert sorted(losses(run)) == list(range(1, 63))
    assert killed_at < 50  # or nothing was left to train
    (end,) = events(run, "finished")
    assert end["step"] == 62
    assert ended - end["time"] < 15
