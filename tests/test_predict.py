"""The most likely labels of images: an evaluation's numbers, and a word for every image."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from alexnet_dist.predict import main
from tests.conftest import SIDE, Saved, error_of
from tests.networks import CLASSES, MEAN, command, ten_crops

SIZES = [(SIDE, SIDE), (90, 130), (200, 77), (50, 60), (SIDE, 99)]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Blotches of color, three of a size; in folders, and of two formats."""
    folder = tmp_path_factory.mktemp("photographs")
    generator = np.random.default_rng(3)
    for index, (height, width) in enumerate(SIZES * 3):
        blotches = generator.integers(0, 256, (5, 5, 3), np.uint8)
        image = Image.fromarray(blotches).resize((width, height), Image.Resampling.BICUBIC)
        path = folder / ("a" if index < 8 else "b") / f"{index:02d}"
        path.parent.mkdir(exist_ok=True)
        image.save(path.with_suffix(".png" if index % 2 else ".jpg"))
    return folder


def predicted(capsys: pytest.CaptureFixture[str], *words: object) -> list[dict]:
    capsys.readouterr()
    command(main, *words, "--json", "-")
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def by_class(records: list[dict]) -> np.ndarray:
    """Probabilities [images, classes] in the order of CLASSES."""
    found = [dict(zip(r["labels"], r["probabilities"], strict=True)) for r in records]
    return np.array([[probs[name] for name in CLASSES] for probs in found])


@torch.no_grad()
def test_one_crop_and_ten_are_those_of_a_plain_loop(
    paper: Saved, photographs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, model = paper
    files = sorted(path for path in photographs.rglob("*.*"))
    crops = [ten_crops(Image.open(file), 67 / SIDE, 67, MEAN) for file in files]
    expected = [model(one).softmax(1) for one in crops]
    options = ["--checkpoint", run, "--top", 6, "--runtime.threads=2"]
    one = predicted(capsys, photographs, *options)
    ten = predicted(capsys, photographs, *options, "--ten_crop", "--runtime.threads=1")
    # Pillow's resize is another
    np.testing.assert_allclose(by_class(one), [probs[8] for probs in expected], atol=5e-3)
    np.testing.assert_allclose(by_class(ten), [probs.mean(0) for probs in expected], atol=2e-3)
    assert np.abs(by_class(one) - by_class(ten)).max() > 0.02
    assert np.ptp(by_class(ten), 0).min() > 0.1  # the images do make a difference
    for record in one:
        assert record["probabilities"] == sorted(record["probabilities"], reverse=True)
    assert [record["path"] for record in one] == [str(file) for file in files]


def test_photographs_are_turned_upright(
    paper: Saved, photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    upright = Image.open(photographs / "a" / "01.png")
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = {6: 8, 8: 6}.get(orientation, orientation)  # what undoes it
        image = upright.copy()
        image.getexif()[0x0112] = orientation
        turned = ImageOps.exif_transpose(image)
        assert (turned.size == upright.size) == (orientation < 5)
        turned.save(tmp_path / f"{orientation}.png", exif=exif)
    probs = by_class(predicted(capsys, tmp_path, "--checkpoint", paper[0], "--top", 6))
    assert len(probs) == 8
    assert (probs == probs[0]).all()


def test_what_cannot_be_read_is_named_and_the_rest_is_done(
    paper: Saved, photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = sorted(photographs.rglob("*.jpg"))
    cut, text, empty = tmp_path / "cut.jpg", tmp_path / "text.jpg", tmp_path / "empty"
    cut.write_bytes(good[1].read_bytes()[:-20])
    text.write_text("text")
    empty.mkdir()
    reasons = {
        cut: "it is cut short: a JPEG without its end marker",
        text: "it is no JPEG, PNG, WebP or BMP",
        tmp_path / "none.jpg": "No such file or directory",
        empty: "there is no image in this folder",
        tmp_path / "*.png": "No such file or directory",
    }
    for options in ([], ["--ten_crop"]):
        with pytest.raises(SystemExit) as ended:
            command(main, good[0], *reasons, good[2], "--checkpoint", paper[0], *options)
        assert ended.value.code == 1
        printed = capsys.readouterr()
        paths = [line for line in printed.out.splitlines() if line[0] != " "]
        assert paths == [str(good[0]), str(good[2])]
        assert printed.err.splitlines() == [
            f"alexnet_dist: {path} cannot be read ({reason}): it is skipped"
            for path, reason in reasons.items()
        ]


def test_a_name_in_another_encoding_and_files_of_other_kinds(
    paper: Saved, photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = tmp_path / "in" / os.fsdecode(b"caf\xe9.jpg")
    odd.parent.mkdir()
    shutil.copy(photographs / "a" / "00.jpg", odd)
    for name in ("._a.jpg", "a.gif"):
        (odd.parent / name).touch()
    words = [odd.parent, "--checkpoint", paper[0], "--save_image", tmp_path / "a.png"]
    command(main, *words, "--json", "-")
    said = capsys.readouterr()
    assert json.loads(said.out)["path"] == str(odd)
    assert said.err == f"alexnet_dist: left out of the images: 1 .gif files ({odd.parent}/a.gif)\n"
    assert (tmp_path / "a.png").is_file()


def test_text_json_and_image(
    paper: Saved, photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, image = tmp_path / "predictions.jsonl", tmp_path / "image.png"
    words = [photographs / "b", "--checkpoint", paper[0], "--json", file, "--save_image", image]
    command(main, *words, "--runtime.device", "cpu", "--runtime.threads=1")
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(records) == 7
    assert {label for record in records for label in record["labels"]} == set(CLASSES)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 7 * 4
    path, (label, *_), (probability, *_) = records[0].values()
    assert lines[:2] == [path, f"  {100 * probability:6.2f} %  {label}"]
    width, height = Image.open(image).size
    assert 1000 < width < 1300  # four columns
    assert 900 < height < 1300  # two rows


def test_wrong_options_are_named(paper: Saved, tmp_path: Path) -> None:
    run = ["--checkpoint", str(paper[0])]
    (tmp_path / "weights.txt").touch()
    for words, message in (
        ([*run], "required: IMAGE"),
        (["a.jpg"], "required: --checkpoint"),
        (["a.jpg", *run, "--top", "0"], "--top: it must be a whole number of at least 1"),
        (["a.jpg", *run, "--save_image", "a.gif"], "must end in .png or .pdf"),
        (["a.jpg", *run, "--json", f"{tmp_path}/no/a"], "has no folder to lie in"),
        (["a.jpg", "--checkpoint", str(tmp_path)], "there is no checkpoint at"),
        (["a.jpg", "--checkpoint", f"{tmp_path}/weights.txt"], "cannot be read"),
    ):
        assert message in error_of(command, main, *words)
