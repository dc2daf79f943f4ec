"""Odd and corrupt images: each is decoded alike by both loaders, or named by both."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from alexnet_dist.data.dali import find_corrupt
from alexnet_dist.data.datasets import ImageDataset
from alexnet_dist.data.decode import SIZE_MISMATCH, decode
from alexnet_dist.data.formats import validate_bytes
from alexnet_dist.data.loader import CorruptImagesError, OnCorruptImage
from alexnet_dist.data.plan import SampleParams, SamplePlan, TrainCrop
from tests.conftest import error_of
from tests.data import corrupt_images
from tests.data.corrupt_images import Content, encode, photograph, png_of_16_bits, put, write_folder
from tests.data.loading import SIZE, build, load, open_train

LOADERS = ["dali", "torch"]


def plan_for(dataset: ImageDataset, crop: TrainCrop = "paper") -> SamplePlan:
    """All images in one batch; by the paper's crop 64 of 96 pixels, without a resize."""
    return SamplePlan(dataset.index.sizes, len(dataset.index), 3, crop, SIZE / 96)


def one_of(samples: SampleParams, dataset: ImageDataset, path: Path) -> SampleParams:
    return samples.select(samples.indices == dataset.index.names.index(f"all/{path.name}"))


def write_corrupt(
    root: Path, contents: Mapping[str, Content], when: str = "after"
) -> tuple[ImageDataset, dict[str, Path]]:
    """A folder of corrupt files; "after" they were indexed as good ones."""
    good = encode(photograph(), "JPEG")
    paths = write_folder(root, contents if when == "before" else dict.fromkeys(contents, good))
    dataset = open_train(root)
    for kind, path in paths.items():
        if when == "after":
            put(path, contents[kind])
    return dataset, paths


@pytest.mark.parametrize("crop", ["paper", "random_resized"])
def test_odd_images_are_decoded_alike(crop: TrainCrop, tmp_path: Path) -> None:
    paths = write_folder(tmp_path, corrupt_images.odd_images())
    dataset = open_train(tmp_path)
    plan = plan_for(dataset, crop)
    samples = plan.sample(0, 0)
    (dali,), (reference,) = (load(name, dataset, plan, [samples])[0] for name in LOADERS)
    for kind, path in paths.items():
        (row,) = np.flatnonzero(samples.indices == dataset.index.names.index(f"all/{path.name}"))
        difference = (dali.images[row] - reference.images[row]).abs()
        resized = samples.crop_boxes[row, 2:].tolist() != [SIZE, SIZE]
        assert difference.mean() < 1 if resized else not difference.any(), kind
        assert kind == "JPEG, 1 pixel" or dali.images[row].std() > 4, kind


def test_what_alpha_16_bits_and_ink_become() -> None:
    made, pixels = corrupt_images.odd_images(), np.asarray(photograph())
    deep = png_of_16_bits(pixels.astype(np.uint16) * 256 + 255)
    gray = png_of_16_bits(pixels[..., :1].astype(np.uint16) * 256 + 255)
    for encoded, wanted in (
        (deep, pixels),
        (gray, np.repeat(pixels[..., :1], 3, 2)),
        (made["PNG, alpha"], pixels),
        (made["PNG, rotated by EXIF"], pixels),
    ):
        assert np.array_equal(decode(validate_bytes(np.frombuffer(encoded, np.uint8))), wanted)
    adobes, others = (
        np.asarray(decode(np.frombuffer(made[f"JPEG, CMYK{kind}"], np.uint8)), float)
        for kind in ("", " without Adobe's mark")
    )
    ink, black = pixels.astype(float), np.asarray(photograph().convert("L"))[..., None] // 2
    assert abs(adobes - (255 - ink) * (255 - black) / 255).mean() < 6
    assert abs(others - ink * black / 255).mean() < 6


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("policy", ["substitute", "skip"])
def test_corrupt_images_are_substituted_or_skipped_and_named(
    policy: OnCorruptImage, when: str, tmp_path: Path
) -> None:
    """Those that were corrupt when they were indexed, and those that became so after."""
    contents = corrupt_images.corrupt_files()
    if when == "before":
        contents.pop("no file any more")
    dataset, paths = write_corrupt(tmp_path, contents, when)
    plan = plan_for(dataset)
    samples, count = plan.sample(0, 0), len(dataset.index)
    reasons = {}
    for name in LOADERS:
        (batch,), events = load(name, dataset, plan, [samples], on_corrupt=policy)
        by_path = {event["path"]: event["reason"] for event in events}
        assert set(by_path) == {str(path) for path in paths.values()}
        reasons[name] = {kind: by_path[str(path)] for kind, path in paths.items()}
        good = [n for n in samples.indices if dataset.path(n) not in by_path]
        if policy == "skip":
            assert batch.indices.tolist() == good
        else:
            wanted = [n if n in good else (n + 1) % count for n in samples.indices]
            assert batch.indices.tolist() == wanted
            for event in events:
                assert event["substitute"] == dataset.path((event["index"] + 1) % count)
    dali, reference = (reasons[name] for name in LOADERS)
    claims = "PNG that claims 60,000 x 60,000 pixels"  # of another size, or too many for Pillow
    assert (when == "after") == (dali.pop(claims) != reference.pop(claims))
    assert dali == reference
    assert dali["JPEG cut at nine tenths"].startswith("it is cut short")
    assert dali["empty file"] == "the file is empty"
    assert dali["text"] == dali["TIFF"] == "it is no JPEG, PNG, WebP or BMP"
    assert dali["folder"] == "Is a directory"
    if when == "before":
        assert dali["broken link"] == "there is no such file, or a link to it leads nowhere"
    else:
        assert dali["no file any more"] == "No such file or directory"


@pytest.mark.parametrize("name", LOADERS)
def test_each_corrupt_image_stops_by_its_name(name: str, tmp_path: Path) -> None:
    dataset, paths = write_corrupt(tmp_path, corrupt_images.corrupt_files())
    plan = plan_for(dataset)
    loader = build(name, dataset, plan)
    for path in paths.values():
        message = error_of(list, loader.batches([one_of(plan.sample(0, 0), dataset, path)]))
        assert message.startswith(f"{path} cannot be decoded (")
        assert message.endswith("go on without it by --data.on_corrupt_image skip")
        loader.corrupt.errors.clear()
    loader.close()


@pytest.mark.parametrize("kind", ["JPEG", "progressive", "thumbnail", "PNG", "WEBP", "BMP"])
def test_no_truncated_file_is_decoded(kind: str) -> None:
    full = encode(photograph(), kind if kind.isupper() else "JPEG", progressive=kind[0] == "p")
    full = corrupt_images.with_thumbnail(full) if kind == "thumbnail" else full
    each = kind not in ("WEBP", "BMP")  # whose decoders tell, and take longer
    for length in range(0 if each else 12, len(full), 1 if each else 97):
        with pytest.raises(OSError, match=r"cut short|empty|no JPEG|the decoder gives up"):
            decode(validate_bytes(np.frombuffer(full[:length], np.uint8)))


def test_the_image_that_dali_fails_on_is_found(tmp_path: Path) -> None:
    good = encode(photograph(), "JPEG")
    broken = corrupt_images.corrupt_inside()["JPEG, a start marker at three quarters"]
    dataset, _ = write_corrupt(tmp_path, {"good": good, "other": good})
    samples = plan_for(dataset).sample(0, 0)
    images = [np.frombuffer(encoded, np.uint8) for encoded in (good, broken, good, good)]
    named = RuntimeError("Error in\nencountered:\n\nFailed to decode sample #2 (it)")
    other = MemoryError("Error in\nencountered:\n\nout of memory\nand more")
    for error, row in ((named, 2), (other, 1)):  # Pillow looks where DALI does not say
        wanted = {int(samples.indices[row]): "the decoder gives up on it"}
        found = find_corrupt(samples, images, error)
        assert isinstance(found, CorruptImagesError)
        assert found.reasons == wanted
    found = find_corrupt(samples, [images[0]] * 4, other)
    assert str(found) == "DALI failed on a batch of images: out of memory"


@pytest.mark.parametrize("name", LOADERS)
def test_an_image_of_another_size_than_indexed_is_named(name: str, tmp_path: Path) -> None:
    """In many of a batch: where a box does not fit, DALI ends the process."""
    other = [encode(photograph(*size), "JPEG") for size in ((40, 50), (200, 150))]
    dataset, paths = write_corrupt(tmp_path, {str(n): other[n % 2] for n in range(40)})
    plan = plan_for(dataset)
    (batch,), events = load(name, dataset, plan, [plan.sample(0, 0)], on_corrupt="skip")
    assert len(batch.indices) == 40
    assert {event["path"] for event in events} == {str(path) for path in paths.values()}
    assert {event["reason"] for event in events} == {SIZE_MISMATCH}


def test_dali_judges_damage_inside_alike_whatever_the_box(tmp_path: Path) -> None:
    dataset, paths = write_corrupt(tmp_path, corrupt_images.corrupt_inside())
    plan = plan_for(dataset)
    for path in paths.values():
        samples = one_of(plan.sample(0, 0), dataset, path)
        boxes = [np.array([[top, 30, SIZE, SIZE]]) for top in (0, 16, 32)]
        each = [replace(samples, crop_boxes=box) for box in boxes]
        _, events = load("dali", dataset, plan, each, on_corrupt="skip")
        assert len(events) in (0, 3), path
