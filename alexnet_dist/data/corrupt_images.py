"""What every engine hands over, and what all do alike when an image cannot be decoded."""

from collections.abc import Generator, Iterable
from dataclasses import dataclass, field
from queue import Empty, Full, Queue
from threading import Event, Thread
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from alexnet_dist.data.plan import SampleParams
from alexnet_dist.data.sources import ImageDataset
from alexnet_dist.errors import UserError

OnCorruptImage = Literal["stop", "substitute", "omit"]
T = TypeVar("T")


@dataclass(frozen=True)
class Batch:
    """A finished batch.

    Attributes:
        images: float32 [b, 3, side, side], channels last, on the training device.
        labels: int64 [b], there too.
        numbers: [b], the samples' numbers as they came out of the engine, on the host.
    """

    images: Tensor
    labels: Tensor
    numbers: NDArray[np.int64]


class Loader(Protocol):
    """Carries out draws: one batch for each, in order, prepared ahead of need."""

    bad: "CorruptImagePolicy"
    description: str

    def batches(self, draws: Iterable[SampleParams]) -> Generator[Batch, None, None]: ...

    def close(self) -> None: ...


@dataclass
class CorruptImagePolicy:
    """Images that cannot be decoded, and what stands in for them.

    ``policy``: "stop" raises; "substitute" takes the next image that is good, whatever its class,
    so that it is the same one in every epoch and on any number of processes; "omit" leaves the
    image out (of an evaluation, which must not count another one twice).
    """

    source: ImageDataset
    policy: OnCorruptImage
    reasons: dict[int, str] = field(default_factory=dict)
    news: list[dict[str, object]] = field(default_factory=list)

    def __post_init__(self) -> None:
        unreadable = self.source.index.unreadable()
        for number in unreadable:
            self.reasons[number] = "it has no readable header of a JPEG, PNG, WebP or BMP"
        if unreadable and self.policy == "stop":
            raise UserError(self._sentence(unreadable[0], len(unreadable)), on_all_ranks=True)

    def found(self, number: int, reason: str) -> None:
        """Note that an image turned out bad; raises Failure where the policy is to stop."""
        self.reasons[number] = reason
        if self.policy == "stop":
            raise UserError(self._sentence(number, 1))

    def apply(self, draws: SampleParams) -> SampleParams:
        """The draws without the images known to be bad."""
        bad = np.array([number in self.reasons for number in draws.numbers.tolist()], np.bool_)
        if not bad.any():
            return draws
        if self.policy == "omit":
            return draws.only(~bad)
        numbers = draws.numbers.copy()
        for row in np.flatnonzero(bad):
            numbers[row] = self._next_good(int(numbers[row]))
        return draws.substituted(numbers)

    def note(self, planned: SampleParams) -> None:
        """Record what ``apply`` made of a batch, once it is known to be good."""
        for number in planned.numbers.tolist():
            if number in self.reasons:
                event: dict[str, object] = {
                    "number": number,
                    "path": self.source.path(number),
                    "reason": self.reasons[number],
                }
                if self.policy == "substitute":
                    event["substitute"] = self.source.path(self._next_good(number))
                self.news.append(event)

    def take_news(self) -> list[dict[str, object]]:
        """What was replaced or left out since the last call."""
        news, self.news = self.news, []
        return news

    def _next_good(self, number: int) -> int:
        count = len(self.source.index)
        for away in range(1, count):
            if (number + away) % count not in self.reasons:
                return (number + away) % count
        raise UserError(f"no image of {self.source.index.folder} can be decoded", on_all_ranks=True)

    def _sentence(self, number: int, count: int) -> str:
        others = f" and {count - 1} other images" if count > 1 else ""
        return (
            f"{self.source.path(number)}{others} cannot be decoded ({self.reasons[number]}): mend "
            "or remove it, or go on without it by --data.on_corrupt_image skip"
        )


def prefetch(items: Iterable[T], ahead: int) -> Generator[T, None, None]:
    """The ``items``, made in a thread of their own, where up to ``ahead`` of them may wait."""
    ready: Queue[Any] = Queue(ahead)
    stop = Event()
    end = object()

    def offer(item: Any) -> bool:
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except Full:
                continue
        return False

    def produce() -> None:
        try:
            for item in items:
                if not offer(item):
                    return
            offer(end)
        except BaseException as error:  # handed on to the thread that trains
            offer(error)

    producer = Thread(target=produce, name="ahead", daemon=True)
    producer.start()
    try:
        while (item := ready.get()) is not end:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        while producer.is_alive():
            with_room = _drain(ready)
            producer.join(0.1 if with_room else 1.0)


def _drain(queue: "Queue[Any]") -> bool:
    try:
        queue.get_nowait()
        return True
    except Empty:
        return False
