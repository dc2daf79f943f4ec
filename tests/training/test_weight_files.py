"""Weights in files: an export, torchvision's state_dict, and what is neither."""

import os
from pathlib import Path

import pytest
import torch

from alexnet_dist.errors import UserError
from alexnet_dist.export import main as export
from alexnet_dist.model import build_model
from alexnet_dist.setup import load_model
from alexnet_dist.training.checkpoint import read_state
from tests.conftest import Saved, error_of
from tests.networks import command, weights_manager


@pytest.fixture(scope="module")
def saved(paper: Saved, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """A network as safetensors, and itself."""
    folder = tmp_path_factory.mktemp("network")
    command(export, "--checkpoint", paper[0], "--out", folder)
    return folder / "model.safetensors", paper[1]


@pytest.mark.usefixtures("mesh")
def test_a_run_starts_from_safetensors(saved: Saved) -> None:
    weights, network = saved
    for arch, outputs, same, from_scratch in (
        ("paper", 3, True, []),
        ("paper", 3, False, ["fc8.weight", "fc8.bias"]),
        ("paper", 7, False, ["fc8.weight", "fc8.bias"]),
        ("original146", 3, True, ["conv6.weight", "conv6.bias"]),
    ):
        mine = build_model(arch, num_classes=outputs, image_size=67)
        initial = {name: value.clone() for name, value in mine.named_parameters()}
        parameters = dict(mine.named_parameters())
        manager, _ = weights_manager(Path(), parameters)
        assert manager.load_pretrained(str(weights), lambda _, same=same: same) == from_scratch
        theirs = dict(network.named_parameters())
        wanted = theirs | {name: initial[name] for name in from_scratch}
        for name, parameter in mine.named_parameters():
            assert torch.equal(parameter, wanted[name]), name
    other = dict(build_model("owt", image_size=67).named_parameters())
    message = error_of(load_model(str(weights)).load_weights, other)
    assert "another network: model.conv1.weight should be [64" in message


def test_what_cannot_be_read(saved: Saved, tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "harm"),)

    content = saved[0].read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(content[: len(content) // 2])
    (tmp_path / "text.safetensors").write_text("weights")
    torch.save({"a": Harm()}, tmp_path / "harm.pth")
    torch.save(saved[1], tmp_path / "whole.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"features.0.weight": torch.zeros(3)}, tmp_path / "other.pth")
    later = content.replace(b'"alexnet_dist":"4"', b'"alexnet_dist":"9"', 1)
    (tmp_path / "later.safetensors").write_bytes(later)
    for name, sentence in {
        "cut.safetensors": "is corrupt, or cannot be read",
        "text.safetensors": "is corrupt, or cannot be read",
        "harm.pth": r"holds posix\.mkdir and not tensors .* write model\.state_dict\(\) instead",
        "whole.pth": r"holds alexnet_dist\.model\.\S+ and not tensors",
        "list.pth": "holds something else than tensors by name",
        "other.pth": "neither an export of this package nor torchvision's AlexNet",
        "later.safetensors": "was written by a newer alexnet_dist",
    }.items():
        with pytest.raises(UserError, match=sentence) as failure:
            load_model(str(tmp_path / name))
        assert str(tmp_path / name) in str(failure.value)
        assert "\n" not in str(failure.value)
        assert failure.value.on_all_ranks
    assert not (tmp_path / "harm").exists()


def test_checkpoints_of_pytorchs_example(tmp_path: Path) -> None:
    """Its network is wrapped by DistributedDataParallel, or its features by DataParallel."""
    weights = {"features.0.weight": torch.ones(64, 3, 11, 11), "classifier.6.weight": torch.ones(2)}
    for old, new in (("features", "module.features"), ("features.", "features.module.")):
        wrapped = {name.replace(old, new): tensor for name, tensor in weights.items()}
        torch.save({"epoch": 9, "arch": "alexnet", "state_dict": wrapped}, tmp_path / "a.pth.tar")
        state = read_state(tmp_path / "a.pth.tar")
        assert list(state["tensors"]) == [f"model.{name}" for name in weights]
        assert state["classes"] == ["0", "1"]
