"""Plots of runs and of what networks see, as PNG or PDF after the suffix of their path."""

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray
from torch import Tensor

from alexnet_dist.tracking import Event

mpl.rcParams.update(
    {
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.25,
        "legend.frameon": False,
        "pdf.fonttype": 42,  # TrueType: publishers accept it, and text can be searched
    }
)
Image = NDArray[Any]
"""[H, W, 3], or [n, H, W, 3] where images are meant."""

_COLORS = ("#1f5a94", "#c44536", "#3d8b5f", "#8a5aa8", "#c98a1b", "#4d4d4d")
_STYLES = ("-", "--", ":", "-.")
_HIGHLIGHTED, _OTHER, _WRONG = "#e58f9a", "#a9c1e6", "#b3261e"


def save_figure(figure: Figure, path: Path, dpi: int = 200) -> None:
    figure.savefig(path, dpi=dpi, bbox_inches="tight", pad_inches=0.03)


def plot_image_grid(
    path: Path,
    images: Sequence[Image] | Image,
    captions: Sequence[str],
    title: str,
    *,
    columns: int = 8,
    colors: Sequence[str] | None = None,
) -> None:
    """Images, each above its caption, which may have a color of its own."""
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(1.35 * columns, 1.6 * rows + 0.4), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes[len(images) :]:
        axis.axis("off")
    for at, (image, caption) in enumerate(zip(images, captions, strict=True)):
        _show(axes[at], image)
        color = colors[at] if colors else "black"
        axes[at].set_xlabel(_label(caption, 24), fontsize=6.5, labelpad=2, color=color)
    figure.suptitle(title, fontsize=10)
    save_figure(figure, path, dpi=130)


def plot_neighbors(path: Path, images: Image, names: Sequence[Sequence[str]]) -> None:
    """Figure 4, right: a row per test image, with the training images nearest to it.

    Args:
        images: [n, 1 + k, H, W, 3], in each row the test image and its neighbors, nearest first.
        names: their classes; those of neighbors of another class than the test image are red.
    """
    plot_image_grid(
        path,
        images.reshape(-1, *images.shape[2:]),
        [name for row in names for name in row],
        "test images (left) and the training images nearest to them",
        columns=images.shape[1],
        colors=["black" if name == row[0] else _WRONG for row in names for name in row],
    )


def plot_predictions(
    path: Path,
    images: Sequence[Image] | Image,
    captions: Sequence[str],
    predictions: Sequence[Sequence[tuple[str, float]]],
    title: str = "",
    columns: int = 4,
) -> None:
    """Figure 4, left: images, each above its ``predictions`` as bars: labels with probabilities,
    best first, of which one that is the image's caption is highlighted."""
    columns = min(columns, len(images))
    rows, bars = -(-len(images) // columns), max(len(best) for best in predictions)
    height = 0.19 * bars
    figure = Figure(figsize=(2.1 * columns, (2.4 + height) * rows + 0.4), layout="constrained")
    axes = figure.subplots(2 * rows, columns, squeeze=False, height_ratios=[2.1, height] * rows)
    for axis in axes.flat:
        axis.axis("off")
    for at, (image, caption, best) in enumerate(zip(images, captions, predictions, strict=True)):
        upper, lower = axes[2 * (at // columns) :, at % columns][:2]
        _show(upper, image)
        upper.set_xlabel(_label(caption, 30), fontsize=8, labelpad=2)
        lower.axis("on")
        lower.set(xlim=(0, 1), ylim=(bars - 0.4, -0.6), xticks=[], yticks=[])
        lower.spines[:].set(visible=True, linewidth=0.6)
        for place, (label, probability) in enumerate(best):
            color = _HIGHLIGHTED if label == caption else _OTHER
            lower.barh(place, probability, height=0.82, color=color)
            lower.text(0.03, place, _label(label, 24), fontsize=7, va="center")
            lower.text(0.97, place, f"{probability:.1%}", fontsize=7, va="center", ha="right")
    figure.suptitle(title, fontsize=10)
    save_figure(figure, path, dpi=150)


def top_labels(probs: Tensor, names: Sequence[str], k: int = 5) -> list[list[tuple[str, float]]]:
    """The ``k`` best labels of each row of ``probs`` [n, classes] with their probabilities."""
    best = probs.topk(min(k, probs.shape[1]))
    rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [[(names[n], p) for n, p in zip(*row, strict=True)] for row in rows]


def plot_kernels(path: Path, weights: NDArray[np.float32], towers: int, title: str = "") -> None:
    """Figure 3: first-layer kernels [n, 3, h, w], in rows of 16, tower by tower.

    Gray is a weight of zero. Each kernel has a scale of its own, so that those without color are
    seen to have none, and weak ones are seen.
    """
    columns, gap, zoom = 16, 1, 8
    count, size = len(weights) // towers, weights.shape[2]
    rows, step = -(-count // columns), size + gap
    scale = np.maximum(np.abs(weights).max((1, 2, 3), keepdims=True), 1e-12)
    kernels = (0.5 + 0.5 * weights / scale).transpose(0, 2, 3, 1)
    width, height = columns * step - gap, rows * step - gap
    figure = Figure(figsize=(8, 8.2 * height / width * towers + 0.3), layout="constrained")
    for tower, axis in enumerate(figure.subplots(towers, 1, squeeze=False).flat):
        sheet = np.ones((height, width, 3))
        for at, kernel in enumerate(kernels[tower * count : (tower + 1) * count]):
            top, left = (at // columns) * step, (at % columns) * step
            sheet[top : top + size, left : left + size] = kernel
        _show(axis, sheet.repeat(zoom, 0).repeat(zoom, 1))  # PDF viewers blur small images
        axis.set_ylabel(f"tower {tower + 1}" if towers > 1 else "")
    figure.suptitle(title, fontsize=10)
    save_figure(figure, path)


def plot_curves(path: Path, runs: Mapping[str, Sequence[Event]]) -> None:
    """Loss, top-1 error and learning rates over epochs, of the events of one or several runs.

    Training is pale; validation has a point for each evaluation, if there are few. Learning rates
    have a line style for each group of parameters.
    """
    figure = Figure(figsize=(12, 3.4))
    figure.set_layout_engine("constrained", wspace=0.06)
    axes = figure.subplots(1, 3)
    handles = []
    for color, (name, events) in zip(cycle(_COLORS), runs.items(), strict=False):
        train = [e for e in events if e["event"] == "train" and e["loss"] is not None]
        evals = [e for e in events if e["event"] == "eval"]
        for axis, key in zip(axes, ("loss", "top1_error"), strict=False):
            axis.plot(*_series(train, key), color=color, lw=1, alpha=0.4)
            axis.plot(*_series(evals, key), color=color, marker="o" * (len(evals) <= 30), ms=3)
        lrs = [event["lrs"] | {"epoch": event["epoch"]} for event in train]
        for style, group in zip(cycle(_STYLES), train[-1]["lrs"] if train else (), strict=False):
            points = _series([values for values in lrs if group in values], group)
            axes[2].plot(*points, color=color, ls=style, lw=1.3, label=group)
        best = min((event["top1_error"] for event in evals), default=math.nan)
        handles.append(Line2D([], [], color=color, label=f"{_label(name, 60)}, best {best:.2f} %"))
    handles.append(Line2D([], [], color=_COLORS[-1], lw=1, alpha=0.4, label="training (pale)"))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 4))
    groups = {line.get_label(): line for line in axes[2].lines}
    if len(groups) > 1:
        axes[2].legend(handles=[*groups.values()], fontsize=7)
    for axis, label in zip(axes, ("loss", "top-1 error (%)", "learning rate"), strict=True):
        axis.set(xlabel="epochs", ylabel=label, xlim=(0, None))
    axes[0].set_ylim(bottom=0)
    axes[1].set_ylim(bottom=0)
    axes[2].set_yscale("log")
    save_figure(figure, path)


def plot_figure1(path: Path, runs: Mapping[str, Mapping[int, float]], target_error: float) -> None:
    """Figure 1: of each run the training error (%) by epochs; the first run is solid."""
    figure = Figure(figsize=(5.6, 4.2), layout="constrained")
    axis = figure.subplots()
    for style, (name, errors) in zip(cycle(_STYLES), runs.items(), strict=False):
        epochs, values = [*errors], [*errors.values()]
        marker = "o" if len(epochs) < 40 else ""
        axis.plot(epochs, values, "k", ls=style, marker=marker, ms=2.5, label=_label(name, 60))
    axis.axhline(target_error, color=_WRONG, lw=0.8, zorder=0, label=f"{target_error:g} %")
    axis.set(xlabel="epochs", ylabel="training error (%)", xlim=(0, None), ylim=(0, None))
    axis.legend()
    save_figure(figure, path)


def _show(axis: Any, image: Image) -> None:
    """Show an image [H, W, 3] without ticks and frame."""
    axis.axis("on")
    axis.imshow(image, interpolation="nearest")
    axis.set(xticks=[], yticks=[])
    axis.grid(False)
    axis.spines[:].set_visible(False)


def _label(text: str, length: int) -> str:
    """Text cut to ``length`` letters a line, as matplotlib prints it."""
    lines = (s if len(s) <= length else f"{s[: length - 1].rstrip()}…" for s in text.split("\n"))
    return "\n".join(lines).replace("$", r"\$")


def _series(events: Sequence[Event], key: str) -> tuple[list[float], list[float]]:
    """Epochs and values."""
    return [event["epoch"] for event in events], [event[key] for event in events]
