"""An offline W&B run, read back from its own file; and a W&B that fails or hangs."""

import atexit
import sys
import time
import types
from pathlib import Path

import pytest

from alexnet_dist.tracking import wandb as tracking
from tests.conftest import Result, environment, train
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


def fake(monkeypatch: pytest.MonkeyPatch, init: object) -> None:
    module = types.ModuleType("wandb")
    module.init = init  # type: ignore[attr-defined]
    module.Settings = lambda **_: None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)


def sink(folder: Path, mode: str) -> tracking.WandbSink:
    return tracking.WandbSink(folder, "x", {"wandb": {"mode": mode, "project": "p"}})


def test_wandb_that_fails_warns_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def init(**_: object) -> None:
        raise RuntimeError("no such server")

    fake(monkeypatch, init)
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
