"""Checkpoints: whole or not at all."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from alexnet_dist.errors import Failure
from alexnet_dist.training import checkpoint


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def tensors() -> dict[str, torch.Tensor]:
    kernel = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    return {"model.conv1.weight": kernel, "model.fc8.bias": torch.randn(5)}


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    written = tensors()
    made = checkpoint.save(tmp_path, 12, written, {"best": None, "loss": 0.1 + 0.2}, best=True)
    read = {name: torch.zeros_like(tensor) for name, tensor in written.items()}
    checkpoint.load(made, read)
    assert all(torch.equal(read[name], written[name]) for name in written)
    assert checkpoint.read_state(made)["loss"] == 0.1 + 0.2
    assert (tmp_path / "last").resolve() == (tmp_path / "best").resolve() == made
    assert not list(tmp_path.glob(".partial*"))


def test_no_file_in_it_is_a_pickle(tmp_path: Path) -> None:
    made = checkpoint.save(tmp_path, 1, tensors(), {}, best=False)
    assert {file.suffix for file in made.iterdir()} == {".json", ".safetensors"}


def test_the_newest_the_best_and_the_last_are_kept(tmp_path: Path) -> None:
    for step in range(1, 6):
        checkpoint.save(tmp_path, step, {"model.a": torch.ones(1)}, {}, best=step == 2)
        checkpoint.remove_old(tmp_path, keep=2)
    kept = sorted(path.name for path in tmp_path.glob("step-*"))
    assert kept == ["step-00000002", "step-00000004", "step-00000005"]


def test_a_save_that_fails_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = checkpoint.save(tmp_path, 1, tensors(), {}, best=False)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.dcp, "save", full)
    with pytest.raises(checkpoint.SaveFailed, match="No space left on device"):
        checkpoint.save(tmp_path, 2, tensors(), {}, best=False)
    assert (tmp_path / "last").resolve() == first
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last", "step-00000001"]


def test_an_interrupt_ends_a_save_and_is_not_taken_for_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.HuggingFaceStorageWriter, "write_data", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(tmp_path, 1, tensors(), {}, best=False)


def test_another_network_and_damage_are_named(tmp_path: Path) -> None:
    made = checkpoint.save(tmp_path, 1, tensors(), {}, best=False)
    with pytest.raises(Failure, match=r"another network: model\.fc8\.bias should be \[7\]"):
        checkpoint.load(made, {"model.fc8.bias": torch.zeros(7)})
    for file in made.glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(Failure, match="is damaged"):
        checkpoint.load(made, {"model.fc8.bias": torch.zeros(5)})
    (made / "state.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(Failure, match="format 99"):
        checkpoint.read_state(made)
    with pytest.raises(Failure, match="there is no checkpoint at"):
        checkpoint.find(str(tmp_path / "nowhere"))
