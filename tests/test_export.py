"""Exported files: each computes what the network does, and says where it comes from."""

import json
import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from safetensors import safe_open
from safetensors.torch import load_file

from alexnet_dist import export
from alexnet_dist.export import main
from alexnet_dist.parallel import mesh
from alexnet_dist.setup import load_model
from tests.conftest import Saved, error_of, evaluate, full_disk, train, write_images
from tests.networks import CLASSES, alone, command, save_network

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def exported(paper: Saved, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``paper`` in two formats."""
    folder, formats = tmp_path_factory.mktemp("exported"), ["--format", "safetensors", "onnx"]
    command(main, "--checkpoint", paper[0], "--out", folder, *formats)
    return folder


def images(count: int, size: int = 67) -> torch.Tensor:
    """Color gradients, normalized as "centered" does it."""
    coarse = torch.rand(count, 3, 5, 5, generator=torch.Generator().manual_seed(count))
    return torch.nn.functional.interpolate(coarse, size=size, mode="bicubic") * 255 - 110


@torch.no_grad()
def logits(model: torch.nn.Module, x: torch.Tensor) -> np.ndarray:
    return model(x).numpy()


def test_safetensors_are_read_back_to_the_bit(paper: Saved, exported: Path) -> None:
    run, model = paper
    file = exported / "model.safetensors"
    alone()
    before, after = load_model(str(run)), load_model(str(file))
    found = after.model(CPU)
    mesh.destroy_distributed()
    for name, parameter in model.named_parameters():
        assert torch.equal(found.get_parameter(name), parameter), name
    for name in ("classes", "statistics", "step", "best", "images", "versions"):
        assert after.state[name] == before.state[name]
    mine, theirs = before.config, after.config
    assert (theirs.data.root, theirs.run.output_dir) == (None, "runs")  # nobody's paths
    mine.data.root, mine.run.output_dir = None, "runs"
    assert mine == theirs
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
    assert str(run.parent) not in json.dumps(header)
    assert json.loads(header["classes"]) == CLASSES
    assert json.loads(header["arch"]) == "paper"


def test_onnx_takes_any_batch(paper: Saved, exported: Path) -> None:
    session = pytest.importorskip("onnxruntime").InferenceSession(exported / "model.onnx")
    assert session.get_inputs()[0].shape == ["batch", 3, 67, 67]
    classes = session.get_modelmeta().custom_metadata_map["classes"]
    assert json.loads(classes) == CLASSES
    for count in (1, 4):
        expected = logits(paper[1], images(count))
        (found,) = session.run(None, {"images": images(count).numpy()})
        np.testing.assert_allclose(found, expected, atol=2e-3)
        assert np.abs(expected).max() > 0.5


def test_the_model_card_has_the_facts(exported: Path) -> None:
    card = (exported / "MODEL_CARD.md").read_text()
    for fact in ("arch paper", "top1_error 12.5", "step 12", "[B, 3, 67, 67]", "blue, green, red"):
        assert fact in card
    assert "mean [120.5, 110.25, 99.0], std [1.0, 1.0, 1.0]" in card
    assert "model.onnx: " in card
    assert str(exported.parent) not in card


def test_torchvisions_class_loads_what_is_written(tmp_path: Path) -> None:
    run, model = save_network(tmp_path / "vision", "torchvision")
    command(main, "--checkpoint", run, "--out", tmp_path / "pth", "--format", "torchvision")
    x = images(5) / 57
    theirs = torchvision.models.alexnet(num_classes=3).eval()
    theirs.load_state_dict(torch.load(tmp_path / "pth/torchvision.pth", weights_only=True))
    np.testing.assert_allclose(logits(theirs, x), logits(model, x), atol=1e-3)
    assert np.abs(logits(model, x)).max() > 1


@pytest.mark.slow
def test_torchvisions_weights_are_read_and_exported(tmp_path: Path) -> None:
    """They have no record: the classes are numbers, the normalization ImageNet's."""
    theirs = torchvision.models.alexnet(num_classes=12).eval()
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    x = images(2, 224) / 57
    command(main, "--checkpoint", tmp_path / "theirs.pth", "--out", tmp_path / "theirs")
    alone()
    for file in (tmp_path / "theirs.pth", tmp_path / "theirs/model.safetensors"):
        found = load_model(str(file))
        np.testing.assert_allclose(logits(found.model(CPU), x), logits(theirs, x), atol=1e-6)
        assert found.labels == [str(index) for index in range(12)]
        assert found.normalization.mean == pytest.approx([123.675, 116.28, 103.53])
        assert (found.config.data.image_size, found.config.data.resize_size) == (224, 256)
    mesh.destroy_distributed()
    other = torchvision.models.alexnet(num_classes=12).eval()
    other.load_state_dict(load_file(tmp_path / "theirs/model.safetensors"))
    assert np.array_equal(logits(other, x), logits(theirs, x))


@pytest.mark.slow
def test_an_export_is_evaluated_and_trained(paper: Saved, exported: Path, tmp_path: Path) -> None:
    """Each of two towers takes its half; after a step of next to nothing these are the weights."""
    file, data = exported / "model.safetensors", write_images(tmp_path / "images")
    sources = (["--checkpoint", str(source), f"--data.root={data}"] for source in (paper[0], file))
    first, second = (evaluate(0, *source) for source in sources)
    assert first == second
    options = [f"--model.pretrained={file}", "--run.name=run", "--train.max_steps=1"]
    train(2, data, tmp_path, *options, "--parallel.towers=2", "--optim.lr=1e-12")
    alone()
    model = load_model(str(tmp_path / "run")).model(CPU)
    mesh.destroy_distributed()
    for name, parameter in paper[1].named_parameters():
        torch.testing.assert_close(model.get_parameter(name), parameter, atol=1e-9, rtol=1e-6)


def test_export_refuses(paper: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = ["--checkpoint", paper[0], "--out", tmp_path]
    (tmp_path / "file").touch()

    message = partial(error_of, command, main, *run)
    assert "invalid choice: 'caffe'" in message("--format", "caffe")
    assert "cannot be made" in message("--out", tmp_path / "file/x")
    assert "another network than paper" in message("--format", "torchvision")
    with monkeypatch.context() as patch:
        patch.setattr(export.importlib.util, "find_spec", lambda name: None)
        assert "pip install 'alexnet-dist[export]'" in message("--format", "onnx")
    with monkeypatch.context() as patch:
        patch.setattr(export, "_read", lambda *_: lambda x: x.new_zeros(len(x), 3))
        assert "would not compute what the network" in message()
    monkeypatch.setattr(export, "_write", full_disk)
    assert "cannot be written (No space left on device)" in message()
    assert os.listdir(tmp_path) == ["file"]
