"""The paper's figures: what they say, and that they can be seen."""

import json
import re
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

from alexnet_dist import figures
from alexnet_dist.config import Config, to_dict
from alexnet_dist.data.statistics import ChannelStats
from alexnet_dist.errors import UserError
from alexnet_dist.model import build_model
from alexnet_dist.parallel.mesh import Mesh
from alexnet_dist.tracking import paper_figures, passes, plots
from alexnet_dist.tracking.logger import EventLog, JsonlSink
from alexnet_dist.training.checkpoint import CheckpointManager
from tests.conftest import write_images

SIDE = 67
CPU = torch.device("cpu")


def records(run: Path, errors: list[float], more: list[tuple[float, float]] = ()) -> str:  # type: ignore[assignment]
    """A run of four steps a pass, with a training error for each pass; ``more``: other ends."""
    run.mkdir(parents=True)
    stream = EventLog(JsonlSink(run / "metrics.jsonl"))
    for number, error in enumerate(errors):
        for step in range(4 * number + 1, 4 * number + 5):
            epoch, loss = step / 4, error / 40
            values = {"loss": loss, "top1_error": error, "lr": 0.1**number}
            stream.emit("train", step=step, epoch=epoch, **values)
        step, epoch = 4 * number + 4, number + 1.0
        stream.emit("eval", step=step, epoch=epoch, loss=error / 50, top1_error=error, images=9)
        stream.emit("epoch", step=step, epoch=epoch, loss=error / 40, top1_error=error, images=12)
    for epoch, error in more:
        stream.emit("epoch", step=int(4 * epoch), epoch=epoch, loss=1.0, top1_error=error, images=4)
    stream.close()
    return str(run)


def assert_seen(folder: Path, *stems: str) -> None:
    """Each is a PNG with something on it, and a PDF with letters in it; nothing else is there."""
    assert {path.stem for path in folder.glob("*.p*")} == set(stems)
    for stem in stems:
        with Image.open(folder / f"{stem}.png") as picture:
            assert picture.format == "PNG"
            pixels = np.asarray(picture.convert("RGB"), np.float64)
        assert min(pixels.shape[:2]) > 300
        assert pixels.std() > 15
        for edge in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]):
            assert edge.mean() > 240  # nothing is cut off
        pdf = (folder / f"{stem}.pdf").read_bytes()
        assert pdf.startswith(b"%PDF")
        streams = re.findall(rb"stream\r?\n(.*?)\r?\nendstream", pdf, re.DOTALL)
        drawn = [zlib.decompress(one) for one in streams if one[:1] == b"x"]
        assert any(re.search(rb"T[jJ]\s", one) for one in drawn)


def test_25_percent_lies_on_the_line_between_two_passes() -> None:
    assert passes.reached(([1, 2, 3], [60, 40, 20]), 25) == 2.75
    assert passes.reached(([1, 2, 3, 4], [60, 25, 40, 20]), 25) == 2
    assert passes.reached(([1, 2], [20, 10]), 25) == 1
    assert passes.reached(([1, 2], [60, 26]), 25) is None


def test_figure_1_tells_how_many_times_the_passes(tmp_path: Path) -> None:
    relu = records(tmp_path / "relu", [60, 40, 20, 10], [(4.5, 1.0)])
    tanh = records(tmp_path / "tanh", [90 - 4 * n for n in range(18)])  # 26 after 17, 22 after 18
    never = records(tmp_path / "never", [90, 80])
    figures.main([relu, tanh, never, f"--out={tmp_path / 'out'}"])
    assert_seen(tmp_path / "out", "curves", "figure1")
    found = json.loads((tmp_path / "out" / "figure1.json").read_text())
    assert found["training_error"] == 25
    one, two, three = found["runs"]
    assert (one["name"], one["passes"], one["passes_in_all"]) == ("relu", 2.75, 4)
    assert (two["name"], two["passes"]) == ("tanh", 17.25)
    assert two["times_the_first"] == pytest.approx(17.25 / 2.75)
    assert (three["passes"], three["times_the_first"], three["passes_in_all"]) == (None, None, 2)
    assert passes.verdict(found["runs"]) == (
        "passes to 25 % training error: relu 2.75; tanh 17.2 (6.27 times as many); "
        "never more than 2 (more than 0.727 times as many)"
    )


def test_one_run_has_curves_and_no_figure_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = records(tmp_path / "a$b$c, d", [60, 40])
    figures.main([run])
    folder = Path(run) / "figures"
    assert_seen(folder, "curves")
    assert capsys.readouterr().out.splitlines() == [
        str(folder / "curves.png"),
        str(folder / "curves.pdf"),
    ]


def test_groups_and_steps_without_a_loss_are_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[dict[str, Any]] = [
        {
            **{"event": "train", "epoch": n / 8, "lr": 0.01, "top1_error": 50.0},
            **{"loss": None if n == 3 else 1.0, "lrs": {"weights": 0.1 / n, "conv1.bias": 0.2}},
        }
        for n in range(1, 33)
    ]
    drawn = []
    monkeypatch.setattr(plots, "save", lambda figure, _: drawn.append(figure))
    plots.curves(tmp_path / "curves.png", {"a": events})
    loss, _, rate = drawn[0].axes
    assert 3 not in loss.lines[0].get_xdata() * 8
    weights, biases = rate.lines
    assert weights.get_ydata().tolist() == [0.1 / n for n in range(1, 33)]
    assert biases.get_ydata().tolist() == [0.2] * 32
    assert rate.get_xlim()[1] >= 4  # all of it is seen
    assert rate.get_ylim()[0] < 0.1 / 32
    legend = [text.get_text() for text in rate.get_legend().get_texts()]
    assert legend == ["weights", "conv1.bias"]


def test_the_nearest_are_those_of_a_plain_loop() -> None:
    torch.manual_seed(3)
    model = build_model("paper", num_classes=5, image_size=SIDE).eval()
    eye = figures.Eye(model, "fp32")
    images = 60 * torch.randn(23, 3, SIDE, SIDE)
    images[17] = images[4]  # as near as the other
    queries = eye.features(images[[4, 9]] + torch.randn(2, 3, SIDE, SIDE))
    assert queries.shape == (2, 4096)
    torch.testing.assert_close(eye.scores(images), model(images).detach())

    order = np.random.default_rng(0).permutation(23)
    order = order[np.argsort(order == 17, kind="stable")]  # 4 comes before it
    parts = [order[at : at + 6] for at in range(0, 23, 6)]
    batches = ((part, eye.features(images[part])) for part in parts)
    numbers, distances = figures.nearest(queries, batches, 6)

    features = {n: eye.features(images[n : n + 1])[0].double().numpy() for n in order.tolist()}
    for row, query in enumerate(queries.double().numpy()):
        plain = {n: float(np.sqrt(((f - query) ** 2).sum())) for n, f in features.items()}
        wanted = sorted(plain, key=lambda n: (round(plain[n], 4), list(features).index(n)))[:6]
        assert numbers[row].tolist() == wanted
        assert distances[row] == pytest.approx([plain[n] for n in wanted], rel=1e-4)
    assert numbers[0, :2].tolist() == [4, 17]
    few, _ = figures.nearest(queries, [(parts[0], eye.features(images[parts[0]]))], 99)
    assert few.shape == (2, 6)


def test_class_names_are_shortened() -> None:
    assert plots.short("tench, Tinca tinca", 20) == "tench"
    assert plots.short("black-and-tan coonhound", 12) == "black-and-t…"
    assert plots.short("US$ and A$", 12) == r"US\$ and A\$"


@pytest.fixture
def mesh() -> Iterator[Mesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    group = dist.group.WORLD
    assert group is not None
    yield Mesh(0, 1, 0, 1, CPU, 1, group, group)
    dist.destroy_process_group()


def state(root: Path) -> dict[str, Any]:
    """What a checkpoint says of a network with a fourth output that has no class."""
    config = to_dict(Config())
    config["data"] |= {
        "root": str(root),
        "image_size": SIDE,
        "resize_size": 76,
        "eval_batch_size": 8,
    }
    config["runtime"] |= {"precision": "fp32", "threads": 1}
    config["model"]["num_classes"] = 4
    grey = ChannelStats(np.full(3, 127.5), np.zeros(3), np.eye(3)).to_json()
    classes = ["blue", "green", "red"]
    return {"step": 1, "config": config, "classes": classes, "statistics": grey}


def test_a_network_is_drawn(tmp_path: Path, mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_images(tmp_path / "images")
    for file in (root / "val").glob("*/*.jpg"):  # each is its own nearest
        shutil.copy(file, root / "train" / file.parent.name / f"copy-{file.name}")
    torch.manual_seed(1)
    model = build_model("paper", num_classes=4, image_size=SIDE).eval()
    weights = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    checkpoints = CheckpointManager(tmp_path / "run" / "checkpoints", mesh.checkpoint_group, CPU)
    checkpoints.begin(state(root), weights, best=True)
    assert checkpoints.settle().failure == ""  # type: ignore[union-attr]
    (tmp_path / "names").write_text("blue azure, sky\nred  a long name for what is merely red\n")
    monkeypatch.setattr(figures, "init_distributed", lambda *_: mesh)
    drawn: dict[str, Any] = {}

    def spy(module: Any, name: str) -> None:
        real = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *a, **k: (drawn.setdefault(name, a[1:]), real(*a, **k))
        )

    spy(plots, "kernels")
    spy(paper_figures, "guesses")
    spy(paper_figures, "neighbours")
    shown = [str(root / "val" / "red" / "002.jpg"), "blue/003.jpg"]
    options = ["--queries=3", "--neighbours", "4", "--names", str(tmp_path / "names")]
    figures.main(
        [str(tmp_path / "run"), "--images", *shown, *options, "--data.on_corrupt_image=skip"]
    )

    assert_seen(tmp_path / "run" / "figures", "figure3", "figure4-labels", "figure4-neighbours")
    weights, towers = drawn["kernels"][:2]
    assert np.array_equal(weights, model.conv1.weight.detach().numpy())  # type: ignore[union-attr]
    assert towers == 2

    pixels, truths, best = drawn["guesses"]
    assert truths == ["a long name for what is merely red", "azure, sky"]
    whole = np.asarray(Image.open(shown[0]))
    assert np.abs(pixels[0] - whole[4:71, 4:71].astype(int)).mean() < 1  # the central 67 of 76
    view = torch.from_numpy(pixels.astype(np.float32) - 127.5).permute(0, 3, 1, 2)
    chances = model(view).detach().softmax(1)
    names = ["azure, sky", "green", truths[0], "class 3"]
    for row, guesses in enumerate(best):
        assert [name for name, _, _ in guesses] == [
            names[n] for n in chances[row].argsort().flip(0)
        ]
        assert [name == truths[row] for name, _, _ in guesses] == [right for *_, right in guesses]
        assert guesses[0][1] == pytest.approx(float(chances[row].max()), rel=1e-4)

    queries, _, found, captions = drawn["neighbours"]
    assert queries.shape == (3, SIDE, SIDE, 3)
    for query, nearest, of in zip(queries, found, captions, strict=True):
        assert nearest.shape == (4, SIDE, SIDE, 3)
        assert np.array_equal(nearest[0], query)
        assert not np.array_equal(nearest[1], query)
        assert of[0][1]


def test_what_cannot_be_drawn_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, empty = records(tmp_path / "good", [60, 40]), records(tmp_path / "empty", [])
    part = records(tmp_path / "part", [], [(0.5, 40.0)])
    bare = tmp_path / "bare"
    bare.mkdir()
    root = write_images(tmp_path / "images", train=6, val=3)
    last = tmp_path / "run" / "checkpoints" / "last"
    last.mkdir(parents=True)
    (last / "state.json").write_text(json.dumps(state(root)))
    (last / "manifest.json").touch()
    run = str(tmp_path / "run")
    monkeypatch.setattr(figures, "init_distributed", lambda *_: None)
    sentences = {
        (): "there is nothing to draw",
        ("nowhere",): "there is no run at nowhere: give a run's folder",
        (str(bare),): "bare has neither records nor checkpoints",
        (str(bare), "--only=curves"): "there are no records at .*bare",
        (str(bare), "--only=3"): "there is no checkpoint at .*bare",
        (empty,): "the records of empty have no step of training",
        (good, "--only", "1"): "figure 1 compares runs, and here is one",
        (good, part, "--only", "1"): "the records of part have no whole pass",
        (good, "--only", "2"): "there is no figure 2: --only takes curves, 1, 3, 4",
        (good, "--onyl", "1"): "there is no option --onyl",
        (good, "--out", "a", "b"): "--out takes one value, not a b",
        (good, "--queries", "0"): "--queries wants a whole number from 1 on, not 0",
        (good, "--names", "nowhere"): "nowhere cannot be read",
        (good, f"--out={tmp_path / 'names'}/x"): "could not be written .*: give another --out",
        (run, "--only=4", "--data.root=nowhere"): "there is no folder .*nowhere: give --data.root",
        (run, "--only=4", "--images", "x.jpg"): "x.jpg is none of the validation images of",
    }
    (tmp_path / "names").write_text("a file")
    for words, sentence in sentences.items():
        with pytest.raises(UserError, match=sentence):
            figures.main([*words])
    build_on_meta = SimpleNamespace(named_parameters=lambda: [("fc.weight", torch.empty(3, 4))])
    monkeypatch.setattr(figures.LoadedModel, "build_on_meta", lambda _: build_on_meta)
    with pytest.raises(UserError, match=r"fc\.weight of paper does not read the three colours"):
        figures.main([run, "--only=3"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="without torchrun"):
        figures.main([good])
