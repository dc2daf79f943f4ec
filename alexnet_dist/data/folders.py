"""What is an image, a class, a split and a hidden file: one rule for all commands.

Images lie in ROOT/SPLIT/CLASS/ and anywhere below it, as torchvision's ImageFolder finds them. What
lies there and is not used is counted by reason.
"""

import os
import random
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from alexnet_dist.errors import UserError

IMAGE_SUFFIXES = frozenset({".jpeg", ".jpg", ".jfif", ".png", ".webp", ".bmp"})
SPLITS = {"train": ("train",), "val": ("val", "valid", "validation", "test")}
"""What people call them, the best first: ImageNet's test images have no labels."""

PARQUET = ("*.parquet", "*/*.parquet")

_COMPANIONS = frozenset(
    {"__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "lost+found", "Thumbs.db", "desktop.ini"}
)
"""What a Mac, a NAS, Windows and file systems put beside people's files."""


class LeftOut(dict[str, list[Any]]):
    """What was found and is not used: by reason, as ".tif files", how many and the first three.

    It is plain data, for prepared.json and the event of a run's start.
    """

    def add(self, reason: str, path: str, count: int = 1) -> None:
        """Count ``path``, or ``count`` images in it."""
        self.merge({reason: [count, [path]]})

    def add_file(self, path: str) -> None:
        """Count a file that is no image by its name."""
        suffix = os.path.splitext(path)[1].lower()
        known = re.fullmatch(r"\.\w{1,12}", suffix)
        self.add(f"{suffix} files" if known else "files of no known kind", path)

    def merge(self, other: dict[str, list[Any]]) -> None:
        """Add what another one has counted."""
        for reason, (count, some) in other.items():
            before, shown = self.get(reason, [0, []])
            self[reason] = [before + count, (shown + some)[:3]]

    def __str__(self) -> str:
        return "; ".join(
            f"{count:,} {reason} ({', '.join(some)}{', ...' if count > len(some) else ''})"
            for reason, (count, some) in self.items()
        )


ImageFile = tuple[str, int, int]
"""An image's path below a folder, its bytes, and when it changed last, in ns; -1, -1 for a broken
link, or a folder in its place."""


class SplitFiles(NamedTuple):
    """The images of class folders.

    Attributes:
        classes: names of the folders, in the order of their labels.
        names: paths below the split's folder, by class.
        labels: [N].
        stamps: [N, 2], bytes and time of ``ImageFile``.
    """

    classes: list[str]
    names: list[str]
    labels: NDArray[np.int64]
    stamps: NDArray[np.int64]
    left_out: LeftOut


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is no data, whatever is in it."""
    return name in _COMPANIONS or (name.startswith(".") and bool(name.strip(".")))


def is_image_name(name: str) -> bool:
    """Whether a file of this name is an image: by its extension, and not hidden."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and not is_hidden(name)


def sort_classes(names: Iterable[str]) -> list[str]:
    """Classes in the order of their labels: by number where all names are numbers, else by name."""
    names = sorted(names)
    return sorted(names, key=int) if all(re.fullmatch("[0-9]+", name) for name in names) else names


def find_split(folder: Path, split: str) -> Path | None:
    """The folder of the "train" or the "val" images."""
    found = (folder / name for name in SPLITS[split])
    return next((path for path in found if path.is_dir()), None)


def count_unused_splits(folder: Path, left_out: LeftOut) -> None:
    """Count the folders of validation images that ``find_split`` passes over for a better one."""
    for path in [folder / name for name in SPLITS["val"] if (folder / name).is_dir()][1:]:
        left_out.add("folders of other splits", str(path))


def find_archives(root: Path, *patterns: str) -> list[Path]:
    """The files that match and are not hidden, sorted."""
    found = sorted(path for pattern in patterns for path in root.glob(pattern))
    return [path for path in found if not any(map(is_hidden, path.relative_to(root).parts))]


def find_form(root: Path) -> str | None:
    """In which form a folder holds ImageNet, as people have it; prepare reads all."""
    if find_archives(root, *PARQUET):
        return "parquet files"
    if (root / "train").is_dir():
        return "class folders"
    if (root / "ILSVRC/Data/CLS-LOC/train").is_dir():
        return "Kaggle's layout"
    if (root / "ILSVRC2012_img_train.tar").is_file():
        return "official tars"
    return "webdataset tars" if find_archives(root, "*.tar") else None


def list_images(folder: Path, left_out: LeftOut) -> list[ImageFile]:
    """The images anywhere below a folder, sorted by path."""
    return sorted(_walk(str(folder), "", frozenset(), left_out))


def list_split(split: Path, sample: int | None = None) -> SplitFiles:
    """The images of a split's class folders; or up to ``sample`` of them, drawn by chance.

    Raises:
        UserError: it has none, or one of them is empty.
    """
    with os.scandir(split) as entries:
        visible = sorted((e for e in entries if not is_hidden(e.name)), key=lambda e: e.name)
    classes = sort_classes(entry.name for entry in visible if entry.is_dir())
    left_out = LeftOut()
    for entry in visible:
        if not entry.is_dir() and is_image_name(entry.name):
            left_out.add("images outside of class folders", f"{split}/{entry.name}")
        elif not entry.is_dir():
            left_out.add_file(f"{split}/{entry.name}")
    drawn = list(range(len(classes)))
    if sample is not None:  # a class for 16 images: slow storage takes its time to list each
        drawn = sample_rows(len(classes), -(-sample // 16))
    listed = [classes[label] for label in drawn]
    counted = [LeftOut() for _ in listed]
    with ThreadPoolExecutor(16) as pool:  # network storage answers slowly, but many at once
        found = [*pool.map(list_images, [split / name for name in listed], counted)]
    for each in counted:
        left_out.merge(each)
    _refuse_empty(split, listed, [len(images) for images in found], left_out)
    names = [f"{c}/{name}" for c, files in zip(listed, found, strict=True) for name, *_ in files]
    labels = np.repeat(np.array(drawn), [*map(len, found)])
    stamps = np.array([stamp for files in found for _, *stamp in files], np.int64)
    files = SplitFiles(classes, names, labels, stamps, left_out)
    if sample is None:
        return files
    rows = sample_rows(len(names), sample)
    names = [names[row] for row in rows]
    return files._replace(names=names, labels=labels[rows], stamps=stamps[rows])


def sample_rows(count: int, sample: int) -> list[int]:
    """Rows of ``sample`` of ``count`` images, drawn by chance, in their order."""
    return sorted(random.sample(range(count), min(count, sample)))


def _refuse_empty(split: Path, classes: list[str], counts: list[int], left_out: LeftOut) -> None:
    kinds = ", ".join(sorted(IMAGE_SUFFIXES))
    besides = f"; there are {left_out}" if left_out else ""
    if classes == ["images"] or (not any(counts) and "images outside of class folders" in left_out):
        raise UserError(
            f"the images in {split} are not in folders of their classes: move them into "
            f"{split}/CLASS/; or put Kaggle's LOC_val_solution.csv or Tiny ImageNet's "
            "val_annotations.txt, which have their labels, beside them and run python -m "
            "alexnet_dist.prepare"
        )
    if not any(counts):
        raise UserError(
            f"{split} has no images ({kinds}) in folders of it: it wants one for each class, full "
            f"of images{besides}"
        )
    empty = [f"{split}/{name}" for name, count in zip(classes, counts, strict=True) if not count]
    if empty:
        raise UserError(
            f"there are no images ({kinds}) in {', '.join(empty[:5])}"
            f"{', ...' if len(empty) > 5 else ''}: add some, or remove the folder{besides}"
        )


def _walk(
    folder: str, below: str, parents: frozenset[tuple[int, int]], left_out: LeftOut
) -> list[ImageFile]:
    """The images in a folder and below, whose names begin with ``below``. Links are followed, but
    not those to one of the ``parents``."""
    status, found = os.stat(folder), []
    here = status.st_dev, status.st_ino
    if here in parents:
        return []
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if is_hidden(entry.name):
                continue
            name, is_image = below + entry.name, is_image_name(entry.name)
            if entry.is_dir():
                inner = _walk(entry.path, f"{name}/", parents | {here}, left_out)
                found += inner or [(name, -1, -1)] * is_image
            elif is_image and entry.is_file():
                status = entry.stat()
                found.append((name, status.st_size, status.st_mtime_ns))
            elif is_image and not os.path.exists(entry.path):
                found.append((name, -1, -1))
            elif is_image:
                left_out.add("devices, pipes and sockets", entry.path)
            else:
                left_out.add_file(entry.path)
    return found
