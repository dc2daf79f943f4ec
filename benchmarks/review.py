"""An AlexNet review's losses on CIFAR-10, and those of a run of configs/cifar10_review.yaml.

python -m benchmarks.review RUN [--out FILE.json] [--png FILE.png]

The review's page prints the mean training loss and the validation loss of each of its 50 passes;
those below are the passes that this project's notes keep of it.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from alexnet_dist.tracking.logger import drop_superseded, read_events
from alexnet_dist.tracking.plots import save_figure
from benchmarks.common import machine_info

Losses = dict[int, dict[str, float]]

REVIEW: Losses = {
    1: {"train": 1.42579, "validation": 1.07362},
    2: {"train": 0.93875, "validation": 0.84799},
    3: {"train": 0.73101, "validation": 0.74433},
    49: {"train": 0.67797, "validation": 1.72786},
    50: {"train": 0.69543, "validation": 0.83729},
}
_COLOURS = {"train": "#8fb8de", "validation": "#c44536"}


def losses(run: Path) -> tuple[Losses, dict[str, Any]]:
    """Losses after whole passes, and what the run is: its first words in the records."""
    events = drop_superseded(read_events(run / "metrics.jsonl"))
    found: Losses = {}
    for event in events:
        kind = {"epoch": "train", "eval": "validation"}.get(event["event"])
        if kind is None or abs(event["epoch"] - round(event["epoch"])) > 1e-9:
            continue
        one = found.setdefault(round(event["epoch"]), {})
        one[kind] = event["loss"]
        if kind == "validation":
            one["top1_error"] = event["top1_error"]
    return found, next(event for event in events if event["event"] == "start")


def draw(path: Path, ours: Losses) -> None:
    figure = Figure(figsize=(5.6, 3.8), layout="constrained")
    axis = figure.subplots()
    for kind, colour in _COLOURS.items():
        points = {at: one[kind] for at, one in ours.items()}
        axis.plot(*zip(*points.items(), strict=True), color=colour, lw=1.6, marker="o", ms=3)
        theirs = {at: one[kind] for at, one in REVIEW.items()}
        axis.plot(
            *zip(*theirs.items(), strict=True), color=colour, ls="", marker="x", ms=6, mew=1.6
        )
        axis.plot([], [], color=colour, lw=1.6, marker="o", ms=3, label=f"{kind}, this run")
        axis.plot([], [], color=colour, ls="", marker="x", mew=1.6, label=f"{kind}, the review")
    if max(ours) < max(REVIEW):  # room for both: the first passes lie close together
        axis.set_xscale("log")
        ticks = sorted({*ours, *REVIEW} - {49})
        axis.set_xticks(ticks, [str(at) for at in ticks], minor=False)
        axis.minorticks_off()
    axis.set(xlabel="passes", ylabel="loss")
    axis.set_ylim(bottom=0)
    axis.legend()
    save_figure(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    parser.add_argument("--png", type=Path, help="where the picture goes")
    words = parser.parse_args()
    ours, start = losses(words.run)
    names = ("precision", "world_size", "train_images", "val_images", "parameters", "versions")
    record = {
        "what": "benchmarks/review.py",
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine_info(),
        "run": {name: start[name] for name in names},
        "passes": {"this run": ours, "the review": REVIEW},
        "below_the_review": {
            at: one["validation"] < REVIEW[at]["validation"]
            for at, one in ours.items()
            if at in REVIEW
        },
    }
    print(json.dumps(record, indent=1))
    if words.out:
        words.out.write_text(json.dumps(record, indent=1) + "\n")
    if words.png:
        draw(words.png, ours)


if __name__ == "__main__":
    main()
