"""Which images there are: class folders in ImageNet's layout, packed folders as ``python -m
alexnet_dist.prepare`` writes them, CIFAR-10's own files, and the digits inside scikit-learn.

Each split gets an index of names, labels and sizes, made once and cached.

A packed folder is

    DIR/prepared.json             what is there, and the training images' statistics; written last
    DIR/SPLIT.index.npz           names, labels and sizes of the images, and where each is
    DIR/SPLIT-00000.tar, ...      kind "shards": encoded images, which webdataset reads, too
    DIR/SPLIT.pixels              kind "pixels": uint8 [N, size, size, 3]

Its index is in the order of class folders, so that the plan gives the same images from any form.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

from alexnet_dist.data.datasets import (
    DATASETS,
    FIX,
    PREPARED,
    ImageDataset,
    SplitIndex,
    check_files,
    read_cifar10,
)
from alexnet_dist.data.formats import FORMATS
from alexnet_dist.data.statistics import ChannelStats, compute_stats
from alexnet_dist.errors import UserError

IMAGE_SUFFIXES = frozenset({".jpeg", ".jpg", ".png", ".webp", ".bmp"})
SPLITS = {"train": ("train",), "val": ("val", "valid", "validation", "test")}
"""What people call them, the best first: ImageNet's test images have no labels."""

DIGITS = "digits"
PACKED_FORMAT = 2  # of packed folders; raise it when their meaning changes
_BEGUN = (".partial", "train.index.npz")  # what there is of a packed folder before PREPARED
_CACHE_FORMAT = 4  # of cached indexes and statistics; raise it when their meaning changes

Progress = Callable[[str, int, int], None]
"""Is called with what is being done, images done, images in all."""


@dataclass(frozen=True)
class DatasetInfo:
    """A data set without its pixels: sent from the process that scanned it to all others.

    Attributes:
        kind: folders, cifar10, shards or pixels.
        stats: of the training images.
        class_names: of classes that have a name: {"n01440764": "tench, Tinca tinca"}.
    """

    kind: str
    train: SplitIndex
    val: SplitIndex
    stats: ChannelStats
    class_names: dict[str, str] = field(default_factory=dict)

    @property
    def short_names(self) -> list[str]:
        """What to call each class: "tench" of "tench, Tinca tinca"; "crane (n02012849)" of two."""
        short = {c: self.class_names.get(c, c).partition(",")[0] for c in self.train.classes}
        all_short = list(short.values())
        return [f"{s} ({c})" if all_short.count(s) > 1 else s for c, s in short.items()]

    @property
    def dataset_hash(self) -> str:
        """Of which images there are, wherever and however they are stored."""
        digest = hashlib.sha256()
        for index in (self.train, self.val):
            digest.update(os.fsencode("\n".join(index.names)))
            digest.update(index.labels.tobytes())
            digest.update(index.sizes.tobytes())
        return digest.hexdigest()[:16]


def open_datasets(info: DatasetInfo) -> tuple[ImageDataset, ImageDataset]:
    """Training and validation images, in whichever process."""
    return DATASETS[info.kind](info.train), DATASETS[info.kind](info.val)


def scan_dataset(root: str | None, cache_dir: str, progress: Progress) -> DatasetInfo:
    """Find out what is at ``root``, and cache the answer.

    Args:
        root: a folder with train/ and val/ (or test/), each with a folder a class; a packed folder;
            one with CIFAR-10's own files; None or "digits" for the embedded digits.
        cache_dir: the folder for the digits, indices and statistics.

    Raises:
        UserError: there is no such folder, it is laid out otherwise, or its preparation has not
            ended.
    """
    cache = Path(cache_dir).expanduser()
    folder = _write_digits(cache / DIGITS) if root in (None, DIGITS) else Path(str(root)).absolute()
    if not folder.is_dir():
        raise UserError(
            f"there is no folder {folder}: give --data.root the folder that holds train/ and val/"
        )
    if (folder / PREPARED).exists():
        return _load_packed(folder)
    cache = cache / "indexes" / hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]
    if (folder / "cifar-10-batches-py").is_dir():
        kind = "cifar10"
        train, val = (_index_cifar10(folder, split) for split in ("train", "test"))
    else:
        kind = "folders"
        train, val = (_index_split(folder, split, cache, progress) for split in SPLITS)
    if train.classes != val.classes:
        odd = sorted(set(train.classes) ^ set(val.classes))
        raise UserError(
            f"the classes of {train.folder} and {val.folder} differ ({', '.join(odd[:5])}"
            f"{', ...' if len(odd) > 5 else ''}): give both the same class folders"
        )
    dataset, measured = DATASETS[kind](train), partial(progress, "measuring colors")
    stats = _cached(
        cache / "statistics.npz",
        [train.names, train.sizes.tolist()],
        lambda: vars(compute_stats(len(train), dataset.read, measured)),
    )
    return DatasetInfo(kind, train, val, ChannelStats(**stats))


def find_split(folder: Path, split: str) -> Path | None:
    """The folder of the "train" or the "val" images."""
    found = (folder / name for name in SPLITS[split])
    return next((path for path in found if path.is_dir()), None)


def class_folders(split: Path) -> dict[str, int]:
    """Names of the class folders, sorted, with the time each was changed last."""
    with os.scandir(split) as entries:
        folders = (entry for entry in entries if entry.is_dir() and not entry.name.startswith("."))
        return dict(sorted((entry.name, entry.stat().st_mtime_ns) for entry in folders))


def list_images(folder: Path) -> list[str]:
    """Names of the image files in a folder, sorted."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if is_image_name(entry.name))


def is_image_name(name: str) -> bool:
    """Whether a file of this name is an image: by its extension, and not hidden."""
    return Path(name).suffix.lower() in IMAGE_SUFFIXES and not name.startswith(".")


def _index_split(folder: Path, name: str, cache: Path, progress: Progress) -> SplitIndex:
    """The index of a split: the cached one, unless a class folder has changed since."""
    split = find_split(folder, name)
    if split is None and any((folder / begun).exists() for begun in _BEGUN):
        raise UserError(
            f"the preparation of {folder} did not finish: run the same python -m "
            "alexnet_dist.prepare again, and it goes on"
        )
    if split is None:
        raise UserError(
            f"{folder} has no folder {name}/: data.root is the folder that holds train/ and val/, "
            "each with a folder a class"
        )
    folders = class_folders(split)
    arrays = _cached(
        cache / f"{split.name}.npz",
        list(folders.items()),
        lambda: _scan(split, list(folders), progress),
    )
    names, sizes = unpack_names(arrays["names"]), arrays["sizes"]
    index = SplitIndex(str(split), names, arrays["labels"], sizes, list(folders))
    for corrupt in index.corrupt_indices():
        # read again: a file that is fixed leaves the time of its folder as it was
        sizes[corrupt] = read_size(split / names[corrupt])
    return index


def _scan(split: Path, classes: list[str], progress: Progress) -> dict[str, NDArray[Any]]:
    """Names, labels and sizes of the images of a split."""
    names: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        images = list_images(split / name)
        names += [f"{name}/{image}" for image in images]
        labels += [label] * len(images)
    if not names:
        raise UserError(
            f"{split} has no images ({', '.join(sorted(IMAGE_SUFFIXES))}) in folders of it: it "
            "wants one for each class, full of images"
        )
    sizes = np.zeros((len(names), 2), np.int64)
    with ThreadPoolExecutor(16) as pool:  # network storage answers slowly, but many at once
        for index, size in enumerate(pool.map(read_size, [split / name for name in names])):
            sizes[index] = size
            progress(f"indexing {split}", index + 1, len(names))
    return {"names": pack_names(names), "labels": np.array(labels, np.int64), "sizes": sizes}


def read_size(path: str | Path, *, upright: bool = False) -> tuple[int, int]:
    """Height and width of an image, from its header alone; (0, 0) where that cannot be read.

    Args:
        upright: as its EXIF data say.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            turned = upright and image.getexif().get(ExifTags.Base.Orientation, 1) > 4
            return image.size if turned else image.size[::-1]
    except Exception:  # struct.error, SyntaxError, EOFError, ...: it depends on the file
        return 0, 0


def _cached(
    path: Path, key: Any, make: Callable[[], dict[str, NDArray[Any]]]
) -> dict[str, NDArray[Any]]:
    """What ``make`` returns, or what it returned when it was called for the same ``key`` before."""
    digest = hashlib.sha256(json.dumps([_CACHE_FORMAT, key]).encode()).hexdigest()
    try:
        with np.load(path, allow_pickle=False) as saved:
            arrays = dict(saved)
        if str(arrays.pop("key")) == digest:
            return arrays
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):
        pass
    arrays = make()
    with suppress(OSError):  # where nothing can be written, nothing is cached
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as partial:
            np.savez(f"{partial}/{path.name}", key=np.array(digest), **arrays)  # type: ignore[arg-type]
            os.replace(f"{partial}/{path.name}", path)
    return arrays


def _load_packed(folder: Path) -> DatasetInfo:
    path, indexes = folder / PREPARED, []
    try:
        facts = json.loads(path.read_text())
        if facts["format"] != PACKED_FORMAT:
            raise UserError(
                f"{path} is of format {facts['format']}, this version reads {PACKED_FORMAT}: take "
                "the version of alexnet_dist that wrote it, or prepare the images from scratch"
            )
        stats = ChannelStats.from_json(facts["statistics"])
        for split in SPLITS:
            path, about = folder / f"{split}.index.npz", facts["splits"][split]
            files = {file["name"]: file["bytes"] for file in about["files"]}
            with np.load(path) as saved:
                names = unpack_names(saved["names"])
                labels, sizes, offsets = saved["labels"], saved["sizes"], saved["offsets"]
            if not about["images"] == len(names) == len(labels) == len(sizes) == len(offsets):
                raise ValueError(f"it is not of the {about['images']} images of {PREPARED}")
            rest = facts["classes"], files, offsets
            indexes.append(SplitIndex(str(folder / split), names, labels, sizes, *rest))
            check_files(indexes[-1])
    except (OSError, ValueError, KeyError, TypeError, EOFError, BadZipFile) as error:
        reason = error.strerror if isinstance(error, OSError) else f"{error}"
        raise UserError(f"{path} is corrupt ({reason or type(error).__name__}): {FIX}") from None
    train, val = indexes
    return DatasetInfo(facts["kind"], train, val, stats, facts["class_names"])


def pack_names(names: list[str]) -> NDArray[np.uint8]:
    """Names as bytes for an .npz: JSON, as a file's name may have any character in it."""
    return np.frombuffer(json.dumps(names).encode(), np.uint8)


def unpack_names(packed: NDArray[np.uint8]) -> list[str]:
    """What ``pack_names`` was given."""
    names: list[str] = json.loads(packed.tobytes())
    return names


def _index_cifar10(folder: Path, split: str) -> SplitIndex:
    data = read_cifar10(str(folder), split)
    labels, sizes = np.asarray(data.targets, np.int64), np.full((len(data), 2), 32, np.int64)
    names = [str(index) for index in range(len(data))]
    return SplitIndex(f"{folder}:{split}", names, labels, sizes, data.classes)


def _write_digits(folder: Path) -> Path:
    """Write the digits inside scikit-learn below ``folder`` as train/ and val/, once.

    They are 1,797 scans in ten classes (UCI's test set of optical digits), enlarged to 256 x 256,
    so that the paper's crop of 224 needs no resize.
    """
    if folder.is_dir():
        return folder
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError(
            "the embedded digits come with scikit-learn, which is not installed: "
            "pip install 'alexnet-dist[quickstart]', or give --data.root a folder of images"
        ) from None
    digits = load_digits()
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=".digits-", dir=folder.parent))
    order = np.random.Generator(np.random.Philox(2012)).permutation(len(digits.images))
    for position, index in enumerate(order):
        target = unfinished / ("val" if position < 500 else "train") / str(digits.target[index])
        target.mkdir(parents=True, exist_ok=True)
        pixels = (digits.images[index] * (255 / 16)).astype(np.uint8)
        image = Image.fromarray(pixels).resize((256, 256), Image.Resampling.BICUBIC)
        image.convert("RGB").save(target / f"{index:04d}.jpg", quality=90)
    try:
        unfinished.rename(folder)
    except OSError:  # another run was faster
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder
