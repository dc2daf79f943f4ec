"""The images of a data set, from class folders, tar files, raw pixels or CIFAR-10's own files.

An image is an index into the ``SplitIndex`` of its split; a dataset reads its encoded bytes or its
pixels. Which images there are is found out by index.py.
"""

import functools
import os
import resource
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alexnet_dist.data.formats import validate_bytes
from alexnet_dist.errors import UserError

PREPARED = "prepared.json"
"""What a packed folder, as prepare writes it, says of itself."""

FIX = "copy it again from where it was prepared, or remove the folder and prepare it from scratch"

MAX_OPEN_FILES = 512  # of the thousand that a process may have open; fewer where it may have fewer


@dataclass(frozen=True)
class SplitIndex:
    """The images of one split.

    Attributes:
        folder: where they are.
        names: paths below ``folder``, or what tells images of one file apart.
        labels: [N], indices of classes.
        sizes: [N, 2], stored height and width in pixels; 0 where the header cannot be read.
        classes: names, in the order of their indices.
        files: of a packed folder: the files that hold the images, and their bytes.
        offsets: of a packed folder: [N, 3], index of the file, offset and length in bytes.
    """

    folder: str
    names: list[str]
    labels: NDArray[np.int64]
    sizes: NDArray[np.int64]
    classes: list[str]
    files: dict[str, int] = field(default_factory=dict)
    offsets: NDArray[np.int64] = field(default_factory=lambda: np.zeros((0, 0), np.int64))

    def __len__(self) -> int:
        return len(self.names)

    def corrupt_indices(self) -> list[int]:
        """Images whose header cannot be read."""
        return np.flatnonzero(self.sizes.min(1) == 0).tolist()


class ImageDataset(ABC):
    """The images of a split, opened from its index alone, by every process for itself.

    Attributes:
        is_decoded: whether ``read`` returns pixels.
    """

    is_decoded = False

    def __init__(self, index: SplitIndex) -> None:
        self.index = index

    @abstractmethod
    def read(self, index: int) -> NDArray[np.uint8]:
        """An image's encoded bytes, or its pixels [H, W, 3]. Raises OSError where they cannot be
        read, or are no complete image."""

    def path(self, index: int) -> str:
        """What to call the image in messages."""
        return f"{self.index.folder}/{self.index.names[index]}"


class FolderDataset(ImageDataset):
    """Image files below a folder."""

    def read(self, index: int) -> NDArray[np.uint8]:
        file = os.open(self.path(index), os.O_RDONLY)  # numpy's fromfile takes twice as long
        try:
            encoded = os.read(file, os.fstat(file).st_size)
        finally:
            os.close(file)
        return validate_bytes(np.frombuffer(encoded, np.uint8))


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


class Cifar10Dataset(ImageDataset):
    """A split of CIFAR-10's own files, whose pixels are held in memory."""

    is_decoded = True

    def __init__(self, index: SplitIndex) -> None:
        super().__init__(index)
        folder, _, split = index.folder.rpartition(":")
        self._pixels: NDArray[np.uint8] = read_cifar10(folder, split).data

    def read(self, index: int) -> NDArray[np.uint8]:
        return self._pixels[index]


def read_cifar10(folder: str, split: str) -> Any:
    """torchvision's dataset of the split "train" or "test".

    Raises:
        UserError: the files below ``folder`` are corrupt.
    """
    from torchvision.datasets import CIFAR10

    try:
        return CIFAR10(folder, train=split == "train")
    except RuntimeError:
        raise UserError(
            f"CIFAR-10 below {folder} is corrupt: unpack its archive there again"
        ) from None


DATASETS: dict[str, type[ImageDataset]] = {
    "folders": FolderDataset,
    "cifar10": Cifar10Dataset,
    "shards": TarDataset,
    "pixels": RawDataset,
}
"""By the kinds of index.py."""


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
