"""ImageNet as people have it: which images there are, and where the bytes of each lie.

Whatever it comes in, an image is a stretch of bytes in a file, or a whole file: any process can
read any of them in any order. Tars are indexed by their headers and never unpacked. What has no
such stretches, compressed tars, parquet files and CIFAR-10's own, is copied into a scratch folder.
"""

import bz2
import csv
import gzip
import hashlib
import json
import lzma
import os
import pickle
import re
import shutil
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from alexnet_dist.data.sources import IMAGES, Progress
from alexnet_dist.errors import Failure

WHOLE = -1
"""The length of an image that is a file of its own."""

_FORMS = (
    "the official tars (ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and the devkit), "
    "train/CLASS/ and val/CLASS/ (or only CLASS/), Kaggle's ILSVRC/Data/CLS-LOC/, parquet files "
    "(train-*.parquet), tars of class folders or of webdataset, cifar-10-batches-py/"
)
_WNID = re.compile(r"n\d{8}")
_VAL_IMAGE = re.compile(r"ILSVRC2012_val_(\d{8})")
_SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_TARS = (".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz")
_PACKERS: dict[bytes, Callable[..., Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZ": bz2.open,
    b"\xfd7": lzma.open,
}
_MEAN_TO_PICKLE = {  # what CIFAR-10's files are made of; a pickle may name anything else, too
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("_codecs", "encode"),
}


class Sample(NamedTuple):
    """An image: its split ("train", "val"), class and file name as they are written out, and where
    its bytes lie."""

    split: str
    label: str
    name: str
    file: str
    offset: int
    length: int


@dataclass
class Listing:
    """What was found.

    Attributes:
        source: what it is, in words.
        samples: all images, sorted by split, class and name.
        class_names: classes in words, where they are known.
    """

    source: str
    samples: list[Sample]
    class_names: dict[str, str] = field(default_factory=dict)

    def digest(self) -> str:
        """Which images there are, wherever they lie."""
        digest = hashlib.sha256()
        for split, label, name, _, offset, length in self.samples:
            digest.update(f"{split}/{label}/{name}:{offset}:{length}\n".encode())
        return digest.hexdigest()


def read(sample: Sample) -> NDArray[np.uint8]:
    """The encoded bytes of an image.

    Raises:
        OSError: with a reason and no errno, where the file ends too early; else as open() does.
    """
    if sample.length == WHOLE:
        return np.fromfile(sample.file, np.uint8)
    with open(sample.file, "rb") as file:
        file.seek(sample.offset)
        encoded = file.read(sample.length)
    if len(encoded) < sample.length:
        raise OSError(f"{sample.file} ends before it")
    return np.frombuffer(encoded, np.uint8)


def find_images(inputs: list[Path], val: list[Path], scratch: Path, progress: Progress) -> Listing:
    """Find all images of the inputs, by looking at what they are.

    Args:
        val: where the validation images are, if not in ``inputs``.
        scratch: a folder for what has to be unpacked. Files there that are finished are used again.

    Raises:
        Failure: there is nothing of a known form, or it is damaged, or it has no training images.
    """
    listing = _look(inputs, scratch, progress)
    if val:
        more = _look(val, scratch, progress)
        held_out = [s for s in more.samples if s.split != "train"] or more.samples
        listing.samples = [s for s in listing.samples if s.split == "train"]
        listing.samples += [s._replace(split="val") for s in held_out]
        listing.source += f"; validation images from {more.source}"
        listing.class_names = more.class_names | listing.class_names
    splits = {sample.split for sample in listing.samples}
    if "val" in splits:  # what is called test beside it has no labels, or is for the last day
        listing.samples = [s for s in listing.samples if s.split != "test"]
    else:
        listing.samples = [s._replace(split=_evaluated(s.split)) for s in listing.samples]
    if "train" not in splits:
        raise Failure(
            f"{inputs[0]} has no training images ({listing.source}): give what holds them first, "
            "and the validation images by --val"
        )
    odd = {s.label for s in listing.samples if s.split == "val"} - {
        s.label for s in listing.samples if s.split == "train"
    }
    if odd:
        raise Failure(
            f"there are validation images of classes without training images "
            f"({', '.join(sorted(odd)[:5])}{', ...' if len(odd) > 5 else ''}): give both the same "
            "classes"
        )
    listing.samples = _with_clean_names(listing.samples)
    known = {sample.label for sample in listing.samples}
    names = {_clean(label): words for label, words in listing.class_names.items()}
    listing.class_names = {label: names[label] for label in sorted(known & names.keys())}
    return listing


def _evaluated(split: str) -> str:
    return "val" if split == "test" else split


def _with_clean_names(samples: list[Sample]) -> list[Sample]:
    """The samples sorted, under names that are fit for any file system and for webdataset, which
    ends a sample's name at its first dot; no two have the same."""
    classes: dict[str, str] = {}
    for label in sorted({sample.label for sample in samples}):
        same = classes.setdefault(_clean(label), label)
        if same != label:
            raise Failure(
                f"the classes {same!r} and {label!r} would both be called {_clean(label)!r}: "
                "rename one"
            )
    clean = {label: name for name, label in classes.items()}
    taken: set[tuple[str, str, str]] = set()
    found = []
    for sample in sorted(samples):
        label, stem = clean[sample.label], _clean(Path(sample.name).stem).replace(".", "_")
        name, more = stem, 1
        while (sample.split, label, name) in taken:
            more += 1
            name = f"{stem}_{more}"
        taken.add((sample.split, label, name))
        found.append(sample._replace(label=label, name=name))
    return sorted(found)


def _clean(word: str) -> str:
    """A word as one part of a path, whatever a hostile tar has put there."""
    kept = "".join(c if c.isprintable() and c not in '/\\:*?"<>|' else "_" for c in word)
    return kept[:120].strip(" .") or "_"


def _look(paths: list[Path], scratch: Path, progress: Progress) -> Listing:
    """All that lies at the paths, of which one may be the devkit of the official tars."""
    for path in paths:
        if not path.exists():
            raise Failure(f"there is no {path}: give a folder or file with {_FORMS}")
    devkits = [path for path in paths if _is_devkit(path)]
    found = [_look_at(p, devkits, scratch, progress) for p in paths if p not in devkits]
    if not found:
        raise Failure(f"{paths[0]} is the devkit, without images: give the tars, too")
    return Listing(
        " and ".join(dict.fromkeys(one.source for one in found)),
        [sample for one in found for sample in one.samples],
        {label: words for one in found for label, words in one.class_names.items()},
    )


def _look_at(path: Path, devkits: list[Path], scratch: Path, progress: Progress) -> Listing:
    if path.is_file():
        if path.suffix == ".parquet":
            return _parquet([path], scratch, progress)
        if path.name.endswith(_TARS):
            return _tars([path], devkits, scratch, progress)
        raise Failure(f"{path} is none of what is known here: {_FORMS}")
    below = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
    splits = [entry for entry in below if entry.name in _SPLITS and _folders(entry)]
    kaggle = [path / inner for inner in ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC", "CLS-LOC", ".")]
    solutions = [*path.glob("LOC_val_solution.csv"), *path.parent.glob("LOC_val_solution.csv")]
    for folder in kaggle:
        if (folder / "train").is_dir() and (folder.name == "CLS-LOC" or solutions):
            return _kaggle(folder)
    batches = path if path.name == "cifar-10-batches-py" else path / "cifar-10-batches-py"
    if (batches / "data_batch_1").is_file():
        return _cifar10(batches, scratch, progress)
    if splits:
        samples = [s for entry in splits for s in _class_folders(_SPLITS[entry.name], entry)]
        return _some(Listing(f"class folders of {path}", samples), path)
    tables = sorted(path.rglob("*.parquet"))
    if tables:
        return _parquet(tables, scratch, progress)
    packed = [entry for entry in below if entry.is_file() and entry.name.endswith(_TARS)]
    if packed:
        beside = [entry for entry in below if _is_devkit(entry)]
        packed = [entry for entry in packed if entry not in beside]
        return _tars(packed, devkits or beside, scratch, progress)
    if _folders(path):
        samples = list(_class_folders("train", path))
        return _some(Listing(f"class folders of {path}", samples), path)
    flat = [entry for entry in below if _is_image(entry.name) and _WNID.match(entry.name)]
    samples = [Sample("train", e.name[:9], e.name, str(e), 0, WHOLE) for e in flat]
    return _some(Listing(f"images of {path} named by their class", samples), path)


def _some(listing: Listing, path: Path) -> Listing:
    if not listing.samples:
        raise Failure(f"{path} holds no images in a form that is known here: {_FORMS}")
    return listing


def _is_image(name: str) -> bool:
    return Path(name).suffix.lower() in IMAGES and not name.startswith(".")


def _folders(path: Path) -> list[str]:
    """Names of the folders in a folder, sorted."""
    if not path.is_dir():
        return []
    with os.scandir(path) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


def _files(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if _is_image(e.name))


def _class_folders(split: str, folder: Path) -> Iterator[Sample]:
    for label in _folders(folder):
        for name in _files(folder / label):
            yield Sample(split, label, name, f"{folder}/{label}/{name}", 0, WHOLE)


def _kaggle(folder: Path) -> Listing:
    """Kaggle's layout: validation images in one folder, their classes in a table."""
    samples = list(_class_folders("train", folder / "train"))
    tables = [place / "LOC_val_solution.csv" for place in (folder, *folder.absolute().parents[:4])]
    table = next((place for place in tables if place.is_file()), None)
    flat = _files(folder / "val") if (folder / "val").is_dir() else []
    if flat and table is None:
        raise Failure(
            f"{folder}/val has images without classes: put Kaggle's LOC_val_solution.csv into "
            f"{folder}"
        )
    class_names = {}
    if table is not None:
        with table.open(newline="") as file:
            rows = [row for row in csv.reader(file) if len(row) > 1]
        classes = {row[0]: row[1].split(" ")[0] for row in rows[1:]}
        missing = [name for name in flat if Path(name).stem not in classes]
        if missing:
            raise Failure(f"{table} has no line for {missing[0]}: it is cut short, get it again")
        samples += [
            Sample("val", classes[Path(name).stem], name, f"{folder}/val/{name}", 0, WHOLE)
            for name in flat
        ]
        words = table.with_name("LOC_synset_mapping.txt")
        if words.is_file():
            lines = [line.partition(" ") for line in words.read_text().splitlines()]
            class_names = {wnid: name for wnid, _, name in lines}
    if (folder / "val").is_dir() and not flat:  # sorted into classes, as many scripts do
        samples += _class_folders("val", folder / "val")
    return _some(Listing(f"Kaggle's layout in {folder}", samples, class_names), folder)


def _split_of(path: Path, otherwise: str = "train") -> str:
    """The split that a file's name speaks of, or its folder's."""
    for part in (path.name, path.parent.name):
        for word in re.split(r"[^a-z]+", part.lower()):
            if word in _SPLITS:
                return _SPLITS[word]
    return otherwise


def _tars(paths: list[Path], devkits: list[Path], scratch: Path, progress: Progress) -> Listing:
    """Tars: the official ones, of class folders, or of webdataset."""
    samples: list[Sample] = []
    numbered: list[_Numbered] = []
    class_names: dict[str, str] = {}
    kinds = []
    for done, path in enumerate(paths):
        progress("indexing tars", done, len(paths))
        plain = _unpacked(path, scratch)
        members = list(_members(plain))
        names = [Path(name) for name, _, _ in members]
        if any(name.suffix == ".cls" for name in names):
            kinds.append("webdataset tars")
            numbered += _webdataset(_split_of(path), plain, members)
        elif any(name.suffix == ".tar" and _WNID.fullmatch(name.stem) for name in names):
            kinds.append("the official tar of training images")
            samples += _tar_of_tars(plain)
        elif any(_VAL_IMAGE.match(n.name) and not _WNID.fullmatch(n.parent.name) for n in names):
            kinds.append("the official tar of validation images")
            more, class_names = _official_val(path, plain, members, devkits)
            samples += more
        elif _WNID.fullmatch(path.stem):
            kinds.append("class tars")
            samples += [
                Sample("train", path.stem, Path(name).name, str(plain), offset, size)
                for name, offset, size in members
                if _is_image(Path(name).name)
            ]
        else:
            kinds.append("a tar of class folders")
            samples += _tar_of_folders(_split_of(path), plain, members)
    progress("indexing tars", len(paths), len(paths))
    labelled, words = _labelled(numbered)
    kind = " and ".join(dict.fromkeys(kinds))
    where = paths[0] if len(paths) == 1 else paths[0].parent
    return _some(Listing(f"{kind} in {where}", samples + labelled, class_names | words), where)


def _members(path: Path, file: Any = None) -> Iterator[tuple[str, int, int]]:
    """Name, offset and size of the regular files in a tar; links and devices are none."""
    try:
        with tarfile.open(path, "r:", fileobj=file) as tar:
            for member in tar:
                if member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and member.sparse is None:
                    yield member.name, member.offset_data, member.size
                tar.members.clear()  # type: ignore[attr-defined]  # they would fill the memory
    except (tarfile.TarError, EOFError) as error:
        raise Failure(f"{path} is damaged or cut short ({error}): get it again") from None


def _tar_of_tars(path: Path) -> Iterator[Sample]:
    with path.open("rb") as file:
        for name, offset, size in list(_members(path)):
            inner = Path(name)
            if inner.suffix != ".tar":
                continue
            for image, at, length in _members(path / inner.name, _Window(file, offset, size)):
                if _is_image(Path(image).name):
                    yield Sample(
                        "train", inner.stem, Path(image).name, str(path), offset + at, length
                    )


class _Window:
    """A part of a file, as a file to read."""

    def __init__(self, file: BinaryIO, start: int, size: int) -> None:
        self._file, self._start, self._size, self._at = file, start, size, 0

    def seek(self, to: int) -> int:
        self._at = to
        return to

    def tell(self) -> int:
        return self._at

    def read(self, size: int) -> bytes:
        self._file.seek(self._start + self._at)
        content = self._file.read(max(min(size, self._size - self._at), 0))
        self._at += len(content)
        return content


def _tar_of_folders(
    split: str, path: Path, members: Iterable[tuple[str, int, int]]
) -> Iterator[Sample]:
    for name, offset, size in members:
        parts = [part for part in name.split("/") if part not in ("", ".", "..")]
        if len(parts) > 1 and _is_image(parts[-1]):
            said = [_SPLITS[part] for part in parts[:-2] if part in _SPLITS]
            yield Sample((said or [split])[-1], parts[-2], parts[-1], str(path), offset, size)


def _official_val(
    tar: Path, plain: Path, members: list[tuple[str, int, int]], devkits: list[Path]
) -> tuple[list[Sample], dict[str, str]]:
    devkits = devkits or [entry for entry in sorted(tar.parent.iterdir()) if _is_devkit(entry)]
    if not devkits:
        raise Failure(
            f"{tar} has images without classes: put the devkit, ILSVRC2012_devkit_t12.tar.gz, "
            "beside it"
        )
    truth, wnids, words = _read_devkit(devkits[0])
    samples = []
    for name, offset, size in members:
        found = _VAL_IMAGE.match(Path(name).name)
        if not found:
            continue
        number = int(found[1])
        if not 1 <= number <= len(truth):
            raise Failure(f"{devkits[0]} has no class for {name}: get the devkit again")
        label = wnids[truth[number - 1]]
        samples.append(Sample("val", label, Path(name).name, str(plain), offset, size))
    return samples, words


def _is_devkit(path: Path) -> bool:
    return (path / "data/meta.mat").is_file() or (
        path.name.startswith("ILSVRC2012_devkit") and path.name.endswith(_TARS)
    )


def _read_devkit(path: Path) -> tuple[list[int], dict[int, str], dict[str, str]]:
    """Class numbers of the validation images; classes by number; and in words."""
    try:
        from scipy.io import loadmat
    except ImportError:
        raise _not_installed("The devkit's table of classes", "scipy") from None
    wanted = ("data/meta.mat", "data/ILSVRC2012_validation_ground_truth.txt")
    if path.is_dir():
        content = {name: (path / name).read_bytes() for name in wanted if (path / name).is_file()}
    else:
        with tarfile.open(path) as tar:
            content = {
                name: file.read()
                for member in tar
                for name in wanted
                if member.isreg() and member.name.endswith(name)
                if (file := tar.extractfile(member))
            }
    if len(content) < 2:
        raise Failure(f"{path} lacks {' or '.join(wanted)}: get the devkit again")
    try:
        synsets = np.atleast_1d(loadmat(BytesIO(content[wanted[0]]), squeeze_me=True)["synsets"])
        rows = [(int(s["ILSVRC2012_ID"]), str(s["WNID"]), str(s["words"])) for s in synsets]
        truth = [int(line) for line in content[wanted[1]].split()]
    except (ValueError, KeyError, TypeError, NotImplementedError) as error:
        raise Failure(f"{path} is damaged ({error}): get the devkit again") from None
    return truth, {n: wnid for n, wnid, _ in rows}, {wnid: words for _, wnid, words in rows}


class _Numbered(NamedTuple):
    """An image whose class is a number, with what may tell the class's name."""

    sample: Sample
    number: int
    folder: str
    words: str


def _labelled(images: list[_Numbered]) -> tuple[list[Sample], dict[str, str]]:
    """The samples with names of classes in the place of numbers, and classes in words.

    A class is called by the folder or the WordNet number in its images' names, where each class has
    its own; else by its words; else by its number, with zeros before it, so that sorting classes
    keeps their order.
    """
    tellers: list[Callable[[_Numbered], str]] = [
        lambda one: one.folder,
        lambda one: (_WNID.findall(one.sample.name) or [""])[-1],
        lambda one: one.words,
    ]
    numbers = {one.number for one in images}
    width = max((len(str(number)) for number in numbers), default=0)
    called = {number: f"{number:0{width}d}" for number in numbers}
    for tell in tellers:
        pairs = {(one.number, tell(one)) for one in images}
        names = {name for _, name in pairs}
        if len(pairs) == len(numbers) == len(names) and "" not in names:
            called = dict(pairs)
            break
    words = {called[one.number]: one.words for one in images if one.words}
    return [one.sample._replace(label=called[one.number]) for one in images], words


def _webdataset(split: str, path: Path, members: list[tuple[str, int, int]]) -> Iterator[_Numbered]:
    """Samples are members with the same name up to the first dot; .cls is the class's number, and
    its name may be in .json or .txt."""
    parts: dict[str, dict[str, tuple[int, int]]] = {}
    for name, offset, size in members:
        folder, _, base = name.rpartition("/")
        stem, _, ending = base.partition(".")
        parts.setdefault(f"{folder}/{stem}", {})[ending.lower()] = (offset, size)
    with path.open("rb") as file:

        def text(of: dict[str, tuple[int, int]], ending: str) -> str:
            offset, size = of.get(ending, (0, 0))
            file.seek(offset)
            return file.read(min(size, 1 << 16)).decode(errors="replace").strip()

        for key, of in parts.items():
            images = [ending for ending in of if f".{ending}" in IMAGES]
            if not images:
                continue
            number = text(of, "cls")
            if not number.isdecimal():
                raise Failure(f"{path}: {key} has no class number in a .cls: give it one")
            known: dict[str, Any] = {}
            if "json" in of:
                try:
                    found = json.loads(text(of, "json"))
                    known = found if isinstance(found, dict) else {}
                except ValueError:
                    pass
            words = next(
                (str(known[k]) for k in ("class_name", "classname", "name") if known.get(k)),
                text(of, "txt"),
            )
            folder, _, stem = key.rpartition("/")
            named = str(known.get("filename") or f"{stem}.{images[0]}")
            sample = Sample(split, "", Path(named).name, str(path), *of[images[0]])
            yield _Numbered(sample, int(number), Path(folder).name, words)


def _parquet(paths: list[Path], scratch: Path, progress: Progress) -> Listing:
    """Hugging Face's parquet files: a row an image."""
    images: list[_Numbered] = []
    for done, path in enumerate(paths):
        progress("copying parquet files", done, len(paths))
        blob, rows = _copied(path, scratch, lambda path=path: _rows(path))  # type: ignore[misc]
        images += [
            _Numbered(
                Sample(_split_of(path), "", name, str(blob), offset, length), number, "", words
            )
            for name, number, words, offset, length in rows
        ]
    progress("copying parquet files", len(paths), len(paths))
    samples, class_names = _labelled(images)
    where = paths[0] if len(paths) == 1 else Path(os.path.commonpath(paths))
    return _some(Listing(f"parquet files of {where}", samples, class_names), where)


def _rows(path: Path) -> Iterator[tuple[list[Any], bytes]]:
    """[name, class number, class in words] and bytes of each image."""
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise _not_installed("A parquet file", "pyarrow") from None
    try:
        table = parquet.ParquetFile(path)
        schema = table.schema_arrow
        info = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = info.get("info", {}).get("features", {})
        kinds = {column.name: column.type for column in schema}
        image = next(
            (
                n
                for n, kind in kinds.items()
                if arrow.types.is_struct(kind) and "bytes" in str(kind)
            ),
            None,
        )
        classes = [n for n in kinds if features.get(n, {}).get("_type") == "ClassLabel"]
        classes += [n for n in ("label", "labels", "cls", "class") if n in kinds]
        if image is None or not classes or not arrow.types.is_integer(kinds[classes[0]]):
            raise Failure(
                f"{path} has the columns {', '.join(kinds)}: it wants an image (a struct of bytes "
                "and path) and a label (a whole number)"
            )
        names = features.get(classes[0], {}).get("names") or []
        at = 0
        for batch in table.iter_batches(64, columns=[image, classes[0]]):
            numbers = batch.column(classes[0]).to_pylist()
            for one, number in zip(batch.column(image).to_pylist(), numbers, strict=True):
                name = Path((one or {}).get("path") or f"{path.stem}_{at:08d}.jpg").name
                if number is None or number < 0:
                    raise Failure(f"{path}: {name} has no class: leave it out of the data set")
                words = str(names[number]) if number < len(names) else ""
                yield [name, int(number), words], (one or {}).get("bytes") or b""
                at += 1
    except (arrow.ArrowException, OSError) as error:
        first = str(error).partition("\n")[0]
        raise Failure(f"{path} is damaged or cut short ({first}): get it again") from None


def _cifar10(folder: Path, scratch: Path, progress: Progress) -> Listing:
    """CIFAR-10's own files; pixels without loss as PNG."""
    try:
        words = _unpickled(folder / "batches.meta")["label_names"]
    except FileNotFoundError as error:
        raise Failure(f"{error.filename} is missing: unpack CIFAR-10 again") from None
    samples = []
    batches = [folder / f"data_batch_{n}" for n in range(1, 6)] + [folder / "test_batch"]
    batches = [path for path in batches if path.is_file()]
    for done, path in enumerate(batches):
        progress("copying CIFAR-10's files", done, len(batches))
        split = "test" if path.name == "test_batch" else "train"
        blob, rows = _copied(path, scratch, lambda path=path: _cifar10_images(path))  # type: ignore[misc]
        samples += [
            Sample(split, words[number], name, str(blob), offset, length)
            for name, number, offset, length in rows
        ]
    progress("copying CIFAR-10's files", len(batches), len(batches))
    return _some(Listing(f"CIFAR-10's own files in {folder}", samples), folder)


def _cifar10_images(path: Path) -> Iterator[tuple[list[Any], bytes]]:
    batch = _unpickled(path)
    pixels = np.asarray(batch["data"], np.uint8).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    for at, (image, label) in enumerate(zip(pixels, batch["labels"], strict=True)):
        buffer = BytesIO()
        Image.fromarray(np.ascontiguousarray(image)).save(buffer, "PNG")
        yield [f"{path.name}_{at:05d}.png", int(label)], buffer.getvalue()


def _unpickled(path: Path) -> Any:
    class Plain(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if (module, name) in _MEAN_TO_PICKLE:
                return super().find_class(module, name)
            raise pickle.UnpicklingError(f"it names {module}.{name}")

    try:
        with path.open("rb") as file:
            return Plain(file, encoding="latin1").load()
    except (pickle.UnpicklingError, EOFError, ValueError, KeyError) as error:
        raise Failure(f"{path} is not CIFAR-10's ({error}): unpack its archive again") from None


def _scratch_name(path: Path, scratch: Path, ending: str) -> Path:
    """A name in the scratch folder that changes with the file's own path, size and time."""
    about = path.stat()
    key = f"{path.absolute()} {about.st_size} {about.st_mtime_ns}"
    return scratch / f"input-{hashlib.sha256(key.encode()).hexdigest()[:16]}{ending}"


def _unpacked(path: Path, scratch: Path) -> Path:
    """A tar that can be sought in: the very one, or a copy without its compression."""
    with path.open("rb") as file:
        unpack = _PACKERS.get(file.read(2))
    if unpack is None:
        return path
    copy = _scratch_name(path, scratch, ".tar")
    if not copy.is_file():
        partial = copy.with_suffix(".tmp")
        with partial.open("wb") as target:
            try:
                with unpack(path, "rb") as packed:
                    shutil.copyfileobj(packed, target, 1 << 20)
            except (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError) as error:
                raise Failure(f"{path} is damaged or cut short ({error}): get it again") from None
        os.replace(partial, copy)
    return copy


def _copied(
    path: Path, scratch: Path, images: Callable[[], Iterator[tuple[list[Any], bytes]]]
) -> tuple[Path, list[list[Any]]]:
    """A file's images as one stretch of bytes after the other, and of each what is known of it,
    offset and length."""
    blob = _scratch_name(path, scratch, ".images")
    index = blob.with_suffix(".json")
    if not index.is_file():
        rows, at = [], 0
        with blob.open("wb") as file:
            for known, encoded in images():
                file.write(encoded)
                rows.append([*known, at, len(encoded)])
                at += len(encoded)
        partial = index.with_suffix(".tmp")
        partial.write_text(json.dumps(rows))
        os.replace(partial, index)
    return blob, json.loads(index.read_text())


def _not_installed(what: str, package: str) -> Failure:
    return Failure(
        f"{what} is read with {package}, which is not installed: "
        "pip install 'alexnet-dist[prepare]'"
    )
