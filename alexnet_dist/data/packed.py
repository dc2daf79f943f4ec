"""Packed folders, as ``python -m alexnet_dist.prepare`` writes them: images in a few large files.

    DIR/prepared.json             what is there, and the training images' statistics; written last
    DIR/SPLIT.index.npz           names, labels and sizes of the images, and where each is
    DIR/SPLIT-00000.tar, ...      kind "shards": encoded images, which webdataset reads, too
    DIR/SPLIT.pixels              kind "pixels": uint8 [N, size, size, 3]

Their index is in the order of class folders, so that the plan gives the same images from any form.
"""

import functools
import json
import os
import resource
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from alexnet_dist.data.datasets import ImageDataset, SplitIndex
from alexnet_dist.data.folders import SPLITS
from alexnet_dist.data.formats import validate_bytes
from alexnet_dist.data.statistics import ChannelStats
from alexnet_dist.errors import UserError

PREPARED = "prepared.json"
"""What a packed folder, as prepare writes it, says of itself."""

FIX = "copy it again from where it was prepared, or remove the folder and prepare it from scratch"

PACKED_FORMAT = 2  # raise it when the meaning of these files changes
MAX_OPEN_FILES = 512  # of the thousand that a process may have open; fewer where it may have fewer


class _PackedDataset(ImageDataset):
    """Images in the files of a packed folder."""

    def __init__(self, index: SplitIndex) -> None:
        super().__init__(index)
        self._paths = check_files(index)

    def path(self, index: int) -> str:
        return f"{self._paths[self.index.offsets[index, 0]]}: {self.index.names[index]}"


class TarDataset(_PackedDataset):
    """Encoded images in tar files."""

    def __init__(self, index: SplitIndex) -> None:
        super().__init__(index)
        most = min(resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4, MAX_OPEN_FILES)
        self._open = functools.lru_cache(most)(functools.partial(open, buffering=0))

    def read(self, index: int) -> NDArray[np.uint8]:
        number, offset, length = self.index.offsets[index].tolist()
        # kept here: the cache may drop it meanwhile, or keep one that another thread has opened
        file = self._open(self._paths[number], "rb")
        # no memory map: a page that is not there yet would be waited for by all threads
        encoded = os.pread(file.fileno(), length, offset)
        return validate_bytes(np.frombuffer(encoded, np.uint8))


class RawDataset(_PackedDataset):
    """Raw pixels in one file, seen through a memory map.

    Attributes:
        pixels: uint8 [N, H, W, 3], in the order of the file.
        rows: [N], of the images in ``pixels``.
    """

    is_decoded = True

    def __init__(self, index: SplitIndex) -> None:
        super().__init__(index)
        pixels = np.memmap(self._paths[0], np.uint8, "r").view(np.ndarray)
        self.pixels = pixels.reshape(-1, *index.sizes[0].tolist(), 3)
        self.rows = index.offsets[:, 1] // self.pixels[0].nbytes

    def read(self, index: int) -> NDArray[np.uint8]:
        return self.pixels[self.rows[index]]


def load_packed(folder: Path) -> tuple[dict[str, Any], ChannelStats, list[SplitIndex]]:
    """What PREPARED says, its statistics, and the training and validation images.

    Raises:
        UserError: a file is missing or corrupt, or of another format.
    """
    path, indexes = folder / PREPARED, []
    try:
        facts = json.loads(path.read_text())
        if facts["format"] != PACKED_FORMAT:
            raise UserError(
                f"{path} is of format {facts['format']}, this version reads {PACKED_FORMAT}: "
                "take the version of alexnet_dist that wrote it, or prepare the images from scratch"
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
    return facts, stats, indexes


def check_files(index: SplitIndex) -> list[Path]:
    """The paths of a packed folder's files. Raises UserError unless they are there, on this
    machine, in their full length."""
    paths = [Path(index.folder).parent / name for name in index.files]
    for path, size in zip(paths, index.files.values(), strict=True):
        try:
            found = path.stat().st_size
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}): {FIX}") from None
        if found != size:
            raise UserError(f"{path} has {found:,} bytes where {PREPARED} says {size:,}: {FIX}")
    return paths


def pack_names(names: list[str]) -> NDArray[np.uint8]:
    """Names as bytes for an .npz: JSON, as a file's name may have any character in it."""
    return np.frombuffer(json.dumps(names).encode(), np.uint8)


def unpack_names(packed: NDArray[np.uint8]) -> list[str]:
    """What ``pack_names`` was given."""
    names: list[str] = json.loads(packed.tobytes())
    return names
