"""How long this process has waited for others: the part of communication that nothing hides."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

_Events = tuple[torch.cuda.Event, torch.cuda.Event]


class Waits:
    """Adds up the time between what is here and what has to come from other processes.

    On a GPU it is the stream that waits, and not the process: there the time lies between two
    events, and is read when it is asked for, so that no step waits for its clock.
    """

    def __init__(self) -> None:
        self._seconds, self._paused = 0.0, False
        self._pairs: list[_Events] = []
        self._since: float | torch.cuda.Event | None = None

    def begin(self, device: torch.device) -> None:
        """A wait begins here, or, where nothing has come since the last call, only now."""
        if device.type != "cuda":
            self._since = time.perf_counter()
            return
        if not isinstance(self._since, torch.cuda.Event):  # which is recorded anew otherwise
            self._since = torch.cuda.Event(enable_timing=True)
        self._since.record()

    def end(self) -> None:
        """What was waited for is here."""
        since, self._since = self._since, None
        if self._paused or since is None:
            return
        if isinstance(since, float):
            self._seconds += time.perf_counter() - since
        else:
            arrived = torch.cuda.Event(enable_timing=True)
            arrived.record()
            self._pairs.append((since, arrived))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is waited for within it does not count: it is no part of a training step."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def take(self) -> float:
        """Seconds waited since the last call."""
        if self._pairs:
            self._pairs[-1][1].synchronize()
        milliseconds = sum(since.elapsed_time(until) for since, until in self._pairs)
        seconds, self._seconds = self._seconds + milliseconds / 1000, 0.0
        self._pairs = []
        return seconds


WAITS = Waits()
"""Of this process, as its groups are."""


def wait_from_last_gradient(module: nn.Module, device: torch.device) -> None:
    """Have a wait begin with the last gradient that a backward pass of ``module`` computes."""
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda _: WAITS.begin(device))
