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

from alexnet_dist import evaluate, setup
from alexnet_dist.config import Config, from_dict, to_dict
from alexnet_dist.data.datasets import FolderDataset, ImageDataset, SplitIndex
from alexnet_dist.data.eval_plan import EvalPlan
from alexnet_dist.data.index import open_datasets, scan_dataset
from alexnet_dist.errors import UserError
from alexnet_dist.model import build_model
from alexnet_dist.parallel.mesh import Mesh, destroy_distributed, init_distributed
from alexnet_dist.setup import LoadedModel
from alexnet_dist.training import checkpoint
from tests.conftest import write_images
from tests.networks import ten_crops

IMAGES, CLASSES = 23, 7


@pytest.fixture
def mesh() -> Iterator[Mesh]:
    yield init_distributed("cpu", 1)
    destroy_distributed()


def evaluate_logits(
    mesh: Mesh,
    monkeypatch: pytest.MonkeyPatch,
    logits: list[torch.Tensor],
    corrupt: list[set[int]],
) -> dict[str, float]:
    """What is counted of networks that give ``logits`` [images, classes], where the loader of each
    skips its ``corrupt`` images."""

    def eval_loader(model: LoadedModel, _: Mesh, dataset: ImageDataset, *__: int) -> Any:
        skipped = corrupt[model.state["n"]]
        kept = np.array([n for n in range(IMAGES) if n not in skipped])
        batches = [SimpleNamespace(indices=n, images=n) for n in np.array_split(kept, 5)]
        policy = SimpleNamespace(pop_events=lambda: [{"index": n} for n in skipped])
        loader = SimpleNamespace(corrupt=policy, batches=lambda _: batches, close=lambda: None)
        return EvalPlan(dataset.index.sizes, 5), loader

    def layout(model: LoadedModel, *_: object) -> Any:
        return SimpleNamespace(logits=lambda images: logits[model.state["n"]][images])

    monkeypatch.setattr(LoadedModel, "layout", layout)
    monkeypatch.setattr(LoadedModel, "eval_loader", eval_loader)
    config, classes = Config(), [str(n) for n in range(CLASSES)]
    config.data.eval_batch_size = 5
    models = [LoadedModel(Path(), {"classes": classes, "n": n}, config) for n in range(len(logits))]
    labels, sizes = np.arange(IMAGES) % CLASSES, np.ones((IMAGES, 2), np.int64)
    index = SplitIndex("", [str(n) for n in range(IMAGES)], labels, sizes, classes)
    return evaluate.evaluate_average(models, 1, mesh, FolderDataset(index))


def test_probabilities_are_averaged_and_counted_exactly(
    mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    # networks of different confidence, so that no mean of logits or of logarithms gives the same
    logits = [torch.randn(IMAGES, CLASSES) * confidence for confidence in (0.5, 3.0, 40.0)]
    labels = np.arange(IMAGES) % CLASSES
    result = evaluate_logits(mesh, monkeypatch, logits, [set()] * 3)
    probs = torch.stack([one.double().softmax(1) for one in logits]).mean(0).numpy()
    loss = -np.log(probs[np.arange(IMAGES), labels]).mean()
    assert result["loss"] == pytest.approx(loss, rel=1e-12)
    assert "num_skipped" not in result

    logits[1][:4] = torch.nan  # one network that has lost its numbers spoils these
    result = evaluate_logits(mesh, monkeypatch, logits, [set(), {0, 11}, {11, 20}])
    counted = np.delete(np.arange(IMAGES), [0, 11, 20])
    good, right = counted >= 4, probs[counted, labels[counted]]
    place = (probs[counted] > right[:, None]).sum(1)
    assert (result["images"], result["num_skipped"]) == (20, 3)
    assert result["top1_error"] == 100 * (1 - ((place < 1) & good).sum() / 20)
    assert result["top5_error"] == 100 * (1 - ((place < 5) & good).sum() / 20)
    assert 20 < result["top5_error"] < result["top1_error"] < 100
    assert np.isnan(result["loss"])

    sure = torch.zeros(IMAGES, CLASSES)
    sure[:, 0] = 200.0  # probabilities of the others are too small for float32
    result = evaluate_logits(mesh, monkeypatch, [sure, sure], [set()] * 2)
    assert result["loss"] == pytest.approx(200 * (labels != 0).mean(), rel=1e-12)


SIDES = {"figure1_relu": 32, "figure1_tanh": 27}
"""Two networks, and how much each cuts from images of 40 pixels on the shorter side."""


@torch.no_grad()
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

    networks, models, probs = {}, [], []
    for arch, side in SIDES.items():
        network = networks[arch] = build_model(arch, num_classes=CLASSES, image_size=side)
        generator = torch.Generator().manual_seed(len(models))
        for name, weight in network.named_parameters():  # so that logits are spread, crops differ
            if weight.dim() > 1:
                std = (2 / weight[0].numel()) ** 0.5 / (30 if name == "conv1.weight" else 1)
                weight.normal_(0, std, generator=generator)
        config = Config()
        config.data.loader = loader  # type: ignore[assignment]
        config.data.image_size, config.data.resize_size = side, 40
        config.data.eval_batch_size = 25
        config.data.on_corrupt_image = "skip"
        config.model.arch = arch
        config.runtime.precision = "fp32"
        classes = [str(n) for n in range(CLASSES)]
        state = {"classes": classes, "statistics": info.stats.to_json()}
        models.append(LoadedModel(Path(arch), state, config))
        crops = [ten_crops(Image.open(file), side / 40, side, info.stats.mean) for file in files]
        probs.append([network.double()(one.double()).softmax(1).numpy() for one in crops])

    def load(path: Path, tensors: dict[str, torch.Tensor]) -> None:
        for name, value in networks[path.name].named_parameters():
            tensors[f"model.{name}"].copy_(value)

    monkeypatch.setattr(setup, "load_tensors", load)
    dataset, expected = open_datasets(info)[1], np.array(probs)
    for some, averaged in ((models[:1], expected[0].mean(1)), (models, expected.mean((0, 2)))):
        result = evaluate.evaluate_average(some, 10, mesh, dataset)
        correct = np.argsort(-averaged, 1) == right[:, None]
        assert result["top1_error"] == 100 * (12 - correct[:, :1].sum()) / 12
        assert result["top5_error"] == 100 * (12 - correct[:, :5].sum()) / 12
        loss = -np.log(averaged[np.arange(12), right]).mean()
        assert result["loss"] == pytest.approx(loss, rel=1e-5)
        assert (result["images"], result["num_skipped"]) == (12, 1)
    unflipped, flipped = expected[0][:, ::2].mean(1), expected[0][:, 1::2].mean(1)
    assert np.abs(unflipped - flipped).max() > 0.01


def test_models_of_other_classes_have_no_average_and_each_keeps_its_size(tmp_path: Path) -> None:
    def save(name: str, classes: list[str], size: int) -> str:
        config = Config()
        config.data.root = name
        config.data.image_size = config.data.eval_batch_size = size
        (tmp_path / name).mkdir()
        state = {"format": checkpoint.FORMAT, "config": to_dict(config), "classes": classes}
        (tmp_path / name / "state.json").write_text(json.dumps(state))
        (tmp_path / name / "manifest.json").touch()
        return str(tmp_path / name)

    first, second = save("first", ["cat", "dog"], 224), save("second", ["cat", "dog"], 192)
    one, two = (model.config.data for model in evaluate.load_models([first, second], from_dict))
    assert (one.image_size, two.image_size) == (224, 192)
    assert one.root == two.root == "first"
    assert one.eval_batch_size == two.eval_batch_size == 224
    other = save("other", ["cat", "emu"], 224)
    with pytest.raises(UserError, match=r"has other classes than .*first") as failure:
        evaluate.main(["--checkpoint", first, first, other])
    assert other in str(failure.value)
    assert failure.value.on_all_ranks
