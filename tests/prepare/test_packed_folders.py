"""Shards and raw pixels: the same samples as a folder of the prepared images, and what is said of
those that are not whole."""

import json
import multiprocessing
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from alexnet_dist.data import build_loader
from alexnet_dist.data.corrupt_images import Batch
from alexnet_dist.data.datasets import DatasetInfo, open_datasets, scan_dataset
from alexnet_dist.data.plan import EvalPlan, SamplePlan
from alexnet_dist.data.transforms import build_normalization
from alexnet_dist.errors import UserError
from tests.conftest import losses, train, write_images
from tests.prepare.packed_folder import write_prepared

CPU = torch.device("cpu")
SIDE = 128
FORMS = ("shards", "pixels")


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """JPEGs and PNGs in every form; the pixels of both are exact."""
    root = tmp_path_factory.mktemp("forms")
    plain = {"jpg": write_images(root / "jpg", side=SIDE), "png": root / "png"}
    for file in sorted(plain["jpg"].rglob("*.jpg")):
        other = plain["png"] / file.relative_to(plain["jpg"]).with_suffix(".png")
        other.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(file) as image:
            image.save(other)
    return plain | {
        f"{name} {kind}": write_prepared(folder, root / f"{name}-{kind}", kind)
        for name, folder in plain.items()
        for kind in FORMS
    }


def catalogue(root: Path) -> DatasetInfo:
    return scan_dataset(str(root), str(root), lambda *_: None)


def first_batches(found: DatasetInfo, name: str, crop: str) -> list[Batch]:
    """Training and validation images through an engine, two batches of each."""
    train_source, val_source = open_datasets(found)
    fraction = {"exact": 0.5, "whole": 1.0, "random_resized": 0.8}[crop]
    drawn = "random_resized" if crop == "random_resized" else "paper"
    plan = SamplePlan(found.train.sizes, 8, 1, crop_fraction=fraction, crop=drawn)  # type: ignore[arg-type]
    evaluation = EvalPlan(found.val.sizes, 8, fraction)
    pixels = build_normalization("centered", found.stats, size=64, pca_noise="source")
    batches: list[Batch] = []
    for source, of, draws in (
        (train_source, plan, plan.epoch(0, 0, slice(None))),
        (val_source, evaluation, evaluation.batches(slice(None))),
    ):
        engine = build_loader(
            name,  # type: ignore[arg-type]
            source,
            pixels,
            of,
            max_batch_size=8,
            device=CPU,
            threads=0 if name == "torch" and crop != "exact" else 1,
        )
        running = engine.batches(draws)
        batches += [next(running), next(running)]
        running.close()
        engine.close()
    return batches


@pytest.mark.parametrize("crop", ["exact", "whole", "random_resized"])
@pytest.mark.parametrize("engine", ["dali", "torch"])
def test_every_form_gives_the_same_batches(
    engine: str, crop: str, folders: dict[str, Path]
) -> None:
    for kind in ("jpg", "png"):
        wanted = first_batches(catalogue(folders[kind]), engine, crop)
        for form in FORMS:
            batches = first_batches(catalogue(folders[f"{kind} {form}"]), engine, crop)
            for batch, expected in zip(batches, wanted, strict=True):
                assert batch.indices.tolist() == expected.indices.tolist()
                assert torch.equal(batch.labels, expected.labels)
                assert torch.equal(batch.images, expected.images)


def test_what_is_known_of_a_prepared_folder(folders: dict[str, Path]) -> None:
    plain = catalogue(folders["jpg"])
    for kind in FORMS:
        found = catalogue(folders[f"jpg {kind}"])
        assert found.dataset_hash == plain.dataset_hash != catalogue(folders["png"]).dataset_hash
        assert found.kind == kind
        assert found.train.classes == ["blue", "green", "red"]
        assert found.class_names["red"] == "the color red"
        assert np.array_equal(found.stats.eigenvectors, plain.stats.eigenvectors)
        for source, index in zip(open_datasets(found), (plain.train, plain.val), strict=True):
            assert source.index.names == index.names
            assert source.path(7).endswith(index.names[7])
            image = np.asarray(Image.open(f"{index.folder}/{index.names[7]}"))
            if kind == "pixels":
                assert np.array_equal(source.read(7), image)
            else:
                encoded = np.fromfile(f"{index.folder}/{index.names[7]}", np.uint8)
                assert np.array_equal(source.read(7), encoded)
                with tarfile.open(source.path(7).partition(": ")[0]) as tar:
                    inside = tar.extractfile(index.names[7])
                    assert inside is not None
                    assert inside.read() == encoded.tobytes()


def read_all(sent: bytes, answer: "multiprocessing.Queue[list[int]]") -> None:
    """In another process: sum up the values of each image of the sources that were sent."""
    for source in pickle.loads(sent):
        answer.put([int(source.read(index).sum()) for index in range(len(source.index))])


def test_sources_travel_to_another_process(folders: dict[str, Path]) -> None:
    found = [pickle.loads(pickle.dumps(catalogue(folders[f"jpg {form}"]))) for form in FORMS]
    sources = [source for one in found for source in open_datasets(one)]
    sent = pickle.dumps(sources)
    assert len(sent) < 20_000  # where the images lie, and not the images
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    process = context.Process(target=read_all, args=(sent, answer))
    process.start()
    for source in sources:
        sums = [int(source.read(index).sum()) for index in range(len(source.index))]
        assert answer.get(timeout=120) == sums
    process.join(60)


def changed(folder: Path, **facts: object) -> None:
    record = json.loads((folder / "prepared.json").read_text())
    (folder / "prepared.json").write_text(json.dumps(record | facts))


def test_what_is_wrong_with_a_prepared_folder_is_said(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    def sentence(form: str, spoil: object) -> str:
        folder = write_prepared(folders["jpg"], tmp_path / str(len(list(tmp_path.iterdir()))), form)
        spoil(folder)  # type: ignore[operator]
        with pytest.raises(UserError) as failure:
            catalogue(folder)
        assert str(folder) in str(failure.value)
        return str(failure.value)

    def cut(name: str) -> object:
        return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-2])

    for form, file in (("shards", "train-00001.tar"), ("shards", "val-00000.tar")):
        said = sentence(form, cut(file))
        assert f"{file} has " in said
        assert "copy it again" in said
    assert "val.pixels has 638,974 bytes where prepared.json says 638,976" in sentence(
        "pixels", cut("val.pixels")
    )
    gone = sentence("shards", lambda folder: (folder / "train-00000.tar").unlink())
    assert "train-00000.tar cannot be read (No such file or directory): copy it again" in gone
    for form in FORMS:
        ended = sentence(form, lambda folder: (folder / "prepared.json").unlink())
        assert "did not finish: run the same python -m alexnet_dist.prepare again" in ended
    future = sentence("shards", lambda folder: changed(folder, format=2))
    assert "is of format 2, this version reads 1: take the version" in future
    for file in ("prepared.json", "train.index.npz", "statistics.npz"):
        assert f"{file} is corrupt" in sentence("pixels", cut(file))
    other = sentence(
        "pixels", lambda folder: (folder / "val.index.npz").replace(folder / "train.index.npz")
    )
    assert "not of the 31 images" in other


@pytest.mark.parametrize("engine", ["dali", "torch"])
def test_a_bad_image_in_a_shard_is_named(
    engine: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = write_prepared(folders["jpg"], tmp_path / "shards", "shards")
    _, source = open_datasets(catalogue(folder))
    shard, offset, length = source.index.offsets[5].tolist()
    with (folder / f"val-{shard:05d}.tar").open("r+b") as file:
        file.seek(offset + length - 2)
        file.write(b"\0\0")
    named = rf"val-0000{shard}\.tar: green/001\.jpg cannot be decoded .*cut short"
    with pytest.raises(UserError, match=named):
        first_batches(catalogue(folder), engine, "exact")


@pytest.mark.slow
def test_a_run_goes_on_from_another_form(tmp_path: Path) -> None:
    plain = write_images(tmp_path / "plain")
    train(0, plain, tmp_path / "one", "--train.max_steps=2")
    for step, kind in enumerate(FORMS, 1):
        root = write_prepared(plain, tmp_path / kind, kind)
        train(0, root, tmp_path / "other", f"--train.max_steps={step}")
    assert losses(tmp_path / "one" / "run") == losses(tmp_path / "other" / "run")
