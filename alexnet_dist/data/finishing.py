"""Batches finished on CPUs: pixels as bytes become the network's input, in several threads and in
memory that is used again."""

import math
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alexnet_dist.data.crops import Bytes, Ints, cut_on_cpu, resized_on_cpu
from alexnet_dist.data.plan import SampleParams
from alexnet_dist.data.transforms import Normalization


class Threads:
    """That work on parts of a batch."""

    def __init__(self, count: int) -> None:
        self._count = max(count, 1)
        self._pool = ThreadPoolExecutor(self._count, thread_name_prefix="finish")

    def each_part(self, do: Callable[[slice], Any], count: int) -> None:
        """Two parts to a thread: what is less is done before the next thread has woken."""
        part = max(-(-count // (2 * self._count)), 8)
        for _ in self._pool.map(do, [slice(at, at + part) for at in range(0, count, part)]):
            pass

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


class Finishing:
    """What is left to do where pixels lie in the host's memory.

    Args:
        max_batch: the most images that batches usually have.
    """

    def __init__(self, pixels: Normalization, *, max_batch: int, threads: Threads) -> None:
        self.pixels, self._threads = pixels, threads
        self._memory = _Memory(max_batch * pixels.size**2 * 3)

    def __call__(
        self, every: Bytes | Sequence[Bytes], rows: Ints, boxes: Ints, draws: SampleParams
    ) -> Tensor:
        """A finished batch [b, 3, side, side], float32, channels last.

        Args:
            every: images [H, W, 3], or one array of them.
            rows: [b], which of them.
            boxes: [b, 4], what of those, resized where it has another side than the finished image.
            draws: flips and colours.
        """
        side, count = self.pixels.size, len(rows)
        images = self._memory.lend(count, side, side, 3)
        means, scales = arithmetic(self.pixels, draws)

        def cut(part: slice) -> None:
            these, of, where = every, rows[part], boxes[part]
            if not isinstance(these, np.ndarray) or (where[:, 2:] != side).any():
                these = resized_on_cpu(these, of, where, side)
                of, where = np.arange(len(of)), 0 * where
            cut_on_cpu(these, of, where, draws.flips[part], means[part], scales, images[part])

        self._threads.each_part(cut, count)
        return images.permute(0, 3, 1, 2)


def arithmetic(
    pixels: Normalization, draws: SampleParams
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Means [b, 3] to subtract, and scales [3] to multiply with."""
    return pixels.means(draws), np.reciprocal(pixels.stds(draws.pca_noise_std))


class _Memory:
    """Memory for finished batches, lent again once torch has let go of it: to have new memory from
    the system takes longer than to fill it.

    Args:
        largest: indices in the largest batch.
    """

    def __init__(self, largest: int) -> None:
        self._largest = largest
        self._free: list[NDArray[np.float32]] = []

    def lend(self, *shape: int) -> Tensor:
        """float32 of any content."""
        count = math.prod(shape)
        if count > self._largest:
            return torch.empty(shape)
        try:
            memory = self._free.pop()
        except IndexError:
            memory = np.empty(self._largest, np.float32)
        lent = memory[:count]  # this view lives as long as any tensor on it
        weakref.finalize(lent, self._free.append, memory).atexit = False
        return torch.from_numpy(lent).view(shape)
