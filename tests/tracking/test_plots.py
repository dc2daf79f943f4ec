"""Plots show what they are given; a look at them is still worth it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from alexnet_dist.tracking import plots


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were saved."""
    saved: list[Figure] = []
    save = plots.save_figure

    def spy(figure: Figure, path: Path, dpi: int = 200) -> None:
        saved.append(figure)
        save(figure, path, dpi)

    monkeypatch.setattr(plots, "save_figure", spy)
    return saved


def test_curves_of_all_groups_and_steps_with_a_loss(tmp_path: Path, figures: list[Figure]) -> None:
    train: dict[str, Any] = {"event": "train", "top1_error": 50.0, "loss": 1.0}
    lrs = [{"weights": 0.1 / n, "conv1.bias": 0.2} for n in range(1, 41)]
    events = [train | {"epoch": n / 8, "lrs": lrs[n - 1]} for n in range(1, 41)]
    events[2]["loss"] = None
    events += [{"event": "eval", "epoch": n, "top1_error": 9 - n, "loss": 1.0} for n in (1, 2)]
    plots.plot_curves(tmp_path / "curves.png", {"a": events})
    loss, error, lr = figures[0].axes
    assert [axis.get_xlabel() for axis in (loss, error, lr)] == ["epochs"] * 3
    assert 3 not in loss.lines[0].get_xdata() * 8
    assert error.lines[1].get_ydata().tolist() == [8, 7]
    weights, biases = lr.lines
    assert weights.get_ydata().tolist() == [0.1 / n for n in range(1, 41) if n != 3]
    assert set(biases.get_ydata()) == {0.2}
    assert lr.get_yscale() == "log"
    assert [text.get_text() for text in lr.get_legend().get_texts()] == ["weights", "conv1.bias"]
    assert "best 7.00 %" in figures[0].legends[0].get_texts()[0].get_text()


def test_right_labels_and_wrong_neighbors_stand_out(tmp_path: Path, figures: list[Figure]) -> None:
    images = np.zeros((2, 8, 8, 3), np.uint8)
    predictions = [[("cat", 0.7), ("dog", 0.3)], [("dog", 1.0), ("cat", 0.0)]]
    plots.plot_predictions(tmp_path / "p.png", images, ["cat", "cat"], predictions)
    bars = [axis.patches for axis in figures[0].axes if axis.patches]
    assert [[bar.get_width() for bar in row] for row in bars] == [[0.7, 0.3], [1.0, 0.0]]
    highlighted = [[bar.get_facecolor() == bars[0][0].get_facecolor() for bar in r] for r in bars]
    assert highlighted == [[True, False], [False, True]]
    pairs = np.stack([images, images], 1)
    plots.plot_neighbors(tmp_path / "n.png", pairs, [["cat", "dog"], ["dog", "dog"]])
    colors = [axis.xaxis.label.get_color() for axis in figures[1].axes]
    assert colors[:1] + colors[2:] == ["black"] * 3
    assert colors[1] != "black"


def test_labels_are_cut_and_escaped() -> None:
    assert plots._label("black-and-tan coonhound", 12) == "black-and-t…"
    assert plots._label("US$ and A$\n(is b)", 12) == "US\\$ and A\\$\n(is b)"
