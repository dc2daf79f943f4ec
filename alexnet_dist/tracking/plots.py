"""Pictures of runs, as PNG or PDF after the ending of their path."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from alexnet_dist.tracking import Event
from alexnet_dist.tracking.passes import Points, rates_by_pass, smooth

mpl.rcParams.update(
    {
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.25,
        "legend.frameon": False,
        "pdf.fonttype": 42,  # outlines that a publisher's programs take, and text that can be found
    }
)
_TRAIN, _VALIDATION = "#8fb8de", "#c44536"
_RUNS = ("#1f5a94", "#c44536", "#3d8b5f", "#8a5aa8", "#c98a1b", "#4d4d4d")
_GROUPS = ("-", "--", "-.", ":")


def save(figure: Figure, path: Path, dpi: int = 200) -> None:
    """Write a figure of 8 inches, which a page of a paper shrinks to 5.5, at 290 dots an inch."""
    figure.savefig(path, dpi=dpi, bbox_inches="tight", pad_inches=0.03)


def short(name: str, most: int) -> str:
    """The first of a class's names, cut to ``most`` letters, as matplotlib prints it."""
    first = name.split(",")[0].strip()
    cut = first if len(first) <= most else first[: most - 1].rstrip() + "…"
    return cut.replace("$", r"\$")


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
    save(figure, path, dpi=130)


def kernels(path: Path, weights: NDArray[np.float32], towers: int, title: str = "") -> None:
    """First-layer kernels [n, 3, h, w], rows of 16 for each tower, as the paper's figure 3.

    Grey is a weight of zero, and each kernel has a scale of its own, so that those without colour
    are seen to have none, and the weak ones are seen.
    """
    columns, gap, grain = 16, 1, 8
    count, side = len(weights) // towers, weights.shape[2]
    rows, step = -(-count // columns), side + gap
    strongest = np.abs(weights).max((1, 2, 3), keepdims=True)
    shown = (0.5 + 0.5 * weights / np.maximum(strongest, 1e-12)).transpose(0, 2, 3, 1)
    wide, high = columns * step - gap, rows * step - gap
    figure = Figure(figsize=(8, 8 * high / wide * towers + 0.22 * (towers - 1) + bool(title) * 0.3))
    figure.set_layout_engine("constrained", w_pad=0, h_pad=0.02)
    for tower, axis in enumerate(figure.subplots(towers, 1, squeeze=False).flat):
        sheet = np.ones((high, wide, 3))
        for at, kernel in enumerate(shown[tower * count : (tower + 1) * count]):
            top, left = (at // columns) * step, (at % columns) * step
            sheet[top : top + side, left : left + side] = kernel
        # readers of PDF smooth what has few pixels
        axis.imshow(sheet.repeat(grain, 0).repeat(grain, 1), interpolation="nearest")
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
        if towers > 1:
            axis.set_ylabel(f"tower {tower + 1}", fontsize=9)
    if title:
        figure.suptitle(title, fontsize=10)
    save(figure, path)


def curves(path: Path, runs: Mapping[str, Sequence[Event]]) -> None:
    """Loss, top-1 error and learning rates by passes, of one run's events or of several runs'.

    Training is pale, a running mean where records are dense; validation has a point for each
    evaluation, of few. A learning rate has a panel where the records have it.
    """
    alone = len(runs) == 1
    rates = {name: rates_by_pass(events) for name, events in runs.items()}
    panels = 3 if any(rates.values()) else 2
    figure = Figure(figsize=(4 * panels, 3.3))
    figure.set_layout_engine("constrained", wspace=0.06)
    axes = figure.subplots(1, panels)
    lines: list[Any] = []
    for number, (name, events) in enumerate(runs.items()):
        own = _RUNS[number % len(_RUNS)]
        pale, strong = (_TRAIN, _VALIDATION) if alone else (own, own)
        train = [e for e in events if e["event"] == "train" and e["loss"] is not None]
        evaluations = [e for e in events if e["event"] == "eval"]
        for axis, value in zip(axes, ("loss", "top1_error"), strict=False):
            values = smooth([e[value] for e in train], len(train) // 100)
            passes = [e["epoch"] for e in train]
            axis.plot(passes, values, color=pale, lw=1, alpha=1 if alone else 0.4)
            passes, values = [e["epoch"] for e in evaluations], [e[value] for e in evaluations]
            mark = "o" if len(evaluations) <= 30 else ""
            axis.plot(passes, values, color=strong, lw=1.5, marker=mark, ms=3)
        best = min((e["top1_error"] for e in evaluations), default=None)
        found = "" if best is None else f", best {best:.2f} %"
        if alone:
            lines = [_line(pale, "training", lw=1), _line(strong, f"validation{found}")]
        else:
            lines.append(_line(own, f"{name}{found}"))
    if panels == 3:
        _draw_rates(axes[2], list(rates.values()))
    if not alone:
        lines.append(_line("#aaaaaa", "training", lw=1))
    for axis, label in zip(
        axes, ("cross-entropy", "top-1 error, %", "learning rate"), strict=False
    ):
        axis.set(xlabel="passes", ylabel=label)
        axis.set_xlim(left=0)
        if axis.get_yscale() == "linear":
            axis.set_ylim(bottom=0)
    figure.legend(handles=lines, loc="outside lower center", ncols=min(len(lines), 4))
    if alone:
        figure.suptitle(next(iter(runs)).replace("$", r"\$"), fontsize=10)
    save(figure, path)


def _line(colour: str, label: str, lw: float = 1.5) -> Line2D:
    return Line2D([], [], color=colour, lw=lw, label=label.replace("$", r"\$"))


def _draw_rates(axis: Any, runs: Sequence[Mapping[str, Points]]) -> None:
    """The rates of each run's groups: a style for each group, and a colour for each run, or, of
    one run, for each group."""
    groups = list(dict.fromkeys(group for rates in runs for group in rates))
    for run, rates in enumerate(runs):
        for group, points in rates.items():
            number = groups.index(group)
            colour = _RUNS[(run if len(runs) > 1 else number) % len(_RUNS)]
            style = _GROUPS[number % len(_GROUPS)]
            axis.plot(*points, color=colour, ls=style, lw=1.3, drawstyle="steps-pre", label=group)
    moving = [v for rates in runs for _, values in rates.values() for v in values if v > 0]
    if moving and max(moving) > 30 * min(moving):
        axis.set_yscale("log")  # on which a rate of zero drops out at the bottom
        axis.set_ylim(min(moving) / 2, max(moving) * 2)
    if len(groups) > 1:
        first = {line.get_label(): line for line in reversed(axis.lines)}
        axis.legend(handles=[first[group] for group in groups], fontsize=7)
