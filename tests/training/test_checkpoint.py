"""Checkpoints: asynchronous, complete or absent, and verified when read."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from alexnet_dist.training import checkpoint
from alexnet_dist.training.checkpoint import CheckpointManager, load_tensors, read_state
from tests.conftest import error_of, full_disk
from tests.networks import weights_manager

pytestmark = pytest.mark.usefixtures("mesh")


def weights() -> dict[str, torch.Tensor]:
    kernel = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    return {"conv1.weight": kernel, "fc8.bias": torch.randn(5)}


def save(manager: CheckpointManager, step: int, *, best: Any = None, **state: Any) -> Path:
    manager.save({"step": step, "last_eval_step": -1, **state}, best)
    manager.wait()
    return manager.folder / f"step-{step:08d}"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_checkpoint_holds_what_was_there_when_the_save_began(tmp_path: Path) -> None:
    """Twice, to the bit, whatever training does meanwhile."""
    live = weights()
    manager, events = weights_manager(tmp_path, live)
    for step in (12, 13):
        saved = {name: tensor.clone() for name, tensor in live.items()}
        manager.save({"step": step, "last_eval_step": 7, "loss": 0.1 + 0.2}, {"step": step})
        for tensor in live.values():
            tensor.mul_(-2)
        manager.wait()
        path = tmp_path / f"step-{step:08d}"
        assert (tmp_path / "last").resolve() == (tmp_path / "best").resolve() == path
        found, warnings = manager.restore(lambda state: None)
        assert all(torch.equal(live[name], saved[name]) for name in saved)
        assert (found["loss"], found["best"], warnings) == (0.1 + 0.2, {"step": step}, [])
        assert manager.last_saved == (step, 7)
        assert {file.suffix for file in path.iterdir()} == {".json", ".safetensors"}  # no pickles
    assert [event["event"] for event in events] == ["checkpoint", "best"] * 2
    assert names(tmp_path) == ["best", "last", "step-00000012", "step-00000013"]


def test_checkpoint_saves_asynchronously(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = checkpoint._Writer.write_data

    def slow(*arguments: Any) -> Any:
        time.sleep(1)
        return write(*arguments)

    monkeypatch.setattr(checkpoint._Writer, "write_data", slow)
    manager, events = weights_manager(tmp_path, weights())
    begun = time.monotonic()
    manager.save({"step": 1, "last_eval_step": -1})
    manager.wait(block=False)
    assert time.monotonic() - begun < 0.5
    assert not events
    manager.wait()
    assert events[0]["seconds"] == manager.longest_save >= 1


def test_checkpoint_retention(tmp_path: Path) -> None:
    """The newest, the best, and some for good."""
    manager, _ = weights_manager(tmp_path, weights(), keep_last=2, keep_every=3)
    for step in range(1, 8):
        save(manager, step, best={"loss": 1.0} if step == 2 else None)
    assert names(tmp_path)[2:] == [f"step-{step:08d}" for step in (2, 3, 6, 7)]
    assert (tmp_path / "best").resolve().name == "step-00000002"


def test_a_kill_while_a_checkpoint_is_replaced_loses_none(tmp_path: Path) -> None:
    manager, _ = weights_manager(tmp_path, weights())
    path = save(manager, 1, best={"step": 1}, loss=0.5)
    path.rename(tmp_path / ".replaced-step-00000001")  # as it is between the two renames
    (tmp_path / "best").unlink()
    (tmp_path / ".partial-step-00000001").mkdir()
    found, warnings = manager.restore(lambda state: None)
    assert (found["loss"], warnings) == (0.5, [])
    assert names(tmp_path) == ["best", "last", "step-00000001"]
    save(manager, 1, loss=0.25)
    assert read_state(path)["loss"] == 0.25
    assert names(tmp_path) == ["best", "last", "step-00000001"]


def test_checkpoint_survives_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manager, events = weights_manager(tmp_path, weights())
    first = save(manager, 1, best={"loss": 2.0})

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint._Writer, "write_data", full_disk)
        save(manager, 2, best={"loss": 1.0})
    assert events[-1]["event"] == "checkpoint_failed"
    assert "(No space left on device); training continues" in events[-1]["message"]
    assert (manager.best, manager.last_saved) == ({"loss": 2.0}, (1, -1))
    assert (tmp_path / "last").resolve() == first
    assert names(tmp_path) == ["best", "last", "step-00000001"]
    save(manager, 3)
    assert events[-1]["event"] == "checkpoint"


def flip(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


CORRUPTIONS = {
    "a flipped bit in a tensor": lambda path: flip(next(path.glob("*.safetensors")), -1),
    "a flipped bit in the state": lambda path: flip(path / "state.json", 12),
    "a missing file": lambda path: (path / "state.json").unlink(),
    "no manifest": lambda path: (path / "manifest.json").unlink(),
    "a manifest of zeros": lambda path: (path / "manifest.json").write_bytes(bytes(100)),
}


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_checkpoint_that_is_corrupt_is_quarantined(corruption: str, tmp_path: Path) -> None:
    """And is not offered any more."""
    tmp_path /= "checkpoints"
    manager, _ = weights_manager(tmp_path, weights())
    save(manager, 9, best={"step": 9})
    second = save(manager, 10, best={"step": 10})
    CORRUPTIONS[corruption](second)
    assert "is corrupt" in error_of(load_tensors, second, manager.state_tensors())
    state, warnings = manager.restore(lambda state: None)
    assert state["step"] == 9
    assert len(warnings) == 1
    assert f"the checkpoint {second} is corrupt" in warnings[0]
    for link in ("last", "best"):
        assert (tmp_path / link).resolve().name == "step-00000009"
    assert names(tmp_path) == ["best", "corrupt-step-00000010", "last", "step-00000009"]
    assert checkpoint.find_checkpoint(str(tmp_path.parent)) == tmp_path / "step-00000009"


def test_checkpoint_of_another_network_or_version_is_refused(tmp_path: Path) -> None:
    path = save(weights_manager(tmp_path, weights())[0], 1)
    message = error_of(load_tensors, path, {"model.fc8.bias": torch.zeros(7)})
    assert "another network: model.fc8.bias should be [7]" in message
    state = json.loads((path / "state.json").read_text())
    versions = {None: "alexnet_dist 0.1.0", 3: "an unreleased alexnet_dist", 99: "a newer"}
    for format_, version in versions.items():
        state |= {"format": format_}
        kept = {name: value for name, value in state.items() if value is not None}
        (path / "state.json").write_text(json.dumps(kept))
        assert f"was written by {version}" in error_of(read_state, path)
    old = tmp_path / "old.safetensors"
    save_file({"a": torch.zeros(1)}, old, {"alexnet_dist": "1", "classes": "[]"})
    assert "was written by alexnet_dist 0.1.0" in error_of(read_state, old)
    nowhere = str(tmp_path / "nowhere")
    assert "there is no checkpoint at" in error_of(checkpoint.find_checkpoint, nowhere)


def test_checkpoint_balances_replicated_tensors_over_processes() -> None:
    tensors = {n: torch.zeros(size) for n, size in {"a": 100, "b": 60, "c": 50, "d": 10}.items()}
    shares = [set(checkpoint._balance_replicated(tensors, rank, 3)) for rank in range(3)]
    assert shares == [{"a"}, {"b"}, {"c", "d"}]
