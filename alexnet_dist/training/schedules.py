"""Learning rates as functions of passes, a pass being an epoch as a real number."""

import math
from bisect import bisect_right
from dataclasses import dataclass, field
from typing import Any, Literal

Table = dict[str, list[tuple[float, float]]]


@dataclass
class Schedule:
    """The rate of each group of parameters after so many passes.

    Attributes: those of config.ScheduleConfig, and
        lr: the rate; the peak of one_cycle.
        bias_lr_mult: rate of biases as a multiple of that of weights.
        lr_mults: what multiplies the rates of some groups, whatever the shape.
        epochs: passes of the whole run.
    """

    name: Literal["constant", "plateau", "one_cycle", "polynomial", "piecewise"]
    lr: float
    epochs: float
    bias_lr_mult: float = 1.0
    warmup_epochs: float = 0.0
    patience: int = 3
    max_drops: int = 3
    pct_start: float = 0.3
    milestones: Table = field(default_factory=dict)
    lr_mults: dict[str, float] = field(default_factory=dict)
    dropped: int = 0
    best: float = math.inf
    waited: int = 0

    def rate(self, group: str, passes: float, *, bias: bool = False) -> float:
        """The rate of ``group`` in the step that begins after ``passes``."""
        if group in self.milestones and self.name == "piecewise":
            value = piecewise_value(self.milestones[group], passes)
        else:
            value = self._shape(passes) * (self.bias_lr_mult if bias else 1.0)
        value *= self.lr_mults.get(group, 1.0)
        return value * min(1.0, passes / self.warmup_epochs) if self.warmup_epochs > 0 else value

    def _shape(self, passes: float) -> float:
        if self.name == "plateau":
            return self.lr * 0.1**self.dropped
        if self.name == "one_cycle":
            return self.lr * _one_cycle(passes / self.epochs, self.pct_start)
        if self.name == "polynomial":  # of power 2, as You, Gitman and Ginsburg 2017 have it
            return self.lr * max(1 - passes / self.epochs, 0.0) ** 2
        if self.name == "piecewise":
            return piecewise_value(self.milestones["weights"], passes)
        return self.lr

    def observe(self, error: float) -> None:
        """Take note of an epoch's validation error; plateau divides the rate by ten after
        ``patience`` of them without a better one, at most ``drops`` times."""
        if error < self.best:
            self.best, self.waited = error, 0
            return
        self.waited += 1
        if self.waited >= self.patience and self.dropped < self.max_drops:
            self.dropped, self.waited = self.dropped + 1, 0

    def state(self) -> dict[str, Any]:
        """What cannot be told from the passes alone."""
        best = None if math.isinf(self.best) else self.best
        return {"dropped": self.dropped, "best": best, "waited": self.waited}

    def load(self, state: dict[str, Any]) -> None:
        self.dropped, self.waited = state["dropped"], state["waited"]
        self.best = math.inf if state["best"] is None else state["best"]


def piecewise_value(rows: list[tuple[float, float]], passes: float) -> float:
    """The value of the last row that begins at or before ``passes``."""
    begins = [row[0] for row in rows]
    # a step's share of a pass is a rounded fraction; a change at a pass is of its first step
    return rows[max(bisect_right(begins, passes + 1e-9) - 1, 0)][1]


def _one_cycle(done: float, rise: float) -> float:
    """From 1/25 of the peak up to it over ``rise`` of the run, and down to nothing, as cosines
    (Smith and Topin 2017)."""
    if done < rise:
        return 1 / 25 + (1 - 1 / 25) * (1 - math.cos(math.pi * done / rise)) / 2
    return (1 + math.cos(math.pi * min((done - rise) / (1 - rise), 1.0))) / 2
