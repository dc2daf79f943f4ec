"""Which images there are: class folders in ImageNet's layout, packed folders as ``python -m
alexnet_dist.prepare`` writes them, CIFAR-10's own files, and the digits inside scikit-learn.

Each split gets an index of names, labels and sizes, made once and cached.
"""

import hashlib
import os
import tempfile
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from alexnet_dist.data.cifar10 import Cifar10Dataset, index_cifar10
from alexnet_dist.data.datasets import FolderDataset, ImageDataset, SplitIndex
from alexnet_dist.data.decode import read_size
from alexnet_dist.data.digits import DIGITS, write_digits
from alexnet_dist.data.folders import (
    SPLITS,
    LeftOut,
    SplitFiles,
    count_unused_splits,
    find_form,
    find_split,
    list_split,
    sample_rows,
)
from alexnet_dist.data.packed import (
    PREPARED,
    RawDataset,
    TarDataset,
    load_packed,
    pack_names,
    unpack_names,
)
from alexnet_dist.data.statistics import NO_STATS, ChannelStats, compute_stats
from alexnet_dist.errors import UserError

_BEGUN = (".partial", "train.index.npz")  # what there is of a packed folder before PREPARED
_CACHE_FORMAT = 5  # of cached indexes and statistics; raise it when their meaning changes

Progress = Callable[[str, int, int], None]
"""Is called with what is being done, images done, images in all."""

DATASETS: dict[str, type[ImageDataset]] = {
    "folders": FolderDataset,
    "cifar10": Cifar10Dataset,
    "shards": TarDataset,
    "pixels": RawDataset,
}


@dataclass(frozen=True)
class DatasetInfo:
    """A data set without its pixels: sent from the process that scanned it to all others.

    Attributes:
        kind: folders, cifar10, shards or pixels.
        stats: of the training images.
        class_names: of classes that have a name: {"n01440764": "tench, Tinca tinca"}.
        class_numbers: of each class, where the source has numbered them: {"n01440764": 0}.
        left_out: what was found beside the images.
        notes: what else people should know.
    """

    kind: str
    train: SplitIndex
    val: SplitIndex
    stats: ChannelStats
    class_names: dict[str, str] = field(default_factory=dict)
    class_numbers: dict[str, int] = field(default_factory=dict)
    left_out: LeftOut = field(default_factory=LeftOut)
    notes: list[str] = field(default_factory=list)

    @property
    def warnings(self) -> list[str]:
        """What people should know, a sentence each."""
        left_out = f"left out of the images: {self.left_out}"
        return [left_out, *self.notes] if self.left_out else self.notes

    @property
    def short_names(self) -> list[str]:
        """What to call each class: "tench" of "tench, Tinca tinca"; "crane (n02012849)" of two."""
        short = {c: self.class_names.get(c, c).partition(",")[0] for c in self.train.classes}
        short = {c: os.fsencode(s).decode(errors="replace") for c, s in short.items()}
        counts = Counter(short.values())
        return [f"{s} ({c})" if counts[s] > 1 else s for c, s in short.items()]

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


def scan_dataset(
    root: str | None,
    cache_dir: str,
    progress: Progress,
    *,
    only_val: bool = False,
    sample: int | None = None,
) -> DatasetInfo:
    """Find out what is at ``root``, and cache the answer.

    Args:
        root: a folder with train/ and val/ (or test/), each with a folder a class; a packed folder;
            one with CIFAR-10's own files; None or "digits" for the embedded digits.
        cache_dir: the folder for the digits, indices and statistics.
        only_val: look for validation images alone: in val/, or, where there is no train/ either, in
            class folders of ``root`` itself. There are no statistics.
        sample: find only so many images of each split, drawn anew each time; without statistics.

    Raises:
        UserError: there is no such folder, it is laid out otherwise, or its preparation has not
            ended.
    """
    cache = Path(cache_dir).expanduser()
    folder = write_digits(cache / DIGITS) if root in (None, DIGITS) else Path(str(root)).absolute()
    if not folder.is_dir():
        raise UserError(
            f"there is no folder {folder}: give --data.root the folder that holds train/ and val/"
        )
    if (folder / PREPARED).exists():
        facts, stats, (train, val) = load_packed(folder)
        info = DatasetInfo(facts["kind"], train, val, stats, facts["class_names"])
        left_out = LeftOut(facts.get("left_out", {}))
        info = replace(info, class_numbers=facts.get("class_numbers", {}), left_out=left_out)
        if sample is None:
            return info
        return replace(info, train=_sample(info.train, sample), val=_sample(info.val, sample))
    cache = cache / "indexes" / hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]
    if (folder / "cifar-10-batches-py").is_dir():
        train, val = (index_cifar10(folder, split) for split in ("train", "test"))
        numbers = {name: number for number, name in enumerate(train.classes)}
        info, key = DatasetInfo("cifar10", train, val, NO_STATS, class_numbers=numbers), b""
    else:
        info, key = _index_folders(folder, cache, progress, only_val, sample)
    if only_val:
        return info
    train, val = info.train, info.val
    if train.classes != val.classes:
        odd = sorted(set(train.classes) ^ set(val.classes))
        raise UserError(
            f"the classes of {train.folder} and {val.folder} differ ({', '.join(odd[:5])}"
            f"{', ...' if len(odd) > 5 else ''}): give both the same class folders"
        )
    if sample is not None:
        return info
    return replace(info, stats=_measure_colors(info, key, cache / "statistics.npz", progress))


def _sample(index: SplitIndex, count: int) -> SplitIndex:
    """``count`` images of a packed folder."""
    rows = sample_rows(len(index), count)
    arrays = {name: getattr(index, name)[rows] for name in ("labels", "sizes", "offsets")}
    return replace(index, names=[index.names[row] for row in rows], **arrays)


def _index_folders(
    folder: Path, cache: Path, progress: Progress, only_val: bool, sample: int | None
) -> tuple[DatasetInfo, bytes]:
    """The images of class folders; and what changes when a training image does."""
    indexes, left_out, notes, key = [], LeftOut(), [], b""
    count_unused_splits(folder, left_out)
    splits = {name: find_split(folder, name) for name in (("val",) if only_val else SPLITS)}
    if only_val and splits["val"] is None and find_form(folder) is None:
        splits["val"] = folder
    for name, split in splits.items():  # before hours of listing
        if split is None:
            raise UserError(_no_split(folder, name))
    for split in filter(None, splits.values()):
        files = list_split(split, sample)
        known = cache / f"{split.name}{'' if sample is None else '-sample'}.npz"
        sizes, said = _read_sizes(split, files, known, progress)
        indexes.append(SplitIndex(str(split), files.names, files.labels, sizes, files.classes))
        left_out.merge(files.left_out)
        notes += [note for note in said if note not in notes]
        key = key or files.stamps.tobytes()
    val = indexes[-1]
    nothing = replace(val, names=[], labels=val.labels[:0], sizes=val.sizes[:0])
    train = nothing if only_val else indexes[0]
    info = DatasetInfo("folders", train, val, NO_STATS, left_out=left_out, notes=notes)
    return info, key


def _read_sizes(
    split: Path, files: SplitFiles, path: Path, progress: Progress
) -> tuple[NDArray[np.int64], list[str]]:
    """The sizes [N, 2] of the images, from the cache at ``path`` for all that have not changed
    since; and what people should know."""
    names, known, notes = files.names, _load_arrays(path), []
    before = unpack_names(known["names"]) if known else []
    sizes = np.zeros((len(names), 2), np.int64)
    if before and len(before) == len(known["stamps"]) == len(known["sizes"]):
        row_before = {name: row for row, name in enumerate(before)}
        rows = np.array([row_before.get(name, -1) for name in names])
        kept = (rows >= 0) & (known["stamps"][rows] == files.stamps).all(1)
        sizes[kept] = known["sizes"][rows[kept]]
        readable = known["sizes"][rows].min(1) > 0
        if len(changed := np.flatnonzero((rows >= 0) & ~kept & readable)):
            notes.append(
                f"{len(changed):,} images in {split} have changed since they were indexed, as "
                f"{names[changed[0]]}: the index is renewed"
            )
    # one that could not be read is read again: its disk may have come back
    missing = np.flatnonzero(sizes.min(1) == 0).tolist()
    with ThreadPoolExecutor(16) as pool:  # network storage answers slowly, but many at once
        found = pool.map(read_size, [split / names[row] for row in missing])
        for done, (row, size) in enumerate(zip(missing, found, strict=True)):
            sizes[row] = size
            progress(f"indexing {split.name}", done + 1, len(missing))
    if missing or before != names:
        arrays = {"names": pack_names(names), "stamps": files.stamps, "sizes": sizes}
        notes += _save_arrays(path, arrays)
    return sizes, notes


def _measure_colors(info: DatasetInfo, key: bytes, path: Path, progress: Progress) -> ChannelStats:
    """Statistics of the training images; those in the cache, if they are of the same ``key``."""
    digest = hashlib.sha256(key + pack_names(info.train.names).tobytes()).hexdigest()
    known = _load_arrays(path)
    if known and str(known.pop("key")) == digest:
        return ChannelStats(**known)
    dataset, measured = DATASETS[info.kind](info.train), partial(progress, "measuring colors")
    stats = compute_stats(len(info.train), dataset.read, measured)
    _save_arrays(path, {"key": np.array(digest), **vars(stats)})
    return stats


def _no_split(folder: Path, name: str) -> str:
    """What to do with a folder that has no such split."""
    form = find_form(folder)
    if any((folder / begun).exists() for begun in _BEGUN):
        problem = "is not prepared to its end: run"
        return f"{folder} {problem} the same python -m alexnet_dist.prepare again, and it goes on"
    if form not in (None, "class folders"):
        command = f"python -m alexnet_dist.prepare {folder} --out DIR"
        return f"{folder} holds {form}: run {command}, and give --data.root DIR"
    if name == "val" and form:
        fix = "add a folder val/ with the same class folders as train/"
        return f"{folder} has no validation images: {fix}"
    layout = "data.root is the folder that holds train/ and val/, each with a folder a class"
    inner = next((path for path in sorted(folder.glob("*")) if find_split(path, name)), None)
    hint = f"; give --data.root {inner}" if inner else ""
    return f"{folder} has no folder {name}/: {layout}{hint}"


def _load_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """What ``_save_arrays`` has written; nothing, where that is gone or corrupt."""
    with suppress(OSError, ValueError, EOFError, KeyError, BadZipFile), np.load(path) as saved:
        arrays = dict(saved)
        if arrays.pop("format") == _CACHE_FORMAT:
            return arrays
    return {}


def _save_arrays(path: Path, arrays: dict[str, Any]) -> list[str]:
    """Write arrays into the cache; where that is impossible, what to do about it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as partial:
            np.savez(f"{partial}/{path.name}", format=_CACHE_FORMAT, **arrays)
            os.replace(f"{partial}/{path.name}", path)
    except OSError as error:
        return [
            f"the index of the images is not kept, as {path.parent} cannot be written "
            f"({error.strerror}): give another --data.cache_dir"
        ]
    return []
