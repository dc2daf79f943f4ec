"""Errors of several networks' averaged chances, on any number of processes."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from alexnet_dist.model import build_on_meta
from alexnet_dist.training import checkpoint
from tests.conftest import events, launch, train

BAD = 4
"""The validation image that is spoiled."""
OTHER = ["--model.arch=half_column", "--data.image_size=71", "--train.seed=5"]


@pytest.fixture(scope="module")
def networks(images: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Runs of two networks, of another variant, image size and statistics each."""
    runs = tmp_path_factory.mktemp("networks")
    train(0, images, runs, "--run.name=a", "--train.epochs=3")
    train(0, images, runs, "--run.name=b", "--optim.lr=0.003", *OTHER)
    file = checkpoint.find_checkpoint(str(runs / "b")) / "state.json"
    state = json.loads(file.read_text())
    state["statistics"]["mean"] = [120.0, 85.0, 115.0]
    file.write_text(json.dumps(state))
    manifest = json.loads((file.parent / "manifest.json").read_text())
    manifest["files"]["state.json"] = hashlib.sha256(file.read_bytes()).hexdigest()
    (file.parent / "manifest.json").write_text(json.dumps(manifest))
    return runs / "a", runs / "b"


def average(processes: int, *words: object) -> dict:
    result = launch(
        processes, "--checkpoint", *(str(word) for word in words), module="alexnet_dist.evaluate"
    )
    assert result.code == 0, result.err[-3000:]
    return json.loads(result.out.splitlines()[-1])


def test_a_network_averaged_with_itself(networks: tuple[Path, Path]) -> None:
    run, _ = networks
    (best,) = [e for e in events(run, "eval") if e["step"] == events(run, "best")[-1]["step"]]
    counted = average(2, run, run)
    for name in ("top1_error", "top5_error", "images"):
        assert counted[name] == best[name]
    assert counted["loss"] == pytest.approx(best["loss"], rel=1e-5)
    assert counted["checkpoints"] == 2


def test_two_networks_on_any_number_of_processes(
    networks: tuple[Path, Path], images: Path, tmp_path: Path
) -> None:
    root = tmp_path / "images"
    shutil.copytree(images, root)
    files = sorted((root / "val").rglob("*.jpg"))
    files[BAD].write_bytes(b"")  # its index, which came along, knows it as good
    chances = torch.stack([_chances(run, files) for run in networks]).mean(0)
    classes = sorted(path.name for path in (root / "val").iterdir())
    labels = [classes.index(path.parent.name) for n, path in enumerate(files) if n != BAD]
    right = chances[torch.arange(len(labels)), torch.tensor(labels)]
    wanted = {
        "top1_error": 100 * int((chances.argmax(1) != torch.tensor(labels)).sum()) / len(labels),
        "loss": -right.log().mean().item(),
    }
    for processes in (0, 2):
        skip = [f"--data.root={root}", "--data.on_corrupt_image=skip"]
        counted = average(processes, *networks, *skip)
        assert counted["images"] == len(labels) == 12
        assert counted["num_skipped"] == 1
        assert counted["top1_error"] == wanted["top1_error"]
        assert counted["loss"] == pytest.approx(wanted["loss"], rel=1e-4)


@pytest.mark.slow
def test_ten_views_on_any_number_of_processes(networks: tuple[Path, Path]) -> None:
    alone, three = (average(n, *networks, "--ten_crop") for n in (0, 3))
    assert alone["images"] == 13
    assert (alone["checkpoints"], alone["num_crops"]) == (2, 10)
    assert three == alone | {"loss": pytest.approx(alone["loss"], rel=1e-9)}


def _chances(run: Path, files: list[Path]) -> torch.Tensor:
    """What the run's best network makes of the images' centres, float64 [images, classes]."""
    found = checkpoint.find_checkpoint(str(run))
    state = checkpoint.read_state(found)
    side = state["config"]["data"]["image_size"]
    model = build_on_meta(state["config"]["model"]["arch"], num_classes=3, image_size=side)
    model = model.to_empty(device="cpu").eval()
    tensors = {k: v for file in found.glob("*.safetensors") for k, v in load_file(file).items()}
    model.load_state_dict(
        {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
    )
    pixels = []
    for number, file in enumerate(files):
        if number != BAD:
            image = np.asarray(Image.open(file), np.float64) - state["statistics"]["mean"]
            top = (image.shape[0] - side) // 2
            pixels.append(image[top : top + side, top : top + side].transpose(2, 0, 1))
    with torch.no_grad():
        return model(torch.tensor(np.array(pixels), dtype=torch.float32)).double().softmax(1)
