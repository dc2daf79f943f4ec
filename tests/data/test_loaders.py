"""Both engines carry out one plan, and agree on what they cannot decode."""

from collections.abc import Callable
from pathlib import Path
from threading import Event

import numpy as np
import pytest
import torch
from PIL import Image

from alexnet_dist.data import build_loader
from alexnet_dist.data.corrupt_images import Batch, Loader
from alexnet_dist.data.dali import DaliLoader
from alexnet_dist.data.plan import EvalPlan, SampleParams, SamplePlan
from alexnet_dist.data.sources import ImageDataset, open_datasets, scan_dataset
from alexnet_dist.data.transforms import Normalization, build_normalization
from alexnet_dist.errors import UserError
from tests.conftest import write_images

CPU = torch.device("cpu")


def quiet(*_: object) -> None:
    pass


def open_folder(folder: Path, cache: Path) -> tuple[ImageDataset, ImageDataset, Normalization]:
    catalogue = scan_dataset(str(folder), str(cache), quiet)
    pixels = build_normalization("centered", catalogue.stats, size=64, pca_noise="source")
    return *open_datasets(catalogue), pixels


def engine(
    name: str, source: ImageDataset, pixels: Normalization, plan: SamplePlan, **options: object
) -> Loader:
    return build_loader(
        name,  # type: ignore[arg-type]
        source,
        pixels,
        plan,
        max_batch_size=plan.batch_size,
        device=CPU,
        threads=1,
        **options,  # type: ignore[arg-type]
    )


def epoch(engine: Loader, plan: SamplePlan) -> list[Batch]:
    batches = list(engine.batches(plan.epoch(0, 0, slice(None))))
    engine.close()
    return batches


@pytest.mark.parametrize("crop", ["exact", "paper", "random_resized"])
def test_engines_agree(crop: str, tmp_path: Path) -> None:
    # 64 of 128 is cut without a resize, everything else is resized
    source, _, pixels = open_folder(write_images(tmp_path / "i", side=128), tmp_path)
    fraction = 0.5 if crop == "exact" else 0.8
    plan = SamplePlan(
        source.index.sizes,
        8,
        1,
        crop_fraction=fraction,
        crop="paper" if crop == "exact" else crop,  # type: ignore[arg-type]
    )
    pairs = zip(
        epoch(engine("dali", source, pixels, plan), plan),
        epoch(engine("torch", source, pixels, plan), plan),
        strict=True,
    )
    for step, (dali, plain) in enumerate(pairs):
        assert dali.indices.tolist() == plain.indices.tolist()
        assert dali.indices.tolist() == plan.sample(0, step).indices.tolist()
        assert torch.equal(dali.labels, plain.labels)
        assert (dali.images - plain.images).abs().max() < 1e-4  # 255 / 1.1, rounded once or twice
        for batch in (dali, plain):
            assert batch.images.dtype == torch.float32
            assert batch.images.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", ["dali", "torch"])
def test_pixels_are_those_of_the_file(name: str, tmp_path: Path) -> None:
    source, _, _ = open_folder(write_images(tmp_path / "i", side=128), tmp_path)
    plan = SamplePlan(source.index.sizes, 4, 5, crop_fraction=0.5)
    pixels = Normalization(np.array([1.0, 2.0, 3.0]), np.ones(3), np.zeros((3, 3)), 64)
    (batch, *_) = epoch(engine(name, source, pixels, plan), plan)
    draws = plan.sample(0, 0)
    for row, index in enumerate(draws.indices.tolist()):
        top, left, height, width = draws.crop_boxes[row]
        image = np.asarray(Image.open(source.path(index)), np.float32)
        image = image[top : top + height, left : left + width] - [1, 2, 3]
        image = image[:, ::-1] if draws.flips[row] else image
        assert np.array_equal(batch.images[row].numpy().transpose(1, 2, 0), image)


@pytest.mark.parametrize("name", ["dali", "torch"])
def test_colour_noise_is_a_shift_of_the_whole_image(name: str, tmp_path: Path) -> None:
    """And it ends in mid-epoch, where a life says so."""
    source, _, pixels = open_folder(write_images(tmp_path / "i", side=128), tmp_path)
    plan = SamplePlan(
        source.index.sizes, 4, 5, crop_fraction=0.5, pca_noise_std=lambda p: 0.1 * (p < 2.5 / 7)
    )
    assert plan.steps_per_epoch == 7
    plain = Normalization(pixels.mean, np.ones(3), np.zeros((3, 3)), 64)
    noisy = epoch(engine(name, source, pixels, plan), plan)
    clean = epoch(engine(name, source, plain, plan), plan)
    for step in range(3):
        shift = (noisy[step].images * 1.1 - clean[step].images).numpy()
        wanted = 0.1 * plan.sample(0, step).pca_coeffs @ pixels.pca_basis.T
        assert np.abs(wanted).max() > 1
        assert np.allclose(shift, wanted[:, :, None, None], atol=1e-3)
    for one, other in zip(noisy[3:], clean[3:], strict=True):
        assert torch.equal(one.images, other.images)


def damage(folder: Path) -> dict[str, Path]:
    """Training images spoiled in three ways, by name of the damage."""
    files = sorted((folder / "train").rglob("*.jpg"))
    cut, noise, empty = files[3], files[9], files[17]
    cut.write_bytes(cut.read_bytes()[:400])
    noise.write_bytes(noise.read_bytes()[:700] + bytes(range(256)) * 20)
    empty.write_bytes(b"")
    return {"cut": cut, "noise": noise, "empty": empty}


@pytest.mark.parametrize("name", ["dali", "torch"])
def test_bad_images_are_replaced_and_recorded(name: str, tmp_path: Path) -> None:
    root = write_images(tmp_path / "i", side=128)
    source, _, pixels = open_folder(root, tmp_path)  # the index knows them as good
    bad = damage(root)
    plan = SamplePlan(source.index.sizes, 5, 5, crop_fraction=0.5)
    used = engine(name, source, pixels, plan, on_corrupt="substitute")
    batches = list(used.batches(plan.epoch(0, 0, slice(None))))
    news = {event["path"]: event["substitute"] for event in used.corrupt.pop_events()}
    seen = [n for batch in batches for n in batch.indices.tolist()]
    assert len(seen) == plan.steps_per_epoch * 5
    files = sorted((root / "train").rglob("*.jpg"))
    drawn = {source.path(n) for n in plan.permutation(0).tolist()}
    for path in (bad["cut"], bad["empty"]):
        if str(path) in drawn:
            assert news[str(path)] == str(files[files.index(path) + 1])
            assert files.index(path) not in seen
    again = list(used.batches(plan.epoch(0, 0, slice(None))))  # known now
    assert [b.indices.tolist() for b in again] == [b.indices.tolist() for b in batches]
    used.close()


@pytest.mark.parametrize("name", ["dali", "torch"])
def test_a_bad_image_stops_by_name(name: str, tmp_path: Path) -> None:
    root = write_images(tmp_path / "i", side=128)
    source, _, pixels = open_folder(root, tmp_path)
    damage(root)
    plan = SamplePlan(source.index.sizes, 31, 5, crop_fraction=0.5)
    with pytest.raises(UserError, match=r"\.jpg cannot be decoded .* --data\.on_corrupt_image"):
        epoch(engine(name, source, pixels, plan), plan)


@pytest.mark.parametrize("name", ["dali", "torch"])
def test_evaluation_leaves_bad_images_out(name: str, tmp_path: Path) -> None:
    root = write_images(tmp_path / "i", side=128)
    _, source, pixels = open_folder(root, tmp_path)
    sorted((root / "val").rglob("*.jpg"))[4].write_bytes(b"")
    plan = EvalPlan(source.index.sizes, 8, 0.5)
    used = build_loader(
        name,  # type: ignore[arg-type]
        source,
        pixels,
        plan,
        max_batch_size=8,
        device=CPU,
        threads=1,
        on_corrupt="skip",
    )
    indices = [n for b in used.batches(plan.batches(slice(None))) for n in b.indices.tolist()]
    assert sorted(indices) == [n for n in range(13) if n != 4]
    assert [event["index"] for event in used.corrupt.pop_events()] == [4]
    used.close()


@pytest.mark.parametrize("name", ["dali", "torch"])
def test_a_loop_that_leaves_early_is_no_burden(name: str, tmp_path: Path) -> None:
    source, _, pixels = open_folder(write_images(tmp_path / "i", side=128), tmp_path)
    plan = SamplePlan(source.index.sizes, 4, 5, crop_fraction=0.5)
    used = engine(name, source, pixels, plan)
    for _ in range(3):
        batches = used.batches(plan.epoch(0, 0, slice(None)))
        assert next(batches).indices.tolist() == plan.sample(0, 0).indices.tolist()
        batches.close()
    used.close()


def test_batches_come_in_order_though_one_overtakes_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two are under way: the second ends before the first, which waits for it; of two that fail,
    the first is told of."""
    source, _, pixels = open_folder(write_images(tmp_path / "i", side=128), tmp_path)
    plan = SamplePlan(source.index.sizes, 4, 5, crop_fraction=0.5)
    draws = list(plan.epoch(0, 0, slice(None)))
    of = {item.indices.tobytes(): index for index, item in enumerate(draws)}
    second, run = Event(), DaliLoader._run

    def overtaken(self: DaliLoader, item: SampleParams, encoded: list) -> Batch:
        index = of[item.indices.tobytes()]
        assert index != 0 or second.wait(60)
        batch = run(self, item, encoded)
        if index == 1:
            second.set()
        return batch

    monkeypatch.setattr(DaliLoader, "_run", overtaken)
    batches = epoch(engine("dali", source, pixels, plan), plan)
    assert [b.indices.tolist() for b in batches] == [item.indices.tolist() for item in draws]

    second.clear()
    for index, reason in ((0, b""), (1, b"no image at all")):
        Path(source.path(int(draws[index].indices[0]))).write_bytes(reason)

    def failing(self: DaliLoader, item: SampleParams, answers: Callable[[], list]) -> Batch:
        index = of[item.indices.tobytes()]
        assert index != 0 or second.wait(60)
        try:
            return finish(self, item, answers)
        finally:
            if index == 1:
                second.set()

    finish = DaliLoader._finish
    monkeypatch.setattr(DaliLoader, "_finish", failing)
    with pytest.raises(UserError, match="the file is empty"):
        epoch(engine("dali", source, pixels, plan), plan)
