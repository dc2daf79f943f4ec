"""The resident engine: the batches of the others, from raw pixels."""

import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alexnet_dist.data import build_loader, crops
from alexnet_dist.data.corrupt_images import Batch, Loader
from alexnet_dist.data.gpu_cache import GpuCacheLoader, fits
from alexnet_dist.data.plan import EvalPlan, SamplePlan, random_resized_crop_boxes
from alexnet_dist.data.prepared import RawDataset
from alexnet_dist.data.sources import ImageDataset, open_datasets, scan_dataset
from alexnet_dist.data.transforms import Normalization, build_normalization, crop_resize_flip
from alexnet_dist.errors import UserError
from tests.conftest import events, losses, train, write_images
from tests.interpreter import WANTED, run_interpreted
from tests.prepare.packed_folder import write_prepared

CPU = torch.device("cpu")
SIDE = 61  # of the finished images: no row of them is a whole number of vectors


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("gpu_cache")
    plain = write_images(root / "plain", side=96)
    return {"plain": plain} | {
        kind: write_prepared(plain, root / kind, kind) for kind in ("shards", "pixels")
    }


def opened(folder: Path) -> tuple[ImageDataset, ImageDataset, Normalization]:
    """Training and validation images, and arithmetic in which nothing is a whole number."""
    catalogue = scan_dataset(str(folder), str(folder), lambda *_: None)
    pixels = build_normalization("imagenet", catalogue.statistics, side=SIDE, colour="source")
    return *open_datasets(catalogue), pixels


def engine(
    name: str, source: ImageDataset, pixels: Normalization, batch: int, plan: SamplePlan | None
) -> Loader:
    return build_loader(
        name,  # type: ignore[arg-type]
        source,
        pixels,
        plan=plan,
        fraction=SIDE / 96,
        max_batch=batch,
        device=CPU,
        threads=0 if name == "torch" else 2,
    )


def alike(ours: list[Batch], theirs: list[Batch]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert one.numbers.tolist() == other.numbers.tolist()
        assert torch.equal(one.labels, other.labels)
        assert one.images.dtype == torch.float32
        assert one.images.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(one.images, other.images)


@pytest.fixture(params=["c", "torch"])
def by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """With a compiler, and without one."""
    crops.compiled.cache_clear()
    if request.param == "torch":
        monkeypatch.setenv("CC", "a-compiler-that-is-not-there")
    elif crops.compiled() is None:
        pytest.skip("there is no C compiler here")
    yield request.param
    crops.compiled.cache_clear()


@pytest.mark.parametrize("crop", ["paper", "random_resized"])
def test_batches_are_those_of_the_dataloader(crop: str, by: str, folders: dict[str, Path]) -> None:
    """To the bit: cut or resized, flipped, with colour noise that ends in mid-epoch; from the
    beginning of an epoch or its middle; the rows of one process of two, and of one with none."""
    source, _, pixels = opened(folders["pixels"])
    plan = SamplePlan(
        source.index.sizes,
        10,
        3,
        crop=crop,  # type: ignore[arg-type]
        fraction=SIDE / 96,
        strength=lambda passes: 0.1 * (passes < 0.5),
    )
    flips = np.concatenate([draws.flips for draws in plan.epoch(0, 0, slice(None))])
    assert 0 < flips.sum() < len(flips)
    ours, theirs = (engine(name, source, pixels, 10, plan) for name in ("gpu_cache", "torch"))
    assert {"c": "by C", "torch": "want of a C compiler"}[by] in ours.description
    for first, rows in ((0, slice(None)), (1, slice(1, None, 2)), (2, slice(10, None, 11))):
        draws = list(plan.epoch(0, first, rows))
        alike(list(ours.batches(draws)), list(theirs.batches(draws)))
    ours.close()


def test_ten_views_of_every_image_once(folders: dict[str, Path]) -> None:
    _, source, pixels = opened(folders["pixels"])
    plan = EvalPlan(source.index.sizes, 6, SIDE / 96, views=10)
    ours, theirs = (engine(name, source, pixels, 60, None) for name in ("gpu_cache", "torch"))
    for rows in (slice(None), slice(1, None, 2)):  # the second has no image of the last batch
        draws = list(plan.draws(rows))
        batches = list(ours.batches(draws))
        alike(batches, list(theirs.batches(draws)))
    assert len(batches[-1].numbers) == 0
    assert batches[-1].images.shape == (0, 3, SIDE, SIDE)
    assert ours.bad.take_news() == []
    ours.close()


def test_a_batch_that_is_kept_stays_as_it_was(folders: dict[str, Path]) -> None:
    """And memory that has been let go of is used again."""
    source, _, pixels = opened(folders["pixels"])
    plan = SamplePlan(source.index.sizes, 5, 3, fraction=SIDE / 96)
    ours = engine("gpu_cache", source, pixels, 5, plan)
    kept = [batch.images[2:] for batch in ours.batches(plan.epoch(0, 0, slice(None)))]
    again = [batch.images[2:].clone() for batch in ours.batches(plan.epoch(0, 0, slice(None)))]
    assert all(torch.equal(one, other) for one, other in zip(kept, again, strict=True))
    places = {images.data_ptr() for images in kept}
    del kept
    gc.collect()
    for batch in ours.batches(plan.epoch(0, 0, slice(None))):
        assert batch.images[2:].data_ptr() in places
    ours.close()


def test_a_loop_that_leaves_early_is_no_burden(folders: dict[str, Path]) -> None:
    source, _, pixels = opened(folders["pixels"])
    plan = SamplePlan(source.index.sizes, 4, 5, fraction=SIDE / 96)
    ours = engine("gpu_cache", source, pixels, 4, plan)
    for _ in range(3):
        batches = ours.batches(plan.epoch(0, 0, slice(None)))
        assert next(batches).numbers.tolist() == plan.draw(0, 0).numbers.tolist()
        batches.close()
    ours.close()


def boxes_of_all_shapes(count: int, stored: int) -> tuple[np.ndarray, ...]:
    """Boxes larger and smaller than the finished image, and which of them are flipped."""
    generator = np.random.default_rng(2)
    sizes = np.full((count, 2), stored)
    attempts, where = generator.random((count, 10, 2)), generator.random((count, 2))
    boxes = random_resized_crop_boxes(sizes, (0.05, 1.0), (0.5, 2.0), attempts, where)
    boxes[0] = [0, 0, stored, stored]
    boxes[1] = [3, 5, SIDE, SIDE]  # as it is
    boxes[2] = [stored - 1, 0, 1, stored]  # a line
    return boxes, generator.random(count) < 0.5


def test_matrix_products_resize_as_torchvision_does(folders: dict[str, Path]) -> None:
    source, _, _ = opened(folders["pixels"])
    assert isinstance(source, RawDataset)
    images = torch.from_numpy(source.pixels.copy())
    boxes, flips = boxes_of_all_shapes(len(images), 96)
    ours = crops.resized(images, torch.from_numpy(boxes), torch.from_numpy(flips), SIDE)
    assert ours.is_contiguous()
    for image, box, flip, finished in zip(images, boxes, flips, ours, strict=True):
        wanted = crop_resize_flip(image.permute(2, 0, 1), box, bool(flip), SIDE)
        difference = (finished.permute(2, 0, 1).int() - wanted.int()).abs()
        assert difference.max() <= 1
        assert difference.float().mean() < 0.05
    as_it_was = images[1, 3 : 3 + SIDE, 5 : 5 + SIDE]
    assert torch.equal(ours[1], as_it_was.flip(1) if flips[1] else as_it_was)


@settings(deadline=None)
@given(st.integers(1, 45), st.integers(0, 9), st.integers(0, 2**32 - 1))
def test_cut_on_cpu_is_its_definition(side: int, more: int, seed: int) -> None:
    """To the bit, of any side, wherever a crop lies and whatever surrounds it."""
    random = np.random.default_rng(seed)
    height, width = side + more, side + more // 2
    pixels = random.integers(0, 256, (3, height, width, 3), np.uint8)
    corners = random.integers(0, [height - side + 1, width - side + 1], (5, 2))
    boxes = np.concatenate([corners, np.full((5, 2), side)], 1)
    rows, flips = random.integers(0, 3, 5), random.random(5) < 0.5
    means = random.uniform(0, 255, (5, 3)).astype(np.float32)
    scales = random.uniform(0.01, 1, 3).astype(np.float32)
    room = torch.full((7, side, side, 3), torch.nan)
    crops.cut_on_cpu(pixels, rows, boxes, flips, means, scales, room[1:6])
    for row, (top, left, *_) in enumerate(boxes.tolist()):
        box = pixels[rows[row], top : top + side, left : left + side].astype(np.float32)
        box = box[:, ::-1] if flips[row] else box
        assert np.array_equal(room[row + 1].numpy(), (box - means[row]) * scales)
    assert room[[0, 6]].isnan().all()


def test_cut_by_torch(folders: dict[str, Path]) -> None:
    """As GPUs without Triton do it, on any device."""
    check_cut(crops.cut_by_torch, folders["pixels"])


@pytest.mark.skipif(crops.cut_by_triton is None, reason=WANTED)
def test_in_the_interpreter() -> None:
    run_interpreted(Path(__file__).with_name("interpreted_crops.py"))


def check_cut(cut: Callable[..., None], folder: Path) -> None:
    """That a kernel finishes the crops as the CPU does, and nothing where there are none."""
    source, _, pixels = opened(folder)
    draws = SamplePlan(source.index.sizes, 9, 3, fraction=SIDE / 96).draw(0, 0)
    (batch,) = engine("gpu_cache", source, pixels, 9, None).batches([draws])
    assert isinstance(source, RawDataset)
    scales = np.reciprocal(pixels.stds(draws.strength))
    rows = source.index.places[draws.numbers, 0]
    given = (source.pixels.copy(), rows, draws.boxes, draws.flips, pixels.means(draws), scales)
    every, rows, boxes, flips, means, scales = map(torch.as_tensor, given)
    out = torch.full((len(rows), SIDE, SIDE, 3), torch.nan)
    cut(every, rows, boxes, flips, means, scales, out)
    assert torch.equal(out.permute(0, 3, 1, 2), batch.images)
    cut(every, rows[:0], boxes[:0], flips[:0], means[:0], scales, out[:0])


def test_what_is_refused(folders: dict[str, Path]) -> None:
    for kind, holds in (("plain", "image files"), ("shards", "shards")):
        source, _, pixels = opened(folders[kind])
        said = f"wants raw pixels, and {folders[kind]} holds {holds}: prepare them by python"
        with pytest.raises(UserError, match=said):
            engine("gpu_cache", source, pixels, 4, None)
        assert not isinstance(engine("auto", source, pixels, 4, None), GpuCacheLoader)
    source, _, pixels = opened(folders["pixels"])
    assert not isinstance(engine("auto", source, pixels, 4, None), GpuCacheLoader)  # not on a CPU
    sizes = source.index.sizes.copy()
    sizes[3] = 95, 96
    source.index = replace(source.index, sizes=sizes)
    with pytest.raises(UserError, match=r"images of one size, and those of .*train have several"):
        engine("gpu_cache", source, pixels, 4, None)


def test_what_fits_on_a_gpu(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    source, _, _ = opened(folders["pixels"])
    assert isinstance(source, RawDataset)
    size, total = 31 * 96 * 96 * 3, 10_000_000
    for free, wanted in ((total // 2 + size, True), (total // 2 + size - 1, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: (free, total))
        assert fits(source, torch.device("cuda", 0)) is wanted


@pytest.mark.slow
def test_training_is_the_same_as_with_dali(tmp_path: Path) -> None:
    pytest.importorskip("nvidia.dali", reason="DALI is not installed here")
    folder = write_prepared(write_images(tmp_path / "plain"), tmp_path / "pixels", "pixels")
    options = ["--train.max_steps=2", "--data.pca_noise=source"]
    for name in ("gpu_cache", "dali"):
        train(0, folder, tmp_path / name, f"--data.loader={name}", *options)
    (start,) = events(tmp_path / "gpu_cache" / "run", "start")
    assert start["loader"].startswith("resident: 0.0 GB of raw pixels in host memory, cut by ")
    ours, theirs = (losses(tmp_path / name / "run") for name in ("gpu_cache", "dali"))
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert len(ours) == 2
