"""Class folders, their cached index, CIFAR-10, statistics; and what is said of corrupt folders."""

import hashlib
import pickle
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import CIFAR10

from alexnet_dist.data import index as datasets
from alexnet_dist.data.index import open_datasets
from alexnet_dist.data.statistics import ChannelStats
from tests.conftest import error_of, write_images
from tests.data.corrupt_images import corrupt_files, encode, photograph, write_folder
from tests.data.loading import scan


def test_index_is_kept_until_files_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_images(tmp_path / "i")
    (root / "train/red/a\nb.jpg").write_bytes((root / "train/red/002.jpg").read_bytes())
    (root / "val").rename(root / "test")  # as good a name as val
    paths: list[Path] = []
    read_size = datasets.read_size
    monkeypatch.setattr(datasets, "read_size", lambda p: paths.append(p) or read_size(p))
    first = scan(root, tmp_path)
    assert len(paths) == 32 + 13
    paths.clear()
    again = scan(root, tmp_path)
    assert again.dataset_hash == first.dataset_hash
    assert again.train.names == first.train.names
    assert "red/a\nb.jpg" in again.train.names
    assert paths == again.warnings == []
    (root / "train/red/002.jpg").unlink()
    photograph(30, 40).save(root / "train/blue/000.jpg")  # in place
    third = scan(root, tmp_path)
    assert len(third.train) == 31
    assert third.train.sizes[0].tolist() == [30, 40]
    assert paths == [root / "train/blue/000.jpg"]
    assert len(third.warnings) == 1
    assert third.warnings[0].endswith("as blue/000.jpg: the index is renewed")
    assert not np.array_equal(third.stats.mean, first.stats.mean)


@pytest.mark.parametrize("left", [0, -30])
def test_a_corrupt_index_is_made_again(left: int, tmp_path: Path) -> None:
    root = write_images(tmp_path / "i")
    first = scan(root, tmp_path)
    for cached in (tmp_path / "indexes").rglob("*.npz"):
        cached.write_bytes(cached.read_bytes()[:left])
    assert scan(root, tmp_path).dataset_hash == first.dataset_hash


def test_a_full_disk_leaves_no_piece_of_a_cache(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: str, **_: object) -> None:
        raise OSError(28, "No space left on device", Path(path).write_bytes(b"half"))

    monkeypatch.setattr(np, "savez", full)
    info = scan(images, tmp_path)
    assert len(info.train) == 31
    assert "give another --data.cache_dir" in info.warnings[0]
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_folders_that_are_laid_out_otherwise_are_refused(tmp_path: Path) -> None:
    message = partial(error_of, partial(scan, cache=tmp_path / "cache"))
    assert "there is no folder" in message(tmp_path / "nowhere")
    root = tmp_path / "i"
    root.mkdir()
    assert "has no folder train/" in message(root)
    (root / "val").mkdir()
    (root / "train").mkdir()
    assert "in folders of it: it wants one for each class" in message(root)
    (root / "train/a").mkdir()
    assert "has no images (.bmp, .jfif, .jpeg" in message(root)
    shutil.rmtree(root)
    write_images(root)
    (root / "val/red").rename(root / "val/rouge")
    assert "differ (red, rouge)" in message(root)
    assert f"give --data.root {root}" in message(tmp_path)


def test_statistics_are_numpys(images: Path, tmp_path: Path) -> None:
    info = scan(images, tmp_path)
    files = (f"{info.train.folder}/{name}" for name in info.train.names)
    together = np.concatenate([np.asarray(Image.open(f), float).reshape(-1, 3) for f in files])
    ours = info.stats
    assert np.allclose(ours.mean, together.mean(0))
    covariance = np.cov(together.T, bias=True)
    rebuilt = ours.eigenvectors @ np.diag(ours.eigenvalues) @ ours.eigenvectors.T
    assert np.allclose(rebuilt, covariance)
    assert (np.diff(ours.eigenvalues) <= 0).all()
    record = ChannelStats.from_json(ours.to_json())
    assert np.array_equal(record.eigenvectors, ours.eigenvectors)


def test_statistics_skip_corrupt_images(tmp_path: Path) -> None:
    contents = corrupt_files()
    contents.pop("no file any more")
    write_folder(tmp_path / "corrupt", contents)
    write_folder(tmp_path / "good", {"one": encode(photograph(), "JPEG", quality=90)})
    ours, wanted = (scan(tmp_path / name, tmp_path).stats for name in ("corrupt", "good"))
    assert np.allclose(ours.mean, wanted.mean)
    assert np.allclose(ours.eigenvalues, wanted.eigenvalues)


def test_cifar10s_own_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    generator = np.random.default_rng(0)
    lists = []
    for name in [f"data_batch_{n}" for n in range(1, 6)] + ["test_batch"]:
        pixels = generator.integers(0, 255, (4, 3072), np.uint8)
        content = pickle.dumps({"data": pixels, "labels": [0, 1, 2, 3]})
        (folder / name).write_bytes(content)
        lists.append([name, hashlib.md5(content).hexdigest()])
    meta = pickle.dumps({"label_names": [f"c{n}" for n in range(10)]})
    (folder / "batches.meta").write_bytes(meta)
    monkeypatch.setattr(CIFAR10, "train_list", lists[:5])
    monkeypatch.setattr(CIFAR10, "test_list", lists[5:])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": hashlib.md5(meta).hexdigest()})
    found = scan(tmp_path, tmp_path / "cache")
    train, val = open_datasets(found)
    wanted = CIFAR10(str(tmp_path), train=True)
    assert (len(found.train), len(found.val)) == (20, 4)
    for index in (0, 19):
        assert np.array_equal(train.read(index), wanted.data[index])
    pixels = wanted.data.reshape(-1, 3).astype(np.float64)
    assert np.allclose(found.stats.mean, pixels.mean(0))
    assert val.index.labels.tolist() == [0, 1, 2, 3]
