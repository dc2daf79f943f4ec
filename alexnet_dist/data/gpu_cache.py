"""The engine for raw pixels, which need no decoder: they stay where they lie, and a batch is cut
out of them in one go.

On a GPU the whole set lies in the GPU's memory where that has room for it, else the pixels of a
batch are gathered from the file's memory map and uploaded under the running step. On CPUs batches
are cut straight from the memory map, which all processes of a machine share.
"""

from collections.abc import Generator, Iterable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alexnet_dist.data import crops
from alexnet_dist.data.corrupt_images import Batch, CorruptImagePolicy, OnCorruptImage, prefetch
from alexnet_dist.data.finishing import Finishing, Threads, arithmetic
from alexnet_dist.data.plan import SampleParams
from alexnet_dist.data.prepared import RawDataset
from alexnet_dist.data.sources import ImageDataset
from alexnet_dist.data.transforms import Normalization
from alexnet_dist.errors import UserError

_RESIZED_TOGETHER = 64
"""Images that a GPU resizes at once: their pixels as float32 take 100 MB or so."""

_UPLOADED_TOGETHER = 2**28
"""Bytes of the file that are uploaded at once."""


def fits(source: RawDataset, device: torch.device) -> bool:
    """Whether a GPU has room for the pixels, besides half of its memory for training."""
    free, total = torch.cuda.mem_get_info(device)
    return source.pixels.nbytes <= free - total // 2


class GpuCacheLoader:
    """Carries out draws on raw pixels, in a thread that stays ahead of the training step.

    Args:
        max_batch: the most images that draws usually have.
        on_gpu: whether the pixels are to lie on the device, a GPU.
        threads: that cut or gather.
        ahead: finished batches that may wait.

    Raises:
        Failure: the source is not of raw pixels, or of several sizes.
    """

    def __init__(
        self,
        source: ImageDataset,
        pixels: Normalization,
        *,
        max_batch: int,
        device: torch.device,
        on_gpu: bool,
        threads: int,
        ahead: int = 2,
        policy: OnCorruptImage = "stop",
    ) -> None:
        self.source = _of_pixels(source)
        self.pixels, self.device, self.ahead = pixels, device, ahead
        self.bad = CorruptImagePolicy(source, policy)
        self._rows = source.index.places[:, 0]
        self._labels = torch.from_numpy(source.index.labels)
        self._threads = Threads(threads)
        self._finish = Finishing(pixels, max_batch=max_batch, threads=self._threads)
        size = f"{self.source.pixels.nbytes / 1e9:.1f} GB of raw pixels"
        if device.type == "cuda":
            self._cut, self._stream = crops.choose_cut(device), torch.cuda.Stream(device)
            self._all = _upload(self.source.pixels, device) if on_gpu else None
            where = "on the GPU" if on_gpu else f"in host memory, gathered by {threads} threads"
        else:
            how = "torch, for want of a C compiler" if crops.compiled() is None else "C"
            where = f"in host memory, cut by {how} in {threads} threads"
        self.description = f"resident: {size} {where}"

    def batches(self, draws: Iterable[SampleParams]) -> Generator[Batch, None, None]:
        """One finished batch for each of ``draws``, in order."""
        if self.device.type != "cuda":
            yield from prefetch(map(self._on_cpu, draws), self.ahead)
            return
        for batch, done in prefetch(map(self._on_gpu, draws), self.ahead):
            current = torch.cuda.current_stream(self.device)
            current.wait_event(done)
            for tensor in (batch.images, batch.labels):  # which are of another stream's memory
                tensor.record_stream(current)
            yield batch

    def close(self) -> None:
        self._threads.close()

    def _on_cpu(self, draws: SampleParams) -> Batch:
        numbers = draws.numbers
        images = self._finish(self.source.pixels, self._rows[numbers], draws.boxes, draws)
        return Batch(images, self._labels[numbers], numbers)

    def _on_gpu(self, draws: SampleParams) -> tuple[Batch, torch.cuda.Event]:
        """The batch, and what has to happen on the GPU before it is one."""
        side, count = self.pixels.side, len(draws.numbers)
        resize = bool((draws.boxes[:, 2:] != side).any())
        with torch.cuda.stream(self._stream):
            every, rows, boxes = self._all, self._rows[draws.numbers], draws.boxes
            if every is None:
                every = self._gathered(rows, None if resize else boxes)
                rows, boxes = np.arange(count), boxes if resize else 0 * boxes
            of, where, flips, means, scales, labels = (
                torch.as_tensor(each).pin_memory().to(self.device, non_blocking=True)
                for each in (
                    rows,
                    boxes,
                    draws.flips,
                    *arithmetic(self.pixels, draws),
                    self._labels[draws.numbers],
                )
            )
            if resize:
                parts = zip(*(x.split(_RESIZED_TOGETHER) for x in (of, where, flips)), strict=True)
                every = torch.cat([crops.resized(every[n], b, f, side) for n, b, f in parts])
                of, where, flips = torch.arange(count, device=self.device), 0 * where, flips & False
            images = torch.empty(count, side, side, 3, device=self.device)
            self._cut(every, of, where, flips, means, scales, images)
            done = torch.cuda.Event()
            done.record()
        return Batch(images.permute(0, 3, 1, 2), labels, draws.numbers), done

    def _gathered(self, rows: NDArray[np.int64], boxes: NDArray[np.int64] | None) -> Tensor:
        """The images, or their boxes of the finished side, uint8 on the device."""
        every, side = self.source.pixels, self.pixels.side
        shape = every.shape[1:3] if boxes is None else (side, side)
        pinned = torch.empty(len(rows), *shape, 3, dtype=torch.uint8, pin_memory=True)
        gathered = pinned.numpy()

        def gather(part: slice) -> None:
            for at in range(*part.indices(len(rows))):
                top, left = (0, 0) if boxes is None else boxes[at, :2]
                box = every[rows[at], top : top + shape[0], left : left + shape[1]]
                gathered[at] = box

        self._threads.each_part(gather, len(rows))
        return pinned.to(self.device, non_blocking=True)


def _of_pixels(source: ImageDataset) -> RawDataset:
    index = source.index
    if not isinstance(source, RawDataset):
        folder = index.folder.rpartition(":")[0] if source.raw else Path(index.folder).parent
        holds = "its own form of them" if source.raw else "shards" if index.files else "image files"
        raise UserError(
            f"data.loader gpu_cache wants raw pixels, and {folder} holds {holds}: prepare them by "
            "python -m alexnet_dist.prepare IN --out DIR --crop center --format pixels, or take "
            "--data.loader auto",
            on_all_ranks=True,
        )
    if len(index) and not 0 <= index.places.min() <= index.places.max() < len(source.pixels):
        raise UserError(
            f"the index of {index.folder} names images that its pixels do not have: copy it again "
            "from where it was prepared, or prepare it anew",
            on_all_ranks=True,
        )
    if (index.sizes != source.pixels.shape[1:3]).any():
        raise UserError(
            f"data.loader gpu_cache wants images of one size, and those of {index.folder} have "
            "several: prepare them anew",
            on_all_ranks=True,
        )
    return source


def _upload(pixels: NDArray[np.uint8], device: torch.device) -> Tensor:
    """The whole set, on the device."""
    every = torch.empty(pixels.shape, dtype=torch.uint8, device=device)
    together = max(_UPLOADED_TOGETHER // max(pixels[:1].nbytes, 1), 1)
    for first in range(0, len(pixels), together):
        part = torch.from_numpy(pixels[first : first + together].copy())  # from a map not writable
        every[first : first + together].copy_(part)
    torch.cuda.synchronize(device)
    return every
