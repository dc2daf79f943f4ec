"""The gpu_cache loader: the torch loader's batches, from raw pixels. CPUs run the same code."""

from pathlib import Path

import numpy as np
import pytest
import torch

from alexnet_dist.data import build_loader
from alexnet_dist.data.corrupt_images import Batch, Loader
from alexnet_dist.data.datasets import ImageDataset, RawDataset
from alexnet_dist.data.eval_plan import EvalPlan
from alexnet_dist.data.gpu_cache import GpuCacheLoader, fits_in_gpu_memory, resize_crops
from alexnet_dist.data.index import open_datasets, scan_dataset
from alexnet_dist.data.plan import SamplePlan, random_resized_crop_boxes
from alexnet_dist.data.transforms import Normalization, build_normalization, crop_resize_flip
from alexnet_dist.errors import UserError
from tests.conftest import events, losses, train, write_images
from tests.prepare.packed_folder import write_prepared

CPU = torch.device("cpu")
SIZE = 61


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("gpu_cache")
    plain = write_images(root / "plain", side=96)
    return {"plain": plain} | {
        kind: write_prepared(plain, root / kind, kind) for kind in ("shards", "pixels")
    }


def opened(folder: Path) -> tuple[ImageDataset, ImageDataset, Normalization]:
    """Training and validation images, and a normalization in which nothing is a whole number."""
    info = scan_dataset(str(folder), str(folder), lambda *_: None)
    normalization = build_normalization("imagenet", info.stats, size=SIZE, pca_noise="source")
    return *open_datasets(info), normalization


def loader(
    name: str, dataset: ImageDataset, normalization: Normalization, plan: SamplePlan | EvalPlan
) -> Loader:
    return build_loader(
        name,  # type: ignore[arg-type]
        dataset,
        normalization,
        plan,
        device=CPU,
        max_batch_size=plan.batch_size,
        threads=0 if name == "torch" else 2,
    )


def assert_same(ours: list[Batch], theirs: list[Batch], *, resized: bool = False) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert one.indices.tolist() == other.indices.tolist()
        assert torch.equal(one.labels, other.labels)
        assert one.images.dtype == torch.float32
        assert one.images.shape == other.images.shape
        assert one.images.is_contiguous(memory_format=torch.channels_last)
        if resized:
            assert (one.images - other.images).abs().sum() <= 0.05 * one.images.numel() / 58
        else:
            assert torch.equal(one.images, other.images)


@pytest.mark.parametrize("crop", ["paper", "random_resized"])
def test_gpu_cache_gives_the_torch_loaders_batches(crop: str, folders: dict[str, Path]) -> None:
    """To the bit without a resize: flipped, with PCA noise that ends in mid-epoch, from the middle
    of an epoch, the batch slices of one rank of two and of one that has no image."""
    dataset, _, normalization = opened(folders["pixels"])
    plan = SamplePlan(
        dataset.index.sizes,
        10,
        3,
        crop=crop,  # type: ignore[arg-type]
        crop_fraction=SIZE / 96,
        pca_noise_std=lambda epochs: 0.1 * (epochs < 0.5),
    )
    ours, theirs = (loader(name, dataset, normalization, plan) for name in ("gpu_cache", "torch"))
    for first, rows in ((0, slice(None)), (1, slice(1, None, 2)), (2, slice(10, None, 11))):
        samples = list(plan.epoch(0, first, rows))
        found = list(ours.batches(samples))
        assert_same(found, list(theirs.batches(samples)), resized=crop != "paper")
    ours.close()


def test_gpu_cache_evaluates_ten_crops_of_every_image(folders: dict[str, Path]) -> None:
    _, dataset, normalization = opened(folders["pixels"])
    plan = EvalPlan(dataset.index.sizes, 6, SIZE / 96, num_crops=10)
    ours, theirs = (loader(name, dataset, normalization, plan) for name in ("gpu_cache", "torch"))
    for rows in (slice(None), slice(1, None, 2)):  # the second has no image of the last batch
        samples = list(plan.batches(rows))
        batches = list(ours.batches(samples))
        assert_same(batches, list(theirs.batches(samples)))
    assert batches[-1].images.shape == (0, 3, SIZE, SIZE)
    assert ours.corrupt.pop_events() == []
    ours.close()


def test_resize_by_matrix_products_is_torchs(folders: dict[str, Path]) -> None:
    """To one of 255: boxes larger and smaller than the result, a full image, a line."""
    dataset, _, _ = opened(folders["pixels"])
    assert isinstance(dataset, RawDataset)
    images = torch.from_numpy(dataset.pixels.copy())
    count, generator = len(images), np.random.default_rng(2)
    attempts, position = generator.random((count, 10, 2)), generator.random((count, 2))
    sizes = np.full((count, 2), 96)
    boxes = random_resized_crop_boxes(sizes, (0.05, 1.0), (0.5, 2.0), attempts, position)
    boxes[:3] = [0, 0, 96, 96], [3, 5, SIZE, SIZE], [95, 0, 1, 96]
    flips = generator.random(count) < 0.5
    ours = resize_crops(images, torch.from_numpy(boxes), torch.from_numpy(flips), SIZE)
    for image, box, flip, resized in zip(images, boxes, flips, ours, strict=True):
        wanted = crop_resize_flip(image.permute(2, 0, 1), box, bool(flip), SIZE)
        difference = (resized.permute(2, 0, 1).int() - wanted.int()).abs()
        assert difference.max() <= 1
        assert difference.float().mean() < 0.05
    as_it_was = images[1, 3 : 3 + SIZE, 5 : 5 + SIZE]
    assert torch.equal(ours[1], as_it_was.flip(1) if flips[1] else as_it_was)


def test_gpu_cache_refuses_what_are_no_raw_pixels(folders: dict[str, Path]) -> None:
    for kind in ("plain", "shards"):
        dataset, _, normalization = opened(folders[kind])
        plan = EvalPlan(dataset.index.sizes, 4)
        message = f"wants raw pixels, and {folders[kind]}/train holds none: prepare them by python"
        with pytest.raises(UserError, match=message):
            loader("gpu_cache", dataset, normalization, plan)
    dataset, _, normalization = opened(folders["pixels"])
    assert not isinstance(loader("auto", dataset, normalization, plan), GpuCacheLoader)  # on CPUs


def test_gpu_cache_leaves_half_of_the_gpu_to_training(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, _, _ = opened(folders["pixels"])
    assert isinstance(dataset, RawDataset)
    size, total = 31 * 96 * 96 * 3, 10_000_000
    for free, wanted in ((total // 2 + size, True), (total // 2 + size - 1, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: (free, total))
        assert fits_in_gpu_memory(dataset, torch.device("cuda", 0)) is wanted


@pytest.mark.slow
def test_gpu_cache_trains_as_dali_does(tmp_path: Path) -> None:
    pytest.importorskip("nvidia.dali", reason="DALI is not installed here")
    folder = write_prepared(write_images(tmp_path / "plain"), tmp_path / "pixels", "pixels")
    options = ["--train.max_steps=2", "--data.pca_noise=source"]
    for name in ("gpu_cache", "dali"):
        train(0, folder, tmp_path / name, f"--data.loader={name}", *options)
    (start,) = events(tmp_path / "gpu_cache" / "run", "start")
    assert start["loader"].startswith("gpu_cache: 0.0 GB of raw pixels in host memory")
    ours, theirs = (losses(tmp_path / name / "run") for name in ("gpu_cache", "dali"))
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert len(ours) == 2
