"""Checkpoints: beside training, whole or not at all, and checked when read."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from alexnet_dist.errors import UserError
from alexnet_dist.training import checkpoint
from alexnet_dist.training.checkpoint import CheckpointManager, Saved

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def checkpoints(folder: Path, **options: object) -> CheckpointManager:
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup)
    return CheckpointManager(folder, group, CPU, **options)  # type: ignore[arg-type]


def tensors() -> dict[str, torch.Tensor]:
    kernel = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    return {"model.conv1.weight": kernel, "model.fc8.bias": torch.randn(5)}


def save(to: CheckpointManager, step: int, *, best: bool = False, **state: object) -> Saved:
    to.begin({"step": step, **state}, tensors(), best=best)
    saved = to.settle()
    assert saved is not None
    return saved


def flip(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


def test_what_is_read_is_what_was_there_when_it_began(tmp_path: Path) -> None:
    mine = checkpoints(tmp_path)
    live = tensors()
    written = {name: tensor.clone() for name, tensor in live.items()}
    mine.begin({"step": 12, "loss": 0.1 + 0.2}, live, best=True)
    for tensor in live.values():  # training goes on
        tensor.zero_()
    saved = mine.settle()
    assert saved is not None
    assert saved.failure == ""
    read = {name: torch.zeros_like(tensor) for name, tensor in written.items()}
    checkpoint.load(saved.path, read)
    assert all(torch.equal(read[name], written[name]) for name in written)
    assert checkpoint.read_state(saved.path)["loss"] == 0.1 + 0.2
    assert (tmp_path / "last").resolve() == (tmp_path / "best").resolve() == saved.path
    assert not list(tmp_path.glob(".partial*"))


def test_training_does_not_wait_for_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = checkpoint._Writer.write_data

    def slowly(*arguments: object) -> object:
        time.sleep(1)
        return write(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(checkpoint._Writer, "write_data", slowly)
    mine = checkpoints(tmp_path)
    began = time.monotonic()
    mine.begin({"step": 1}, tensors(), best=False)
    assert mine.settle(wait=False) is None
    assert time.monotonic() - began < 0.5
    saved = mine.settle()
    assert saved is not None
    assert saved.seconds >= 1
    assert mine.settle() is None


def test_no_file_in_it_is_a_pickle(tmp_path: Path) -> None:
    made = save(checkpoints(tmp_path), 1).path
    assert {file.suffix for file in made.iterdir()} == {".json", ".safetensors"}


def test_the_newest_the_best_and_some_for_good_are_kept(tmp_path: Path) -> None:
    mine = checkpoints(tmp_path, keep=2, keep_every=3)
    for step in range(1, 8):
        save(mine, step, best=step == 2)
    kept = sorted(path.name for path in tmp_path.glob("step-*"))
    assert kept == [f"step-{step:08d}" for step in (2, 3, 6, 7)]
    assert (tmp_path / "best").resolve().name == "step-00000002"


def test_a_save_that_fails_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = checkpoints(tmp_path)
    first = save(mine, 1).path

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint._Writer, "write_data", full)
        assert save(mine, 2).failure == "No space left on device"
    assert (tmp_path / "last").resolve() == first
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last", "step-00000001"]
    assert save(mine, 3).failure == ""


def test_the_same_step_again_takes_its_place(tmp_path: Path) -> None:
    mine = checkpoints(tmp_path)
    save(mine, 1, evaluated=0)
    made = save(mine, 1, evaluated=1).path
    assert checkpoint.read_state(made)["evaluated"] == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last", "step-00000001"]


DAMAGES = {
    "a flipped bit in a tensor": lambda made: flip(next(made.glob("*.safetensors")), -1),
    "a cut file": lambda made: next(made.glob("*.safetensors")).write_bytes(b"short"),
    "a flipped bit in the state": lambda made: flip(made / "state.json", 12),
    "a missing file": lambda made: (made / "state.json").unlink(),
    "no manifest": lambda made: (made / "manifest.json").unlink(),
    "a manifest of zeros": lambda made: (made / "manifest.json").write_bytes(bytes(100)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one_is_set_aside_and_the_one_before_it_used(damage: str, tmp_path: Path) -> None:
    mine = checkpoints(tmp_path)
    first, second = save(mine, 9).path, save(mine, 10, best=True).path
    DAMAGES[damage](second)
    with pytest.raises(UserError, match="is damaged"):
        checkpoint.load(second, tensors())
    found, sentences = mine.newest()
    assert found == first
    assert len(sentences) == 1
    assert f"the checkpoint {second} is damaged" in sentences[0]
    assert (tmp_path / "last").resolve() == first
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "damaged-step-00000010",
        "last",
        "step-00000009",
    ]


def test_what_a_cut_life_left_behind_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".partial-step-00000003").mkdir()
    assert checkpoints(tmp_path).newest() == (None, [])
    assert not list(tmp_path.iterdir())


def test_another_network_and_another_version_are_named(tmp_path: Path) -> None:
    made = save(checkpoints(tmp_path), 1).path
    with pytest.raises(UserError, match=r"another network: model\.fc8\.bias should be \[7\]"):
        checkpoint.load(made, {"model.fc8.bias": torch.zeros(7)})
    (made / "manifest.json").write_text('{"format": 99, "files": {}}')
    with pytest.raises(UserError, match="format 99"):
        checkpoint.find_damage(made)
    with pytest.raises(UserError, match="there is no checkpoint at"):
        checkpoint.find(str(tmp_path / "nowhere"))


def test_processes_share_out_what_all_have() -> None:
    sizes = {"a": 100, "b": 60, "c": 50, "d": 10}
    whole = {name: torch.zeros(size) for name, size in sizes.items()}
    shares = [set(checkpoint._share(whole, rank, 3)) for rank in range(3)]
    assert shares == [{"a"}, {"b"}, {"c", "d"}]
