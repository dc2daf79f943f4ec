"""Packed folders give training what the folder of images gives, and are refused when incomplete."""

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from alexnet_dist.data.decode import decode
from alexnet_dist.data.index import open_datasets
from tests.conftest import error_of
from tests.data.loading import scan
from tests.prepare.packed_folder import write_prepared


@pytest.mark.parametrize("kind", ["shards", "pixels"])
def test_packed_folders_give_the_same_images(kind: str, packed: dict[str, Path]) -> None:
    info, plain = pickle.loads(pickle.dumps(scan(packed[kind]))), scan(packed["jpegs"])
    assert info.dataset_hash == plain.dataset_hash
    assert info.train.classes == ["blue", "green", "red"]
    for dataset, original in zip(open_datasets(info), open_datasets(plain), strict=True):
        for index, name in enumerate(original.index.names):
            assert dataset.path(index).endswith(name)
            image = original.read(index)
            expected = image if kind == "shards" else np.asarray(decode(image))
            assert np.array_equal(dataset.read(index), expected)


def test_an_incomplete_packed_folder_is_refused(packed: dict[str, Path], tmp_path: Path) -> None:
    def message(kind: str, name: str, content: bytes | None) -> str:
        folder = write_prepared(packed["jpegs"], tmp_path / f"{len([*tmp_path.iterdir()])}", kind)
        (folder / name).unlink()
        if content is not None:
            (folder / name).write_bytes(content)
        said = error_of(scan, folder)
        assert str(folder) in said
        return said

    for kind, name in (("shards", "train-00001.tar"), ("pixels", "val.pixels")):
        assert f"{name} has 3 bytes where prepared.json says" in message(kind, name, b"cut")
        assert f"{name} cannot be read (No such file or directory)" in message(kind, name, None)
        assert "run the same python -m alexnet_dist.prepare" in message(kind, "prepared.json", None)
    for name in ("prepared.json", "train.index.npz"):
        assert name in message("pixels", name, b"cut")
    other = json.dumps({"format": 1}).encode()
    assert "is of format 1, this version reads 2" in message("shards", "prepared.json", other)
    other = (packed["pixels"] / "val.index.npz").read_bytes()
    assert "31 images" in message("pixels", "train.index.npz", other)


def test_a_corrupt_image_in_a_shard_is_named(packed: dict[str, Path], tmp_path: Path) -> None:
    folder = write_prepared(packed["jpegs"], tmp_path / "shards", "shards")
    dataset, _ = open_datasets(scan(folder))
    shard, offset, length = dataset.index.offsets[5].tolist()
    with (folder / f"train-{shard:05d}.tar").open("r+b") as file:
        file.seek(offset + length - 2)
        file.write(b"\0\0")
    with pytest.raises(OSError, match="cut short"):
        dataset.read(5)
    assert dataset.path(5) == f"{folder}/train-{shard:05d}.tar: {dataset.index.names[5]}"


def test_shards_in_use_stay_open(packed: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Though other threads, which come in between, open more of them than are kept open."""
    monkeypatch.setattr("alexnet_dist.data.packed.MAX_OPEN_FILES", 1)
    dataset, _ = open_datasets(scan(packed["shards"]))
    expected, pread = dataset.read(0), os.pread

    def late(*read: int) -> bytes:
        monkeypatch.setattr(os, "pread", pread)
        dataset.read(len(dataset.index) - 1)  # of another shard
        return pread(*read)

    monkeypatch.setattr(os, "pread", late)
    assert np.array_equal(dataset.read(0), expected)
