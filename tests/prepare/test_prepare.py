"""What the command writes, and what a kill, a full disk or a corrupt file leave."""

import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import time
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from alexnet_dist.data.formats import decode, validate_bytes
from alexnet_dist.errors import UserError
from alexnet_dist.prepare import shards
from alexnet_dist.prepare.__main__ import exclusive_lock, main
from alexnet_dist.prepare.images import OutputFormat, resize_image
from alexnet_dist.prepare.sources import discover_dataset
from tests.conftest import command, environment
from tests.data.corrupt_images import corrupt_files, encode, odd_images, photograph
from tests.prepare.imagenet import CLASSES, IMAGES, class_folders, official_tars, parquet, write

FORM = OutputFormat("shards", 48, "none", 95)
OPTIONS = ["--size=48", "--shard_mb=0.01"]
CORRUPT = ["n01440764_3", "n02102040_1"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that holds ``in`` and, made of it by one worker and by four, ``one``, ``four``."""
    root = tmp_path_factory.mktemp("prepared")
    class_folders(root / "in")
    write(root / "in/train/n01440764/n01440764_3.JPEG", b"no image")
    cut = root / "in/train/n02102040/n02102040_1.JPEG"
    cut.write_bytes(cut.read_bytes()[:900])
    for name, workers in (("one", 1), ("four", 4)):
        main([f"{root}/in", f"--out={root / name}", *OPTIONS, f"--workers={workers}"])
    return root


def read_index(out: Path, split: str) -> tuple[list[str], dict[str, np.ndarray]]:
    index = dict(np.load(out / f"{split}.index.npz"))
    return index["names"].tobytes().decode().split("\n"), index


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
    assert facts["classes"] == list(CLASSES)
    for split, count in (("train", 10), ("val", 6)):
        names, index = read_index(out, split)
        members = {}
        tars = [out / file["name"] for file in facts["splits"][split]["files"]]
        for path in tars:
            with tarfile.open(path) as tar:
                members |= {m.name: tar.extractfile(m).read() for m in tar}  # type: ignore[union-attr]
        images = [name for name in members if not name.endswith(".cls")]
        assert facts["splits"][split]["images"] == len(names) == count
        assert names == sorted(images) != images  # shuffled in the shards
        for row, name in enumerate(names):
            start, length = index["offsets"][row], index["lengths"][row]
            found = tars[index["shards"][row]].read_bytes()[start : start + length]
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
    with pytest.raises(UserError, match=r"cannot be decoded .*--on_corrupt_image skip"):
        main([f"{prepared}/in", f"--out={prepared}/stop", "--on_corrupt_image=stop"])


def test_statistics_against_numpy(prepared: Path) -> None:
    values, weights = [], []
    for (split, _, name), data in IMAGES.items():
        if split == "train" and Path(name).stem not in CORRUPT:
            pixels, *_ = resize_image(np.frombuffer(data, np.uint8), FORM)
            side = min(pixels.shape[:2])
            top, left = ((length - side) // 2 for length in pixels.shape[:2])
            values.append(pixels[top : top + side, left : left + side].reshape(-1, 3).astype(float))
            weights.append(np.full(side**2, 1 / side**2))
    all_values, all_weights = np.concatenate(values), np.concatenate(weights)
    ours = dict(np.load(prepared / "one/statistics.npz"))
    assert np.allclose(ours["mean"], np.average(all_values, 0, all_weights))
    rebuilt = ours["eigenvectors"] @ np.diag(ours["eigenvalues"]) @ ours["eigenvectors"].T
    assert np.allclose(rebuilt, np.cov(all_values.T, ddof=0, aweights=all_weights))


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
    form = OutputFormat("pixels", 64, "center", 95)
    for split, count in (("train", 10), ("val", 6)):
        array = np.fromfile(out / f"{split}.pixels", np.uint8).reshape(-1, 64, 64, 3)
        names, index = read_index(out, split)
        assert len(names) == len(set(index["rows"])) == count
        for name, row in zip(names, index["rows"], strict=True):
            assert np.array_equal(array[row], resize_image(source_of(split, name), form)[0])


def test_a_finished_folder_is_kept(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = content(prepared / "one")
    words = [f"{prepared}/in", f"--out={prepared}/one", "--shard_mb=0.01"]
    main([*words, "--size=48"])
    assert "is already prepared" in capsys.readouterr().out
    with pytest.raises(UserError, match="was made with size 48, not 32: give another --out"):
        main([*words, "--size=32"])
    assert content(prepared / "one") == before


def test_a_damaged_shard_is_found_when_read_back(tmp_path: Path) -> None:
    listing = discover_dataset(class_folders(tmp_path / "in"), tmp_path, lambda *_: None)
    (tmp_path / "out/.partial").mkdir(parents=True)
    job = next(shards.plan_jobs(tmp_path / "out", listing, FORM, 5))
    shards.write_shard("skip", job)
    shards.verify_shard(job)
    data = bytearray(job.path.read_bytes())
    data[len(data) // 2] ^= 1
    job.path.write_bytes(data)
    with pytest.raises(UserError, match="does not read back as it was written"):
        shards.verify_shard(job)
    assert not job.record.exists()


def test_errors_name_the_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def message(*words: object) -> str:
        with pytest.raises(UserError) as error:
            main([str(word) for word in words])
        return str(error.value)

    folder, out = tmp_path / "in", tmp_path / "out"
    assert "there is no option --sise; did you mean --size?" in message("x", "--sise", "3")
    assert "--size must be from 8 to 4096" in message("x", "--out", out, "--size", 4)
    assert "give --crop center" in message("x", "--out", out, "--format", "pixels")
    assert "is no folder with a known form of ImageNet" in message("nowhere", "--out", out)
    write(folder / "train/cat/a.JPEG", b"")
    assert "has no validation images" in message(folder, "--out", out)
    write(folder / "val/b.JPEG", b"")
    assert "put Kaggle's LOC_val_solution.csv into" in message(folder, "--out", out)
    (folder / "val/b.JPEG").unlink()
    write(folder / "val/dog/a.JPEG", b"")
    assert "classes without training images (dog)" in message(folder, "--out", out)
    class_folders(folder)
    assert "is in the source" in message(folder, "--out", folder / "out")
    assert "has other files in it" in message(folder, "--out", tmp_path)
    write(tmp_path / "file", b"")
    assert "cannot be written" in message(folder, "--out", tmp_path / "file/out")
    with exclusive_lock(tmp_path / "held"):
        assert "another command is preparing" in message(folder, "--out", tmp_path / "held")
    (folder / "val/dog/a.JPEG").unlink()
    (folder / "val/dog").rmdir()
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 9}))
        assert "GB free: make room" in message(folder, "--out", tmp_path / "full")
    official = official_tars(tmp_path / "official")
    cut = official / "ILSVRC2012_img_train.tar"
    cut.write_bytes(cut.read_bytes()[:9000])
    assert "corrupt or cut short" in message(official, "--out", out)
    write(official / "ILSVRC2012_devkit_t12/data/meta.mat", b"no matrix")
    assert "not ImageNet's devkit" in message(official, "--out", out)
    tables = parquet(tmp_path / "tables")
    (tables / "train-00000-of-00002.parquet").write_bytes(b"no table")
    assert "train-00000-of-00002.parquet is corrupt" in message(tables, "--out", out)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install 'alexnet-dist[prepare]'" in message(tables, "--out", out)


def many_images(root: Path) -> Path:
    noise = np.random.default_rng(1).integers(0, 255, (300, 300, 3), np.uint8)
    for number in range(120):
        buffer = BytesIO()
        Image.fromarray(np.roll(noise, number, 0)).save(buffer, "PNG", compress_level=0)
        split = "train" if number < 100 else "val"
        write(root / f"{split}/{number % 2}/{number:03d}.png", buffer.getvalue())
    return root


@pytest.mark.slow
def test_a_killed_command_resumes_without_writing_a_shard_twice(tmp_path: Path) -> None:
    source, out = many_images(tmp_path / "in"), tmp_path / "out"
    words = [f"{source}", "--size=200", "--shard_mb=0.3", "--workers=2"]
    running = subprocess.Popen(
        command(0, "alexnet_dist.prepare", *words, f"--out={out}"),
        start_new_session=True,
        env=environment(),
    )
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
    main([*words, f"--out={tmp_path}/reference"])
    assert 2 <= len(before) < len(list((tmp_path / "reference").glob("*.tar")))
    main([*words, f"--out={out}"])
    assert {path: path.stat().st_mtime_ns for path in tars} == before
    assert content(out) == content(tmp_path / "reference")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["shards", "pixels"])
def test_a_full_disk_is_one_error_message_and_loses_nothing(kind: str, tmp_path: Path) -> None:
    source, out = many_images(tmp_path / "in"), tmp_path / "out"
    words = [f"{source}", f"--format={kind}", "--crop=center", "--size=100", "--shard_mb=0.2"]
    shell = (
        f"ulimit -f 150; exec {shlex.join(command(0, 'alexnet_dist.prepare', *words))} --out={out}"
    )
    done = subprocess.run(
        ["bash", "-c", shell], capture_output=True, text=True, env=environment(), check=False
    )
    assert done.returncode == 1
    assert done.stderr.count("alexnet_dist: ") == 1
    assert "cannot be written or read (File too large): make room" in done.stderr
    assert "Traceback" not in done.stderr
    main([*words, f"--out={out}"])
    main([*words, f"--out={tmp_path}/reference"])
    assert content(out) == content(tmp_path / "reference")
