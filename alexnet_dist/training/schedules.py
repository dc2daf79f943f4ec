"""Learning rates as functions of the epoch, a real number."""

import math
from bisect import bisect_right
from dataclasses import dataclass, field
from typing import Any, Literal

Milestones = list[tuple[float, float]]
"""Epochs, and the value that holds from each."""


@dataclass
class Schedule:
    """The learning rate of each parameter group at an epoch.

    Attributes:
        name, warmup_epochs, patience, pct_start, milestones: see ScheduleConfig in config.py.
        lr: the base learning rate; the peak of one_cycle.
        epochs: of the whole run, before ``epochs_scale``.
        epochs_scale: stretches the schedule by this factor.
        lr_mults: multiples of some groups, whatever the schedule.
        num_decays, best, num_bad_epochs: of plateau: how often the lr was divided, the lowest
            error, and the evaluations since.
    """

    name: Literal["constant", "plateau", "one_cycle", "polynomial", "piecewise"]
    lr: float
    epochs: float
    epochs_scale: float = 1.0
    warmup_epochs: float = 0.0
    patience: int = 3
    pct_start: float = 0.3
    milestones: dict[str, Milestones] = field(default_factory=dict)
    lr_mults: dict[str, float] = field(default_factory=dict)
    num_decays: int = 0
    best: float | None = None
    num_bad_epochs: int = 0

    def lr_at(self, group: str, epoch: float) -> float:
        """The learning rate of ``group`` in the step that begins at ``epoch``."""
        epoch /= self.epochs_scale
        lr = self._scheduled_lr(group, epoch) * self.lr_mults.get(group, 1.0)
        return lr * min(1.0, epoch / self.warmup_epochs) if self.warmup_epochs > 0 else lr

    def _scheduled_lr(self, group: str, epoch: float) -> float:
        if self.name == "plateau":
            return self.lr * 0.1**self.num_decays
        if self.name == "one_cycle":
            return self.lr * _one_cycle(epoch / self.epochs, self.pct_start)
        if self.name == "polynomial":  # of power 2, as You, Gitman and Ginsburg 2017 have it
            return self.lr * max(1 - epoch / self.epochs, 0.0) ** 2
        if self.name == "piecewise":
            return piecewise_value(self.milestones.get(group, self.milestones["weights"]), epoch)
        return self.lr

    def step_metric(self, error: float) -> None:
        """Take an epoch's validation error; plateau divides the learning rate by ten after
        ``patience`` of them without a better one, at most three times, as in the paper."""
        if self.best is None or error < self.best:
            self.best, self.num_bad_epochs = error, 0
            return
        self.num_bad_epochs += 1
        if self.num_bad_epochs >= self.patience and self.num_decays < 3:
            self.num_decays, self.num_bad_epochs = self.num_decays + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """What does not follow from the epoch alone."""
        names = ("num_decays", "best", "num_bad_epochs")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


def piecewise_value(milestones: Milestones, epoch: float) -> float:
    """The value of the last milestone at or before ``epoch``."""
    # a step's epoch is a rounded fraction; a milestone holds from the first step of its epoch
    index = bisect_right([begin for begin, _ in milestones], epoch + 1e-9) - 1
    return milestones[max(index, 0)][1]


def _one_cycle(done: float, pct_start: float) -> float:
    """From 1/25 of the peak up to it over ``pct_start`` of the run, and down to 0, as cosines
    (Smith and Topin 2017)."""
    if done < pct_start:
        return 1 / 25 + (1 - 1 / 25) * (1 - math.cos(math.pi * done / pct_start)) / 2
    return (1 + math.cos(math.pi * min((done - pct_start) / (1 - pct_start), 1.0))) / 2
