"""The plain loader: torch's DataLoader, and decoding by Pillow as torchvision's folders do it.

For machines without DALI, and the reference that the other loaders are tested against.
"""

import multiprocessing
import signal
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from alexnet_dist.data.datasets import ImageDataset
from alexnet_dist.data.formats import SIZE_MISMATCH, decode
from alexnet_dist.data.loader import PREFETCH, Batch, Loader, to_device
from alexnet_dist.data.plan import SampleParams
from alexnet_dist.data.transforms import Normalization, crop_resize_flip, normalize

Params = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]
"""Indices [b], crop boxes [b, 4] and flips [b]: what can be sent to another process."""


class _DecodeDataset(Dataset[tuple[Tensor, dict[int, str]]]):
    """A batch of crops, uint8 [b, 3, size, size], for each ``Params``; and which images are
    corrupt, and why."""

    def __init__(self, dataset: ImageDataset, size: int) -> None:
        self.dataset, self.size = dataset, size

    def __getitem__(self, params: Params) -> tuple[Tensor, dict[int, str]]:
        indices, boxes, flips = params
        images = torch.empty(
            (len(indices), 3, self.size, self.size),
            dtype=torch.uint8,
            memory_format=torch.channels_last,
        )
        errors: dict[int, str] = {}
        for row, index in enumerate(indices.tolist()):
            try:
                images[row] = self._crop(index, boxes[row], bool(flips[row]))
            except OSError as error:
                errors[index] = error.strerror or str(error)
        return images, errors

    def _crop(self, index: int, box: NDArray[np.int64], flip: bool) -> Tensor:
        image = self.dataset.read(index)
        pixels = torch.from_numpy(np.array(image if self.dataset.is_decoded else decode(image)))
        if pixels.shape[:2] != tuple(self.dataset.index.sizes[index]):
            raise OSError(SIZE_MISMATCH)
        return crop_resize_flip(pixels.permute(2, 0, 1), box, flip, self.size)


def _ignore_signals(_: int) -> None:
    """In a worker: a launcher's or a cluster's signals reach all processes, but it is the training
    process that has to save, for which it may still need images. Workers end when it does."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"):
        signal.signal(signal.Signals[name], signal.SIG_IGN)


class TorchLoader(Loader):
    """Loads samples in ``threads`` worker processes (0: in this one), each of which keeps
    PREFETCH batches ready."""

    def __init__(self, dataset: ImageDataset, normalization: Normalization, **options: Any) -> None:
        super().__init__(dataset, normalization, **options)
        self._decode = _DecodeDataset(dataset, normalization.size)
        self.description = f"DataLoader, {self._threads} worker processes"

    def batches(self, samples: Iterable[SampleParams]) -> Generator[Batch, None, None]:
        pending: deque[tuple[SampleParams, SampleParams]] = deque()

        def sampler() -> Iterator[Params]:
            for planned in samples:
                known = self.corrupt.substitute(planned)
                pending.append((planned, known))
                yield known.indices, known.crop_boxes, known.flips

        loader = DataLoader(
            self._decode,
            batch_size=None,
            sampler=sampler(),
            pin_memory=self.device.type == "cuda",
            num_workers=self._threads,
            prefetch_factor=PREFETCH if self._threads else None,
            worker_init_fn=_ignore_signals,
        )
        for images, errors in loader:
            yield self._finish(*pending.popleft(), images, errors)

    def close(self) -> None:
        for worker in multiprocessing.active_children():
            worker.kill()  # they ignore anything gentler

    def _finish(
        self, planned: SampleParams, samples: SampleParams, images: Tensor, errors: dict[int, str]
    ) -> Batch:
        while errors:
            self.corrupt.mark_corrupt(errors)
            samples = self.corrupt.substitute(planned)
            images, errors = self._decode[samples.indices, samples.crop_boxes, samples.flips]
        self.corrupt.log_substitutions(planned)
        means = to_device(self.normalization.means(samples), self.device)
        scales = np.reciprocal(self.normalization.stds(samples.pca_noise_std))
        labels = to_device(self._labels[samples.indices], self.device)
        images = normalize(to_device(images, self.device), means, to_device(scales, self.device))
        return Batch(images, labels, samples.indices)
