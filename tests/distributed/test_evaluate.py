"""Errors of two networks' averaged probabilities, on any number of processes."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from alexnet_dist.model import Network
from tests.conftest import SIDE, launch
from tests.data.loading import scan
from tests.networks import CLASSES, MEAN, save_network

CORRUPT = 4
"""The validation image that is."""


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Network]:
    folder = tmp_path_factory.mktemp("networks")
    return dict(save_network(folder / arch, arch) for arch in ("paper", "half_column"))


def evaluate(processes: int, networks: dict[Path, Network], *options: str) -> dict:
    words = ["--checkpoint", *map(str, networks), *options]
    result = launch(processes, *words, module="alexnet_dist.evaluate")
    assert result.code == 0, result.err[-3000:]
    return json.loads(result.out.splitlines()[-1])


def test_two_networks_on_any_number_of_processes(
    networks: dict[Path, Network], images: Path, tmp_path: Path
) -> None:
    root = tmp_path / "images"
    shutil.copytree(images, root)
    scan(root)  # of which all images are good
    files = sorted((root / "val").rglob("*.jpg"))
    files.pop(CORRUPT).write_bytes(b"")
    labels = torch.tensor([CLASSES.index(file.parent.name) for file in files])
    crop = slice((SIDE - 67) // 2, (SIDE + 67) // 2)
    pixels = np.stack([np.asarray(Image.open(file), np.float64)[crop, crop] for file in files])
    inputs = torch.tensor((pixels - MEAN).transpose(0, 3, 1, 2), dtype=torch.float32)
    with torch.no_grad():
        each = [model(inputs).double().softmax(1) for model in networks.values()]
    probabilities = torch.stack(each).mean(0)
    wanted = {
        "top1_error": 100 * (probabilities.argmax(1) != labels).double().mean().item(),
        "loss": -probabilities[range(len(labels)), labels].log().mean().item(),
    }
    for processes in (0, 2):
        skip = [f"--data.root={root}", "--data.on_corrupt_image=skip"]
        result = evaluate(processes, networks, *skip)
        assert (result["images"], result["num_skipped"]) == (len(labels), 1) == (12, 1)
        assert result["top1_error"] == pytest.approx(wanted["top1_error"])
        assert result["loss"] == pytest.approx(wanted["loss"], rel=1e-4)


@pytest.mark.slow
def test_ten_crops_on_any_number_of_processes(networks: dict[Path, Network], images: Path) -> None:
    options = [f"--data.root={images}", "--ten_crop"]
    alone, three = (evaluate(processes, networks, *options) for processes in (0, 3))
    assert alone["images"] == 13
    assert (alone["checkpoints"], alone["num_crops"]) == (2, 10)
    assert three == alone | {"loss": pytest.approx(alone["loss"], rel=1e-9)}
