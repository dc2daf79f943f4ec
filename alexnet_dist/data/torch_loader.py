"""The plain engine: torch's DataLoader, and decoding by Pillow as torchvision's folders do it.

For machines without DALI, and the reference that DALI is tested against.
"""

import multiprocessing
import signal
from collections.abc import Generator, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from alexnet_dist.data.corrupt_images import Batch, CorruptImagePolicy, OnCorruptImage
from alexnet_dist.data.formats import OTHER_SIZE, decode
from alexnet_dist.data.plan import SampleParams
from alexnet_dist.data.sources import ImageDataset
from alexnet_dist.data.transforms import Normalization, crop_resize_flip, normalize

Order = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]


class _Decoded(Dataset[tuple[Tensor, dict[int, str]]]):
    """A whole batch for each order, decoded in one worker process."""

    def __init__(self, source: ImageDataset, side: int) -> None:
        self.source, self.side = source, side

    def __getitem__(self, order: Order) -> tuple[Tensor, dict[int, str]]:
        numbers, boxes, flips = order
        images = torch.empty(
            (len(numbers), 3, self.side, self.side),
            dtype=torch.uint8,
            memory_format=torch.channels_last,  # as decoders give them, and networks take them
        )
        bad: dict[int, str] = {}
        for row, number in enumerate(numbers.tolist()):
            try:
                images[row] = self._image(number, boxes[row], bool(flips[row]))
            except OSError as error:
                bad[number] = error.strerror or str(error)
        return images, bad

    def _image(self, number: int, box: NDArray[np.int64], flip: bool) -> Tensor:
        image = self.source.read(number)
        pixels = torch.from_numpy(np.array(image if self.source.raw else decode(image)))
        if pixels.shape[:2] != tuple(self.source.index.sizes[number]):
            raise OSError(OTHER_SIZE)
        return crop_resize_flip(pixels.permute(2, 0, 1), box, flip, self.side)


class _Orders:
    """Draws as what a worker needs of them, remembering the draws that are under way."""

    def __init__(self, draws: Iterable[SampleParams], bad: CorruptImagePolicy) -> None:
        self.draws, self.bad = draws, bad
        self.under_way: list[tuple[SampleParams, SampleParams]] = []

    def __iter__(self) -> Iterator[Order]:
        for draws in self.draws:
            known = self.bad.apply(draws)
            self.under_way.append((draws, known))
            yield known.numbers, known.boxes, known.flips


def _be_deaf(_: int) -> None:
    """In a worker: a launcher's or a cluster's signals reach all processes, but it is the training
    process that has to save, for which it may still need images. Workers end when it does."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"):
        signal.signal(signal.Signals[name], signal.SIG_IGN)


class TorchLoader:
    """Carries out draws in ``threads`` worker processes (0: in this one)."""

    def __init__(
        self,
        source: ImageDataset,
        pixels: Normalization,
        *,
        device: torch.device,
        threads: int,
        ahead: int = 2,
        policy: OnCorruptImage = "stop",
    ) -> None:
        self.source, self.pixels, self.device = source, pixels, device
        self.threads, self.ahead = threads, ahead
        self.bad = CorruptImagePolicy(source, policy)
        self._decoded = _Decoded(source, pixels.side)
        self._labels = torch.from_numpy(source.index.labels)
        self.description = f"DataLoader, {threads} worker processes"

    def batches(self, draws: Iterable[SampleParams]) -> Generator[Batch, None, None]:
        """One finished batch for each of ``draws``, in order.

        Raises:
            Failure: an image cannot be decoded and the policy is to stop.
        """
        orders = _Orders(draws, self.bad)
        options: dict[str, Any] = {"prefetch_factor": self.ahead} if self.threads else {}
        loader = DataLoader(
            self._decoded,
            batch_size=None,
            sampler=orders,
            num_workers=self.threads,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=_be_deaf,
            **options,
        )
        for images, bad in loader:
            yield self._finish(*orders.under_way.pop(0), images, bad)

    def close(self) -> None:
        for worker in multiprocessing.active_children():
            worker.kill()  # they are deaf to anything gentler

    def _finish(
        self, planned: SampleParams, draws: SampleParams, images: Tensor, bad: dict[int, str]
    ) -> Batch:
        while bad:
            for number, reason in bad.items():
                self.bad.found(number, reason)
            draws = self.bad.apply(planned)
            images, bad = self._decoded[draws.numbers, draws.boxes, draws.flips]
        self.bad.note(planned)
        means = torch.from_numpy(self.pixels.means(draws)).to(self.device)
        stds = torch.from_numpy(self.pixels.stds(draws.strength)).to(self.device)
        images = normalize(images.to(self.device, non_blocking=True), means, stds)
        return Batch(images, self._labels[draws.numbers].to(self.device), draws.numbers)
