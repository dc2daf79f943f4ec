"""Taking the time of several things in turns, so that what the machine does otherwise hits all."""

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from alexnet_dist.parallel.mesh import Mesh


@dataclass(frozen=True)
class Work:
    """Something to be done again and again.

    Attributes:
        once: does it once, on this process; how many units it did, over all processes.
        warm: how often, and once at least, it is done before the time is taken, at the beginning of
            each turn.
    """

    once: Callable[[], float]
    warm: int = 1


@dataclass(frozen=True)
class Figure:
    """Units a second, turn by turn."""

    turns: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.turns)

    def over(self, other: "Figure") -> float:
        """The median of the ratios to another that took turns with it."""
        pairs = zip(self.turns, other.turns, strict=True)
        return statistics.median(mine / theirs for mine, theirs in pairs)

    def record(self) -> dict[str, Any]:
        """Median, lowest and highest, to four digits."""
        return {
            "median": rounded(self.median),
            "low": rounded(min(self.turns)),
            "high": rounded(max(self.turns)),
        }


def in_turns(
    works: Mapping[str, Work], mesh: Mesh, *, rounds: int, seconds: float
) -> dict[str, Figure]:
    """Units a second of each work, in ``rounds`` turns of ``seconds`` or one unit more.

    All processes call it together, and do everything as often.
    """
    turns: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            turns[name].append(_turn(work, mesh, seconds))
    return {name: Figure(tuple(each)) for name, each in turns.items()}


def _turn(work: Work, mesh: Mesh, seconds: float) -> float:
    count, begin = max(work.warm, 1), time.perf_counter()
    for _ in range(count):
        work.once()
    _together(mesh)
    each = (time.perf_counter() - begin) / count
    begin = time.perf_counter()
    units = work.once()
    _together(mesh)
    first = time.perf_counter() - begin
    # what was lying ready took no time; and all go by the slowest process, to do as much
    slower = max(mesh.all_gather_object(max(first, each)))
    if slower >= seconds:
        return units / first
    begin = time.perf_counter()
    units = sum(work.once() for _ in range(math.ceil(seconds / slower)))
    _together(mesh)
    return units / (time.perf_counter() - begin)


def _together(mesh: Mesh) -> None:
    """Wait until the device has done what it was given, and the other processes have come here."""
    if mesh.device.type == "cuda":
        torch.cuda.synchronize(mesh.device)
    if mesh.world_size > 1:
        mesh.all_gather_object(None)


def rounded(value: float) -> float:
    """To four digits, as much as any measurement here is good for."""
    return float(f"{value:.4g}")
