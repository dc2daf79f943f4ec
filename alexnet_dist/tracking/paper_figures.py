"""Figures 1 and 4 of the paper, as PNG or PDF after the ending of their path.

Krizhevsky et al. 2012, sections 3.1 and 6.1. Figure 3 is ``plots.kernels``.
"""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from alexnet_dist.tracking.passes import LEVEL, Points
from alexnet_dist.tracking.plots import save, short

_STYLES = ("-", "--", ":", "-.")
_RIGHT, _OTHER, _WRONG = "#e58f9a", "#a9c1e6", "#b3261e"


def training_error(path: Path, runs: Mapping[str, tuple[Points, Points]], title: str) -> None:
    """Training error in percent by passes, the first run solid, the second dashed: figure 1.

    Args:
        runs: the points after whole passes, and those of finer records, which are drawn pale.
        title: says when each reaches LEVEL.
    """
    figure = Figure(figsize=(5.6, 4.2), layout="constrained")
    axis = figure.subplots()
    for number, (name, (whole, fine)) in enumerate(runs.items()):
        style = _STYLES[number % len(_STYLES)]
        axis.plot(*fine, color="#c9c9c9", lw=0.8, ls=style, zorder=1)
        label = name.replace("$", r"\$")
        mark = "o" if len(whole[0]) < 40 else ""
        axis.plot(*whole, color="black", lw=1.5, ls=style, marker=mark, ms=2.5, label=label)
    axis.axhline(LEVEL, color="#c44536", lw=0.8, zorder=0)
    axis.annotate(
        f"{LEVEL:g} %",
        (1, LEVEL),
        xycoords=("axes fraction", "data"),
        xytext=(3, 0),
        textcoords="offset points",
        va="center",
        color="#c44536",
    )
    axis.set(xlabel="passes", ylabel="training error, %")
    axis.set_xlim(left=0)
    axis.set_ylim(bottom=0)
    axis.legend(loc="best")
    lines = textwrap.fill(title.replace("$", r"\$"), 75, break_on_hyphens=False)
    axis.set_title(lines, fontsize=8.5)
    save(figure, path)


def guesses(
    path: Path,
    pixels: NDArray[np.uint8],
    truths: Sequence[str],
    best: Sequence[Sequence[tuple[str, float, bool]]],
) -> None:
    """Images [n, H, W, 3] with the right label and the best ones as bars: figure 4, left.

    Args:
        truths: the right label of each.
        best: of each the best labels, best first: a label, its probability, whether it is right.
    """
    columns = min(4, len(pixels))
    rows = -(-len(pixels) // columns)
    figure = Figure(figsize=(1.9 * columns, 2.87 * rows))
    grid = figure.add_gridspec(
        rows, columns, wspace=0.09, hspace=0.06, left=0, right=1, bottom=0, top=1
    )
    for at, (image, truth, labels) in enumerate(zip(pixels, truths, best, strict=True)):
        cell = grid[at // columns, at % columns].subgridspec(
            2, 1, height_ratios=(1.9, 0.85), hspace=0.13
        )
        upper, lower = figure.add_subplot(cell[0]), figure.add_subplot(cell[1])
        _image(upper, image)
        upper.set_anchor("S")  # at its name, whatever room there is
        upper.set_xlabel(short(truth, 28), fontsize=8, labelpad=2.5)
        _bars(lower, labels)
    save(figure, path)


def _bars(axis: Any, labels: Sequence[tuple[str, float, bool]]) -> None:
    axis.set(xlim=(0, 1), ylim=(4.6, -0.6), xticks=[], yticks=[])  # five, be there fewer classes
    axis.grid(False)
    axis.spines[:].set(visible=True, linewidth=0.6)
    for place, (label, chance, right) in enumerate(labels):
        axis.barh(place, chance, height=0.82, color=_RIGHT if right else _OTHER)
        axis.text(0.03, place, short(label, 22), fontsize=7, va="center")
        axis.text(0.97, place, f"{100 * chance:.0f} %", fontsize=7, va="center", ha="right")


def neighbours(
    path: Path,
    queries: NDArray[np.uint8],
    names: Sequence[str],
    found: Sequence[NDArray[np.uint8]],
    found_names: Sequence[Sequence[tuple[str, bool]]],
) -> None:
    """A row for each of ``queries`` [n, H, W, 3] and the images [k, H, W, 3] that were ``found``
    for it, nearest first: figure 4, right.

    Args:
        found_names: the class of each, and whether it is the query's; others are red.
    """
    most = max(len(row) for row in found)
    figure = Figure(figsize=(1.15 * (most + 1) + 0.15, 1.32 * len(queries)))
    grid = figure.add_gridspec(
        len(queries),
        most + 2,
        width_ratios=(1, 0.12, *[1] * most),
        **{"wspace": 0.06, "hspace": 0.06, "left": 0, "right": 1, "bottom": 0, "top": 1},
    )
    for row, (query, name) in enumerate(zip(queries, names, strict=True)):
        axis = figure.add_subplot(grid[row, 0])
        _image(axis, query)
        axis.set_xlabel(short(name, 20), fontsize=7, labelpad=2)
        if row == 0:
            axis.set_title("test image", fontsize=8, pad=4)
        shown = zip(found[row], found_names[row], strict=True)
        for place, (image, (of, same)) in enumerate(shown):
            axis = figure.add_subplot(grid[row, place + 2])
            _image(axis, image)
            colour = "black" if same else _WRONG
            axis.set_xlabel(short(of, 20), fontsize=7, labelpad=2, color=colour)
            if row == 0 and place == 0:
                axis.set_title("nearest training images", fontsize=8, pad=4, loc="left")
    save(figure, path)


def _image(axis: Any, pixels: NDArray[np.uint8]) -> None:
    axis.imshow(pixels, interpolation="nearest")
    axis.set(xticks=[], yticks=[])
    axis.grid(False)
    axis.spines[:].set_visible(False)
