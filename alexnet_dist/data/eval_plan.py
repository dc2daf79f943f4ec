"""Which crops of which images are in which batch of an evaluation: all of them, in order."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from alexnet_dist.data.plan import Ints, SampleParams, SamplePlan, central_square

NumCrops = Literal[1, 10]


def center_crop_boxes(sizes: Ints, fraction: float) -> Ints:
    """A centered square of ``fraction`` of the shorter side, [b, 4], of images of ``sizes`` [b, 2]
    (height, width)."""
    side, _ = central_square(sizes, fraction)
    corner = (sizes - side[:, None]) // 2
    return np.column_stack([corner, side, side])


def five_crop_boxes(sizes: Ints, fraction: float) -> Ints:
    """Five squares of ``fraction`` of the shorter side, [b, 5, 4]: in the corners of the central
    square, and ``center_crop_boxes``.

    On a stored 256 x 256 image at 224/256 these are the patches of Krizhevsky et al. 2012, section
    4.1.
    """
    side, square = central_square(sizes, fraction)
    room = (sizes.min(1) - side)[:, None]
    corners = [square + room * np.array(at) for at in ((0, 0), (0, 1), (1, 0), (1, 1))]
    boxes = [np.column_stack([corner, side, side]) for corner in corners]
    return np.stack([*boxes, center_crop_boxes(sizes, fraction)], 1)


@dataclass(frozen=True)
class EvalPlan:
    """Every image once, in order: its center crop, or ten crops in a row, those of
    ``five_crop_boxes`` and their horizontal flips (Krizhevsky et al. 2012, section 4.1).

    Attributes:
        sizes: [N, 2], height and width of the stored images in pixels; 0 where unreadable.
        batch_size: images in a global batch, however many crops each has.
    """

    sizes: Ints
    batch_size: int
    crop_fraction: float = 224 / 256
    num_crops: NumCrops = 1

    @property
    def steps(self) -> int:
        """ceil(N / batch_size)."""
        return -(-len(self.sizes) // self.batch_size)

    def batches(self, batch_slice: slice) -> Iterator[SampleParams]:
        """The ``batch_slice`` of each global batch.

        Every rank gets the same number of batches, empty ones where the images have run out, so
        that no rank is left waiting.
        """
        every = np.arange(len(self.sizes))
        for step in range(self.steps):
            batch = every[step * self.batch_size : (step + 1) * self.batch_size]
            yield self.samples(batch[batch_slice])

    def samples(self, images: Ints) -> SampleParams:
        """The crops of ``images`` [n], as a batch of n * num_crops."""
        indices = np.repeat(images, self.num_crops)
        flips = np.arange(self.num_crops) >= 5
        return SampleParams(
            indices,
            self._crop_boxes_for(indices),
            np.tile(flips, len(images)),
            np.zeros((len(indices), 3)),
            self._crop_boxes_for,
        )

    def _crop_boxes_for(self, indices: Ints) -> Ints:
        sizes = self.sizes[indices]
        if self.num_crops == 1:
            return center_crop_boxes(sizes, self.crop_fraction)
        row = np.arange(len(indices))
        return five_crop_boxes(sizes, self.crop_fraction)[row, row % 5]


def needs_resize(plan: SamplePlan | EvalPlan, size: int) -> bool:
    """Whether any crop of ``plan`` has another side than ``size`` pixels."""
    if isinstance(plan, SamplePlan) and plan.crop == "random_resized":
        return True
    readable = plan.sizes[plan.sizes.min(1) > 0]
    return bool((center_crop_boxes(readable, plan.crop_fraction)[:, 2] != size).any())
