"""Images inside of other files: the official tars, webdataset tars, Hugging Face's parquet files.

Tars are read in place, by the offsets of their members. The images of parquet files, which have no
offsets, are copied into a scratch folder first.
"""

import contextlib
import hashlib
import json
import re
import tarfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from alexnet_dist.data.sources import IMAGES, Progress, is_image_name
from alexnet_dist.errors import UserError
from alexnet_dist.prepare.files import check_free_space, write_json
from alexnet_dist.prepare.listing import WNID, DatasetListing, ImageEntry, assign_splits

_VAL_IMAGE = re.compile(r"ILSVRC2012_val_(\d{8})")
_META, _TRUTH = "data/meta.mat", "data/ILSVRC2012_validation_ground_truth.txt"


class _NumericLabelEntry(NamedTuple):
    """An image whose class is an index, the WordNet ID in its name or "", and its class in words or
    ""."""

    entry: ImageEntry
    label: int
    wnid: str
    words: str


def read_tars(paths: list[Path], progress: Progress) -> DatasetListing:
    """The images of the official tars, or of webdataset tars.

    Raises:
        UserError: a tar is cut short, compressed, or neither.
    """
    entries: list[ImageEntry] = []
    numeric: list[_NumericLabelEntry] = []
    class_names: dict[str, str] = {}
    for done, (path, split) in enumerate(assign_splits(paths).items()):
        progress("indexing tars", done, len(paths))
        members = _members(path)
        names = [Path(member.name) for member in members]
        if any(name.suffix == ".cls" for name in names):
            numeric += _read_webdataset(path, split, members)
        elif any(name.suffix == ".tar" and WNID.fullmatch(name.stem) for name in names):
            entries += _read_official_train(path, members, progress)
        elif any(_VAL_IMAGE.match(name.name) for name in names):
            truth, class_names = _read_devkit(path)
            entries += _read_official_val(path, members, truth)
        else:
            raise UserError(
                f"{path} is neither one of ImageNet's official tars nor a webdataset shard with a "
                ".cls for each image: unpack it, and give the folder"
            )
    labelled, words = _resolve_class_names(numeric)
    kind = "webdataset tars" if numeric else "official tars"
    where = paths[0] if len(paths) == 1 else paths[0].parent
    return DatasetListing(f"{kind} in {where}", entries + labelled, class_names | words)


def _members(path: Path, file: Any = None) -> list[tarfile.TarInfo]:
    """The regular files in a tar."""
    try:
        with tarfile.open(path, "r:", file) as tar:
            return [member for member in tar if member.isreg()]
    except (tarfile.TarError, EOFError) as error:
        raise UserError(
            f"{path} is compressed, corrupt or cut short ({error}): download it again, or unpack it"
        ) from None


def _read_official_train(
    path: Path, members: list[tarfile.TarInfo], progress: Progress
) -> Iterator[ImageEntry]:
    """A tar of one tar for each class."""
    with tarfile.open(path, "r:") as outer:
        for done, inner in enumerate(members):
            progress("indexing classes", done, len(members))
            for member in _members(path / inner.name, outer.extractfile(inner)):
                label, name = Path(inner.name).stem, Path(member.name).name
                offset = inner.offset_data + member.offset_data
                if is_image_name(name):
                    yield ImageEntry("train", label, name, str(path), offset, member.size)


def _read_official_val(
    path: Path, members: list[tarfile.TarInfo], truth: list[str]
) -> Iterator[ImageEntry]:
    for member in members:
        name = Path(member.name).name
        if found := _VAL_IMAGE.match(name):
            number = int(found[1])
            if not 1 <= number <= len(truth):
                raise UserError(f"the devkit has no class for {name}: download it again")
            label = truth[number - 1]
            yield ImageEntry("val", label, name, str(path), member.offset_data, member.size)


def _read_devkit(val_tar: Path) -> tuple[list[str], dict[str, str]]:
    """The classes of the validation images in order, and the names of all classes, from the folder
    or tar.gz of the devkit beside their tar."""
    try:
        from scipy.io import loadmat
    except ImportError:
        raise _not_installed("The devkit's table of classes", "scipy") from None
    path = min(val_tar.parent.glob("ILSVRC2012_devkit*"), default=None)
    if path is None:
        raise UserError(
            f"{val_tar} has images without classes: put the devkit, ILSVRC2012_devkit_t12.tar.gz, "
            "beside it"
        )
    try:
        if path.is_dir():
            content = {name: (path / name).read_bytes() for name in (_META, _TRUTH)}
        else:
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


def _read_webdataset(
    path: Path, split: str, members: list[tarfile.TarInfo]
) -> Iterator[_NumericLabelEntry]:
    """Samples are members with the same name up to the first dot: an image, its label in .cls, and
    the name of its class perhaps in .json or .txt."""
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    for member in members:
        folder, slash, name = member.name.rpartition("/")
        stem, _, extension = name.partition(".")
        samples.setdefault(f"{folder}{slash}{stem}", {})[extension.lower()] = member
    for key, sample in samples.items():
        extension = next((e for e in sample if f".{e}" in IMAGES), "")
        if not extension:
            continue
        at = {e: (str(path), member.offset_data, member.size) for e, member in sample.items()}
        text = {
            e: bytes(ImageEntry("", "", "", *at[e]).read()).decode(errors="replace").strip()
            for e in ("cls", "json", "txt")
            if e in sample
        }
        if not text.get("cls", "").isdecimal():
            raise UserError(f"{path}: {key} has no class index in a .cls: give it one")
        facts = {}
        with contextlib.suppress(ValueError, TypeError):
            facts = dict(json.loads(text.get("json", "")))
        full_name = str(facts.get("filename") or f"{key}.{extension}")
        words = str(facts.get("class_name") or facts.get("classname") or text.get("txt", ""))
        entry = ImageEntry(split, "", Path(full_name).name, *at[extension])
        yield _NumericLabelEntry(entry, int(text["cls"]), _find_wnid(full_name), words)


def _find_wnid(name: str) -> str:
    return (WNID.findall(name) or [""])[-1]


def _resolve_class_names(
    images: list[_NumericLabelEntry],
) -> tuple[list[ImageEntry], dict[str, str]]:
    """The entries with names of classes in the place of indices, and the classes in words.

    A class is called by the WordNet ID in its images' names, if each class has one of its own; else
    by its words; else by its index, with leading zeros, so that sorting keeps the order.
    """
    labels = {image.label for image in images}
    digits = len(str(max(labels, default=0)))
    names = {label: f"{label:0{digits}d}" for label in labels}
    for pairs in (
        {(image.label, image.wnid) for image in images},
        {(image.label, image.words) for image in images},
    ):
        found = {name for _, name in pairs} - {""}
        if len(pairs) == len(labels) == len(found):
            names = dict(pairs)
            break
    words = {names[image.label]: image.words for image in images if image.words}
    return [image.entry._replace(label=names[image.label]) for image in images], words


def read_parquet(paths: list[Path], scratch: Path, progress: Progress) -> DatasetListing:
    """The images of Hugging Face's parquet files, a row each, copied into the scratch folder.

    Raises:
        UserError: a file is corrupt or has other columns; or there is no room for the copies.
    """
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        raise _not_installed("A parquet file", "pyarrow") from None
    images: list[_NumericLabelEntry] = []
    splits = assign_splits(paths)
    indexes = {path: _copy_index(path, scratch) for path in splits}
    missing = [path for path, index in indexes.items() if not index.is_file()]
    size = sum(path.stat().st_size for path in missing)
    check_free_space(scratch, size, "a copy of the parquet files' images")
    for done, (path, index) in enumerate(indexes.items()):
        progress("copying parquet files", done, len(indexes))
        copy = index.with_suffix(".images")
        if path in missing:
            write_json(index, _copy_images(path, copy))
        for name, label, words, offset, length in json.loads(index.read_text()):
            entry = ImageEntry(splits[path], "", name, str(copy), offset, length)
            images.append(_NumericLabelEntry(entry, label, _find_wnid(name), words))
    entries, class_names = _resolve_class_names(images)
    where = paths[0] if len(paths) == 1 else paths[0].parent
    return DatasetListing(f"parquet files of {where}", entries, class_names)


def _copy_index(path: Path, scratch: Path) -> Path:
    """The index of a file's copy, under a name that changes with the file."""
    key = f"{path.absolute()} {path.stat().st_mtime_ns}"
    return scratch / f"parquet-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def _copy_images(path: Path, copy: Path) -> list[list[Any]]:
    """Copy the images of a parquet file, one behind the other; their index as rows of [name, label,
    words, offset, length]."""
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    index: list[list[Any]] = []
    try:
        table = ParquetFile(path)
        metadata = json.loads((table.schema_arrow.metadata or {}).get(b"huggingface", b"{}"))
        features = metadata.get("info", {}).get("features", {})
        words = features.get("label", {}).get("names") or []
        with copy.open("wb") as file:
            for batch in table.iter_batches(64, columns=["image", "label"]):
                for row in batch.to_pylist():
                    label, image = row["label"], row["image"]
                    name = Path(image["path"] or f"{path.stem}_{len(index):08d}.jpg").name
                    if label is None or label < 0:
                        raise UserError(f"{path}: {name} has no class: remove it from the data set")
                    known = words[label] if label < len(words) else ""
                    index.append([name, label, known, file.tell(), file.write(image["bytes"])])
    except (KeyError, TypeError):
        raise UserError(
            f"{path} is not as Hugging Face stores images: it needs a column image (a struct of "
            "bytes and path) and a column label (an integer)"
        ) from None
    except (ArrowException, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path} is corrupt or cut short ({reason}): download it again") from None
    return index


def _not_installed(what: str, package: str) -> UserError:
    return UserError(
        f"{what} is read with {package}, which is not installed: "
        "pip install 'alexnet-dist[prepare]'"
    )
