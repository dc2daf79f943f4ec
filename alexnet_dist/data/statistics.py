"""Channel means of the training images, and the directions in which their colors vary."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from alexnet_dist.data.decode import decode

NUM_SAMPLED_IMAGES = 1024


@dataclass(frozen=True)
class ChannelStats:
    """Of RGB values of 0..255 over the training images.

    Attributes:
        mean: [3], channel means.
        eigenvalues: [3], of the covariance of RGB values, largest first.
        eigenvectors: [3, 3], a column each (Krizhevsky et al. 2012, section 4.1).
    """

    mean: NDArray[np.float64]
    eigenvalues: NDArray[np.float64]
    eigenvectors: NDArray[np.float64]

    def to_json(self) -> dict[str, Any]:
        return {name: array.tolist() for name, array in vars(self).items()}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> "ChannelStats":
        return cls(**{name: np.array(record[name]) for name in cls.__annotations__})


NO_STATS = ChannelStats(np.full(3, 127.5), np.zeros(3), np.eye(3))
"""Those of gray."""


def compute_stats(
    count: int,
    read: Callable[[int], NDArray[np.uint8]],
    progress: Callable[[int, int], None],
) -> ChannelStats:
    """Of a seeded sample of ``count`` images, each by the pixels of its central square.

    Each image counts alike, whatever its size. ``read(index)`` returns encoded bytes, or pixels.
    Images that cannot be decoded are skipped; with no image at all the statistics are those of
    gray.
    """
    chosen = np.random.Generator(np.random.Philox(145)).permutation(count)[:NUM_SAMPLED_IMAGES]

    def moments(index: int) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
        try:
            return compute_moments(np.asarray(decode(read(index), near=256)))
        except OSError:
            return None

    first, second, used = np.zeros(3), np.zeros((3, 3)), 0
    with ThreadPoolExecutor(8) as pool:  # map keeps the order, so the sums are repeatable
        for done, result in enumerate(pool.map(moments, chosen.tolist()), 1):
            progress(done, len(chosen))
            if result is not None:
                first, second, used = first + result[0], second + result[1], used + 1
    if used == 0:
        return NO_STATS
    return stats_from_moments(first / used, second / used)


def compute_moments(pixels: NDArray[np.uint8]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The means of RGB, [3], and of their products, [3, 3], over the central square of an image,
    uint8 [H, W, 3]."""
    side = min(pixels.shape[:2])
    top, left = (pixels.shape[0] - side) // 2, (pixels.shape[1] - side) // 2
    square = pixels[top : top + side, left : left + side].transpose(2, 0, 1)
    # sums of 256 products of bytes are exact in float32, which is the faster type
    exact = np.float32 if side <= 256 else np.float64
    rows = torch.from_numpy(square.astype(exact, order="C")).transpose(0, 1)
    first, second = (x.double().sum(0) / side**2 for x in (rows.sum(2), torch.bmm(rows, rows.mT)))
    return first.numpy(), second.numpy()


def stats_from_moments(mean: NDArray[np.float64], second: NDArray[np.float64]) -> ChannelStats:
    """Statistics of the mean of RGB values, [3], and that of their products, [3, 3]."""
    values, vectors = np.linalg.eigh(second - np.outer(mean, mean))
    # largest first, and a sign that does not depend on the linear algebra library
    vectors = vectors[:, ::-1] * np.where(vectors.sum(0)[::-1] < 0, -1.0, 1.0)
    return ChannelStats(mean, np.maximum(values[::-1], 0.0), vectors)
