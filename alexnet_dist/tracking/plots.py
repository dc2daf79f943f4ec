"""Pictures of a run, as PNG."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from alexnet_dist.tracking.events import Event

mpl.rcParams.update(
    {
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.25,
        "legend.frameon": False,
    }
)
_TRAIN, _VALIDATION = "#8fb8de", "#c44536"


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=130, bbox_inches="tight")


def images(
    path: Path, pixels: NDArray[np.uint8], captions: Sequence[str], title: str, columns: int = 8
) -> None:
    """A sheet of images [n, H, W, 3] with a caption below each."""
    rows = -(-len(pixels) // columns)
    figure = Figure(figsize=(1.35 * columns, 1.6 * rows + 0.4), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.axis("off")
    for axis, image, caption in zip(axes, pixels, captions, strict=False):
        axis.imshow(image)
        axis.text(0.5, -0.04, caption, fontsize=6, ha="center", va="top", transform=axis.transAxes)
    figure.suptitle(title, fontsize=10)
    _save(figure, path)


def kernels(path: Path, weights: NDArray[np.float32], towers: int, title: str) -> None:
    """First-layer kernels [n, 3, h, w], a block of rows for each tower, as the paper's figure 3.

    Each kernel is stretched to the full range on its own.
    """
    count, columns = len(weights) // towers, 16
    low = weights.min((1, 2, 3), keepdims=True)
    high = weights.max((1, 2, 3), keepdims=True)
    shown = ((weights - low) / np.maximum(high - low, 1e-12)).transpose(0, 2, 3, 1)
    side = shown.shape[1]
    blocks = []
    for tower in range(towers):
        rows = -(-count // columns)
        sheet = np.ones((rows * (side + 1) - 1, columns * (side + 1) - 1, 3))
        for at, kernel in enumerate(shown[tower * count : (tower + 1) * count]):
            top, left = (at // columns) * (side + 1), (at % columns) * (side + 1)
            sheet[top : top + side, left : left + side] = kernel
        blocks.append(sheet)
    figure = Figure(figsize=(8, 0.5 * sum(-(-count // columns) for _ in blocks) + 0.6))
    for tower, (axis, sheet) in enumerate(
        zip(figure.subplots(towers, 1, squeeze=False).flat, blocks, strict=True)
    ):
        axis.imshow(sheet, interpolation="nearest")
        axis.axis("off")
        if towers > 1:
            axis.set_title(f"tower {tower + 1}", fontsize=8, loc="left")
    figure.suptitle(title, fontsize=10)
    _save(figure, path)


def curves(path: Path, events: Sequence[Event], title: str) -> None:
    """Loss and error by passes, of training and of validation."""
    train = [event for event in events if event["event"] == "train"]
    evaluations = [event for event in events if event["event"] == "eval"]
    figure = Figure(figsize=(9, 3.2))
    loss, error = figure.subplots(1, 2)

    def draw(axis: Any, name: str, label: str) -> None:
        axis.plot(
            [e["epoch"] for e in train], [e[name] for e in train], color=_TRAIN, lw=1, label="train"
        )
        axis.plot(
            [e["epoch"] for e in evaluations],
            [e[name] for e in evaluations],
            color=_VALIDATION,
            marker="o",
            ms=3,
            label="validation",
        )
        axis.set_xlabel("passes")
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
        axis.legend()

    draw(loss, "loss", "cross-entropy")
    draw(error, "top1_error", "top-1 error, %")
    if evaluations:
        best = min(evaluations, key=lambda e: e["top1_error"])
        error.annotate(
            f"{best['top1_error']:.2f} %",
            (best["epoch"], best["top1_error"]),
            textcoords="offset points",
            xytext=(0, -6),
            ha="center",
            va="top",
            color=_VALIDATION,
        )
    figure.suptitle(title, fontsize=10)
    _save(figure, path)
