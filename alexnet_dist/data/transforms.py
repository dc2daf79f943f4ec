"""The arithmetic on pixels: what every engine does, and the reference that each is held to."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from alexnet_dist.data.plan import SampleParams
from alexnet_dist.data.statistics import ChannelStats

Colour = Literal["none", "source", "paper"]

# of ImageNet's training set on pixels of 0..1, as torchvision's weights expect them
IMAGENET_MEAN = np.array([0.485, 0.456, 0.406])
IMAGENET_STD = np.array([0.229, 0.224, 0.225])


@dataclass(frozen=True)
class Normalization:
    """How pixels of 0..255 become the network's input: (x + basis @ coefficients - mean) / std.

    Attributes:
        mean, std: [3].
        basis: [3, 3], a column for each colour coefficient of standard deviation 1; zeros where
            there is no noise.
        side: side of the finished image in pixels.
        shrinks: whether an image with noise of strength s is divided by 1 + s, too.
    """

    mean: NDArray[np.float64]
    std: NDArray[np.float64]
    basis: NDArray[np.float64]
    side: int
    shrinks: bool = False

    def means(self, draws: SampleParams) -> NDArray[np.float32]:
        """[b, 3]: the mean to subtract from each image; a colour shift is but another mean."""
        return np.asarray(self.mean - draws.strength * draws.colours @ self.basis.T, np.float32)

    def stds(self, strength: float) -> NDArray[np.float32]:
        """[3]: what the images are divided by, under noise of ``strength``."""
        return np.asarray(self.std * (1 + strength * self.shrinks), np.float32)

    def seen(self, images: Tensor, strength: float = 0.0) -> NDArray[np.uint8]:
        """Finished images [b, 3, H, W] as people see them, [b, H, W, 3]; colour noise stays."""
        pixels = images.float().cpu().numpy().transpose(0, 2, 3, 1)
        pixels = pixels * self.stds(strength) + self.mean
        return np.rint(pixels.clip(0, 255)).astype(np.uint8)


def build_normalization(
    reads: Literal["centered", "imagenet"],
    statistics: ChannelStats,
    *,
    side: int,
    colour: Colour = "none",
) -> Normalization:
    """The arithmetic for a network that ``reads`` centred or ImageNet's pixels.

    Args:
        colour: noise along the colours' principal directions. "source": coefficients times the
            standard deviations of the colours, and the image divided by 1 + their strength (the
            authors' program, convdata_jpeg.py). "paper": times the eigenvalues, as Krizhevsky et
            al. 2012, section 4.1 prints it, on pixels of 0..1.
    """
    mean, std = (
        (statistics.mean, np.ones(3))
        if reads == "centered"
        else (255 * IMAGENET_MEAN, 255 * IMAGENET_STD)
    )
    basis = np.zeros((3, 3))
    if colour == "source":
        basis = statistics.eigenvectors * np.sqrt(statistics.eigenvalues)
    elif colour == "paper":
        basis = 255 * statistics.eigenvectors * (statistics.eigenvalues / 255**2)
    return Normalization(mean, std, basis, side, shrinks=colour == "source")


def crop_resize_flip(image: Tensor, box: NDArray[np.int64], flip: bool, side: int) -> Tensor:
    """An uint8 image [3, H, W], cut to ``box``, resized to [3, side, side] and perhaps flipped.

    Bilinear with antialiasing, rounded to whole values, in every engine.
    """
    top, left, height, width = (int(x) for x in box)
    image = image[:, top : top + height, left : left + width]
    if (height, width) != (side, side):
        image = resize(image, side)
    return image.flip(-1) if flip else image


def resize(image: Tensor, side: int) -> Tensor:
    """An uint8 image [3, H, W] as [3, side, side]; channels last, if it is so itself."""
    batch = image.permute(1, 2, 0)[None].permute(0, 3, 1, 2)  # image[None] has no such strides
    return F.interpolate(batch, [side, side], mode="bilinear", antialias=True)[0]


def normalize(images: Tensor, means: Tensor, std: Tensor) -> Tensor:
    """uint8 [b, 3, H, W] to float32, channels last; ``means`` [b, 3], ``std`` [3]."""
    result = images.to(torch.float32, memory_format=torch.channels_last)
    count, _, height, width = images.shape
    # by the line: a loop over three colours would take half as long again on CPUs
    lines = result.permute(0, 2, 3, 1).view(count, height, width * 3)
    lines.sub_(means.repeat(1, width)[:, None]).mul_((1 / std).repeat(width))
    return result
