"""The average of several networks' chances and of ten views, and what may be averaged."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

from alexnet_dist import evaluate, loaded_model
from alexnet_dist.config import Config, from_dict, to_dict
from alexnet_dist.data.datasets import SplitIndex, scan_dataset
from alexnet_dist.errors import UserError
from alexnet_dist.loaded_model import LoadedModel
from alexnet_dist.model import build_model
from alexnet_dist.parallel.mesh import Mesh
from alexnet_dist.training import checkpoint
from tests.conftest import write_images

IMAGES, CLASSES = 23, 7


@pytest.fixture
def mesh() -> Iterator[Mesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    group = dist.group.WORLD
    assert group is not None
    yield Mesh(0, 1, 0, 1, torch.device("cpu"), 1, group, group)
    dist.destroy_process_group()


def errors_of(
    mesh: Mesh,
    monkeypatch: pytest.MonkeyPatch,
    labels: np.ndarray,
    logits: list[torch.Tensor],
    bad: list[set[int]],
) -> dict[str, float]:
    """What is counted of networks that give ``logits`` [images, classes], where the engine of each
    leaves out its ``bad`` images."""

    def layout(model: LoadedModel, *_: object) -> object:
        return SimpleNamespace(logits=lambda images: logits[model.state["n"]][images])

    def loader(model: LoadedModel, *_: object) -> object:
        missing = bad[model.state["n"]]
        steps = np.array_split(np.arange(IMAGES), [5, 10, 15, 20])
        kept = [np.array([n for n in step if n not in missing], np.int64) for step in steps]
        batches = [SimpleNamespace(indices=one, images=torch.from_numpy(one)) for one in kept]
        return SimpleNamespace(
            corrupt=SimpleNamespace(pop_events=lambda: [{"index": n} for n in missing]),
            batches=lambda samples: batches,
            close=lambda: None,
        )

    monkeypatch.setattr(LoadedModel, "layout", layout)
    monkeypatch.setattr(evaluate, "_loader", loader)
    config = Config()
    config.data.eval_batch_size = 5
    state = {"classes": [str(n) for n in range(CLASSES)]}
    networks = [LoadedModel(Path(), state | {"n": n}, config) for n in range(len(logits))]
    names = [str(n) for n in range(IMAGES)]
    index = SplitIndex("", names, labels, np.ones((IMAGES, 2), np.int64), state["classes"])
    catalogue = SimpleNamespace(val=index)
    return evaluate.evaluate_average(networks, 1, mesh, catalogue)  # type: ignore[arg-type]


def test_chances_are_averaged_and_counted_exactly(
    mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = np.arange(IMAGES) % CLASSES
    # networks of different confidence, so that no mean of logits or of logarithms gives the same
    logits = [
        torch.randn(IMAGES, CLASSES, generator=generator) * confidence
        for confidence in (0.5, 3.0, 40.0)
    ]
    logits[1][:4] = torch.nan  # one network that has lost its numbers spoils these
    bad: list[set[int]] = [set(), {0, 11}, {11, 20}]
    result = errors_of(mesh, monkeypatch, labels, logits, bad)
    used = np.array([n not in {0, 11, 20} for n in range(IMAGES)])
    chances = torch.stack([one.double().softmax(1) for one in logits]).mean(0).numpy()[used]
    right = chances[np.arange(len(chances)), labels[used]]
    place = (chances > right[:, None]).sum(1)
    good = ~np.isnan(right)
    assert (result["images"], result["num_skipped"]) == (20, 3)
    assert good.sum() == 17
    assert result["top1_error"] == 100 * (1 - ((place < 1) & good).sum() / 20)
    assert result["top5_error"] == 100 * (1 - ((place < 5) & good).sum() / 20)
    assert 20 < result["top5_error"] < result["top1_error"] < 100
    assert np.isnan(result["loss"])


def test_the_loss_is_that_of_the_averaged_chances(
    mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(1)
    labels = np.arange(IMAGES) % CLASSES
    logits = [torch.randn(IMAGES, CLASSES, generator=generator) * size for size in (0.5, 3.0)]
    none: list[set[int]] = [set(), set()]
    result = errors_of(mesh, monkeypatch, labels, logits, none)
    chances = torch.stack([one.double().softmax(1) for one in logits]).mean(0).numpy()
    wanted = -np.log(chances[np.arange(IMAGES), labels]).mean()
    assert result["loss"] == pytest.approx(wanted, rel=1e-12)
    assert "num_skipped" not in result
    sure = torch.zeros(IMAGES, CLASSES)
    sure[:, 0] = 200.0  # chances of the others are too small for float32
    result = errors_of(mesh, monkeypatch, labels, [sure, sure], none)
    assert result["loss"] == pytest.approx(200 * (labels != 0).mean(), rel=1e-12)


SIDES = {"figure1_relu": 32, "figure1_tanh": 27}
"""Two networks, and how much each cuts from images of 40 pixels on the shorter side."""


@pytest.mark.parametrize("engine", ["dali", "dataloader"])
def test_ten_views_are_a_loop_over_crops(
    engine: str, mesh: Mesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_images(tmp_path / "images", side=40)
    files = sorted((root / "val").rglob("*.jpg"))
    noise = np.random.default_rng(3).integers(0, 255, (2, 47, 40, 3), np.uint8)
    Image.fromarray(noise[0]).save(files[2])
    Image.fromarray(noise[1].transpose(1, 0, 2)).save(files[7])
    catalogue = scan_dataset(str(root), str(tmp_path), lambda *_: None)
    files.pop(4).write_bytes(b"")  # after the index was made, which knows it as good
    right = np.delete(catalogue.val.labels, 4)

    models, trained = {}, []
    for variant in SIDES:
        model = build_model(variant, num_classes=CLASSES, image_size=SIDES[variant])
        generator = torch.Generator().manual_seed(len(models))
        for name, weight in model.named_parameters():  # so that scores are spread, and views differ
            if weight.dim() > 1:
                size = (2 / weight[0].numel()) ** 0.5 / (30 if name == "conv1.weight" else 1)
                weight.data.normal_(0, size, generator=generator)
        models[variant] = model
        config = Config()
        config.data.loader = engine  # type: ignore[assignment]
        config.data.image_size, config.data.resize_size = SIDES[variant], 40
        config.data.eval_batch_size, config.data.threads = 25, 1
        config.data.on_corrupt_image = "skip"
        config.model.arch, config.model.num_classes = variant, CLASSES
        config.runtime.precision = "fp32"
        statistics = catalogue.stats.to_json()
        state = {"classes": catalogue.val.classes, "statistics": statistics}
        trained.append(LoadedModel(Path(variant), state, config))

    def load(path: Path, tensors: dict[str, torch.Tensor]) -> None:
        for name, value in models[path.name].named_parameters():
            tensors[f"model.{name}"].copy_(value.detach())

    monkeypatch.setattr(loaded_model, "load_tensors", load)
    results = [
        evaluate.evaluate_average(some, 10, mesh, catalogue) for some in (trained[:1], trained)
    ]
    mean = catalogue.stats.mean
    views = np.array(
        [_views(models[variant].double(), files, side, mean) for variant, side in SIDES.items()]
    )
    for result, chances in zip(results, (views[0].mean(1), views.mean((0, 2))), strict=True):
        hits = np.argsort(-chances, 1) == right[:, None]
        assert result["top1_error"] == 100 * (12 - hits[:, :1].sum()) / 12
        assert result["top5_error"] == 100 * (12 - hits[:, :5].sum()) / 12
        loss = -np.log(chances[np.arange(12), right]).mean()
        assert result["loss"] == pytest.approx(loss, rel=1e-5)
        assert (result["images"], result["num_skipped"]) == (12, 1)
    without_reflections = views[0][:, ::2].mean(1)[np.arange(12), right]
    assert abs(-np.log(without_reflections).mean() / results[0]["loss"] - 1) > 0.01


@torch.no_grad()
def _views(
    model: torch.nn.Module, files: list[Path], side: int, mean: np.ndarray
) -> list[list[np.ndarray]]:
    """Chances of each image's ten views, each of which is computed alone: [images, 10, classes]."""
    rows = []
    for file in files:
        image = Image.open(file)
        left, top = (image.width - 40) // 2, (image.height - 40) // 2
        right, low = left + 40 - side, top + 40 - side
        centre = (image.width - side) // 2, (image.height - side) // 2
        found = []
        for x, y in ((left, top), (right, top), (left, low), (right, low), centre):
            box = (x, y, x + side, y + side)
            crop = np.asarray(image.crop(box), np.float64) - mean
            found += [crop, crop[:, ::-1]]
        inputs = [torch.tensor(view.transpose(2, 0, 1)[None].copy()) for view in found]
        rows.append([model(view).softmax(1)[0].numpy() for view in inputs])
    return rows


def _checkpoint(folder: Path, classes: list[str], **model: object) -> str:
    """A checkpoint without tensors."""
    config = to_dict(Config())
    config["model"] |= model
    folder.mkdir()
    (folder / "state.json").write_text(
        json.dumps({"format": checkpoint.FORMAT, "config": config, "classes": classes})
    )
    (folder / "manifest.json").touch()
    return str(folder)


def test_networks_of_other_classes_have_no_average(tmp_path: Path) -> None:
    first = _checkpoint(tmp_path / "first", ["cat", "dog"])
    for other in (
        _checkpoint(tmp_path / "other", ["cat", "emu"]),
        _checkpoint(tmp_path / "wider", ["cat", "dog"], num_classes=9),
    ):
        with pytest.raises(UserError, match=r"has other classes than .*first") as failure:
            evaluate.main(["--checkpoint", first, first, other])
        assert other in str(failure.value)
        assert failure.value.on_all_ranks


def _three_threads(kept: dict[str, Any]) -> Config:
    config = from_dict(kept)
    config.data.threads = 3
    return config


def test_each_network_keeps_its_size_and_the_first_ones_images(tmp_path: Path) -> None:
    paths = [_checkpoint(tmp_path / name, ["cat", "dog"]) for name in "ab"]
    for path, size in zip(paths, (224, 192), strict=True):
        file = Path(path, "state.json")
        state = json.loads(file.read_text())
        state["config"]["data"] |= {"image_size": size, "root": path, "eval_batch_size": size}
        file.write_text(json.dumps(state))
    one, two = (model.config.data for model in evaluate.load_models(paths, _three_threads))
    assert (one.image_size, two.image_size) == (224, 192)
    assert (one.threads, two.threads) == (3, 3)
    assert one.root == two.root == paths[0]
    assert one.eval_batch_size == two.eval_batch_size == 224
