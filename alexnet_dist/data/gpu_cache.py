"""The loader for raw pixels, of which a GPU crops its batches.

They lie in its memory where they fit; else threads copy a batch of them from the file into pinned
memory, from which it fetches them. CPUs compute the same, so that it can be tried there; DALI is
faster on them.
"""

from collections.abc import Generator, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alexnet_dist.data.loader import Batch, Loader, to_device
from alexnet_dist.data.normalization import Normalization, normalize
from alexnet_dist.data.packed import RawDataset
from alexnet_dist.data.plan import Ints, SampleParams

RESIZE_CHUNK = 64
"""Images that are resized at a time: as float32 they take 50 MB."""
READ_CHUNK = 8
"""Images that a thread reads at a time."""


def fits_in_gpu_memory(dataset: RawDataset, device: torch.device) -> bool:
    """Whether this is a GPU that has room for the pixels, with half of its memory left for
    training."""
    if device.type != "cuda":
        return False
    free, total = torch.cuda.mem_get_info(device)
    return dataset.pixels.nbytes <= free - total // 2


def crop_normalize(
    images: Tensor,
    rows: Tensor,
    boxes: Tensor,
    flips: Tensor,
    means: Tensor,
    scales: Tensor,
    size: int,
) -> Tensor:
    """Crops that need no resize, normalized: float32 [b, 3, size, size], channels last.

    Args:
        images: uint8 [N, H, W, 3].
        rows: [b], which of them.
        boxes: [b, 4], top, left, and two sides of ``size``.
        flips: [b], bool.
        means, scales: [b, 3] and [3], for ``normalize``.
    """
    at = torch.arange(size, device=images.device)
    lines = boxes[:, :1] + at
    columns = boxes[:, 1:2] + torch.where(flips[:, None], size - 1 - at, at)
    crops = images[rows[:, None, None], lines[:, :, None], columns[:, None]]
    return normalize(crops.permute(0, 3, 1, 2), means, scales)


def resize_crops(images: Tensor, boxes: Tensor, flips: Tensor, size: int) -> Tensor:
    """The boxes [b, 4] of uint8 ``images`` [b, H, W, 3], resized and flipped: [b, size, size, 3].

    Bilinear with antialiasing, by two batched matrix products, rounded after each as torch's resize
    of bytes is.
    """
    _, height, width, _ = images.shape
    across = _resize_weights(boxes[:, 1], boxes[:, 3], width, size)
    across = torch.where(flips[:, None, None], across.flip(1), across)
    down = _resize_weights(boxes[:, 0], boxes[:, 2], height, size)
    planes = images.permute(0, 3, 1, 2).float()
    planes = (planes @ across[:, None].mT).round_()
    planes = (down[:, None] @ planes).round_()
    return planes.to(torch.uint8).permute(0, 2, 3, 1)


def _resize_weights(start: Tensor, length: Tensor, stored: int, size: int) -> Tensor:
    """[b, size, stored]: the weights of the stored pixels of a line in each resized one. They are
    triangles, as wide as two stored or two resized pixels, whichever are larger."""
    start, length = start.float()[:, None, None], length.float()[:, None, None]
    scale = length / size
    centers = (torch.arange(size, device=start.device) + 0.5)[:, None] * scale
    pixels = torch.arange(stored, device=start.device) - start
    inside = (pixels >= 0) & (pixels < length)
    weights = (1 - (pixels + 0.5 - centers).abs() / scale.clamp(min=1)).clamp(min=0) * inside
    return weights / weights.sum(2, keepdim=True)


class GpuCacheLoader(Loader):
    """Loads samples of raw pixels."""

    batches_at_once = 1  # they share a stream

    def __init__(self, dataset: RawDataset, normalization: Normalization, **options: Any) -> None:
        super().__init__(dataset, normalization, **options)
        gpu = self.device.type == "cuda"
        self._rows, self._pixels = dataset.rows, dataset.pixels
        self._images: Tensor | None = None
        where = f"read by {self._threads} threads"
        if fits_in_gpu_memory(dataset, self.device):
            where = "in the memory of the GPU"
            self._images = torch.empty(self._pixels.shape, dtype=torch.uint8, device=self.device)
            for first in range(0, len(self._pixels), 1024):  # no second copy of all on the host
                some = slice(first, first + 1024)
                self._images[some] = torch.tensor(self._pixels[some])
        self._stream = torch.cuda.Stream(self.device) if gpu else None
        self._crop = torch.compile(crop_normalize, dynamic=True) if gpu else crop_normalize
        size = f"{self._pixels.nbytes / 1e9:.1f} GB of raw pixels"
        self.description = f"gpu_cache: {size}, {where}"

    def batches(self, samples: Iterable[SampleParams]) -> Generator[Batch, None, None]:
        for batch in super().batches(samples):
            if self._stream is not None:
                current = torch.cuda.current_stream(self.device)
                current.wait_stream(self._stream)
                for tensor in (batch.images, batch.labels):  # whose memory is another stream's
                    tensor.record_stream(current)
            yield batch

    def _load(self, samples: SampleParams) -> Batch:
        normalization, size = self.normalization, self.normalization.size
        at, images = self._rows[samples.indices], self._images
        if images is None:
            read, at = self._read(at), np.arange(len(at))
        with torch.cuda.stream(self._stream):  # None on CPUs, which changes nothing
            rows, boxes, flips, means, scales, labels = (
                to_device(array, self.device)
                for array in (
                    at,
                    samples.crop_boxes,
                    samples.flips,
                    normalization.means(samples),
                    normalization.scales(samples),
                    self._labels[samples.indices],
                )
            )
            if images is None:
                images = read.to(self.device, non_blocking=True)
            if (samples.crop_boxes[:, 2:] != size).any():
                chunks = zip(*(x.split(RESIZE_CHUNK) for x in (rows, boxes, flips)), strict=True)
                images = torch.cat([resize_crops(images[n], b, f, size) for n, b, f in chunks])
                rows = torch.arange(len(rows), device=self.device)
                boxes, flips = torch.zeros_like(boxes), torch.zeros_like(flips)
            images = self._crop(images, rows, boxes, flips, means, scales, size)
        return Batch(images, labels, samples.indices)

    def _read(self, rows: Ints) -> Tensor:
        """The pixels [b, H, W, 3] at ``rows`` of the file, in memory that a GPU can fetch from."""
        pinned, shape = self.device.type == "cuda", self._pixels.shape[1:]
        images = torch.empty(len(rows), *shape, dtype=torch.uint8, pin_memory=pinned)
        out = images.numpy()

        def read_chunk(first: int) -> None:
            some = slice(first, first + READ_CHUNK)  # clip: numpy writes there without a copy
            np.take(self._pixels, rows[some], axis=0, out=out[some], mode="clip")

        list(self._readers.map(read_chunk, range(0, len(rows), READ_CHUNK)))
        return images
