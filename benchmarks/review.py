"""An AlexNet review's losses on CIFAR-10, beside those of a run of configs/cifar10_review.yaml.

python -m benchmarks.review RUN [--out FILE.json] [--png FILE.png]

The review's page prints the mean training loss and the validation loss of each of its 50 epochs;
those below are the epochs that this project's notes keep of it.
"""

import argparse
from pathlib import Path

from matplotlib.figure import Figure

from alexnet_dist.tracking.logger import read_events
from alexnet_dist.tracking.plots import save_figure
from benchmarks.common import save_record

REVIEW = {
    1: {"train": 1.42579, "validation": 1.07362},
    2: {"train": 0.93875, "validation": 0.84799},
    3: {"train": 0.73101, "validation": 0.74433},
    49: {"train": 0.67797, "validation": 1.72786},
    50: {"train": 0.69543, "validation": 0.83729},
}
COLORS = {"train": "#8fb8de", "validation": "#c44536"}


def plot(path: Path, ours: dict[int, dict[str, float]]) -> None:
    """Both losses by epoch: this run as lines, the review as crosses."""
    figure = Figure(figsize=(5.6, 3.8), layout="constrained")
    axis = figure.subplots()
    for kind, color in COLORS.items():
        losses = [one[kind] for one in ours.values()]
        axis.plot(list(ours), losses, "o-", color=color, ms=3, label=f"{kind}, this run")
        theirs = [one[kind] for one in REVIEW.values()]
        axis.plot(list(REVIEW), theirs, "x", color=color, mew=1.6, label=f"{kind}, the review")
    if max(ours) < max(REVIEW):  # the first epochs would lie close together
        axis.set_xscale("log")
        ticks = sorted({*ours, *REVIEW} - {49})
        axis.set_xticks(ticks, [str(epoch) for epoch in ticks])
        axis.minorticks_off()
    axis.set(xlabel="epochs", ylabel="loss", ylim=(0, None))
    axis.legend()
    save_figure(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    parser.add_argument("--png", type=Path, help="where the picture goes")
    words = parser.parse_args()
    events = read_events(words.run)
    ours: dict[int, dict[str, float]] = {}
    for event in events:
        kind = {"epoch": "train", "eval": "validation"}.get(event["event"])
        if kind and abs(event["epoch"] - round(event["epoch"])) < 1e-9:  # not within an epoch
            losses = ours.setdefault(round(event["epoch"]), {})
            losses |= {kind: event["loss"], f"{kind}_top1_error": event["top1_error"]}
    start = next(event for event in events if event["event"] == "start")
    names = ("precision", "world_size", "train_images", "val_images", "parameters", "versions")
    results = {
        "run": {name: start[name] for name in names},
        "epochs": {"this run": ours, "the review": REVIEW},
        "below_the_review": {
            epoch: losses["validation"] < REVIEW[epoch]["validation"]
            for epoch, losses in ours.items()
            if epoch in REVIEW
        },
    }
    save_record("review.py", results, words.out)
    if words.png:
        plot(words.png, ours)


if __name__ == "__main__":
    main()
