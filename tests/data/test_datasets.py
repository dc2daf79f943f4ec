"""Folders, their index, and what is said of those that are not as they should be."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from alexnet_dist.data import datasets, statistics
from alexnet_dist.data.corrupt_images import CorruptImagePolicy
from alexnet_dist.data.datasets import DatasetInfo, FolderDataset, open_datasets, scan_dataset
from alexnet_dist.errors import UserError
from tests.conftest import write_images


def quiet(*_: object) -> None:
    pass


def catalogue(root: Path, cache: Path) -> DatasetInfo:
    return scan_dataset(str(root), str(cache), quiet)


def test_what_an_index_knows(images: Path, tmp_path: Path) -> None:
    found = catalogue(images, tmp_path)
    assert (len(found.train), len(found.val)) == (31, 13)
    assert found.train.classes == ["blue", "green", "red"]
    assert found.train.labels.tolist() == [0] * 11 + [1] * 10 + [2] * 10
    assert (found.train.sizes == 76).all()
    train, val = open_datasets(found)
    assert train.path(0).endswith("train/blue/000.jpg")
    assert bytes(val.read(12)[:2]) == b"\xff\xd8"


def test_the_index_is_made_once_and_anew_when_the_folder_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_images(tmp_path / "i")
    first = catalogue(root, tmp_path)
    scans: list[Path] = []
    scan = datasets._scan
    monkeypatch.setattr(datasets, "_scan", lambda s, *a: scans.append(s) or scan(s, *a))
    assert catalogue(root, tmp_path).dataset_hash == first.dataset_hash
    assert not scans
    (root / "train/red/002.jpg").unlink()
    assert len(catalogue(root, tmp_path).train) == 30
    assert scans == [root / "train"]


@pytest.mark.parametrize("left", [0, 100, -30])
def test_a_damaged_index_is_made_anew(left: int, tmp_path: Path) -> None:
    root = write_images(tmp_path / "i")
    first = catalogue(root, tmp_path)
    for kept in (root / ".alexnet_dist").glob("*.npz"):
        kept.write_bytes(kept.read_bytes()[:left])
    assert catalogue(root, tmp_path).dataset_hash == first.dataset_hash


def test_the_index_of_a_read_only_folder_lies_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_images(tmp_path / "i")
    make = Path.mkdir

    def refuse(self: Path, *args: object, **options: object) -> None:
        if self.is_relative_to(root):  # whatever the rights of who runs the test
            raise PermissionError(13, "Permission denied")
        make(self, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "mkdir", refuse)
    catalogue(root, tmp_path / "cache")
    assert not (root / ".alexnet_dist").exists()
    kept = sorted(p.name for p in (tmp_path / "cache").rglob("*.npz"))
    assert kept == ["statistics.npz", "train.npz", "val.npz"]
    monkeypatch.setattr(datasets, "_scan", None)
    assert len(catalogue(root, tmp_path / "cache").train) == 31


def test_test_is_as_good_a_name_as_val(tmp_path: Path) -> None:
    root = write_images(tmp_path / "i")
    (root / "val").rename(root / "test")
    assert len(catalogue(root, tmp_path).val) == 13


def test_what_is_wrong_with_a_folder_is_said(tmp_path: Path) -> None:
    def sentence(root: Path) -> str:
        with pytest.raises(UserError) as failure:
            catalogue(root, tmp_path / "cache")
        return str(failure.value)

    assert "there is no folder" in sentence(tmp_path / "nowhere")
    root = tmp_path / "i"
    root.mkdir()
    assert "has no folder train/" in sentence(root)
    (root / "train").mkdir()
    assert "has no folders in it" in sentence(root)
    (root / "train/a").mkdir()
    assert "no images" in sentence(root)
    shutil.rmtree(root)
    write_images(root)
    (root / "val/red").rename(root / "val/rouge")
    assert "differ (red, rouge)" in sentence(root)
    shutil.rmtree(root / "val")
    assert "has no folder val/ or test/" in sentence(root)


def test_an_unreadable_header_is_named_at_the_start(tmp_path: Path) -> None:
    root = write_images(tmp_path / "i")
    (root / "train/red/002.jpg").write_bytes(b"no image")
    source = FolderDataset(catalogue(root, tmp_path).train)
    with pytest.raises(UserError, match=r"train/red/002\.jpg cannot be decoded"):
        CorruptImagePolicy(source, "stop")
    assert list(CorruptImagePolicy(source, "substitute").errors) == [21]


def test_statistics_against_numpy(images: Path, tmp_path: Path) -> None:
    found = catalogue(images, tmp_path)
    pixels = [
        np.asarray(Image.open(f"{found.train.folder}/{n}"), np.float64).reshape(-1, 3)
        for n in found.train.names
    ]
    together = np.concatenate(pixels)
    ours = found.stats
    assert np.allclose(ours.mean, together.mean(0))
    covariance = np.cov(together.T, bias=True)
    rebuilt = ours.eigenvectors @ np.diag(ours.eigenvalues) @ ours.eigenvectors.T
    assert np.allclose(rebuilt, covariance)
    assert (np.diff(ours.eigenvalues) <= 0).all()
    record = statistics.ChannelStats.from_json(ours.to_json())
    assert np.array_equal(record.eigenvectors, ours.eigenvectors)


def test_cifar10s_own_files(tmp_path: Path) -> None:
    import hashlib
    import pickle

    from torchvision.datasets import CIFAR10

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
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CIFAR10, "train_list", lists[:5])
        patch.setattr(CIFAR10, "test_list", lists[5:])
        patch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": hashlib.md5(meta).hexdigest()})
        found = catalogue(tmp_path, tmp_path / "cache")
        train, val = open_datasets(found)
        wanted = CIFAR10(str(tmp_path), train=True)
    assert (len(found.train), len(found.val)) == (20, 4)
    for index in (0, 19):
        assert np.array_equal(train.read(index), wanted.data[index])
    pixels = wanted.data.reshape(-1, 3).astype(np.float64)
    assert np.allclose(found.stats.mean, pixels.mean(0))
    assert val.index.labels.tolist() == [0, 1, 2, 3]
