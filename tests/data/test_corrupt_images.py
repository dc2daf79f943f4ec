"""Odd and damaged images: each is decoded alike by both engines, or named by both."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

from alexnet_dist.data import build_loader, datasets
from alexnet_dist.data.corrupt_images import Batch, Loader, OnCorruptImage
from alexnet_dist.data.dali import DaliLoader
from alexnet_dist.data.datasets import ImageDataset, open_datasets, scan_dataset
from alexnet_dist.data.formats import decode, parse_jpeg_size, validate_bytes
from alexnet_dist.data.plan import SampleParams, SamplePlan
from alexnet_dist.data.transforms import Normalization
from alexnet_dist.errors import UserError
from tests.data.corrupt_images import (
    Content,
    damaged,
    encode,
    inwardly_damaged,
    photograph,
    png_of_16_bits,
    put,
    whole,
    with_thumbnail,
    write_folder,
)

ENGINES = ["dali", "torch"]
SIDE = 64
BYTES = Normalization(np.zeros(3), np.ones(3), np.zeros((3, 3)), SIDE)


def open_folder(root: Path) -> ImageDataset:
    return open_datasets(scan_dataset(str(root), str(root / "cache"), lambda *_: None))[0]


def plan_of(source: ImageDataset, crop: Literal["paper", "random_resized"] = "paper") -> SamplePlan:
    """All images in one batch; by the paper's crop 64 of 96 pixels, without a resize."""
    return SamplePlan(source.index.sizes, len(source.index), 3, crop=crop, crop_fraction=SIDE / 96)


def engine(name: str, source: ImageDataset, plan: SamplePlan, policy: OnCorruptImage) -> Loader:
    return build_loader(
        name,  # type: ignore[arg-type]
        source,
        BYTES,
        plan,
        max_batch_size=plan.batch_size,
        device=torch.device("cpu"),
        threads=0 if name == "torch" else 2,
        on_corrupt=policy,
    )


def run(
    name: str,
    source: ImageDataset,
    plan: SamplePlan,
    *draws: SampleParams,
    on_corrupt: OnCorruptImage = "stop",
) -> tuple[list[Batch], list[dict]]:
    """The batches of an engine, and its news."""
    used = engine(name, source, plan, on_corrupt)
    try:
        return list(used.batches(draws)), used.corrupt.pop_events()
    finally:
        used.close()


def one_of(draws: SampleParams, index: int) -> SampleParams:
    return draws.select(draws.indices == index)


def replaced(
    root: Path, contents: dict[str, Content], when: str
) -> tuple[ImageDataset, dict[str, Path]]:
    """A folder of damaged files; "after" they were indexed as good ones."""
    good = encode(photograph(), "JPEG")
    paths = write_folder(root, contents if when == "before" else dict.fromkeys(contents, good))
    source = open_folder(root)
    for kind, path in paths.items():
        if when == "after":
            put(path, contents[kind])
    return source, paths


@pytest.mark.parametrize("crop", ["paper", "random_resized"])
def test_odd_images_are_decoded_alike(
    crop: Literal["paper", "random_resized"], tmp_path: Path
) -> None:
    paths = write_folder(tmp_path, whole())
    source = open_folder(tmp_path)
    plan = plan_of(source, crop)
    draws = plan.sample(0, 0)
    (dali,), (plain,) = (run(name, source, plan, draws)[0] for name in ENGINES)
    for kind, path in paths.items():
        (row,) = np.flatnonzero(draws.indices == source.index.names.index(f"all/{path.name}"))
        difference = (dali.images[row] - plain.images[row]).abs()
        resized = draws.crop_boxes[row, 2:].tolist() != [SIDE, SIDE]
        assert difference.mean() < 1 if resized else not difference.any(), kind
        assert kind == "JPEG, 1 pixel" or dali.images[row].std() > 4, kind


def test_what_alpha_16_bits_and_ink_become() -> None:
    made, pixels = whole(), np.asarray(photograph())
    deep = png_of_16_bits(pixels.astype(np.uint16) * 256 + 255)
    grey = png_of_16_bits(pixels[..., :1].astype(np.uint16) * 256 + 255)
    for encoded, wanted in (
        (deep, pixels),
        (grey, np.repeat(pixels[..., :1], 3, 2)),
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
def test_damaged_images_are_skipped_alike(
    policy: OnCorruptImage, when: str, tmp_path: Path
) -> None:
    contents = damaged()
    if when == "before":
        contents.pop("no file any more")
    source, paths = replaced(tmp_path, contents, when)
    plan = plan_of(source)
    draws = plan.sample(0, 0)
    found = {}
    for name in ENGINES:
        (batch,), news = run(name, source, plan, draws, on_corrupt=policy)
        found[name] = {event["path"]: event["reason"] for event in news}
        assert set(found[name]) == {str(path) for path in paths.values()}
        good = [n for n in draws.indices if source.path(n) not in found[name]]
        if policy == "skip":
            assert batch.indices.tolist() == good
        else:
            wanted = [n if n in good else (n + 1) % len(source.index) for n in draws.indices]
            assert batch.indices.tolist() == wanted
            for event in news:
                assert event["substitute"] == source.path((event["index"] + 1) % len(source.index))
    dali, plain = (
        {kind: found[name][str(path)] for kind, path in paths.items()} for name in ENGINES
    )
    claims = "PNG that claims 60,000 x 60,000 pixels"  # of another size, or too many for Pillow
    assert (when == "after") == (dali.pop(claims) != plain.pop(claims))
    assert dali == plain
    assert dali["JPEG cut at nine tenths"].startswith("it is cut short")
    if when == "before":
        for kind in ("GIF", "TIFF", "text", "empty file", "folder", "broken link"):
            assert dali[kind] == "it has no readable header of a JPEG, PNG, WebP or BMP"
    else:
        assert dali["empty file"] == "the file is empty"
        assert dali["text"] == "it is no JPEG, PNG, WebP or BMP"
        assert dali["folder"] == "Is a directory"
        assert dali["no file any more"] == "No such file or directory"


@pytest.mark.parametrize("name", ENGINES)
def test_each_damaged_image_stops_by_its_name(name: str, tmp_path: Path) -> None:
    source, paths = replaced(tmp_path, damaged(), "after")
    plan = plan_of(source)
    used = engine(name, source, plan, "stop")
    for path in paths.values():
        index = source.index.names.index(f"all/{path.name}")
        with pytest.raises(UserError) as failure:
            list(used.batches([one_of(plan.sample(0, 0), index)]))
        assert str(failure.value).startswith(f"{path} cannot be decoded (")
        used.corrupt.errors.clear()
    used.close()


def test_a_plain_header_is_one_that_dalis_parser_reads() -> None:
    nvimgcodec = pytest.importorskip("nvidia.nvimgcodec")
    generator, made = np.random.default_rng(2), whole()
    kinds = [made[f"JPEG{kind}"] for kind in ("", ", greyscale", ", progressive", ", CMYK")]
    plain = 0
    for _ in range(3000):
        encoded = np.frombuffer(kinds[generator.integers(4)], np.uint8).copy()
        encoded[generator.integers(0, 620, 2)] = generator.choice([0, 1, 8, 0xC2, 0xDA, 0xFF], 2)
        size = parse_jpeg_size(encoded)
        if size is not None:
            plain += 1
            header = nvimgcodec.CodeStream(encoded)
            assert ([header.height, header.width], header.dtype) == (size, np.uint8)
    assert plain > 500


def test_no_cut_goes_unseen() -> None:
    jpeg, progressive, png, webp, bmp = (
        encode(photograph(), kind, **options)  # type: ignore[arg-type]
        for kind, options in (
            ("JPEG", {}),
            ("JPEG", {"progressive": True}),
            ("PNG", {}),
            ("WEBP", {}),
            ("BMP", {}),
        )
    )
    for content in (jpeg, progressive, with_thumbnail(jpeg), png):
        for length in range(len(content)):
            try:
                encoded = validate_bytes(np.frombuffer(content[:length], np.uint8))
            except OSError:
                continue
            assert content[:length].endswith(b"\xff\xd9")  # of the thumbnail
            with pytest.raises(OSError, match="the decoder gives up on it"):
                decode(encoded)
    for content in (webp, bmp):
        for length in range(12, len(content), 97):
            with pytest.raises(OSError, match="the decoder gives up on it"):
                decode(validate_bytes(np.frombuffer(content[:length], np.uint8)))


def test_a_batch_that_fails_names_those_that_fail_alone_or_only_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bits = {str(n): damaged()["PNG, a bit flipped"] for n in (1, 2)}  # only decoders can tell
    source, paths = replaced(tmp_path, {**bits, "3": encode(photograph(), "JPEG")}, "after")
    plan = plan_of(source)
    draws = plan.sample(0, 0)
    (batch,), news = run("dali", source, plan, draws, on_corrupt="substitute")
    assert {event["path"] for event in news} == {str(paths["1"]), str(paths["2"])}

    third = source.index.names.index(f"all/{paths['3'].name}")
    decode_batch = DaliLoader._run

    def together(self: DaliLoader, draws: SampleParams, encoded: list) -> Batch:
        rows = np.flatnonzero(draws.indices == third)
        if len(rows):
            raise RuntimeError(f"Error in\nencountered:\n\nFailed to decode sample #{rows[0]} :")
        return decode_batch(self, draws, encoded)

    monkeypatch.setattr(DaliLoader, "_run", together)
    (batch,), news = run("dali", source, plan, draws, on_corrupt="substitute")
    assert {event["path"] for event in news} == {str(path) for path in paths.values()}
    assert third not in batch.indices

    def at_a_loss(self: DaliLoader, draws: SampleParams, encoded: list) -> Batch:
        raise MemoryError("Error in\nencountered:\n\nout of memory\nand more")

    monkeypatch.setattr(DaliLoader, "_run", at_a_loss)
    with pytest.raises(UserError, match=r"whose images decode one by one: out of memory$"):
        run("dali", source, plan, one_of(draws, third), on_corrupt="substitute")


@pytest.mark.parametrize("name", ENGINES)
def test_an_image_of_another_size_than_before_is_named(name: str, tmp_path: Path) -> None:
    """In many of a batch: where a box does not fit, DALI ends the process."""
    other = [encode(photograph(*size), "JPEG") for size in ((40, 50), (200, 150))]
    contents: dict[str, Content] = {str(n): other[n % 2] for n in range(40)}
    source, paths = replaced(tmp_path, contents, "after")
    plan = plan_of(source)
    (batch,), news = run(name, source, plan, plan.sample(0, 0), on_corrupt="skip")
    assert len(batch.indices) == 40
    assert {event["path"] for event in news} == {str(path) for path in paths.values()}
    assert {event["reason"] for event in news} == {"it has another size than when it was indexed"}


def test_damage_inside_is_judged_alike_whatever_the_box(tmp_path: Path) -> None:
    source, paths = replaced(tmp_path, dict(inwardly_damaged()), "after")
    plan = plan_of(source)
    for path in paths.values():
        draws = one_of(plan.sample(0, 0), source.index.names.index(f"all/{path.name}"))
        boxes = [np.array([[top, 30, SIDE, SIDE]]) for top in (0, 16, 32)]
        each = [replace(draws, crop_boxes=box) for box in boxes]
        _, news = run("dali", source, plan, *each, on_corrupt="skip")
        assert len(news) in (0, 3), path


def test_an_index_takes_note_of_what_was_mended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = write_folder(tmp_path, {"it": b"no image"})
    assert open_folder(tmp_path).index.corrupt_indices() == [0]
    paths["it"].write_bytes(encode(photograph(), "JPEG"))  # in place
    assert not open_folder(tmp_path).index.corrupt_indices()
    monkeypatch.setattr(datasets, "_scan", None)
    assert not open_folder(tmp_path).index.corrupt_indices()


def test_statistics_pass_over_what_cannot_be_decoded(tmp_path: Path) -> None:
    contents = damaged()
    contents.pop("no file any more")
    write_folder(tmp_path / "bad", contents)
    write_folder(tmp_path / "good", {"one": encode(photograph(), "JPEG", quality=90)})
    spoilt, good = (
        scan_dataset(str(tmp_path / name), str(tmp_path), lambda *_: None).stats
        for name in ("bad", "good")
    )
    assert np.allclose(spoilt.mean, good.mean)
    assert np.allclose(spoilt.eigenvalues, good.eigenvalues)
