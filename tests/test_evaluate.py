"""The averaged probabilities of several networks and of ten crops, and what may be averaged."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from alexnet_dist import evaluate
from alexnet_dist.config import Config, from_dict, to_dict
from alexnet_dist.data.datasets import FolderDataset, ImageDataset, SplitIndex
from alexnet_dist.data.eval_plan import EvalPlan
from alexnet_dist.errors import UserError
from alexnet_dist.parallel.mesh import Mesh
from alexnet_dist.setup import LoadedModel
from alexnet_dist.training import checkpoint

IMAGES, CLASSES = 23, 7


def evaluate_logits(
    mesh: Mesh, monkeypatch: pytest.MonkeyPatch, logits: list[Tensor], corrupt: list[set[int]]
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


def test_probabilities_are_averaged_exactly(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
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
