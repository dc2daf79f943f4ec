"""The loader for raw pixels, which need no decoder: a batch is cropped out of them on the device.

The full data set lies in the GPU's memory where it fits there, else the images of a batch are
gathered from the file's memory map and uploaded under the running step. CPUs compute the same, so
that it can be tried there; DALI is faster on them.
"""

from collections.abc import Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alexnet_dist.data.datasets import RawDataset
from alexnet_dist.data.loader import Batch, Loader, load_ahead, to_device
from alexnet_dist.data.plan import SampleParams
from alexnet_dist.data.transforms import Normalization

RESIZE_CHUNK = 64
"""Images that are resized at a time: as float32 they take 50 MB."""

GATHER_CHUNK = 16
"""Images that a thread gathers at a time."""


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
    """Crops that need no resize, normalized: float32 [b, size, size, 3].

    Args:
        images: uint8 [N, H, W, 3].
        rows: [b], which of them.
        boxes: [b, 4], top, left, and two sides of ``size``.
        flips: [b], bool.
        means, scales: [b, 3] and [3]; the result is (pixel - mean) * scale.
    """
    at = torch.arange(size, device=images.device)
    lines = boxes[:, :1] + at
    columns = boxes[:, 1:2] + torch.where(flips[:, None], size - 1 - at, at)
    crops = images[rows[:, None, None], lines[:, :, None], columns[:, None]]
    return (crops - means[:, None, None]) * scales


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
    """Loads samples of raw pixels.

    Args:
        in_gpu_memory: whether all pixels are to lie on the device.
        options: those of Loader.
    """

    dataset: RawDataset

    def __init__(
        self,
        dataset: RawDataset,
        normalization: Normalization,
        *,
        in_gpu_memory: bool,
        **options: Any,
    ) -> None:
        super().__init__(dataset, normalization, **options)
        device, threads = self.device, self._threads
        self._readers = ThreadPoolExecutor(threads, "gather")
        self._cache = _upload(dataset.pixels, device) if in_gpu_memory else None
        gpu = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if gpu else None
        self._crop = torch.compile(crop_normalize, dynamic=True) if gpu else crop_normalize
        size = f"{dataset.pixels.nbytes / 1e9:.1f} GB of raw pixels"
        where = "on the GPU" if in_gpu_memory else f"in host memory, gathered by {threads} threads"
        self.description = f"gpu_cache: {size} {where}"

    def batches(self, samples: Iterable[SampleParams]) -> Generator[Batch, None, None]:
        for batch, done in load_ahead(self._load, samples, self.device, 1):
            if done is not None:
                current = torch.cuda.current_stream(self.device)
                current.wait_event(done)
                for tensor in (batch.images, batch.labels):  # whose memory is another stream's
                    tensor.record_stream(current)
            yield batch

    def close(self) -> None:
        self._readers.shutdown(cancel_futures=True)

    def _load(self, samples: SampleParams) -> tuple[Batch, torch.Event | None]:
        """A batch, and on a GPU the event after which it is one."""
        normalization, size = self.normalization, self.normalization.size
        with torch.cuda.stream(self._stream):  # None on CPUs, which changes nothing
            found, images = self.dataset.rows[samples.indices], self._cache
            if images is None:
                images, found = to_device(self._gather(found), self.device), np.arange(len(found))
            rows, boxes, flips, means, scales, labels = (
                to_device(array, self.device)
                for array in (
                    found,
                    samples.crop_boxes,
                    samples.flips,
                    normalization.means(samples),
                    np.reciprocal(normalization.stds(samples.pca_noise_std)),
                    self._labels[samples.indices],
                )
            )
            if (samples.crop_boxes[:, 2:] != size).any():
                chunks = zip(*(x.split(RESIZE_CHUNK) for x in (rows, boxes, flips)), strict=True)
                images = torch.cat([resize_crops(images[n], b, f, size) for n, b, f in chunks])
                rows = torch.arange(len(rows), device=self.device)
                boxes, flips = torch.zeros_like(boxes), torch.zeros_like(flips)
            crops = self._crop(images, rows, boxes, flips, means, scales, size)
            done = self._stream.record_event() if self._stream else None
        return Batch(crops.permute(0, 3, 1, 2), labels, samples.indices), done

    def _gather(self, rows: NDArray[np.int64]) -> Tensor:
        """The images of ``rows`` [b], uint8 [b, H, W, 3], in pinned memory."""
        pixels = self.dataset.pixels
        shape = (len(rows), *pixels.shape[1:])
        gathered = torch.empty(shape, dtype=torch.uint8, pin_memory=self.device.type == "cuda")

        def take(first: int) -> None:
            some = slice(first, first + GATHER_CHUNK)
            np.take(pixels, rows[some], 0, out=gathered.numpy()[some], mode="clip")

        list(self._readers.map(take, range(0, len(rows), GATHER_CHUNK)))
        return gathered


def _upload(pixels: NDArray[np.uint8], device: torch.device) -> Tensor:
    """All pixels, on the device, where they come 1024 images at a time."""
    uploaded = torch.empty(pixels.shape, dtype=torch.uint8, device=device)
    for first in range(0, len(pixels), 1024):
        some = slice(first, first + 1024)
        uploaded[some].copy_(torch.from_numpy(pixels[some].copy()))  # the map is not writable
    return uploaded
