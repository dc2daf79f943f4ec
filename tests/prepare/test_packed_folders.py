"""Packed folders give training what the folder of images gives, and are refused when corrupt."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from alexnet_dist.data import build_loader
from alexnet_dist.data.corrupt_images import Batch
from alexnet_dist.data.datasets import DatasetInfo, open_datasets, scan_dataset
from alexnet_dist.data.plan import EvalPlan, SamplePlan
from alexnet_dist.data.transforms import build_normalization
from alexnet_dist.errors import UserError
from tests.conftest import write_images
from tests.prepare.packed_folder import write_prepared

KINDS = ("shards", "pixels")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("forms")
    plain = write_images(root / "plain", side=128)
    return {"plain": plain} | {kind: write_prepared(plain, root / kind, kind) for kind in KINDS}


def scan(root: Path) -> DatasetInfo:
    return scan_dataset(str(root), str(root), lambda *_: None)


def first_batches(info: DatasetInfo, loader: str, crop: str) -> list[Batch]:
    """The first training batch and the first validation batch."""
    plan = SamplePlan(info.train.sizes, 8, 1, crop_fraction=0.5, crop=crop)  # type: ignore[arg-type]
    evaluation = EvalPlan(info.val.sizes, 8, 0.5)
    normalization = build_normalization("centered", info.stats, size=64, pca_noise="source")
    train_set, val_set = open_datasets(info)
    result = []
    for dataset, of, samples in (
        (train_set, plan, plan.epoch(0, 0, slice(None))),
        (val_set, evaluation, evaluation.batches(slice(None))),
    ):
        running = build_loader(
            loader,  # type: ignore[arg-type]
            dataset,
            normalization,
            of,
            max_batch_size=8,
            device=torch.device("cpu"),
            threads=1,
        )
        batches = running.batches(samples)
        result.append(next(batches))
        batches.close()
        running.close()
    return result


@pytest.mark.parametrize("crop", ["paper", "random_resized"])
@pytest.mark.parametrize("loader", ["dali", "torch"])
def test_packed_folders_give_the_same_batches(
    loader: str, crop: str, folders: dict[str, Path]
) -> None:
    expected = first_batches(scan(folders["plain"]), loader, crop)
    for kind in KINDS:
        batches = first_batches(scan(folders[kind]), loader, crop)
        for ours, theirs in zip(batches, expected, strict=True):
            assert ours.indices.tolist() == theirs.indices.tolist()
            assert torch.equal(ours.labels, theirs.labels)
            assert torch.equal(ours.images, theirs.images)


def test_packed_folders_have_the_same_index(folders: dict[str, Path]) -> None:
    plain = scan(folders["plain"])
    for kind in KINDS:
        info = pickle.loads(pickle.dumps(scan(folders[kind])))
        assert info.dataset_hash == plain.dataset_hash
        assert info.train.classes == ["blue", "green", "red"]
        assert info.class_names["red"] == "the color red"
        for dataset, index in zip(open_datasets(info), (plain.train, plain.val), strict=True):
            sent = pickle.dumps(dataset)  # to another process
            assert len(sent) < 20_000
            dataset = pickle.loads(sent)
            assert dataset.index.names == index.names
            assert dataset.path(7).endswith(index.names[7])
            if kind == "shards":
                encoded = np.fromfile(f"{index.folder}/{index.names[7]}", np.uint8)
                assert np.array_equal(dataset.read(7), encoded)


def test_an_incomplete_packed_folder_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    def message(kind: str, name: str, content: bytes | None) -> str:
        folder = write_prepared(folders["plain"], tmp_path / f"{len([*tmp_path.iterdir()])}", kind)
        (folder / name).unlink()
        if content is not None:
            (folder / name).write_bytes(content)
        with pytest.raises(UserError, match=str(folder)) as error:
            scan(folder)
        return str(error.value)

    for kind, name in (("shards", "train-00001.tar"), ("pixels", "val.pixels")):
        assert f"{name} has 3 bytes where prepared.json says" in message(kind, name, b"cut")
        assert f"{name} cannot be read (No such file or directory)" in message(kind, name, None)
    for kind in KINDS:
        assert "run the same python -m alexnet_dist.prepare" in message(kind, "prepared.json", None)
    for name in ("prepared.json", "train.index.npz", "statistics.npz"):
        assert name in message("pixels", name, b"cut")
    other = json.dumps({"format": 2}).encode()
    assert "is of format 2, this version reads 1" in message("shards", "prepared.json", other)
    other = (folders["pixels"] / "val.index.npz").read_bytes()
    assert "31 images" in message("pixels", "train.index.npz", other)


@pytest.mark.parametrize("loader", ["dali", "torch"])
def test_a_corrupt_image_in_a_shard_is_named(
    loader: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = write_prepared(folders["plain"], tmp_path / "shards", "shards")
    _, dataset = open_datasets(scan(folder))
    _, offset, length = dataset.index.offsets[5].tolist()
    with (folder / "val-00000.tar").open("r+b") as file:
        file.seek(offset + length - 2)
        file.write(b"\0\0")
    with pytest.raises(UserError, match=r"val-00000\.tar: green/001\.jpg .*cut short"):
        first_batches(scan(folder), loader, "paper")
