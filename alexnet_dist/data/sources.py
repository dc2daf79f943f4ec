"""Where images come from: folders in ImageNet's layout, prepared folders, CIFAR-10's files, the
embedded digits.

A split is an index, made once and kept: names, labels and sizes of its images. From there on an
image is a index, and a source gives its encoded bytes or its pixels.
"""

import hashlib
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from alexnet_dist.data.digits import write_digits
from alexnet_dist.data.formats import FORMATS, validate_bytes
from alexnet_dist.data.index import DatasetInfo, ImageDataset, SplitIndex
from alexnet_dist.data.prepared import RawDataset, TarDataset, is_packed_dataset, load_packed_info
from alexnet_dist.data.statistics import ChannelStats, compute_stats
from alexnet_dist.errors import UserError

IMAGES = frozenset({".jpeg", ".jpg", ".png", ".webp", ".bmp"})
VALIDATION_NAMES = ("val", "test")
DIGITS = "digits"
_KEPT_IN = ".alexnet_dist"
_FORMAT = 2  # of the kept index; raise it when its meaning changes

Progress = Callable[[str, int, int], None]


class FolderDataset:
    """Files below a folder."""

    is_decoded = False

    def __init__(self, index: SplitIndex) -> None:
        self.index = index

    def read(self, index: int) -> NDArray[np.uint8]:
        file = os.open(self.path(index), os.O_RDONLY)  # numpy's fromfile takes twice as long
        try:
            encoded = os.read(file, os.fstat(file).st_size)
        finally:
            os.close(file)
        return validate_bytes(np.frombuffer(encoded, np.uint8))

    def path(self, index: int) -> str:
        return f"{self.index.folder}/{self.index.names[index]}"


class InMemoryDataset:
    """The pixels of a small set, in memory."""

    is_decoded = True

    def __init__(self, index: SplitIndex, pixels: NDArray[np.uint8]) -> None:
        self.index, self._pixels = index, pixels

    def read(self, index: int) -> NDArray[np.uint8]:
        return self._pixels[index]

    def path(self, index: int) -> str:
        return f"{self.index.folder} (image {self.index.names[index]})"


def scan_dataset(root: str | None, cache: str, progress: Progress) -> DatasetInfo:
    """Find out what lies at ``root``, and keep the answer.

    Args:
        root: a folder with train/ and val/ (or test/), each with a folder a class; a prepared
            folder; one with CIFAR-10's own files; None or "digits" for the embedded digits.
        cache: the folder for what is kept, where ``root`` cannot be written.
        progress: is called with what is being done, images done, images in all.

    Raises:
        Failure: there is no such folder, it is not laid out so, or its preparation has not ended.
    """
    kept = Path(cache).expanduser()
    folder = write_digits(kept / DIGITS) if root in (None, DIGITS) else Path(str(root)).absolute()
    if not folder.is_dir():
        raise UserError(
            f"there is no folder {folder}: give --data.root the folder that holds train/ and val/"
        )
    if is_packed_dataset(folder):
        return load_packed_info(folder)
    if (folder / "cifar-10-batches-py").is_dir():
        train, val = (_cifar10(folder, split)[0] for split in (True, False))
        kind, source = "cifar10", _open("cifar10", train)
    else:
        kind = "folders"
        train = _index(folder, _split(folder, ("train",)), kept, progress)
        val = _index(folder, _split(folder, VALIDATION_NAMES), kept, progress)
        source = FolderDataset(train)
    if train.classes != val.classes:
        odd = sorted(set(train.classes) ^ set(val.classes))
        raise UserError(
            f"the classes of {train.folder} and {val.folder} differ ({', '.join(odd[:5])}"
            f"{', ...' if len(odd) > 5 else ''}): give both the same class folders"
        )
    return DatasetInfo(kind, train, val, _statistics(folder, train, source, kept, progress))


def open_datasets(catalogue: DatasetInfo) -> tuple[ImageDataset, ImageDataset]:
    """Training and validation images, in whichever process."""
    return _open(catalogue.kind, catalogue.train), _open(catalogue.kind, catalogue.val)


def _open(kind: str, index: SplitIndex) -> ImageDataset:
    if kind == "cifar10":
        folder, split = index.folder.rsplit(":", 1)
        return InMemoryDataset(index, _cifar10(Path(folder), split == "train")[1])
    kinds: dict[str, Callable[[SplitIndex], ImageDataset]] = {
        "folders": FolderDataset,
        "shards": TarDataset,
        "pixels": RawDataset,
    }
    return kinds[kind](index)


def _cifar10(folder: Path, train: bool) -> tuple[SplitIndex, NDArray[np.uint8]]:
    from torchvision.datasets import CIFAR10

    try:
        data = CIFAR10(str(folder), train=train)
    except RuntimeError:
        raise UserError(
            f"CIFAR-10 below {folder} is damaged: unpack its archive there again"
        ) from None
    pixels: NDArray[np.uint8] = data.data
    names = [str(index) for index in range(len(pixels))]
    sizes = np.full((len(pixels), 2), pixels.shape[1], np.int64)
    where = f"{folder}:{'train' if train else 'test'}"
    return SplitIndex(where, names, np.asarray(data.targets, np.int64), sizes, data.classes), pixels


def _split(folder: Path, names: tuple[str, ...]) -> Path:
    for name in names:
        if (folder / name).is_dir():
            return folder / name
    raise UserError(
        f"{folder} has no folder {' or '.join(f'{name}/' for name in names)}: data.root is the "
        "folder that holds train/ and val/, each with a folder a class"
    )


def class_folders(split: Path) -> dict[str, int]:
    """Names of the class folders, sorted, with the time each was changed last."""
    with os.scandir(split) as entries:
        found = {
            entry.name: entry.stat().st_mtime_ns
            for entry in entries
            if entry.is_dir() and not entry.name.startswith(".")
        }
    return dict(sorted(found.items()))


def list_images(folder: Path) -> list[str]:
    """Names of the image files in a folder, sorted."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if is_image_name(entry.name))


def is_image_name(name: str) -> bool:
    """Whether a file of this name is an image: by its extension, and not hidden."""
    return Path(name).suffix.lower() in IMAGES and not name.startswith(".")


def _index(root: Path, split: Path, cache: Path, progress: Progress) -> SplitIndex:
    """The index of a split: the kept one, unless a class folder has changed since."""
    folders = class_folders(split)
    if not folders:
        raise UserError(
            f"{split} has no folders in it: it wants one for each class, full of images"
        )
    times = np.array(list(folders.values()), np.int64)
    places = _places(root, cache, f"{split.name}.npz")
    for place in places:
        kept = _load(place)
        if (
            kept is not None
            and kept["format"] == _FORMAT
            and kept["classes"].tolist() == list(folders)
            and np.array_equal(kept["times"], times)
        ):
            names = kept["names"].tobytes().decode().split("\n")
            index = SplitIndex(str(split), names, kept["labels"], kept["sizes"], list(folders))
            # a file that is mended leaves the time of its folder as it was
            if not any(
                any(_header_size(split / names[index])) for index in index.corrupt_indices()
            ):
                return index
    index = _scan(split, list(folders), progress)
    _keep(
        places,
        format=np.array(_FORMAT),
        classes=np.array(index.classes),
        times=times,
        names=np.frombuffer("\n".join(index.names).encode(), np.uint8),
        labels=index.labels,
        sizes=index.sizes,
    )
    return index


def _scan(split: Path, classes: list[str], progress: Progress) -> SplitIndex:
    names: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        images = list_images(split / name)
        names += [f"{name}/{image}" for image in images]
        labels += [label] * len(images)
    if not names:
        raise UserError(f"{split} has class folders but no images ({', '.join(sorted(IMAGES))})")
    sizes = np.zeros((len(names), 2), np.int64)
    with ThreadPoolExecutor(16) as pool:  # network storage answers slowly, but many at once
        paths = (split / name for name in names)
        for index, size in enumerate(pool.map(_header_size, paths)):
            sizes[index] = size
            progress(f"indexing {split}", index + 1, len(names))
    return SplitIndex(str(split), names, np.array(labels, np.int64), sizes, classes)


def _header_size(path: Path) -> tuple[int, int]:
    """Stored height and width, from the header alone; (0, 0) where there is none."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            return image.height, image.width
    except Exception:  # struct.error, SyntaxError, EOFError, ...: it depends on the damage
        return 0, 0


def _statistics(
    root: Path, train: SplitIndex, source: ImageDataset, cache: Path, progress: Progress
) -> ChannelStats:
    digest = hashlib.sha256("\n".join(train.names).encode() + train.sizes.tobytes()).hexdigest()
    places = _places(root, cache, "statistics.npz")
    for place in places:
        kept = _load(place)
        if kept is not None and kept["format"] == _FORMAT and str(kept["of"]) == digest:
            return ChannelStats(kept["mean"], kept["eigenvalues"], kept["eigenvectors"])
    result = compute_stats(
        len(train), source.read, progress=lambda *at: progress("measuring colours", *at)
    )
    _keep(places, format=np.array(_FORMAT), of=np.array(digest), **vars(result))
    return result


def _places(root: Path, cache: Path, name: str) -> tuple[Path, Path]:
    """Where an index may lie: in the data folder, and in the cache for those that are read-only."""
    key = hashlib.sha256(str(root).encode()).hexdigest()[:16]
    return root / _KEPT_IN / name, cache / "indexes" / key / name


def _load(place: Path) -> dict[str, Any] | None:
    try:
        with np.load(place, allow_pickle=False) as arrays:
            return dict(arrays)
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):
        return None


def _keep(places: tuple[Path, Path], **arrays: NDArray[Any]) -> None:
    """Keep the arrays in the first place that can be written; without any they are made anew."""
    for place in places:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            handle, partial = tempfile.mkstemp(prefix=".partial-", dir=place.parent)
            with os.fdopen(handle, "wb") as file:
                np.savez(file, **arrays)  # type: ignore[arg-type]
            os.replace(partial, place)
            return
        except OSError:
            continue
