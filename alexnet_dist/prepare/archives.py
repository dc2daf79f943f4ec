"""Images inside other files: tars, Hugging Face's parquet files, CIFAR-10's own.

Tars are indexed by their headers and never unpacked. What has no stretches of bytes to point at,
compressed tars, parquet files and CIFAR-10's, is copied into a scratch folder.
"""

import bz2
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
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from alexnet_dist.data.sources import IMAGES, Progress
from alexnet_dist.errors import UserError
from alexnet_dist.prepare.samples import SPLITS, WNID, Listing, Sample, is_image

_VAL_IMAGE = re.compile(r"ILSVRC2012_val_(\d{8})")
TARS = (".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz")
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


class _Numbered(NamedTuple):
    """An image whose class is a number, with what may tell the class's name."""

    sample: Sample
    number: int
    folder: str
    words: str


def tars(paths: list[Path], devkits: list[Path], scratch: Path, progress: Progress) -> Listing:
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
        elif any(name.suffix == ".tar" and WNID.fullmatch(name.stem) for name in names):
            kinds.append("the official tar of training images")
            samples += _tar_of_tars(plain)
        elif any(_VAL_IMAGE.match(n.name) and not WNID.fullmatch(n.parent.name) for n in names):
            kinds.append("the official tar of validation images")
            more, class_names = _official_val(path, plain, members, devkits)
            samples += more
        elif WNID.fullmatch(path.stem):
            kinds.append("class tars")
            samples += [
                Sample("train", path.stem, Path(name).name, str(plain), offset, size)
                for name, offset, size in members
                if is_image(Path(name).name)
            ]
        else:
            kinds.append("a tar of class folders")
            samples += _tar_of_folders(_split_of(path), plain, members)
    progress("indexing tars", len(paths), len(paths))
    labelled, words = _labelled(numbered)
    kind = " and ".join(dict.fromkeys(kinds))
    where = paths[0] if len(paths) == 1 else paths[0].parent
    return Listing(f"{kind} in {where}", samples + labelled, class_names | words)


def is_devkit(path: Path) -> bool:
    return (path / "data/meta.mat").is_file() or (
        path.name.startswith("ILSVRC2012_devkit") and path.name.endswith(TARS)
    )


def _members(path: Path, file: Any = None) -> Iterator[tuple[str, int, int]]:
    """Name, offset and size of the regular files in a tar; links and devices are none."""
    try:
        with tarfile.open(path, "r:", fileobj=file) as tar:
            for member in tar:
                if member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and member.sparse is None:
                    yield member.name, member.offset_data, member.size
                tar.members.clear()  # type: ignore[attr-defined]  # they would fill the memory
    except (tarfile.TarError, EOFError) as error:
        raise UserError(f"{path} is damaged or cut short ({error}): get it again") from None


def _tar_of_tars(path: Path) -> Iterator[Sample]:
    with path.open("rb") as file:
        for name, offset, size in list(_members(path)):
            inner = Path(name)
            if inner.suffix != ".tar":
                continue
            for image, at, length in _members(path / inner.name, _Window(file, offset, size)):
                if is_image(Path(image).name):
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
        if len(parts) > 1 and is_image(parts[-1]):
            said = [SPLITS[part] for part in parts[:-2] if part in SPLITS]
            yield Sample((said or [split])[-1], parts[-2], parts[-1], str(path), offset, size)


def _official_val(
    tar: Path, plain: Path, members: list[tuple[str, int, int]], devkits: list[Path]
) -> tuple[list[Sample], dict[str, str]]:
    devkits = devkits or [entry for entry in sorted(tar.parent.iterdir()) if is_devkit(entry)]
    if not devkits:
        raise UserError(
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
            raise UserError(f"{devkits[0]} has no class for {name}: get the devkit again")
        label = wnids[truth[number - 1]]
        samples.append(Sample("val", label, Path(name).name, str(plain), offset, size))
    return samples, words


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
        raise UserError(f"{path} lacks {' or '.join(wanted)}: get the devkit again")
    try:
        synsets = np.atleast_1d(loadmat(BytesIO(content[wanted[0]]), squeeze_me=True)["synsets"])
        rows = [(int(s["ILSVRC2012_ID"]), str(s["WNID"]), str(s["words"])) for s in synsets]
        truth = [int(line) for line in content[wanted[1]].split()]
    except (ValueError, KeyError, TypeError, NotImplementedError) as error:
        raise UserError(f"{path} is damaged ({error}): get the devkit again") from None
    return truth, {n: wnid for n, wnid, _ in rows}, {wnid: words for _, wnid, words in rows}


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
                raise UserError(f"{path}: {key} has no class number in a .cls: give it one")
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


def _labelled(images: list[_Numbered]) -> tuple[list[Sample], dict[str, str]]:
    """The samples with names of classes in the place of numbers, and classes in words.

    A class is called by the folder or the WordNet number in its images' names, where each class has
    its own; else by its words; else by its number, with zeros before it, so that sorting classes
    keeps their order.
    """
    tellers: list[Callable[[_Numbered], str]] = [
        lambda one: one.folder,
        lambda one: (WNID.findall(one.sample.name) or [""])[-1],
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


def parquet_files(paths: list[Path], scratch: Path, progress: Progress) -> Listing:
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
    return Listing(f"parquet files of {where}", samples, class_names)


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
            raise UserError(
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
                    raise UserError(f"{path}: {name} has no class: leave it out of the data set")
                words = str(names[number]) if number < len(names) else ""
                yield [name, int(number), words], (one or {}).get("bytes") or b""
                at += 1
    except (arrow.ArrowException, OSError) as error:
        first = str(error).partition("\n")[0]
        raise UserError(f"{path} is damaged or cut short ({first}): get it again") from None


def cifar10(folder: Path, scratch: Path, progress: Progress) -> Listing:
    """CIFAR-10's own files; pixels without loss as PNG."""
    try:
        words = _unpickled(folder / "batches.meta")["label_names"]
    except FileNotFoundError as error:
        raise UserError(f"{error.filename} is missing: unpack CIFAR-10 again") from None
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
    return Listing(f"CIFAR-10's own files in {folder}", samples)


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
        raise UserError(f"{path} is not CIFAR-10's ({error}): unpack its archive again") from None


def _split_of(path: Path) -> str:
    """The split that a file's name speaks of, or else its folder is."""
    words = [word for word in re.split(r"[^a-z]+", path.name.lower()) if word in SPLITS]
    return SPLITS[words[0]] if words else SPLITS.get(path.parent.name, "train")


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
                raise UserError(f"{path} is damaged or cut short ({error}): get it again") from None
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


def _not_installed(what: str, package: str) -> UserError:
    return UserError(
        f"{what} is read with {package}, which is not installed: "
        "pip install 'alexnet-dist[prepare]'"
    )
