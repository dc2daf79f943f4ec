"""What the records of runs say by passes over the training images."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from alexnet_dist.tracking import Event

LEVEL = 25.0
"""Training error in percent that figure 1 of the paper compares at."""

Points = tuple[Sequence[float], Sequence[float]]
"""Passes, and a value after each."""


def smooth(values: Sequence[float], width: int) -> list[float]:
    """The running mean of ``width`` values, of fewer at the ends."""
    if not values:
        return []
    window = np.ones(min(max(width, 1), len(values)))
    count = np.convolve(np.ones(len(values)), window, "same")
    mean: list[float] = (np.convolve(values, window, "same") / count).tolist()
    return mean


def errors(events: list[Event]) -> Points:
    """Whole passes, and the training error in percent over each."""
    found = {
        event["epoch"]: event["top1_error"]
        for event in events
        if event["event"] == "epoch" and abs(event["epoch"] - round(event["epoch"])) < 1e-9
    }
    passes = sorted(found)
    return passes, [found[n] for n in passes]


def fine_errors(events: list[Event]) -> Points:
    """Training error between records, its running mean over a quarter of a pass."""
    train = [e for e in events if e["event"] == "train" and e["top1_error"] is not None]
    passes = [event["epoch"] for event in train]
    width = round(len(train) / max(passes[-1], 1) / 4) if train else 1
    return passes, smooth([event["top1_error"] for event in train], width)


def rates_by_pass(events: Sequence[Event]) -> dict[str, Points]:
    """The learning rate of each group that the records name, else of the weights."""
    found: dict[str, tuple[list[float], list[float]]] = {}
    for event in events:
        if event["event"] != "train" or "lr" not in event:
            continue
        for group, rate in event.get("lrs", {"weights": event["lr"]}).items():
            passes, values = found.setdefault(group, ([], []))
            passes.append(event["epoch"])
            values.append(rate)
    return dict(found)


def reached(points: Points, level: float) -> float | None:
    """Passes after which the error first is at ``level``, on straight lines between the points;
    those of the first one where it is below already, None where none is."""
    before: tuple[float, float] | None = None
    for passes, error in zip(*points, strict=True):
        if error <= level:
            if before is None:
                return passes
            part = (before[1] - level) / (before[1] - error)
            return before[0] + part * (passes - before[0])
        before = passes, error
    return None


def compare(runs: dict[str, Points]) -> list[dict[str, Any]]:
    """Of each run the passes to LEVEL (None: never), how many times those of the first run they
    are, and how many it has taken in all: figure 1 of Krizhevsky et al. 2012."""
    taken = {name: reached(points, LEVEL) for name, points in runs.items()}
    first = next(iter(taken.values()))
    return [
        {
            "name": name,
            "passes": passes,
            "times_the_first": passes / first if passes is not None and first else None,
            "passes_in_all": runs[name][0][-1],
        }
        for name, passes in taken.items()
    ]


def verdict(result: list[dict[str, Any]]) -> str:
    """What ``compare`` has found, in words."""
    first, said = result[0]["passes"], []
    for run in result:
        least = "" if run["passes"] is not None else "more than "
        passes = run["passes_in_all"] if run["passes"] is None else run["passes"]
        words = f"{run['name']} {least}{passes:.3g}"
        if first and run is not result[0]:
            words += f" ({least}{passes / first:.3g} times as many)"
        said.append(words)
    return f"passes to {LEVEL:g} % training error: {'; '.join(said)}"
