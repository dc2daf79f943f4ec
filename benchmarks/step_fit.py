"""Parts of a step's time from what benchmarks/step_parts.py measured."""

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from benchmarks.step_model import Law, LayerSpec, count_hops, ways


def fit_parts(layers: Sequence[LayerSpec], found: dict[str, Any]) -> dict[str, Any]:
    """Parts, as Parts has them, from what ``observe`` found."""
    n, hops = found["processes"], "ring"
    return {
        "name": found["name"],
        "assumed": [],
        "width": found["width"],
        **_fit_computing(layers, n, found["batches"], found["computing"]),
        "processes_a_node": found["node"],
        **{
            place: fit_lines(lines["seconds"], lines["processes"], hops) if lines else None
            for place, lines in found["lines"].items()
        },
        "hops": hops,
        "taken": found["taken"],
        "powersgd_waits": found["waits"],
        "loader": None,
    }


def fit(points: Iterable[tuple[float, float]]) -> Law:
    """Seconds at all and a unit more, neither below 0, by least squares in which an error counts by
    the root of what it is an error of: neither the small times nor the large ones alone decide."""
    x, seconds = np.array(sorted(points), float).T
    weights = seconds**-0.5
    terms = np.stack([np.ones_like(x), x], 1) * weights[:, None]
    first, more = np.linalg.lstsq(terms, seconds * weights, rcond=None)[0]
    if more < 0:
        return float(len(x) / np.sum(1 / seconds)), 0.0
    if first < 0:
        return 0.0, float(np.sum(x) / np.sum(x**2 / seconds))
    return float(first), float(more)


def _fit_computing(
    layers: Sequence[LayerSpec], n: int, batches: Sequence[int], found: dict[str, Any]
) -> dict[str, Any]:
    """The computing parts, from what ``computing`` found on n processes."""
    connected = sum(layer.parameters for layer in layers if not layer.work)
    values = sum(layer.parameters for layer in layers)
    plain, split = found["plain"], found.get("split", [])
    points = [(b, one["connected"] / connected) for b, one in zip(batches, plain, strict=True)]
    if split:
        held = connected / n
        points += [(b * n, one["connected"] / held) for b, one in zip(batches, split, strict=True)]
    forward = [one["connected_forward"] / one["connected"] for one in plain]

    def whole(step: dict[str, float]) -> float:
        return sum(seconds for name, seconds in step.items() if name != "connected_forward")

    sending = {
        compress: max(whole(found[compress]) - whole(plain[0]), 0.0) / values
        for compress in ("none", "bf16", "powersgd")
    }
    return {
        "convolutions_forward": fit(zip(batches, [one["forward"] for one in plain], strict=True)),
        "convolutions_backward": fit(zip(batches, [one["backward"] for one in plain], strict=True)),
        "connected": fit(points),
        "connected_backward": 1 - statistics.median(forward),
        "update": statistics.median(one["update"] for one in plain) / values,
        "sending": sending,
    }


def fit_lines(found: dict[str, list[tuple[int, float]]], n: int, hops: str) -> dict[str, Law]:
    """Seconds a hop and bytes a second of each collective, from what ``travelling`` found."""
    lines = {}
    for kind, points in found.items():
        sent = [(ways(kind) * (n - 1) / n * size, seconds) for size, seconds in points]
        seconds, more = fit(sent)
        lines[kind] = (seconds / (ways(kind) * count_hops(hops, n)), 1 / max(more, 1e-15))
    return lines
