"""The plain loader: decoding by Pillow, as torchvision's folders do it, and resizing by torch.

For machines without DALI, and the reference that the other loaders are tested against.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from alexnet_dist.data.datasets import ImageDataset
from alexnet_dist.data.decode import SIZE_MISMATCH, decode
from alexnet_dist.data.loader import Batch, Loader, to_device
from alexnet_dist.data.normalization import Normalization, normalize
from alexnet_dist.data.plan import Ints, SampleParams


class TorchLoader(Loader):
    """Loads samples image by image, in threads: Pillow and torch work outside of Python's lock."""

    def __init__(self, dataset: ImageDataset, normalization: Normalization, **options: Any) -> None:
        super().__init__(dataset, normalization, **options)
        torch.get_num_threads()  # this thread keeps it; the readers would each have so many threads
        self._readers = ThreadPoolExecutor(self._threads, "read", torch.set_num_threads, (1,))
        self._pixels = lru_cache(self._threads)(self._decode)  # the ten crops of an image share it
        self.description = f"Pillow and torch, {self._threads} threads"

    def _load(self, samples: SampleParams) -> Batch:
        size = self.normalization.size
        crops_of_an_image = int((samples.indices == samples.indices[:1]).sum())
        crops = self._read_each(samples, self._read, chunk=max(crops_of_an_image, 1))
        images = torch.stack(crops) if crops else torch.empty(0, 3, size, size, dtype=torch.uint8)
        normalized = normalize(
            to_device(images, self.device),
            to_device(self.normalization.means(samples), self.device),
            to_device(self.normalization.scales(samples), self.device),
        )
        labels = to_device(self._labels[samples.indices], self.device)
        return Batch(normalized, labels, samples.indices)

    def _read(self, index: int, box: Ints, flip: bool) -> Tensor:
        """A crop, uint8 [3, size, size]."""
        return crop_resize_flip(self._pixels(index), box, flip, self.normalization.size)

    def _decode(self, index: int) -> Tensor:
        """An image, uint8 [3, H, W]."""
        image = self.dataset.read(index)
        pixels = torch.from_numpy(np.array(image if self.dataset.is_decoded else decode(image)))
        if pixels.shape[:2] != tuple(self.dataset.index.sizes[index]):
            raise OSError(SIZE_MISMATCH)
        return pixels.permute(2, 0, 1)


def crop_resize_flip(image: Tensor, box: Ints, flip: bool, size: int) -> Tensor:
    """The ``box`` [4] of an uint8 image [3, H, W] as uint8 [3, size, size].

    Bilinear with antialiasing, rounded to integers.
    """
    top, left, height, width = (int(x) for x in box)
    image = image[:, top : top + height, left : left + width]
    if (height, width) != (size, size):
        image = F.interpolate(image[None], [size, size], mode="bilinear", antialias=True)[0]
    return image.flip(-1) if flip else image
