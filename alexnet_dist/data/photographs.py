"""Photographs from anywhere: found, decoded in threads, and cropped as an evaluation crops."""

import glob
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from alexnet_dist.data.corrupt_images import prefetch, to_device
from alexnet_dist.data.datasets import is_image_name
from alexnet_dist.data.formats import decode, validate_bytes
from alexnet_dist.data.plan import EvalPlan, NumCrops
from alexnet_dist.data.transforms import Normalization, crop_resize_flip, normalize


def expand_paths(words: Iterable[str]) -> Iterator[str]:
    """The files that people mean: a file itself, the images anywhere below a folder, those that a
    pattern matches. What is none of these stays as it is, and is missed when it is read."""
    for word in words:
        path = Path(word)
        found: list[Path] = []
        if path.is_dir():
            found = [file for file in path.rglob("*") if is_image_name(file.name)]
        elif not path.exists() and glob.has_magic(word):
            found = [Path(file) for file in glob.glob(word, recursive=True)]
        yield from sorted(str(file) for file in found if file.is_file()) or [word]


@dataclass(frozen=True)
class LoadedImage:
    """An image's crops, uint8 [n, 3, size, size], or why it has none."""

    path: str
    crops: Tensor | None
    error: str = ""


def load_crops(path: str, crop_fraction: float, size: int, num_crops: NumCrops) -> LoadedImage:
    """The crops of an image file, in the order of ``EvalPlan``."""
    try:
        if Path(path).is_dir():
            return LoadedImage(path, None, "there is no image in this folder")
        pixels = torch.from_numpy(np.array(decode(validate_bytes(np.fromfile(path, np.uint8)))))
    except OSError as error:
        return LoadedImage(path, None, error.strerror or str(error))
    plan = EvalPlan(np.array([pixels.shape[:2]]), 1, crop_fraction, num_crops)
    samples, image = plan.samples(np.arange(1)), pixels.permute(2, 0, 1)
    boxes = zip(samples.crop_boxes, samples.flips, strict=True)
    crops = [crop_resize_flip(image, box, bool(flip), size) for box, flip in boxes]
    return LoadedImage(path, torch.stack(crops))


def iter_batches(
    paths: Iterable[str],
    crop_fraction: float,
    size: int,
    num_crops: NumCrops,
    *,
    batch_size: int,
    threads: int,
) -> Iterator[list[LoadedImage]]:
    """The images at ``paths`` in order, ``batch_size`` at a time, decoded ahead in ``threads``."""
    remaining = iter(paths)

    def load(path: str) -> LoadedImage:
        return load_crops(path, crop_fraction, size, num_crops)

    with ThreadPoolExecutor(threads) as pool:
        chunks = iter(lambda: list(islice(remaining, batch_size)), [])
        yield from prefetch((list(pool.map(load, c)) for c in chunks), 1, torch.device("cpu"))


def normalize_crops(crops: Tensor, normalization: Normalization, device: torch.device) -> Tensor:
    """Crops uint8 [b, 3, size, size] as the network's input, float32, without PCA noise."""
    means = np.tile(normalization.mean.astype(np.float32), (len(crops), 1))
    stds = normalization.stds(0)
    return normalize(*(to_device(each, device) for each in (crops, means, stds)))
