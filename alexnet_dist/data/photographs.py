"""Photographs from anywhere: found, decoded in threads, and cut to the views that networks see."""

import glob
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from alexnet_dist.data.datasets import IMAGE_SUFFIXES
from alexnet_dist.data.formats import decode, validate_bytes
from alexnet_dist.data.plan import Ints, center_crop_boxes, five_crop_boxes
from alexnet_dist.data.transforms import Normalization, crop_resize_flip, normalize

AHEAD = 2
"""Batches that are decoded while the network is at the one before."""


def paths(words: Iterable[str]) -> Iterator[str]:
    """The files that people mean: a file itself, the images anywhere below a folder, those that a
    pattern fits. What is nothing of that stays as it is, to be missed when it is read."""
    for word in words:
        place = Path(word)
        if place.is_dir():
            within = (path for path in place.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
            found = sorted(str(path) for path in within if path.is_file())
        elif not place.exists() and glob.has_magic(word):
            found = sorted(path for path in glob.glob(word, recursive=True) if Path(path).is_file())
        else:
            found = [word]
        yield from found or [word]


@dataclass(frozen=True)
class Viewed:
    """An image as it is looked at.

    Attributes:
        views: uint8 [v, 3, side, side], the central one first; None where it has none.
        reason: why not.
    """

    path: str
    views: Tensor | None
    reason: str = ""


def boxes_and_flips(size: Ints, fraction: float, views: Literal[1, 10]) -> tuple[Ints, list[bool]]:
    """Where the views lie in an image of ``size`` [2], boxes [v, 4], the centre first, and which
    are reflected."""
    if views == 1:
        return center_crop_boxes(size[None], fraction), [False]
    five = five_crop_boxes(size[None], fraction)[0][::-1]
    return np.concatenate([five, five]), [False] * 5 + [True] * 5


def view(path: str, fraction: float, side: int, views: Literal[1, 10]) -> Viewed:
    """An image's views, with an evaluation's pixels."""
    try:
        if Path(path).is_dir():
            return Viewed(path, None, "there is no image in this folder")
        pixels = torch.from_numpy(np.array(decode(validate_bytes(np.fromfile(path, np.uint8)))))
    except OSError as error:
        return Viewed(path, None, error.strerror or str(error))
    image = pixels.permute(2, 0, 1)
    boxes, flips = boxes_and_flips(np.array(image.shape[1:]), fraction, views)
    cut = [crop_resize_flip(image, box, flip, side) for box, flip in zip(boxes, flips, strict=True)]
    return Viewed(path, torch.stack(cut))


def look(
    files: Iterable[str],
    *,
    fraction: float,
    side: int,
    views: Literal[1, 10],
    batch: int,
    threads: int,
) -> Iterator[list[Viewed]]:
    """The files in order, ``batch`` by ``batch``, those ahead being decoded in ``threads``."""
    remaining = iter(files)
    under_way: deque[list[Future[Viewed]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        while True:
            while len(under_way) <= AHEAD and (some := list(islice(remaining, batch))):
                under_way.append([pool.submit(view, one, fraction, side, views) for one in some])
            if not under_way:
                return
            yield [future.result() for future in under_way.popleft()]


def finish(views: Tensor, pixels: Normalization, device: torch.device) -> Tensor:
    """Views uint8 [b, 3, side, side] as the network wants them, without colour noise."""
    means = torch.from_numpy(pixels.mean).to(device, torch.float32).expand(len(views), 3)
    return normalize(views.to(device), means, torch.from_numpy(pixels.stds(0)).to(device))
