"""CIFAR-10 from its own files, which torchvision reads."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alexnet_dist.data.datasets import ImageDataset, SplitIndex
from alexnet_dist.errors import UserError


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


def index_cifar10(folder: Path, split: str) -> SplitIndex:
    """The images of a split: 32 x 32 pixels, named by their place in the files."""
    data = read_cifar10(str(folder), split)
    labels, sizes = np.asarray(data.targets, np.int64), np.full((len(data), 2), 32, np.int64)
    names = [str(index) for index in range(len(data))]
    return SplitIndex(f"{folder}:{split}", names, labels, sizes, data.classes)
