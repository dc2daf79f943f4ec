"""Images inside of other files: the official tars, webdataset tars, Hugging Face's parquet files.

Tars are read in place, by the offsets of their members. The images of parquet files, which have no
offsets, are copied into a scratch folder first.
"""

import contextlib
import importlib
import json
import re
import tarfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from alexnet_dist.data.folders import IMAGE_SUFFIXES, is_hidden, is_image_name
from alexnet_dist.data.index import Progress
from alexnet_dist.errors import UserError
from alexnet_dist.prepare.listing import DatasetListing, ImageEntry, write_json

_WNID = re.compile(r"n\d{8}")  # the WordNet ID of an ImageNet class
UNPAIRED = "members of samples that are not one image and a .cls of the same name up to a dot"
"""Why members of webdataset tars are left out."""

_META, _TRUTH = "data/meta.mat", "data/ILSVRC2012_validation_ground_truth.txt"


def read_official_tars(root: Path, progress: Progress) -> DatasetListing:
    """The images of ILSVRC2012_img_train.tar, with a tar for each class in it, and of
    ILSVRC2012_img_val.tar, whose classes are in the devkit.

    Raises:
        UserError: a file is missing or corrupt.
    """
    truth, class_names = _read_devkit(root)
    listing = DatasetListing(f"official tars in {root}", [], class_names)
    path = root / "ILSVRC2012_img_train.tar"
    class_tars = _members(path)
    with tarfile.open(path, "r:") as outer:
        for done, inner in enumerate(class_tars):
            progress("indexing classes", done, len(class_tars))
            if not inner.name.endswith(".tar"):
                listing.left_out.add_file(f"{path}: {inner.name}")
                continue
            label = Path(inner.name).stem
            for member in _images(path / inner.name, outer.extractfile(inner), listing):
                name, offset = Path(member.name).name, inner.offset_data + member.offset_data
                entry = ImageEntry("train", label, name, str(path), offset, member.size)
                listing.entries.append(entry)
    path = root / "ILSVRC2012_img_val.tar"
    members = sorted(_images(path, None, listing), key=lambda member: member.name)
    if len(members) != len(truth):
        raise UserError(
            f"{path} has {len(members)} images, the devkit classes of {len(truth)}: download them"
        )
    for label, member in zip(truth, members, strict=True):
        name, offset = Path(member.name).name, member.offset_data
        listing.entries.append(ImageEntry("val", label, name, str(path), offset, member.size))
    return listing


def read_webdataset(
    root: Path, splits: dict[Path, str], others: list[Path], progress: Progress
) -> DatasetListing:
    """The images of webdataset tars, but for those of ``others``.

    Raises:
        UserError: a tar is cut short or compressed, or has no classes.
    """
    listing = DatasetListing(f"webdataset tars in {root}", [])
    for done, (path, split) in enumerate(splits.items()):
        progress("indexing tars", done, len(splits))
        _read_webdataset(path, split, listing)
    for path in others:
        listing.left_out.add("tars of other splits", str(path))
    return _name_classes(listing)


def _members(path: Path, file: Any = None) -> list[tarfile.TarInfo]:
    """The regular files in a tar that are not hidden."""
    try:
        with tarfile.open(path, "r:", file) as tar:
            files = [member for member in tar if member.isreg()]
            return [file for file in files if not any(map(is_hidden, file.name.split("/")))]
    except (tarfile.TarError, EOFError) as error:
        raise UserError(
            f"{path} is compressed, corrupt or cut short ({error}): download it again, or unpack it"
        ) from None


def _images(path: Path, file: Any, listing: DatasetListing) -> Iterator[tarfile.TarInfo]:
    """The images in a tar; what else is in it is counted."""
    for member in _members(path, file):
        if is_image_name(Path(member.name).name):
            yield member
        else:
            listing.left_out.add_file(f"{path}: {member.name}")


def _read_devkit(root: Path) -> tuple[list[str], dict[str, str]]:
    """The classes of the validation images in order, and the names of all classes."""
    loadmat = _import("scipy.io").loadmat
    path = min(root.glob("ILSVRC2012_devkit*.tar.gz"), default=None)
    if path is None:
        raise UserError(f"{root} lacks the devkit: put ILSVRC2012_devkit_t12.tar.gz into it")
    try:
        with tarfile.open(path) as tar:
            content = {
                member.name.partition("/")[2]: file.read()
                for member in tar
                if (file := tar.extractfile(member))
            }
        synsets = np.atleast_1d(loadmat(BytesIO(content[_META]), squeeze_me=True)["synsets"])
        wnids = {int(synset["ILSVRC2012_ID"]): str(synset["WNID"]) for synset in synsets}
        truth = [wnids[int(line)] for line in content[_TRUTH].split()]
        return truth, {str(synset["WNID"]): str(synset["words"]) for synset in synsets}
    except Exception as error:  # of tarfile, zlib, scipy, ...: it depends on what is wrong
        raise UserError(
            f"{path} is corrupt or not ImageNet's devkit ({error}): download it again"
        ) from None


def _read_webdataset(path: Path, split: str, listing: DatasetListing) -> None:
    """Samples are members with the same name up to the first dot: an image, its class index in
    .cls, and perhaps its file name and the name of its class in .json."""
    samples: dict[str, dict[str, tuple[ImageEntry, str]]] = {}
    for member in _members(path):
        folder, slash, name = member.name.rpartition("/")
        stem, _, extension = name.partition(".")
        part = ImageEntry(split, "", stem, str(path), member.offset_data, member.size)
        sample = samples.setdefault(f"{folder}{slash}{stem}", {})
        if extension.lower() in sample:
            listing.left_out.add("members that come twice", f"{path}: {member.name}")
        else:
            sample[extension.lower()] = part, member.name
    for key, sample in samples.items():
        images = [part for e, (part, _) in sample.items() if f".{e}" in IMAGE_SUFFIXES]
        if len(images) != 1 or "cls" not in sample:
            for _, name in sample.values():
                listing.left_out.add(UNPAIRED, f"{path}: {name}")
            continue
        label = sample["cls"][0].read().tobytes().strip()
        if not label.isdigit():
            raise UserError(f"{path}: {key} has no class index in its .cls: give it one")
        facts = {}
        with contextlib.suppress(ValueError, TypeError, KeyError):
            facts = dict(json.loads(sample["json"][0].read().tobytes()))
        index = str(int(label))
        name = Path(str(facts.get("filename", images[0].name))).name
        listing.entries.append(images[0]._replace(label=index, name=name))
        if "class_name" in facts:
            listing.class_names[index] = str(facts["class_name"])


def _name_classes(listing: DatasetListing) -> DatasetListing:
    """The images with classes that are indices named by the WordNet ID in their images' names, if
    each class has one of its own; else by the index with leading zeros."""
    wnids: dict[str, set[str]] = {}
    for entry in listing.entries:
        wnids.setdefault(entry.label, set()).update(_WNID.findall(entry.name)[-1:] or [""])
    names = {label: label.zfill(len(max(wnids, key=len))) for label in wnids}
    if len(set().union(*wnids.values()) - {""}) == len(wnids) == sum(map(len, wnids.values())):
        names = {label: wnid for label, (wnid,) in wnids.items()}
    entries = [entry._replace(label=names[entry.label]) for entry in listing.entries]
    words = {names[index]: words for index, words in listing.class_names.items() if index in names}
    numbers = {name: int(index) for index, name in names.items()}
    return DatasetListing(listing.source, entries, words, numbers, listing.left_out)


def read_parquet(
    root: Path, splits: dict[Path, str], others: list[Path], scratch: Path, progress: Progress
) -> DatasetListing:
    """The images of Hugging Face's parquet files, a row each, copied into the scratch folder, but
    for those of ``others``.

    Raises:
        UserError: a file is corrupt or has other columns.
    """
    listing = DatasetListing(f"parquet files of {root}", [])
    for done, (path, split) in enumerate(splits.items()):
        progress("copying parquet files", done, len(splits))
        copy, index = (scratch / f"parquet-{done:05d}.{kind}" for kind in ("images", "json"))
        if not index.is_file():  # which is there when the copy is complete
            write_json(index, _copy_images(path, copy))
        class_names, images = json.loads(index.read_text())
        listing.class_names = {str(label): name for label, name in enumerate(class_names)}
        for name, label, offset, length in images:
            if label is None or int(label) < 0:
                listing.left_out.add("images without a class", f"{path}: {name}")
            else:
                listing.entries.append(ImageEntry(split, label, name, str(copy), offset, length))
    for path in others:
        with contextlib.suppress(Exception):  # what is wrong in it does not matter
            count = _import("pyarrow.parquet").ParquetFile(path).metadata.num_rows
            listing.left_out.add("images of other splits", str(path), count)
    return _name_classes(listing)


def _copy_images(path: Path, copy: Path) -> tuple[list[str], list[list[Any]]]:
    """Copy the images of a parquet file, one behind the other; the names of the classes, and of
    each image [name, class index, offset, length]."""
    arrow, parquet = _import("pyarrow"), _import("pyarrow.parquet")
    images: list[list[Any]] = []
    try:
        table = parquet.ParquetFile(path)
        metadata = json.loads((table.schema_arrow.metadata or {}).get(b"huggingface", b"{}"))
        features = metadata.get("info", {}).get("features", {})
        with copy.open("wb") as file:
            for batch in table.iter_batches(64, columns=["image", "label"]):
                for row in batch.to_pylist():
                    label, image = row["label"], row["image"]
                    label = None if label is None else str(int(label))
                    name = Path(image["path"] or f"{path.stem}_{len(images):08d}.jpg").name
                    images.append([name, label, file.tell(), file.write(image["bytes"])])
        return features.get("label", {}).get("names") or [], images
    except (KeyError, TypeError):
        raise UserError(
            f"{path} is not as Hugging Face stores images: it needs columns image and label"
        ) from None
    except (arrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise  # of the disk
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path} is corrupt or cut short ({reason}): download it again") from None


def _import(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(f"{module} is not installed: pip install 'alexnet-dist[prepare]'") from None
