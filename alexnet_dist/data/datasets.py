"""The images of a split: what is known of each, and how one is read.

An image is an index into the ``SplitIndex`` of its split; a dataset reads its encoded bytes or its
pixels. Which images there are is found out by index.py; other datasets than class folders are in
packed.py and cifar10.py.
"""

import os
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from alexnet_dist.data.formats import validate_bytes


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
