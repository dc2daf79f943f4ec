"""From pixels to the network's input: the arithmetic of every loader."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alexnet_dist.data.plan import SampleParams
from alexnet_dist.data.statistics import ChannelStats

PcaNoise = Literal["none", "source", "paper"]

# of ImageNet's training set on pixels of 0..1, as torchvision's weights expect them
IMAGENET_MEAN = np.array([0.485, 0.456, 0.406])
IMAGENET_STD = np.array([0.229, 0.224, 0.225])


@dataclass(frozen=True)
class Normalization:
    """How pixels of 0..255 become the network's input: (x + pca_basis @ coeffs - mean) / std.

    Attributes:
        mean, std: [3].
        pca_basis: [3, 3], a column for each coefficient of standard deviation 1; zeros where there
            is no noise.
        size: height and width of the network's input in pixels.
        rescale_by_noise: whether an image under noise of standard deviation s is divided by 1 + s.
    """

    mean: NDArray[np.float64]
    std: NDArray[np.float64]
    pca_basis: NDArray[np.float64]
    size: int
    rescale_by_noise: bool = False

    def means(self, samples: SampleParams) -> NDArray[np.float32]:
        """[b, 3], to subtract from each image: PCA noise is but another mean."""
        noise = samples.pca_noise_std * samples.pca_coeffs @ self.pca_basis.T
        return np.asarray(self.mean - noise, np.float32)

    def stds(self, pca_noise_std: float) -> NDArray[np.float32]:
        """[3], what images are divided by."""
        return np.asarray(self.std * (1 + pca_noise_std * self.rescale_by_noise), np.float32)

    def scales(self, samples: SampleParams) -> NDArray[np.float32]:
        """[3], what images are multiplied by."""
        return np.reciprocal(self.stds(samples.pca_noise_std))

    def to_uint8_images(self, images: Tensor, pca_noise_std: float = 0.0) -> NDArray[np.uint8]:
        """Normalized images [b, 3, H, W] as images [b, H, W, 3] for people; PCA noise stays."""
        pixels = images.float().cpu().numpy().transpose(0, 2, 3, 1)
        pixels = pixels * self.stds(pca_noise_std) + self.mean
        return np.rint(pixels.clip(0, 255)).astype(np.uint8)


def build_normalization(
    pixels: Literal["centered", "imagenet"],
    stats: ChannelStats,
    *,
    size: int,
    pca_noise: PcaNoise = "none",
) -> Normalization:
    """The normalization of a network that reads centered ``pixels``, or torchvision's.

    Args:
        pca_noise: along the principal directions of RGB values. "source": the coefficients times
            the standard deviations along them, and the image divided by 1 + pca_noise_std (the
            authors' program, convdata_jpeg.py). "paper": times the eigenvalues, as Krizhevsky et
            al. 2012, section 4.1 prints it, on pixels of 0..1.
    """
    mean, std = (
        (stats.mean, np.ones(3))
        if pixels == "centered"
        else (255 * IMAGENET_MEAN, 255 * IMAGENET_STD)
    )
    basis = np.zeros((3, 3))
    if pca_noise == "source":
        basis = stats.eigenvectors * np.sqrt(stats.eigenvalues)
    elif pca_noise == "paper":
        basis = 255 * stats.eigenvectors * (stats.eigenvalues / 255**2)
    return Normalization(mean, std, basis, size, rescale_by_noise=pca_noise == "source")


def normalize(images: Tensor, means: Tensor, scales: Tensor) -> Tensor:
    """uint8 images [b, 3, H, W] as (pixel - mean) * scale, float32, channels last.

    Args:
        means, scales: [b, 3] and [3]; scales are reciprocals of standard deviations.
    """
    images = images.to(torch.float32, memory_format=torch.channels_last)
    return images.sub_(means[:, :, None, None]).mul_(scales[:, None, None])
