"""What all loaders share: the batch that they hand over, running ahead of training, and what they
do when an image cannot be decoded."""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from io import BytesIO
from itertools import chain
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alexnet_dist.data.datasets import ImageDataset
from alexnet_dist.data.decode import SIZE_MISMATCH, open_image
from alexnet_dist.data.normalization import Normalization
from alexnet_dist.data.plan import Ints, SampleParams
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

    Attributes:
        policy: "stop" raises. "substitute" takes the next image that can be decoded, whatever its
            class: the same one in every epoch and on any number of processes. "skip" makes the
            batch smaller. Where data.on_corrupt_image is skip, training substitutes; an evaluation
            skips, since it must count no image twice.
        errors: why, by index.
        events: what ``pop_events`` returns next.
    """

    dataset: ImageDataset
    policy: OnCorruptImage
    errors: dict[int, str] = field(default_factory=dict)
    events: list[dict[str, object]] = field(default_factory=list)

    def __post_init__(self) -> None:
        unreadable = self.dataset.index.corrupt_indices()
        self.mark_corrupt({n: self._reason(n) for n in unreadable}, on_all_ranks=True)

    def mark_corrupt(self, reasons: dict[int, str], *, on_all_ranks: bool = False) -> None:
        """Note why images cannot be decoded; raises UserError where the policy is to stop."""
        self.errors |= reasons
        if reasons and self.policy == "stop":
            index, *others = sorted(reasons)
            more = f" and {len(others)} other images" if others else ""
            raise UserError(
                f"{self.dataset.path(index)}{more} cannot be decoded ({reasons[index]}): fix or "
                "remove it, or go on without it by --data.on_corrupt_image skip",
                on_all_ranks=on_all_ranks,
            )

    def _reason(self, index: int) -> str:
        """Why an image's header could not be read."""
        try:
            with open_image(BytesIO(self.dataset.read(index).tobytes())):
                return SIZE_MISMATCH
        except FileNotFoundError:
            return "there is no such file, or a link to it leads nowhere"
        except OSError as error:
            return error.strerror or str(error)

    def replace_or_drop(self, samples: SampleParams) -> SampleParams:
        """The samples with the images that are known to be corrupt substituted or skipped."""
        mask = np.isin(samples.indices, list(self.errors))
        if not mask.any():
            return samples
        if self.policy == "skip":
            return samples.select(~mask)
        indices = samples.indices.copy()
        indices[mask] = [self._next_good(index) for index in indices[mask].tolist()]
        return samples.with_indices(indices)

    def note_events(self, planned: SampleParams) -> None:
        """Note what ``replace_or_drop`` made of a batch, once the batch has been loaded."""
        for index in (index for index in planned.indices.tolist() if index in self.errors):
            path, reason = self.dataset.path(index), self.errors[index]
            event: dict[str, object] = {"index": index, "path": path, "reason": reason}
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


class CorruptImagesError(Exception):
    """Images of a batch cannot be decoded: why, by index."""

    def __init__(self, reasons: dict[int, str]) -> None:
        super().__init__(reasons)
        self.reasons = reasons


class Loader(ABC):
    """Loads samples: one batch for each ``SampleParams``, in order, ahead of need.

    Args:
        device: what the batches are loaded to.
        threads: that decode.
        on_corrupt: what is done with images that cannot be decoded.

    Attributes:
        description: one line for people.
    """

    description: str
    min_readers = 1  # threads of ``_read_each``
    batches_at_once = 2

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
        self._readers = ThreadPoolExecutor(max(threads, self.min_readers), "read")
        self._pending: deque[Future[tuple[SampleParams, Batch] | None]] = deque()

    def batches(self, samples: Iterable[SampleParams]) -> Generator[Batch, None, None]:
        """One batch for each of ``samples``.

        Raises:
            UserError: an image cannot be decoded and the policy is to stop.
        """
        count, self._pending = self.batches_at_once, deque()
        loaded = load_ahead(self._load_good, samples, self.device, count, self._pending)
        for planned, batch in loaded:
            self.corrupt.note_events(planned)
            yield batch

    def wait_until_idle(self) -> None:
        """Return when nothing is being loaded, nor will be before the next batch is taken."""
        wait(self._pending)

    def close(self) -> None:
        """End its threads."""
        self._readers.shutdown(cancel_futures=True)

    @abstractmethod
    def _load(self, samples: SampleParams) -> Batch:
        """A batch of just these samples. Raises CorruptImagesError where some cannot be decoded."""

    def _load_good(self, planned: SampleParams) -> tuple[SampleParams, Batch]:
        """``planned``, and the batch of its samples or their substitutes."""
        while True:
            try:
                return planned, self._load(self.corrupt.replace_or_drop(planned))
            except CorruptImagesError as error:
                self.corrupt.mark_corrupt(error.reasons)

    def _read_each(
        self, samples: SampleParams, read: Callable[[int, Ints, bool], T], chunk: int = 1
    ) -> list[T]:
        """What ``read`` returns for index, crop box and flip of each sample, ``chunk`` of them at a
        time in a thread. Raises CorruptImagesError where it raises OSError."""
        reasons: dict[int, str] = {}

        def read_chunk(first: int) -> list[T]:
            some, results = slice(first, first + chunk), []
            columns = samples.indices[some].tolist(), samples.crop_boxes[some], samples.flips[some]
            for index, box, flip in zip(*columns, strict=True):
                try:
                    results.append(read(index, box, flip))
                except OSError as error:
                    reasons[index] = error.strerror or str(error)
            return results

        chunks = self._readers.map(read_chunk, range(0, len(samples.indices), chunk))
        results = list(chain.from_iterable(chunks))
        if reasons:
            raise CorruptImagesError(reasons)
        return results


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
    pending: deque[Future[T | None]],
) -> Generator[T, None, None]:
    """What ``load`` returns for each of ``samples``, in their order; ``threads`` of them are loaded
    at a time, and PREFETCH more wait to be taken. They are ``pending`` until they are."""
    source = iter(samples)
    planning = ThreadPoolExecutor(1, "plan")  # a batch of thousands takes milliseconds
    # CUDA calls of a thread go to device 0 unless it says otherwise
    use_device = partial(torch.cuda.set_device, device) if device.type == "cuda" else None
    pool = ThreadPoolExecutor(threads, "load", initializer=use_device)

    def load_planned(plan: Future[SampleParams | None]) -> T | None:
        planned = plan.result()
        return None if planned is None else load(planned)

    def submit() -> None:
        pending.append(pool.submit(load_planned, planning.submit(next, source, None)))

    try:
        for _ in range(threads + PREFETCH):
            submit()
        while (loaded := pending.popleft().result()) is not None:
            submit()
            yield loaded
    finally:
        planning.shutdown(cancel_futures=True)
        pool.shutdown(cancel_futures=True)
