"""Prepared folders, as `python -m alexnet_dist.prepare` leaves them:

    DIR/prepared.json             what is there; written last
    DIR/SPLIT.index.npz           names, labels and sizes of the images, and where each lies
    DIR/SPLIT-00000.tar, ...      kind "shards": encoded images, which webdataset reads, too
    DIR/SPLIT.pixels              kind "pixels": uint8 [N, size, size, 3]
    DIR/statistics.npz            what the training images are like

The images are in the order in which a folder of them is read, so that the plan gives the same ones
from any form.
"""

import json
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from alexnet_dist.data.formats import validate_bytes
from alexnet_dist.data.index import DatasetInfo, SplitIndex
from alexnet_dist.data.statistics import ChannelStats
from alexnet_dist.errors import UserError

FORMAT = 1  # of the folder; raise it when its meaning changes
PREPARED = "prepared.json"
_BEGUN = ("*-00000.tar*", "*.pixels*", "*.index.npz", "*.partial*", ".partial*")
_MEND = "copy it again from where it was prepared, or remove the folder and prepare it anew"
_PLACES = {"shards": ("shards", "offsets", "lengths"), "pixels": ("rows",)}


def is_packed_dataset(folder: Path) -> bool:
    """Whether this is a prepared folder.

    Raises:
        Failure: it was to become one.
    """
    if (folder / PREPARED).exists():
        return True
    plain = (folder / "train").is_dir()
    if not plain and any(found for pattern in _BEGUN for found in folder.glob(pattern)):
        raise UserError(
            f"the preparation of {folder} did not finish: run the same python -m "
            "alexnet_dist.prepare again, and it goes on"
        )
    return False


def load_packed_info(folder: Path) -> DatasetInfo:
    """What a prepared folder says of its images.

    Raises:
        Failure: it is of another version, or damaged.
    """
    with _whole(folder / PREPARED) as path:
        facts = json.loads(path.read_text())
        written = facts["format"]
        if written != FORMAT:
            raise UserError(
                f"{path} is of format {written}, this version reads {FORMAT}: take the version of "
                "alexnet_dist that wrote it, or prepare the images anew"
            )
        train, val = (_index(folder, facts, split) for split in ("train", "val"))
        titles = dict(facts["class_names"])
    with _whole(folder / "statistics.npz") as path, np.load(path, allow_pickle=False) as kept:
        statistics = ChannelStats(*(kept[name] for name in ChannelStats.__annotations__))
    return DatasetInfo(facts["kind"], train, val, statistics, titles)


class TarDataset:
    """Encoded images in tar files."""

    is_decoded = False

    def __init__(self, index: SplitIndex) -> None:
        _check(index)
        _allow_files(len(index.files))
        self.index = index
        self._files = [open(path, "rb", buffering=0) for path in _paths(index)]  # noqa: SIM115

    def read(self, index: int) -> NDArray[np.uint8]:
        file, offset, length = self.index.offsets[index].tolist()
        # no memory map: a page that is not there yet would be waited for by all threads
        encoded = os.pread(self._files[file].fileno(), length, offset)
        return validate_bytes(np.frombuffer(encoded, np.uint8))

    def path(self, index: int) -> str:
        file = _paths(self.index)[self.index.offsets[index, 0]]
        return f"{file}: {self.index.names[index]}"

    def __reduce__(self) -> tuple[type["TarDataset"], tuple[SplitIndex]]:
        return TarDataset, (self.index,)


class RawDataset:
    """Raw pixels in one file, seen through a memory map.

    Attributes:
        pixels: [N, size, size, 3], in the order of the file: image n is that of its place.
    """

    is_decoded = True

    def __init__(self, index: SplitIndex) -> None:
        _check(index)
        self.index = index
        pixels = np.memmap(_paths(index)[0], np.uint8, "r").view(np.ndarray)
        self.pixels = pixels.reshape(-1, *index.sizes[0].tolist(), 3)

    def read(self, index: int) -> NDArray[np.uint8]:
        return self.pixels[self.index.offsets[index, 0]]

    def path(self, index: int) -> str:
        return f"{_paths(self.index)[0]}: {self.index.names[index]}"

    def __reduce__(self) -> tuple[type["RawDataset"], tuple[SplitIndex]]:
        return RawDataset, (self.index,)


def _index(folder: Path, facts: dict[str, Any], split: str) -> SplitIndex:
    about, places = facts["splits"][split], _PLACES[facts["kind"]]
    files = {file["name"]: file["bytes"] for file in about["files"]}
    with _whole(folder / f"{split}.index.npz") as path, np.load(path, allow_pickle=False) as kept:
        names = kept["names"].tobytes().decode().split("\n")
        labels, sizes = kept["labels"], kept["sizes"]
        where = np.column_stack([kept[name] for name in places])
        if not about["images"] == len(names) == len(labels) == len(sizes) == len(where):
            raise ValueError(f"it is not of the {about['images']} images of {PREPARED}")
    index = SplitIndex(str(folder / split), names, labels, sizes, facts["classes"], files, where)
    _check(index)
    return index


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """For reading a file: what is wrong with it, as a sentence."""
    try:
        yield path
    except (OSError, ValueError, KeyError, TypeError, EOFError, BadZipFile) as error:
        reason = error.strerror if isinstance(error, OSError) else f"{error}"
        raise UserError(f"{path} is damaged ({reason or type(error).__name__}): {_MEND}") from None


def _paths(index: SplitIndex) -> list[Path]:
    return [Path(index.folder).parent / name for name in index.files]


def _check(index: SplitIndex) -> None:
    """See to it that the files are there, on this machine, in their full length."""
    for path, size in zip(_paths(index), index.files.values(), strict=True):
        try:
            found = path.stat().st_size
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}): {_MEND}") from None
        if found != size:
            raise UserError(f"{path} has {found:,} bytes where {PREPARED} says {size:,}: {_MEND}")


def _allow_files(count: int) -> None:
    """Let this process open ``count`` files more: systems allow a thousand unless asked."""
    allowed, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = allowed + count if most == resource.RLIM_INFINITY else min(allowed + count, most)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))
