"""The command figures: what the paper's figures show, and that they can be seen."""

import re
import shutil
import zlib
from functools import partial
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from PIL import Image

from alexnet_dist import figures
from alexnet_dist.data.datasets import SplitIndex
from alexnet_dist.data.index import DatasetInfo
from alexnet_dist.data.statistics import ChannelStats
from alexnet_dist.model import build_model
from alexnet_dist.tracking import plots
from alexnet_dist.tracking.logger import JsonlSink
from tests.conftest import Saved, error_of, write_images
from tests.networks import CLASSES, MEAN, command

SIZE = 67


def write_records(run: Path, errors: list[float], steps: int = 4) -> str:
    """A run with a training error for each epoch."""
    run.mkdir(parents=True)
    log = JsonlSink(run / "metrics.jsonl")
    for number, error in enumerate(errors):
        for step in range(steps * number + 1, steps * (number + 1) + 1):
            values = {"loss": error / 40, "top1_error": error, "lrs": {"weights": 0.1**number}}
            log.log({"event": "train", "step": step, "epoch": step / steps, **values})
        for event in ("eval", "epoch"):
            values = {"loss": error / 50, "top1_error": error}
            log.log({"event": event, "step": step, "epoch": number + 1.0, **values})
    return str(run)


def assert_seen(folder: Path, *stems: str) -> None:
    """Each is a PNG with something on it, and a PDF with letters in it; nothing else is there."""
    assert {path.stem for path in folder.glob("*.p*")} == set(stems)
    for stem in stems:
        pixels = np.asarray(Image.open(folder / f"{stem}.png").convert("RGB"), np.float64)
        assert min(pixels.shape[:2]) > 300
        assert pixels.std() > 15
        edges = (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1])
        assert min(edge.mean() for edge in edges) > 240  # nothing is cut off
        pdf = (folder / f"{stem}.pdf").read_bytes()
        streams = re.findall(rb"stream\r?\n(x.*?)\r?\nendstream", pdf, re.DOTALL)
        assert any(re.search(rb"T[jJ]\s", zlib.decompress(one)) for one in streams)


def test_figure_1_says_after_how_many_epochs_runs_reach_25_percent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_records(Path("relu"), [60, 40, 20, 10])
    with Path("relu/metrics.jsonl").open("a") as file:  # an epoch that was not completed
        file.write('{"event": "epoch", "step": 18, "epoch": 4.5, "top1_error": 1.0}\n')
    write_records(Path("tanh"), [90 - 4 * n for n in range(18)])  # 26 after 17, 22 after 18
    write_records(Path("exact"), [60, 25, 40, 20])
    write_records(Path("at once"), [20, 10])
    write_records(Path("a$b$c"), [90, 80])
    runs = ["relu", "tanh", "exact", "at once", "a$b$c"]
    figures.main([*runs, "--out=out", "--only", "curves", "1"])
    assert_seen(Path("out"), "curves", "figure1")
    out = capsys.readouterr().out.splitlines()
    assert out[:2] == ["out/curves.png", "out/curves.pdf"]
    epochs = ("2.75", "17.2", "2", "1", "more than 2")
    assert out[2:7] == [f"{r}: {n} epochs to 25 %" for r, n in zip(runs, epochs, strict=True)]


def test_nearest_neighbors_are_those_of_a_plain_loop() -> None:
    torch.manual_seed(3)
    model = build_model("paper", num_classes=5, image_size=SIZE).eval()
    extract = partial(figures.extract_features, model, "fp32")
    images = 60 * torch.randn(23, 3, SIZE, SIZE)
    images[17] = images[4]  # as near as the other
    noisy = images[[4, 9]] + torch.randn(2, 3, SIZE, SIZE)
    queries, logits = extract(noisy)
    assert queries.shape == (2, 4096)
    torch.testing.assert_close(logits, model(noisy).detach())
    *_, last = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    torch.testing.assert_close(last(queries), logits)

    order = np.random.default_rng(0).permutation(23)
    order = order[np.argsort(order == 17, kind="stable")]  # 4 comes before it
    chunks = [order[at : at + 6] for at in range(0, 23, 6)]
    indices = figures.knn(queries, ((chunk, extract(images[chunk])[0]) for chunk in chunks), 6)

    features = {n: extract(images[n : n + 1])[0][0].double().numpy() for n in order.tolist()}
    for row, query in enumerate(queries.double().numpy()):
        plain = {n: float(np.sqrt(((f - query) ** 2).sum())) for n, f in features.items()}
        expected = sorted(plain, key=lambda n: (round(plain[n], 4), list(features).index(n)))[:6]
        assert indices[row].tolist() == expected
    assert indices[0, :2].tolist() == [4, 17]


def test_classes_have_short_names_that_tell_them_apart() -> None:
    split = SplitIndex("", [], np.array([]), np.array([]), ["n1", "n2", "n3", "n4"])
    names = {"n1": "tench, Tinca tinca", "n2": "crane", "n3": "crane, a machine"}
    stats = ChannelStats(np.zeros(3), np.zeros(3), np.eye(3))
    info = DatasetInfo("folders", split, split, stats, names)
    assert info.short_names == ["tench", "crane (n2)", "crane (n3)", "n4"]


def test_figures_3_and_4(paper: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, model = paper
    root = write_images(tmp_path / "images")
    for file in (root / "val").glob("*/*.jpg"):  # each is its own nearest
        shutil.copy(file, root / "train" / file.parent.name / f"copy-{file.name}")
    for name in ("plot_kernels", "plot_predictions", "plot_neighbors"):
        monkeypatch.setattr(plots, name, MagicMock(wraps=getattr(plots, name)))
    labeled = [str(root / "val" / "red" / "002.jpg"), "blue/003.jpg"]
    options = ["--queries=3", "--neighbors", "4", "--only", "3", "4"]
    options += ["--data.root", root, "--data.on_corrupt_image=skip", "--data.eval_batch_size=8"]
    command(figures.main, run, "--images", *labeled, *options)

    assert_seen(run / "figures", "figure3", "figure4-labels", "figure4-neighbors")
    _, weights, towers = plots.plot_kernels.call_args.args
    assert np.array_equal(weights, model.conv1.weight.detach().numpy())  # type: ignore[union-attr]
    assert towers == 2

    _, pixels, captions, predictions = plots.plot_predictions.call_args.args
    assert captions == ["red", "blue"]
    stored = np.asarray(Image.open(labeled[0]))
    assert np.abs(pixels[0] - stored[4:71, 4:71].astype(int)).mean() < 1  # the central 67 of 76
    images = torch.from_numpy(pixels - np.float32(MEAN)).permute(0, 3, 1, 2)
    names = np.array(CLASSES)
    for row, best in zip(model(images).detach().softmax(1), predictions, strict=True):
        assert [name for name, _ in best] == names[row.argsort().flip(0)].tolist()
        assert [p for _, p in best] == pytest.approx(row.sort(descending=True)[0].tolist(), 1e-4)

    _, rows, row_names = plots.plot_neighbors.call_args.args
    assert rows.shape == (3, 1 + 4, SIZE, SIZE, 3)
    assert np.array_equal(rows[:, 1], rows[:, 0])
    assert not (rows[:, 2] == rows[:, 0]).all((1, 2, 3)).any()
    assert all(row[1] == row[0] for row in row_names)


def test_what_cannot_be_plotted_is_an_error_message(
    paper: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_records(Path("good"), [60, 40])
    write_records(Path("empty"), [])
    Path("bare").mkdir()
    run, root = str(paper[0]), f"--data.root={write_images(tmp_path / 'images', train=6, val=3)}"
    messages = {
        (): "there is nothing to plot",
        ("nowhere",): "there is no run at nowhere: give a run's folder",
        ("bare",): "there are no records at .*bare",
        ("bare", "--only", "3"): "there is no checkpoint at .*bare",
        ("empty",): "the records of empty have no step of training",
        ("good", "--only", "1"): "figure 1 compares runs",
        ("good", "empty", "--only", "1"): "the records of empty have no complete epoch",
        ("good", "--only", "2"): "--only: invalid choice: '2'",
        ("good", "--queries", "0"): "--queries: it must be a whole number of at least 1, not 0",
        ("good", "--only=curves", "--out=good/metrics.jsonl/x"): "cannot be written .*: give --out",
        (run, "--only=4", "--data.root=none"): "there is no folder .*none: give --data.root",
        (run, "--only=4", root, "--images", "x.jpg"): "x.jpg is none of the validation images of",
    }
    for words, message in messages.items():
        assert re.search(message, error_of(command, figures.main, *words))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "without torchrun" in error_of(figures.main, ["good"])
