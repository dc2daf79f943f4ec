"""Which crop of which image is in which batch.

Everything random about the data is a function of (seed, epoch, position): the order of the images,
the crop box, the flip, the coefficients of the PCA noise. Loaders only carry it out. A global batch
of B images is the positions step * B to (step + 1) * B - 1 of the epoch's permutation, of which
data-parallel rank r of R takes every R-th from the r-th on. So the order does not depend on the
number of processes, and a run resumes in mid-epoch from two integers.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
TrainCrop = Literal["paper", "chunked", "random_resized"]

CROP_CHUNK = 32
"""Consecutive images that the authors' program crops and flips alike (convdata_jpeg.py)."""

RANDOMS_PER_SAMPLE = 32
"""Uniform numbers for each position: 0 the flip, 1 to 4 the PCA coefficients, 5 and 6 the box's
top-left corner, 8 to 27 ten attempts at a random resized crop; the others are spare. Philox makes
four for each value of its counter."""


@dataclass(frozen=True)
class SampleParams:
    """A batch before it is loaded: b images, and what is to be done to each.

    Attributes:
        indices: [b], of the images in their split.
        crop_boxes: [b, 4], top, left, height, width in pixels of the stored image.
        flips: [b], bool.
        pca_coeffs: [b, 3], coefficients of the PCA noise, N(0, 1).
        crop_boxes_for: draws the boxes [b, 4] of any images [b] from this batch's random numbers.
        pca_noise_std: standard deviation that the coefficients are scaled to; 0 for no noise.
    """

    indices: Ints
    crop_boxes: Ints
    flips: NDArray[np.bool_]
    pca_coeffs: Floats
    crop_boxes_for: Callable[[Ints], Ints]
    pca_noise_std: float = 0.0

    def with_indices(self, indices: Ints) -> "SampleParams":
        """Other images [b] under the same random numbers."""
        return replace(self, indices=indices, crop_boxes=self.crop_boxes_for(indices))

    def select(self, mask: NDArray[np.bool_]) -> "SampleParams":
        """The samples where ``mask`` [b] is True. Their indices cannot be replaced any more."""
        return replace(
            self,
            indices=self.indices[mask],
            crop_boxes=self.crop_boxes[mask],
            flips=self.flips[mask],
            pca_coeffs=self.pca_coeffs[mask],
        )


def central_square(sizes: Ints, fraction: float) -> tuple[Ints, Ints]:
    """Side of the crop [b] in the central square, and top-left corner [b, 2] of that square."""
    short = sizes.min(1)
    side = np.maximum(np.rint(short * fraction).astype(np.int64), 1)
    return side, (sizes - short[:, None]) // 2


def random_crop_boxes(sizes: Ints, fraction: float, position: Floats) -> Ints:
    """A square of ``fraction`` of the shorter side anywhere in the central square, [b, 4].

    ``position`` [b, 2] is uniform in [0, 1). On a stored 256 x 256 image at 224/256 these are the
    crops of Krizhevsky et al. 2012, section 4.1.
    """
    side, square = central_square(sizes, fraction)
    room = sizes.min(1) - side + 1
    corner = square + (position * room[:, None]).astype(np.int64)
    return np.column_stack([corner, side, side])


def random_resized_crop_boxes(
    sizes: Ints,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    attempts: Floats,
    position: Floats,
) -> Ints:
    """Boxes [b, 4] of random area and aspect ratio, as torchvision's RandomResizedCrop.

    ``scale`` bounds the area relative to the image's, ``ratio`` width over height. The first of
    ``attempts`` [b, n, 2] that fits is taken, else the largest centered box of an allowed ratio.
    ``position`` [b, 2] and the attempts are uniform in [0, 1).
    """
    height, width = sizes[:, 0], sizes[:, 1]
    area = (height * width)[:, None] * (scale[0] + attempts[..., 0] * (scale[1] - scale[0]))
    low, high = np.log(ratio[0]), np.log(ratio[1])
    aspect = np.exp(low + attempts[..., 1] * (high - low))
    w = np.rint(np.sqrt(area * aspect)).astype(np.int64)
    h = np.rint(np.sqrt(area / aspect)).astype(np.int64)
    fits = (w > 0) & (h > 0) & (w <= width[:, None]) & (h <= height[:, None])
    first = fits.argmax(1)
    row = np.arange(len(sizes))
    h, w, found = h[row, first], w[row, first], fits[row, first]
    h = np.where(found, h, np.minimum(height, np.rint(width / ratio[0]).astype(np.int64)))
    w = np.where(found, w, np.minimum(width, np.rint(height * ratio[1]).astype(np.int64)))
    h, w = np.maximum(h, 1), np.maximum(w, 1)
    position = np.where(found[:, None], position, 0.5)
    top = (position[:, 0] * (height - h + 1)).astype(np.int64)
    left = (position[:, 1] * (width - w + 1)).astype(np.int64)
    return np.column_stack([top, left, h, w])


@dataclass
class SamplePlan:
    """The samples of a training run over N images.

    Attributes:
        sizes: [N, 2], height and width of the stored images in pixels; 0 where unreadable.
        batch_size: images in a global batch, B.
        crop: paper, chunked (the same position and flip for CROP_CHUNK images in a row), or
            random_resized.
        crop_fraction: side of the paper's crop over that of the central square, 224/256.
        scale, ratio: of random resized crops.
        pca_noise_std: of the PCA noise after so many (fractional) epochs.
    """

    sizes: Ints
    batch_size: int
    seed: int
    crop: TrainCrop = "paper"
    crop_fraction: float = 224 / 256
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: bool = True
    pca_noise_std: Callable[[float], float] = lambda epochs: 0.0
    _cached: tuple[int, Ints] | None = None  # an epoch and its permutation

    @property
    def steps_per_epoch(self) -> int:
        """floor(N / B): the tail, another one in each epoch, is skipped."""
        return len(self.sizes) // self.batch_size

    def permutation(self, epoch: int) -> Ints:
        """The indices in the epoch's order, cut to full batches: [steps_per_epoch * B]."""
        if self._cached is None or self._cached[0] != epoch:
            shuffled = self._generator(epoch, 0).permutation(len(self.sizes))
            self._cached = epoch, shuffled[: self.steps_per_epoch * self.batch_size]
        return self._cached[1]

    def sample(self, epoch: int, step: int, batch_slice: slice = slice(None)) -> SampleParams:
        """The ``batch_slice`` of global batch ``step`` of ``epoch``."""
        first = step * self.batch_size
        indices = self.permutation(epoch)[first : first + self.batch_size][batch_slice]
        # a position's numbers start at a counter of their own, so that any batch can be made alone
        generator = self._generator(epoch, 1, counter=first * (RANDOMS_PER_SAMPLE // 4))
        randoms = generator.random((self.batch_size, RANDOMS_PER_SAMPLE))
        if self.crop == "chunked":
            first_in_chunk = np.arange(self.batch_size) // CROP_CHUNK * CROP_CHUNK
            randoms[:, [0, 5, 6]] = randoms[first_in_chunk][:, [0, 5, 6]]
        randoms = randoms[batch_slice]
        position, attempts = randoms[:, 5:7], randoms[:, 8:28].reshape(-1, 10, 2)

        def crop_boxes_for(indices: Ints) -> Ints:
            sizes = self.sizes[indices]
            if self.crop == "random_resized":
                return random_resized_crop_boxes(sizes, self.scale, self.ratio, attempts, position)
            return random_crop_boxes(sizes, self.crop_fraction, position)

        radius = np.sqrt(-2 * np.log1p(-randoms[:, 1:3]))  # Box-Muller
        angle = 2 * np.pi * randoms[:, 3:5]
        normal = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], 1)
        return SampleParams(
            indices,
            crop_boxes_for(indices),
            (randoms[:, 0] < 0.5) & self.hflip,
            normal[:, :3],
            crop_boxes_for,
            self.pca_noise_std(epoch + step / self.steps_per_epoch),
        )

    def epoch(self, epoch: int, first_step: int, batch_slice: slice) -> Iterator[SampleParams]:
        """The batches of ``epoch`` from ``first_step`` to its end."""
        for step in range(first_step, self.steps_per_epoch):
            yield self.sample(epoch, step, batch_slice)

    def _generator(self, epoch: int, stream: int, counter: int = 0) -> np.random.Generator:
        key = np.random.SeedSequence((self.seed, epoch, stream)).generate_state(2, np.uint64)
        return np.random.Generator(np.random.Philox(key=key, counter=counter))
