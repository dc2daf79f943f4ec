"""What all loaders share: the batch that they hand over, running ahead of training, and what they
do when an image cannot be decoded."""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alexnet_dist.data.datasets import ImageDataset
from alexnet_dist.data.plan import SampleParams
from alexnet_dist.data.transforms import Normalization
from alexnet_dist.errors import UserError

OnCorruptImage = Literal["stop", "substitute", "skip"]
T = TypeVar("T")

PREFETCH = 2
"""Batches that are ready before they are taken."""


@dataclass(frozen=True)
class Batch:
    """A batch, ready for the network.

    Attributes:
        images: float32 [b, 3, size, size], channels last, on the training device.
        labels: int64 [b], there too.
        indices: [b], of the images as the loader returned them, on the host.
    """

    images: Tensor
    labels: Tensor
    indices: NDArray[np.int64]


@dataclass
class CorruptImagePolicy:
    """Which images cannot be decoded, and what is done about it.

    ``policy``: "stop" raises. Where data.on_corrupt_image is skip, training has "substitute" and an
    evaluation "skip". "substitute" takes the next image that can be decoded, whatever its
    class, so that it is the same one in every epoch and on any number of processes. "skip" makes
    the batch smaller, since an evaluation must not count another image twice.

    Attributes:
        errors: why, by index.
        events: what ``pop_events`` returns next.
    """

    dataset: ImageDataset
    policy: OnCorruptImage
    errors: dict[int, str] = field(default_factory=dict)
    events: list[dict[str, object]] = field(default_factory=list)

    def __post_init__(self) -> None:
        unreadable = self.dataset.index.corrupt_indices()
        for index in unreadable:
            self.errors[index] = "it has no readable header of a JPEG, PNG, WebP or BMP"
        if unreadable and self.policy == "stop":
            message = self._message(unreadable[0], others=len(unreadable) - 1)
            raise UserError(message, on_all_ranks=True)

    def mark_corrupt(self, index: int, reason: str) -> None:
        """Note that an image cannot be decoded; raises UserError where the policy is to stop."""
        self.errors[index] = reason
        if self.policy == "stop":
            raise UserError(self._message(index))

    def substitute(self, samples: SampleParams) -> SampleParams:
        """The samples with the images that are known to be corrupt replaced or skipped."""
        mask = np.array([index in self.errors for index in samples.indices.tolist()], np.bool_)
        if not mask.any():
            return samples
        if self.policy == "skip":
            return samples.select(~mask)
        indices = samples.indices.copy()
        indices[mask] = [self._next_good(index) for index in indices[mask].tolist()]
        return samples.with_indices(indices)

    def log_substitutions(self, planned: SampleParams) -> None:
        """Record what ``substitute`` made of a batch, once the batch has been loaded."""
        for index in planned.indices.tolist():
            if index in self.errors:
                event: dict[str, object] = {
                    "index": index,
                    "path": self.dataset.path(index),
                    "reason": self.errors[index],
                }
                if self.policy == "substitute":
                    event["substitute"] = self.dataset.path(self._next_good(index))
                self.events.append(event)

    def pop_events(self) -> list[dict[str, object]]:
        """What was substituted or skipped since the last call."""
        events, self.events = self.events, []
        return events

    def _next_good(self, index: int) -> int:
        count = len(self.dataset.index)
        for other in range(index + 1, index + count):
            if other % count not in self.errors:
                return other % count
        folder = self.dataset.index.folder
        raise UserError(f"no image of {folder} can be decoded", on_all_ranks=True)

    def _message(self, index: int, others: int = 0) -> str:
        more = f" and {others} other images" if others else ""
        return (
            f"{self.dataset.path(index)}{more} cannot be decoded ({self.errors[index]}): fix or "
            "remove it, or go on without it by --data.on_corrupt_image skip"
        )


class Loader(ABC):
    """Loads samples: one batch for each ``SampleParams``, in order, ahead of need.

    Args:
        device: what the batches are loaded to.
        threads: that decode, or gather pixels.
        on_corrupt: what is done with images that cannot be decoded.

    Attributes:
        description: one line for people.
    """

    description: str

    def __init__(
        self,
        dataset: ImageDataset,
        normalization: Normalization,
        *,
        device: torch.device,
        threads: int,
        on_corrupt: OnCorruptImage = "stop",
    ) -> None:
        self.dataset, self.normalization, self.device = dataset, normalization, device
        self.corrupt = CorruptImagePolicy(dataset, on_corrupt)
        self._threads = threads
        self._labels = torch.from_numpy(dataset.index.labels)

    @abstractmethod
    def batches(self, samples: Iterable[SampleParams]) -> Generator[Batch, None, None]:
        """One batch for each of ``samples``.

        Raises:
            UserError: an image cannot be decoded and the policy is to stop.
        """

    @abstractmethod
    def close(self) -> None:
        """End its threads and processes."""


def to_device(array: Any, device: torch.device) -> Tensor:
    """A numpy array or a tensor on ``device``, without waiting for work that is queued there."""
    tensor = torch.as_tensor(array)
    if device.type == "cuda":
        tensor = tensor.pin_memory().to(device, non_blocking=True)
    return tensor


def load_ahead(
    load: Callable[[SampleParams], T],
    samples: Iterable[SampleParams],
    device: torch.device,
    threads: int,
) -> Generator[T, None, None]:
    """What ``load`` returns for each of ``samples``, in their order; ``threads`` of them are loaded
    at a time, and PREFETCH more wait to be taken."""
    source = iter(samples)
    planning = ThreadPoolExecutor(1, "plan")
    loading = ThreadPoolExecutor(threads, "load", initializer=_use_device, initargs=(device,))

    def load_next(planned: Future[SampleParams | None]) -> T | None:
        sample = planned.result()
        return None if sample is None else load(sample)

    def submit() -> Future[T | None]:
        return loading.submit(load_next, planning.submit(next, source, None))

    try:
        pending = deque(submit() for _ in range(threads + PREFETCH))
        while (loaded := pending.popleft().result()) is not None:
            pending.append(submit())
            yield loaded
    finally:
        loading.shutdown(cancel_futures=True)
        planning.shutdown(cancel_futures=True)


def _use_device(device: torch.device) -> None:
    """To be called first in a thread that touches CUDA: threads begin on device 0."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
