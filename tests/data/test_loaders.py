"""DALI and torch's DataLoader load the same samples, and agree on what is corrupt."""

from pathlib import Path
from threading import Event

import numpy as np
import pytest
import torch
from PIL import Image

from alexnet_dist.data import build_loader
from alexnet_dist.data.corrupt_images import Batch, Loader
from alexnet_dist.data.dali import DaliLoader
from alexnet_dist.data.datasets import ImageDataset
from alexnet_dist.data.eval_plan import EvalPlan, needs_resize
from alexnet_dist.data.index import open_datasets, scan_dataset
from alexnet_dist.data.plan import SampleParams, SamplePlan
from alexnet_dist.data.transforms import Normalization, build_normalization
from alexnet_dist.errors import UserError
from tests.conftest import write_images
from tests.prepare.packed_folder import write_prepared

LOADERS = ["dali", "torch"]
ALL = slice(None)


def open_folder(root: Path) -> tuple[ImageDataset, ImageDataset, Normalization]:
    info = scan_dataset(str(root), str(root), lambda *_: None)
    normalization = build_normalization("centered", info.stats, size=64, pca_noise="source")
    return *open_datasets(info), normalization


def loader(
    name: str,
    dataset: ImageDataset,
    normalization: Normalization,
    plan: SamplePlan | EvalPlan,
    **options: object,
) -> Loader:
    return build_loader(
        name,  # type: ignore[arg-type]
        dataset,
        normalization,
        plan,
        device=torch.device("cpu"),
        max_batch_size=plan.batch_size,
        threads=1,
        **options,  # type: ignore[arg-type]
    )


def load(loader: Loader, plan: SamplePlan) -> list[Batch]:
    """The batches of an epoch."""
    batches = list(loader.batches(plan.epoch(0, 0, ALL)))
    loader.close()
    return batches


@pytest.mark.parametrize("crop", ["no resize", "paper", "random_resized"])
def test_dali_agrees_with_the_torch_loader(crop: str, tmp_path: Path) -> None:
    """To the bit without a resize. With one by 0.2 to 0.3 of 255 on average on these images, which
    are noise (0.17 on 64 photographs of ImageNet, 12 at most): both are bilinear with antialiasing,
    but differ in their weights and where they round."""
    dataset, _, normalization = open_folder(write_images(tmp_path, side=128))
    fraction = 0.5 if crop == "no resize" else 0.8
    kind = "random_resized" if crop == "random_resized" else "paper"
    plan = SamplePlan(
        dataset.index.sizes,
        8,
        1,
        kind,  # type: ignore[arg-type]
        fraction,
        pca_noise_std=lambda _: 0.1,
    )
    assert needs_resize(plan, 64) == (crop != "no resize")
    ours, theirs = (load(loader(name, dataset, normalization, plan), plan) for name in LOADERS)
    for step, (dali, reference) in enumerate(zip(ours, theirs, strict=True)):
        for batch in (dali, reference):
            assert batch.indices.tolist() == plan.sample(0, step).indices.tolist()
            assert batch.images.dtype == torch.float32
            assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(dali.labels, reference.labels)
        difference = (dali.images - reference.images).abs() * 1.1  # of 255
        if crop == "no resize":
            assert difference.max() == 0
        assert difference.mean() < 1


@pytest.mark.parametrize("name", LOADERS)
def test_loader_gives_the_pixels_of_the_file(name: str, tmp_path: Path) -> None:
    dataset, _, _ = open_folder(write_images(tmp_path, side=128))
    plan = SamplePlan(dataset.index.sizes, 4, 5, crop_fraction=0.5)
    normalization = Normalization(np.array([1.0, 2.0, 3.0]), np.ones(3), np.zeros((3, 3)), 64)
    batch = load(loader(name, dataset, normalization, plan), plan)[0]
    samples = plan.sample(0, 0)
    for row, index in enumerate(samples.indices.tolist()):
        top, left, height, width = samples.crop_boxes[row]
        image = np.asarray(Image.open(dataset.path(index)), np.float32)
        image = image[top : top + height, left : left + width] - [1, 2, 3]
        image = image[:, ::-1] if samples.flips[row] else image
        assert np.array_equal(batch.images[row].numpy().transpose(1, 2, 0), image)


@pytest.mark.parametrize("name", LOADERS)
def test_pca_noise_shifts_the_full_image(name: str, tmp_path: Path) -> None:
    """And ends in mid-epoch, where its schedule says so."""
    dataset, _, normalization = open_folder(write_images(tmp_path, side=128))
    plan = SamplePlan(
        dataset.index.sizes,
        4,
        5,
        crop_fraction=0.5,
        pca_noise_std=lambda epochs: 0.1 * (epochs < 2.5 / 7),
    )
    assert plan.steps_per_epoch == 7
    without = Normalization(normalization.mean, np.ones(3), np.zeros((3, 3)), 64)
    noisy = load(loader(name, dataset, normalization, plan), plan)
    clean = load(loader(name, dataset, without, plan), plan)
    for step in range(3):
        shift = (noisy[step].images * 1.1 - clean[step].images).numpy()
        wanted = 0.1 * plan.sample(0, step).pca_coeffs @ normalization.pca_basis.T
        assert np.abs(wanted).max() > 1
        assert np.allclose(shift, wanted[:, :, None, None], atol=1e-3)
    for one, other in zip(noisy[3:], clean[3:], strict=True):
        assert torch.equal(one.images, other.images)


@pytest.mark.parametrize("name", LOADERS)
def test_evaluation_skips_corrupt_images(name: str, tmp_path: Path) -> None:
    root = write_images(tmp_path, side=128)
    _, dataset, normalization = open_folder(root)
    Path(dataset.path(4)).write_bytes(b"")
    plan = EvalPlan(dataset.index.sizes, 8, 0.5)
    used = loader(name, dataset, normalization, plan, on_corrupt="skip")
    batches = list(used.batches(plan.batches(ALL)))
    assert [n for b in batches for n in b.indices.tolist()] == [n for n in range(13) if n != 4]
    assert [event["index"] for event in used.corrupt.pop_events()] == [4]
    used.close()


@pytest.mark.parametrize("name", [*LOADERS, "gpu_cache"])
def test_batches_may_be_left_early(name: str, tmp_path: Path) -> None:
    root = write_images(tmp_path / "plain", side=128)
    if name == "gpu_cache":
        root = write_prepared(root, tmp_path / "pixels", "pixels")
    dataset, _, normalization = open_folder(root)
    plan = SamplePlan(dataset.index.sizes, 4, 5, crop_fraction=0.5)
    used = loader(name, dataset, normalization, plan)
    for _ in range(3):
        batches = used.batches(plan.epoch(0, 0, ALL))
        assert next(batches).indices.tolist() == plan.sample(0, 0).indices.tolist()
        batches.close()
    used.close()


def test_dali_keeps_the_order_though_the_second_pipeline_overtakes_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batch 1 is loaded before batch 0; of two that fail, the first one's error is raised."""
    dataset, _, normalization = open_folder(write_images(tmp_path, side=128))
    plan = SamplePlan(dataset.index.sizes, 4, 5, crop_fraction=0.5)
    samples = list(plan.epoch(0, 0, ALL))
    steps = {one.indices.tobytes(): step for step, one in enumerate(samples)}
    second, load_batch = Event(), DaliLoader._load

    def overtaken(self: DaliLoader, planned: SampleParams) -> Batch:
        step = steps[planned.indices.tobytes()]
        assert step != 0 or second.wait(60)
        try:
            return load_batch(self, planned)
        finally:
            if step == 1:
                second.set()

    monkeypatch.setattr(DaliLoader, "_load", overtaken)
    batches = load(loader("dali", dataset, normalization, plan), plan)
    assert [b.indices.tolist() for b in batches] == [one.indices.tolist() for one in samples]

    second.clear()
    for step, content in ((0, b""), (1, b"no image at all")):
        Path(dataset.path(int(samples[step].indices[0]))).write_bytes(content)
    with pytest.raises(UserError, match="the file is empty"):
        load(loader("dali", dataset, normalization, plan), plan)
