"""A picture of images, each with its best labels as bars, as in figure 4 of the paper."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

_BEST, _OTHERS, _GROUND = "#c44536", "#8fb8de", "#f2f2f2"
_LETTERS = 30


def guesses(
    path: Path,
    images: Sequence[NDArray[np.uint8]],
    captions: Sequence[str],
    best: Sequence[Sequence[tuple[str, float]]],
    title: str,
    columns: int = 4,
) -> None:
    """Images [H, W, 3] with captions, each above its ``best`` labels with their probabilities."""
    columns = min(columns, len(images))
    rows, bars = -(-len(images) // columns), max(len(some) for some in best)
    low = 0.21 * bars
    figure = Figure(figsize=(2.2 * columns, (2.45 + low) * rows + 0.4), layout="constrained")
    grid = figure.subplots(2 * rows, columns, squeeze=False, height_ratios=[2.3, low] * rows)
    for axis in grid.ravel():
        axis.axis("off")
    for number, (image, caption, some) in enumerate(zip(images, captions, best, strict=True)):
        row, column = divmod(number, columns)
        above, below = grid[2 * row, column], grid[2 * row + 1, column]
        above.imshow(image)
        above.set_title(_short(caption), fontsize=7)
        places = range(len(some))
        values = [value for _, value in some]
        below.barh(places, [1.0] * len(some), color=_GROUND, height=0.9)
        below.barh(places, values, color=[_BEST] + [_OTHERS] * (len(some) - 1), height=0.9)
        for place, (label, value) in enumerate(some):
            below.text(0.015, place, _short(label), fontsize=7, va="center")
            below.text(0.985, place, f"{value:.1%}", fontsize=7, va="center", ha="right")
        below.set(xlim=(0, 1), ylim=(bars - 0.5, -0.5))
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=130, bbox_inches="tight")


def _short(name: str) -> str:
    """A name that fits, as matplotlib prints it."""
    cut = name if len(name) <= _LETTERS else f"{name[: _LETTERS - 1].rstrip()}…"
    return cut.replace("$", r"\$")
