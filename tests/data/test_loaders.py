"""DALI and gpu_cache give the batches of the torch loader; here on CPUs, in tests/gpu on GPUs."""

import time
from collections import deque
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from threading import Event, Lock
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from alexnet_dist.data import gpu_cache
from alexnet_dist.data.datasets import ImageDataset
from alexnet_dist.data.decode import decode
from alexnet_dist.data.eval_plan import EvalPlan, needs_resize
from alexnet_dist.data.gpu_cache import GpuCacheLoader, fits_in_gpu_memory, resize_crops
from alexnet_dist.data.index import open_datasets
from alexnet_dist.data.loader import Batch, load_ahead
from alexnet_dist.data.normalization import Normalization, build_normalization
from alexnet_dist.data.packed import RawDataset
from alexnet_dist.data.plan import SampleParams, SamplePlan, random_resized_crop_boxes
from alexnet_dist.data.torch_loader import crop_resize_flip
from alexnet_dist.errors import UserError
from tests.conftest import error_of, write_images
from tests.data.loading import SIZE, build, load, open_train, scan

ALL = slice(None)
SIDE = 128
NAMES = ["dali", "torch", "gpu_cache"]


def opened(packed: dict[str, Path], name: str) -> tuple[ImageDataset, ImageDataset, Normalization]:
    """Training and validation images for a loader, and a normalization in which nothing is a whole
    number."""
    info = scan(packed["pixels" if name == "gpu_cache" else "jpegs"])
    pixels = "imagenet" if name == "gpu_cache" else "centered"
    normalization = build_normalization(pixels, info.stats, size=SIZE, pca_noise="source")
    return *open_datasets(info), normalization


def assert_close(ours: list[Batch], theirs: list[Batch], mean_difference: float) -> None:
    """Of 255, on average."""
    for one, other in zip(ours, theirs, strict=True):
        assert one.indices.tolist() == other.indices.tolist()
        assert torch.equal(one.labels, other.labels)
        assert one.images.dtype == torch.float32
        assert one.images.shape == other.images.shape
        if len(one.indices):
            assert one.images.is_contiguous(memory_format=torch.channels_last)
        difference = (one.images - other.images).abs()
        assert difference.sum() <= mean_difference * difference.numel()


@pytest.mark.parametrize("crop", ["no resize", "paper", "random_resized"])
@pytest.mark.parametrize(
    ("name", "in_memory"), [("dali", False), ("gpu_cache", False), ("gpu_cache", True)]
)
def test_loader_gives_the_torch_loaders_batches(
    name: str, in_memory: bool, crop: Any, packed: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit without a resize: flipped, with PCA noise that ends in mid-epoch, from the middle
    of an epoch, for one rank of two and for one that has no image. DALI resizes, as torch does,
    bilinearly with antialiasing, but with other weights and roundings: 0.2 to 0.3 of 255 on average
    on these images, which are noise (0.17 on 64 photographs of ImageNet, 12 at most)."""
    monkeypatch.setattr(gpu_cache, "fits_in_gpu_memory", lambda *_: in_memory)
    dataset, _, normalization = opened(packed, name)
    fraction, crop = (0.5, "paper") if crop == "no resize" else (0.8, crop)
    plan = SamplePlan(
        dataset.index.sizes, 10, 3, crop, fraction, pca_noise_std=lambda e: 0.1 * (e < 0.5)
    )
    assert needs_resize(plan, SIZE) == (fraction != 0.5)
    samples = [*plan.epoch(0, 0, ALL), *plan.epoch(0, 1, slice(1, None, 2))]
    samples += plan.epoch(0, 2, slice(10, None, 11))
    ours, theirs = (load(n, dataset, plan, samples, normalization)[0] for n in (name, "torch"))
    resized = 1 if name == "dali" else 0.05 / 58
    assert_close(ours, theirs, resized if fraction != 0.5 else 0)


@pytest.mark.parametrize("name", ["dali", "gpu_cache"])
def test_loader_evaluates_ten_crops_of_every_image(name: str, packed: dict[str, Path]) -> None:
    _, dataset, normalization = opened(packed, name)
    plan = EvalPlan(dataset.index.sizes, 6, SIZE / SIDE, num_crops=10)
    for rows in (ALL, slice(1, None, 2)):  # the second has no image of the last batch
        samples = list(plan.batches(rows))
        both = [load(n, dataset, plan, samples, normalization) for n in (name, "torch")]
        assert_close(both[0][0], both[1][0], 0)
        assert both[0][1] == []
    assert both[0][0][-1].images.shape == (0, 3, SIZE, SIZE)


def test_the_torch_loader_gives_the_pixels_of_the_file(packed: dict[str, Path]) -> None:
    dataset = open_train(packed["jpegs"])
    plan = SamplePlan(dataset.index.sizes, 4, 5, crop_fraction=0.5)
    normalization = Normalization(np.array([1.0, 2.0, 3.0]), np.ones(3), np.zeros((3, 3)), SIZE)
    samples = plan.sample(0, 0)
    (batch,), _ = load("torch", dataset, plan, [samples], normalization)
    for row, index in enumerate(samples.indices.tolist()):
        top, left, height, width = samples.crop_boxes[row]
        image = np.asarray(Image.open(dataset.path(index)), np.float32)
        image = image[top : top + height, left : left + width] - [1, 2, 3]
        image = image[:, ::-1] if samples.flips[row] else image
        assert np.array_equal(batch.images[row].numpy().transpose(1, 2, 0), image)


def test_a_thread_that_decodes_starts_no_threads_of_its_own(packed: dict[str, Path]) -> None:
    dataset, _, normalization = opened(packed, "torch")
    mine = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        loader: Any = build("torch", dataset, SamplePlan(dataset.index.sizes, 4, 5), normalization)
        with closing(loader):
            assert loader._readers.submit(torch.get_num_threads).result() == 1
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(mine)


def test_pca_noise_shifts_the_full_image(packed: dict[str, Path]) -> None:
    dataset, _, normalization = opened(packed, "torch")
    plan = SamplePlan(dataset.index.sizes, 4, 5, crop_fraction=0.5, pca_noise_std=lambda _: 0.1)
    samples = plan.sample(0, 0)
    without = replace(normalization, pca_basis=np.zeros((3, 3)))
    (noisy,), (clean,) = (
        load("torch", dataset, plan, [samples], n)[0] for n in (normalization, without)
    )
    shift = (noisy.images - clean.images).numpy() * (1.1 * normalization.std)[:, None, None]
    wanted = 0.1 * samples.pca_coeffs @ normalization.pca_basis.T
    assert np.abs(wanted).max() > 1
    assert np.allclose(shift, wanted[:, :, None, None], atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_batches_may_be_left_early(name: str, packed: dict[str, Path]) -> None:
    dataset, _, normalization = opened(packed, name)
    plan = SamplePlan(dataset.index.sizes, 4, 5, crop_fraction=0.5)
    loader = build(name, dataset, plan, normalization)
    for _ in range(3):
        batches = loader.batches(plan.epoch(0, 0, ALL))
        assert next(batches).indices.tolist() == plan.sample(0, 0).indices.tolist()
        batches.close()
    loader.close()


def test_batches_keep_their_order_though_one_overtakes_another() -> None:
    """Of two that fail, the first one's error is raised."""
    samples = list(SamplePlan(np.full((12, 2), 256), 4, 5).epoch(0, 0, ALL))
    second = Event()

    def load_batch(planned: SampleParams) -> SampleParams:
        assert planned is not samples[0] or second.wait(60)
        if planned is samples[1]:
            second.set()
        if planned is not samples[2] and fail:
            raise UserError("the second" if planned is samples[1] else "the first")
        return planned

    for fail in (False, True):
        second.clear()
        loaded = load_ahead(load_batch, samples, torch.device("cpu"), 2, deque())
        with pytest.raises(UserError, match="the first") if fail else nullcontext():
            assert [one is other for one, other in zip(loaded, samples, strict=True)] == [True] * 3


@pytest.mark.parametrize("name", NAMES)
def test_a_loader_becomes_idle(name: str, packed: dict[str, Path]) -> None:
    """While nobody takes a batch, no thread of it works: a CUDA graph can be captured then."""
    dataset, _, normalization = opened(packed, name)
    plan = SamplePlan(dataset.index.sizes, 4, 5)
    loader: Any = build(name, dataset, plan, normalization)
    load_batch, running, loaded = loader._load, Lock(), 0

    def watched(samples: SampleParams) -> Batch:
        nonlocal loaded
        time.sleep(0.1)
        with running:
            loaded += 1
        batch: Batch = load_batch(samples)
        return batch

    loader._load = watched
    with closing(loader), closing(loader.batches(plan.epoch(0, 0, ALL))) as batches:
        next(batches)
        loader.wait_until_idle()
        before = loaded
        time.sleep(0.3)
        assert loaded == before > 1


def test_resize_by_matrix_products_is_torchs(tmp_path: Path) -> None:
    """To one of 255: boxes larger and smaller than the result, a full image, a line."""
    dataset = open_train(write_images(tmp_path, side=96))
    decoded = [decode(dataset.read(index)) for index in range(len(dataset.index))]
    images = torch.from_numpy(np.stack(decoded))
    count, generator = len(images), np.random.default_rng(2)
    attempts, position = generator.random((count, 10, 2)), generator.random((count, 2))
    sizes = np.full((count, 2), 96)
    boxes = random_resized_crop_boxes(sizes, (0.05, 1.0), (0.5, 2.0), attempts, position)
    size = 61
    boxes[:3] = [0, 0, 96, 96], [3, 5, size, size], [95, 0, 1, 96]
    flips = generator.random(count) < 0.5
    ours = resize_crops(images, torch.from_numpy(boxes), torch.from_numpy(flips), size)
    for image, box, flip, resized in zip(images, boxes, flips, ours, strict=True):
        wanted = crop_resize_flip(image.permute(2, 0, 1), box, bool(flip), size)
        difference = (resized.permute(2, 0, 1).int() - wanted.int()).abs()
        assert difference.max() <= 1
        assert difference.float().mean() < 0.05
    as_it_was = images[1, 3 : 3 + size, 5 : 5 + size]
    assert torch.equal(ours[1], as_it_was.flip(1) if flips[1] else as_it_was)


def test_gpu_cache_refuses_what_are_no_raw_pixels(packed: dict[str, Path]) -> None:
    for kind in ("jpegs", "shards"):
        dataset = open_train(packed[kind])
        plan = EvalPlan(dataset.index.sizes, 4)
        said = f"wants raw pixels, and {packed[kind]}/train holds none: prepare them by python"
        assert said in error_of(build, "gpu_cache", dataset, plan)
    dataset = open_train(packed["pixels"])
    assert not isinstance(build("auto", dataset, plan), GpuCacheLoader)  # on CPUs


def test_gpu_cache_takes_half_at_most(
    packed: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = open_train(packed["pixels"])
    assert isinstance(dataset, RawDataset)
    size, total = 31 * SIDE * SIDE * 3, 10_000_000
    for free, wanted in ((total // 2 + size, True), (total // 2 + size - 1, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: (free, total))
        assert fits_in_gpu_memory(dataset, torch.device("cuda", 0)) is wanted
