"""The averaged probabilities of several networks and of ten crops, and what may be averaged."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from alexnet_dist import evaluate, loaded_model
from alexnet_dist.config import Config, from_dict, to_dict
from alexnet_dist.data.datasets import ImageDataset, SplitIndex
from alexnet_dist.data.eval_plan import EvalPlan
from alexnet_dist.data.index import open_datasets, scan_dataset
from alexnet_dist.errors import UserError
from alexnet_dist.loaded_model import LoadedModel
from alexnet_dist.model import build_model
from alexnet_dist.parallel.mesh import Mesh, destroy_distributed, init_distributed
from alexnet_dist.training import checkpoint
from tests.conftest import write_images

IMAGES, CLASSES = 23, 7


@pytest.fixture
def mesh() -> Iterator[Mesh]:
    yield init_distributed("cpu", 1)
    destroy_distributed()


def evaluate_logits(
    mesh: Mesh,
    monkeypatch: pytest.MonkeyPatch,
    labels: np.ndarray,
    logits: list[torch.Tensor],
    corrupt: list[set[int]],
) -> dict[str, float]:
    """What is counted of networks that give ``logits`` [images, classes], where the loader of each
    skips its ``corrupt`` images."""

    def eval_loader(
        model: LoadedModel, mesh: Mesh, dataset: ImageDataset, *_: object
    ) -> tuple[EvalPlan, object]:
        skipped = corrupt[model.state["n"]]
        steps = np.array_split(np.arange(IMAGES), [5, 10, 15, 20])
        kept = [np.array([n for n in step if n not in skipped], np.int64) for step in steps]
        batches = [SimpleNamespace(indices=one, images=torch.from_numpy(one)) for one in kept]
        return EvalPlan(dataset.index.sizes, 5), SimpleNamespace(
            corrupt=SimpleNamespace(pop_events=lambda: [{"index": n} for n in skipped]),
            batches=lambda samples: batches,
            close=lambda: None,
        )

    def layout(model: LoadedModel, *_: object) -> object:
        return SimpleNamespace(logits=lambda images: logits[model.state["n"]][images])

    monkeypatch.setattr(LoadedModel, "layout", layout)
    monkeypatch.setattr(LoadedModel, "eval_loader", eval_loader)
    config = Config()
    config.data.eval_batch_size = 5
    classes = [str(n) for n in range(CLASSES)]
    models = [LoadedModel(Path(), {"classes": classes, "n": n}, config) for n in range(len(logits))]
    sizes = np.ones((IMAGES, 2), np.int64)
    index = SplitIndex("", [str(n) for n in range(IMAGES)], labels, sizes, classes)
    return evaluate.evaluate_average(models, 1, mesh, ImageDataset(index))


def test_probabilities_are_averaged_and_counted_exactly(
    mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = np.arange(IMAGES) % CLASSES
    # networks of different confidence, so that no mean of logits or of logarithms gives the same
    logits = [
        torch.randn(IMAGES, CLASSES, generator=generator) * confidence
        for confidence in (0.5, 3.0, 40.0)
    ]
    nothing: list[set[int]] = [set(), set(), set()]
    result = evaluate_logits(mesh, monkeypatch, labels, logits, nothing)
    probs = torch.stack([one.double().softmax(1) for one in logits]).mean(0).numpy()
    loss = -np.log(probs[np.arange(IMAGES), labels]).mean()
    assert result["loss"] == pytest.approx(loss, rel=1e-12)
    assert "num_skipped" not in result

    logits[1][:4] = torch.nan  # one network that has lost its numbers spoils these
    corrupt: list[set[int]] = [set(), {0, 11}, {11, 20}]
    result = evaluate_logits(mesh, monkeypatch, labels, logits, corrupt)
    used = np.array([n not in {0, 11, 20} for n in range(IMAGES)])
    probs[:4] = np.nan
    right = probs[used][np.arange(20), labels[used]]
    place = (probs[used] > right[:, None]).sum(1)
    good = ~np.isnan(right)
    assert (result["images"], result["num_skipped"]) == (20, 3)
    assert good.sum() == 17
    assert result["top1_error"] == 100 * (1 - ((place < 1) & good).sum() / 20)
    assert result["top5_error"] == 100 * (1 - ((place < 5) & good).sum() / 20)
    assert 20 < result["top5_error"] < result["top1_error"] < 100
    assert np.isnan(result["loss"])

    sure = torch.zeros(IMAGES, CLASSES)
    sure[:, 0] = 200.0  # probabilities of the others are too small for float32
    result = evaluate_logits(mesh, monkeypatch, labels, [sure, sure], nothing)
    assert result["loss"] == pytest.approx(200 * (labels != 0).mean(), rel=1e-12)


SIDES = {"figure1_relu": 32, "figure1_tanh": 27}
"""Two networks, and how much each cuts from images of 40 pixels on the shorter side."""


@pytest.mark.parametrize("loader", ["dali", "torch"])
def test_ten_crops_are_a_loop_over_crops(
    loader: str, mesh: Mesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_images(tmp_path / "images", side=40)
    files = sorted((root / "val").rglob("*.jpg"))
    noise = np.random.default_rng(3).integers(0, 255, (2, 47, 40, 3), np.uint8)
    Image.fromarray(noise[0]).save(files[2])
    Image.fromarray(noise[1].transpose(1, 0, 2)).save(files[7])
    info = scan_dataset(str(root), str(tmp_path), lambda *_: None)
    files.pop(4).write_bytes(b"")  # after the index was made, which knows it as good
    right = np.delete(info.val.labels, 4)

    models, trained = {}, []
    for arch in SIDES:
        model = build_model(arch, num_classes=CLASSES, image_size=SIDES[arch])
        generator = torch.Generator().manual_seed(len(models))
        for name, weight in model.named_parameters():  # so that logits are spread, and crops differ
            if weight.dim() > 1:
                size = (2 / weight[0].numel()) ** 0.5 / (30 if name == "conv1.weight" else 1)
                weight.data.normal_(0, size, generator=generator)
        models[arch] = model
        config = Config()
        config.data.loader = loader  # type: ignore[assignment]
        config.data.image_size, config.data.resize_size = SIDES[arch], 40
        config.data.eval_batch_size = 25
        config.data.on_corrupt_image = "skip"
        config.model.arch = arch
        config.runtime.precision = "fp32"
        classes = [str(n) for n in range(CLASSES)]
        state = {"classes": classes, "statistics": info.stats.to_json()}
        trained.append(LoadedModel(Path(arch), state, config))

    def load(path: Path, tensors: dict[str, torch.Tensor]) -> None:
        for name, value in models[path.name].named_parameters():
            tensors[f"model.{name}"].copy_(value.detach())

    monkeypatch.setattr(loaded_model, "load_tensors", load)
    results = [
        evaluate.evaluate_average(some, 10, mesh, open_datasets(info)[1])
        for some in (trained[:1], trained)
    ]
    mean = info.stats.mean
    probs = np.array(
        [_crop_probs(models[arch].double(), files, side, mean) for arch, side in SIDES.items()]
    )
    for result, averaged in zip(results, (probs[0].mean(1), probs.mean((0, 2))), strict=True):
        correct = np.argsort(-averaged, 1) == right[:, None]
        assert result["top1_error"] == 100 * (12 - correct[:, :1].sum()) / 12
        assert result["top5_error"] == 100 * (12 - correct[:, :5].sum()) / 12
        loss = -np.log(averaged[np.arange(12), right]).mean()
        assert result["loss"] == pytest.approx(loss, rel=1e-5)
        assert (result["images"], result["num_skipped"]) == (12, 1)
    without_flips = probs[0][:, ::2].mean(1)[np.arange(12), right]
    assert abs(-np.log(without_flips).mean() / results[0]["loss"] - 1) > 0.01


@torch.no_grad()
def _crop_probs(
    model: torch.nn.Module, files: list[Path], side: int, mean: np.ndarray
) -> list[list[np.ndarray]]:
    """Probabilities of each image's ten crops, computed one by one: [images, 10, classes]."""
    rows = []
    for file in files:
        image = Image.open(file)
        left, top = (image.width - 40) // 2, (image.height - 40) // 2
        right, low = left + 40 - side, top + 40 - side
        center = (image.width - side) // 2, (image.height - side) // 2
        rows.append([])
        for x, y in ((left, top), (right, top), (left, low), (right, low), center):
            crop = np.asarray(image.crop((x, y, x + side, y + side)), np.float64) - mean
            for pixels in (crop, crop[:, ::-1]):
                probs = model(torch.tensor(pixels.transpose(2, 0, 1)[None].copy())).softmax(1)
                rows[-1].append(probs[0].numpy())
    return rows


def _checkpoint(folder: Path, classes: list[str]) -> str:
    """A checkpoint without tensors."""
    config = to_dict(Config())
    folder.mkdir()
    (folder / "state.json").write_text(
        json.dumps({"format": checkpoint.FORMAT, "config": config, "classes": classes})
    )
    (folder / "manifest.json").touch()
    return str(folder)


def test_networks_of_other_classes_have_no_average(tmp_path: Path) -> None:
    first = _checkpoint(tmp_path / "first", ["cat", "dog"])
    other = _checkpoint(tmp_path / "other", ["cat", "emu"])
    with pytest.raises(UserError, match=r"has other classes than .*first") as failure:
        evaluate.main(["--checkpoint", first, first, other])
    assert other in str(failure.value)
    assert failure.value.on_all_ranks


def _skip_corrupt(kept: dict[str, Any]) -> Config:
    config = from_dict(kept)
    config.data.on_corrupt_image = "skip"
    return config


def test_each_network_keeps_its_size_and_the_first_ones_images(tmp_path: Path) -> None:
    paths = [_checkpoint(tmp_path / name, ["cat", "dog"]) for name in "ab"]
    for path, size in zip(paths, (224, 192), strict=True):
        file = Path(path, "state.json")
        state = json.loads(file.read_text())
        state["config"]["data"] |= {"image_size": size, "root": path, "eval_batch_size": size}
        file.write_text(json.dumps(state))
    one, two = (model.config.data for model in evaluate.load_models(paths, _skip_corrupt))
    assert (one.image_size, two.image_size) == (224, 192)
    assert one.on_corrupt_image == two.on_corrupt_image == "skip"
    assert one.root == two.root == paths[0]
    assert one.eval_batch_size == two.eval_batch_size == 224
