"""Errors of networks' averaged probabilities, on any number of processes."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import SIDE, evaluate
from tests.data.loading import scan
from tests.networks import CLASSES, MEAN, save_network, ten_crops

SIZES = {"paper": 67, "half_column": 70}
"""Networks, and the size of their crops, for which no image is resized."""


@torch.no_grad()
def test_evaluation_is_a_plain_loop(images: Path, tmp_path: Path) -> None:
    """Over two networks and crops of images of several shapes, of which one is corrupt."""
    root = shutil.copytree(images, tmp_path / "images")
    files = sorted((root / "val").rglob("*.jpg"))
    noise = np.random.default_rng(3).integers(0, 255, (2, SIDE + 14, SIDE, 3), np.uint8)
    Image.fromarray(noise[0]).save(files[2])
    Image.fromarray(noise[1].transpose(1, 0, 2)).save(files[7])
    scan(root)  # of which all images are good
    files.pop(4).write_bytes(b"")
    labels = torch.tensor([CLASSES.index(file.parent.name) for file in files])
    runs, probabilities = [], []
    for arch, size in SIZES.items():
        run, network = save_network(tmp_path / arch, arch, size)
        runs.append(str(run))
        crops = [ten_crops(Image.open(file), size / SIDE, size, MEAN) for file in files]
        probabilities.append(network(torch.cat(crops)).double().softmax(1))
    mean = torch.stack(probabilities).mean(0).view(len(files), 10, len(CLASSES))
    options = ["--checkpoint", *runs, f"--data.root={root}", "--data.on_corrupt_image=skip"]
    for num_crops, each in ((1, mean[:, 8]), (10, mean.mean(1))):  # the ninth is the center
        more = ["--ten_crop"] * (num_crops == 10)
        alone, two = (evaluate(processes, *options, *more) for processes in (0, 2))
        assert (alone["checkpoints"], alone["num_crops"]) == (2, num_crops)
        assert (alone["images"], alone["num_skipped"]) == (12, 1)
        wrong = (each.argmax(1) != labels).double().mean()
        assert alone["top1_error"] == pytest.approx(100 * float(wrong))
        assert alone["loss"] == pytest.approx(-float(each[range(12), labels].log().mean()), 1e-6)
        assert two == alone | {"loss": pytest.approx(alone["loss"], rel=1e-9)}
