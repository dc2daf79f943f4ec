"""The forms of ImageNet that the command reads, what it writes, and what a kill, a full disk or a
corrupt file leave."""

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from alexnet_dist.data.decode import decode
from alexnet_dist.data.formats import validate_bytes
from alexnet_dist.data.index import open_datasets
from alexnet_dist.data.packed import unpack_names
from alexnet_dist.prepare.__main__ import exclusive_lock, main
from alexnet_dist.prepare.images import OutputFormat, resize_image
from alexnet_dist.prepare.sources import discover_dataset
from tests.conftest import call, command, environment, error_of
from tests.data.corrupt_images import corrupt_files, encode, odd_images, photograph
from tests.data.loading import scan
from tests.prepare import imagenet
from tests.prepare.imagenet import CLASSES, IMAGES, tar, write

FORM = OutputFormat("shards", 48, "none", 95)
CORRUPT = ["n01440764_3", "n02102040_1"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that holds ``in`` and, made of it by one worker and by four, ``one``, ``four``."""
    root = tmp_path_factory.mktemp("prepared")
    train = imagenet.kaggle(root / "in") / "ILSVRC/Data/CLS-LOC/train"
    bad, cut = (train / f"{name[:9]}/{name}.JPEG" for name in CORRUPT)
    bad.write_bytes(b"no image")
    cut.write_bytes(cut.read_bytes()[:900])
    words = [f"{root}/in", "--size=48", "--shard_mb=0.01"]
    for name, workers in (("one", 1), ("four", 4)):
        main([*words, f"--out={root / name}", f"--workers={workers}"])
    return root


def source_of(split: str, name: str) -> np.ndarray:
    label, file = name.split("/")
    return np.frombuffer(IMAGES[split, label, f"{Path(file).stem}.JPEG"], np.uint8)


def content(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}


def test_one_worker_and_four_write_the_same_bytes(prepared: Path) -> None:
    ours = content(prepared / "one")
    assert content(prepared / "four") == ours
    assert "train-00002.tar" in ours


def test_shards_are_read_by_tarfile_and_by_the_index(prepared: Path) -> None:
    out = prepared / "one"
    facts = json.loads((out / "prepared.json").read_text())
    assert facts["class_names"] == CLASSES
    assert facts["classes"] == list(CLASSES)
    for split, count in (("train", 10), ("val", 6)):
        index = dict(np.load(out / f"{split}.index.npz"))
        names = unpack_names(index["names"])
        members = {}
        tars = [out / file["name"] for file in facts["splits"][split]["files"]]
        for path in tars:
            with tarfile.open(path) as tar:
                members |= {m.name: tar.extractfile(m).read() for m in tar}  # type: ignore[union-attr]
        images = [name for name in members if not name.endswith(".cls")]
        assert facts["splits"][split]["images"] == len(names) == count
        assert names == sorted(images) != images  # shuffled in the shards
        for row, name in enumerate(names):
            file, start, length = index["offsets"][row]
            found = tars[file].read_bytes()[start : start + length]
            pixels, encoded, _ = resize_image(source_of(split, name), FORM)
            assert found == members[name] == encoded
            assert index["sizes"][row].tolist() == list(pixels.shape[:2])
            label = int(members[f"{name.partition('.')[0]}.cls"])
            assert facts["classes"][label] == name.split("/")[0]
            assert index["labels"][row] == label


def test_corrupt_images_are_listed_and_skipped_or_stop_the_command(prepared: Path) -> None:
    lines = (prepared / "one/corrupt-images.jsonl").read_text().splitlines()
    first, second = (json.loads(line) for line in lines)
    assert [first["name"], second["name"]] == [f"{name[:9]}/{name}" for name in CORRUPT]
    assert first["reason"] == "it is no JPEG, PNG, WebP or BMP"
    assert "cut short" in second["reason"]
    words = [f"{prepared}/in", f"--out={prepared}/stop", "--on_corrupt_image=stop"]
    assert re.search("cannot be decoded .*--on_corrupt_image skip", error_of(main, words))


def test_statistics_are_those_that_training_measures(tmp_path: Path) -> None:
    plain, out = imagenet.class_folders(tmp_path / "in"), tmp_path / "out"
    main([str(plain), f"--out={out}", "--size=4096", "--workers=1"])  # images as they are
    ours, expected = (scan(root).stats for root in (out, plain))
    for name, value in vars(expected).items():
        assert np.allclose(getattr(ours, name), value), name


def test_images_are_resized_as_pillow_does_and_corrupt_ones_refused() -> None:
    for kind, data in {**odd_images(), "large": encode(photograph(400, 523), "PNG")}.items():
        encoded = np.frombuffer(data, np.uint8)
        image, (ours, kept, _) = decode(validate_bytes(encoded)), resize_image(encoded, FORM)
        height, width, _ = ours.shape
        pillow = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
        difference = np.abs(ours.astype(int) - pillow)
        assert difference.max() <= 2, kind
        assert difference.mean() < 0.05, kind
        assert min(image.size) > 48 or kept == data, kind
    for data in (data for data in corrupt_files().values() if isinstance(data, bytes)):
        with pytest.raises(OSError, match=r"\w"):
            resize_image(np.frombuffer(data, np.uint8), FORM)


def test_pixels_are_one_array_with_a_row_for_each_image(prepared: Path) -> None:
    out = prepared / "pixels"
    words = ["--format=pixels", "--crop=center", "--size=64", "--shard_mb=0.05", "--workers=2"]
    main([str(prepared / "in"), f"--out={out}", *words])
    form, datasets = OutputFormat("pixels", 64, "center", 95), open_datasets(scan(out))
    assert [len(dataset.index) for dataset in datasets] == [10, 6]
    for split, dataset in zip(("train", "val"), datasets, strict=True):
        for index, name in enumerate(dataset.index.names):
            wanted, _, _ = resize_image(source_of(split, name), form)
            assert np.array_equal(dataset.read(index), wanted)


def test_a_finished_folder_is_kept(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = content(prepared / "one")
    words = [f"{prepared}/in", f"--out={prepared}/one", "--shard_mb=0.01"]
    main([*words, "--size=48"])
    assert "is already prepared" in capsys.readouterr().out
    message = error_of(main, [*words, "--size=32"])
    assert "was made with size 48, not 32: give another --out" in message
    assert content(prepared / "one") == before


@pytest.mark.parametrize("form", imagenet.FORMS)
def test_every_form_gives_the_same_images(form: str, tmp_path: Path) -> None:
    listing = discover_dataset(imagenet.FORMS[form](tmp_path / "given"), tmp_path, lambda *_: None)
    found = {
        (e.split, e.label, e.name.removesuffix(f"_{e.label}")): e.read().tobytes()
        for e in listing.entries
    }
    assert len(listing.entries) == len(IMAGES)
    assert found == {(split, c, Path(name).stem): data for (split, c, name), data in IMAGES.items()}
    if form in ("Kaggle", "parquet", "webdataset") or form.startswith("official"):
        assert listing.class_names == CLASSES


def test_classes_are_named_by_index_where_file_names_do_not_tell(tmp_path: Path) -> None:
    given = imagenet.parquet(tmp_path / "in", paths=False)
    listing = discover_dataset(given, tmp_path, lambda *_: None)
    assert listing.class_names == dict(zip("012", CLASSES.values(), strict=True))


def test_hostile_tars_write_nothing_elsewhere_and_make_no_odd_names(tmp_path: Path) -> None:
    given = imagenet.webdataset(tmp_path / "given")
    names = ["../../outside/a", "/etc/b", "train/../../n1/c\nd", "n1/\t", "n1/e f", "n1/e_f"]
    names += ["n1/e:f", f"n1/{'long' * 70}", "../.../x/y", "n1/\udcff", "n1/?"]
    image = encode(photograph(20, 20), "JPEG")
    files = {f"{name}.jpg": image for name in names} | {f"{name}.cls": b"0" for name in names}
    write(given / "train-2.tar", tar(files))
    with tarfile.open(given / "train-2.tar", "a") as file:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
            info = tarfile.TarInfo(f"n1/special-{kind!r}.jpg")
            info.type, info.linkname = kind, "/etc/passwd"
            file.addfile(info)
    before = set(tmp_path.rglob("*"))
    out = tmp_path / "out"
    main([str(given), "--out", str(out), "--workers", "1"])
    assert {path for path in tmp_path.rglob("*") if not path.is_relative_to(out)} == before
    with tarfile.open(out / "train-00000.tar") as file:
        members = file.getmembers()
    assert len({member.name for member in members}) == len(members) == 2 * (len(names) + 12)
    for member in members:
        assert member.isreg()
        assert re.fullmatch(r"[012]/[^./][^./]*\.(jpg|png|cls)", member.name)
        assert member.name.isprintable()
        assert len(member.name) < 130


def test_errors_name_the_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"

    def message(source: Path, *words: object) -> str:
        return error_of(main, [str(source), "--out", str(out), *map(str, words)])

    assert "there is no option --sise; did you mean --size?" in message(folder, "--sise", 3)
    assert "give --crop center" in message(folder, "--format", "pixels")
    assert "is no folder with a known form of ImageNet" in message(folder)
    write(folder / "train/cat/a.JPEG", b"")
    write(folder / "val/dog/a.JPEG", b"")
    assert "classes without training images (dog)" in message(folder)
    good = imagenet.class_folders(tmp_path / "good")
    assert "is in the source" in message(good, "--out", good / "out")
    assert "has other files in it" in message(good, "--out", tmp_path)
    with exclusive_lock(out):
        assert "another command is preparing" in message(good)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 9}))
        assert "GB free: make room" in message(good)
    official = imagenet.official_tars(tmp_path / "official")
    write(official / "ILSVRC2012_img_val.tar", b"cut")
    assert "compressed, corrupt or cut short" in message(official)
    tables = imagenet.parquet(tmp_path / "tables")
    write(tables / "train-0.parquet", b"cut")
    assert "train-0.parquet is corrupt" in message(tables)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install 'alexnet-dist[prepare]'" in message(tables)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder of 120 images that are large files."""
    root = tmp_path_factory.mktemp("many")
    noise = np.random.default_rng(1).integers(0, 255, (300, 300, 3), np.uint8)
    for number in range(120):
        image = encode(Image.fromarray(np.roll(noise, number, 0)), "PNG", compress_level=0)
        write(root / f"{'train' if number < 100 else 'val'}/{number % 2}/{number}.png", image)
    return str(root)


def resume(words: list[str], out: Path) -> None:
    """Run a command that was interrupted again: ``out`` is as if it had never been."""
    reference = out.with_name("reference")
    for folder in (out, reference):
        main([*words, f"--out={folder}"])
    assert content(out) == content(reference)


@pytest.mark.slow
def test_a_killed_command_resumes_without_writing_a_shard_twice(many: str, tmp_path: Path) -> None:
    words, out = [many, "--size=200", "--shard_mb=0.3", "--workers=2"], tmp_path / "out"
    line = command(0, "alexnet_dist.prepare", *words, f"--out={out}")
    running = subprocess.Popen(line, start_new_session=True, env=environment())
    while len(list(out.glob(".partial/train-*.json"))) < 2:
        time.sleep(0.002)
    running.kill()
    running.wait()
    with contextlib.suppress(ProcessLookupError):  # until the workers have ended, too
        while True:
            os.killpg(running.pid, 0)
            time.sleep(0.05)
    tars = [out / path.with_suffix(".tar").name for path in out.glob(".partial/train-*.json")]
    before = {path: path.stat().st_mtime_ns for path in tars}
    resume(words, out)
    assert 2 <= len(before) < len(list(out.glob("*.tar")))
    assert {path: path.stat().st_mtime_ns for path in tars} == before


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["shards", "pixels"])
def test_a_full_disk_is_one_message_and_loses_nothing(kind: str, many: str, tmp_path: Path) -> None:
    words, out = [many, f"--format={kind}", "--crop=center", "--size=100"], tmp_path / "out"
    words.append("--shard_mb=0.2")
    run = shlex.join(command(0, "alexnet_dist.prepare", *words, f"--out={out}"))
    done = call(["bash", "-c", f"ulimit -f 150; {run}"])
    assert done.code == 1
    (message,) = done.said
    assert "cannot be written or read (File too large): make room" in message
    assert "Traceback" not in done.err
    resume(words, out)
