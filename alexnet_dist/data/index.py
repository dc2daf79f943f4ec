"""What is known of images without their pixels, and what every source of them offers."""

import hashlib
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from alexnet_dist.data.statistics import ChannelStats


@dataclass(frozen=True)
class SplitIndex:
    """The images of one split.

    Attributes:
        folder: where they lie.
        names: paths below ``folder``; for files that hold many images, what tells them apart.
        labels: [N], indices of classes.
        sizes: [N, 2], stored height and width in pixels; 0 where the header cannot be read.
        classes: names, in the order of their indices.
        files: of a prepared folder: the files that hold the images, and their bytes.
        offsets: of a prepared folder, where in them: [N, 3], index of the file, offset and length
            in bytes; or, of raw pixels, [N, 1], row of the array.
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
        """Numbers of the images whose header cannot be read."""
        return np.flatnonzero(self.sizes.min(1) == 0).tolist()


@dataclass(frozen=True)
class DatasetInfo:
    """All that is known of a data set without its pixels: sent from the process that made it to
    all others, and enough to open it.

    Attributes:
        class_names: what people call the classes, for those that have such a name: {"n01440764":
            "tench, Tinca tinca"}.
    """

    kind: str
    train: SplitIndex
    val: SplitIndex
    stats: ChannelStats
    class_names: dict[str, str] = field(default_factory=dict)

    @property
    def dataset_hash(self) -> str:
        """A digest of which images there are, wherever and in whatever form they lie."""
        digest = hashlib.sha256()
        for index in (self.train, self.val):
            digest.update("\n".join(index.names).encode())
            digest.update(index.labels.tobytes())
            digest.update(index.sizes.tobytes())
        return digest.hexdigest()[:16]


class ImageDataset(Protocol):
    """Images by index.

    Attributes:
        is_decoded: whether they are pixels, which need no decoder.
    """

    index: SplitIndex
    is_decoded: bool

    def read(self, index: int) -> NDArray[np.uint8]:
        """The encoded bytes of an image, or its raw pixels [H, W, 3]. Raises OSError where they
        cannot be had, or are not those of a whole image."""
        ...

    def path(self, index: int) -> str:
        """What to call the image when speaking to people."""
        ...
