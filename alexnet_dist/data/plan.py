"""Who sees which crop of which image when.

Everything random about the data is a function of (seed, epoch, position): the order of the
images, the crop box, the flip, the colour coefficients. Engines only carry it out. A global batch
of B images is the positions step * B ... of the epoch's permutation, and replica r of R takes
every R-th of them from the r-th on, so the order does not depend on the number of processes, and
a run goes on in mid-epoch from two integers.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Crop = Literal["paper", "chunked", "random_resized"]

CHUNK = 32
"""Images in a row that the authors' program crops and flips alike (convdata_jpeg.py)."""

DRAWS = 32
"""Uniform numbers kept for each position: a flip, four for three normal coefficients, two for the
corner, and two for each of ten attempts at a random-resized box; a multiple of the four that one
count of Philox gives."""


@dataclass(frozen=True)
class SampleParams:
    """A batch to be: b images and what is to be done to each.

    Attributes:
        numbers: [b], the samples' numbers.
        boxes: [b, 4], top, left, height, width in pixels of the stored image.
        flips: [b], bool.
        colours: [b, 3], coefficients along the eigenvectors, N(0, 1).
        boxes_of: the boxes for other samples under the same draws.
        strength: of the colour noise, the coefficients' standard deviation; 0 for none.
    """

    numbers: Ints
    boxes: Ints
    flips: NDArray[np.bool_]
    colours: Floats
    boxes_of: Callable[[Ints], Ints]
    strength: float = 0.0

    def substituted(self, numbers: Ints) -> "SampleParams":
        """The same draws on other samples."""
        return replace(self, numbers=numbers, boxes=self.boxes_of(numbers))

    def only(self, rows: NDArray[np.bool_]) -> "SampleParams":
        """The rows where the mask ``rows`` is True."""
        return replace(
            self,
            numbers=self.numbers[rows],
            boxes=self.boxes[rows],
            flips=self.flips[rows],
            colours=self.colours[rows],
        )


def _centre(sizes: Ints, fraction: float) -> tuple[Ints, Ints]:
    """Of the central square: side of the crop [b], and the corner [b, 2] of the square itself."""
    short = sizes.min(1)
    side = np.maximum(np.rint(short * fraction).astype(np.int64), 1)
    return side, (sizes - short[:, None]) // 2


def center_crop_boxes(sizes: Ints, fraction: float) -> Ints:
    """The central square of ``fraction`` of the shorter side, for images of ``sizes`` [b, 2]."""
    side, _ = _centre(sizes, fraction)
    corner = (sizes - side[:, None]) // 2
    return np.column_stack([corner, side, side])


def five_crop_boxes(sizes: Ints, fraction: float) -> Ints:
    """Five squares of ``fraction`` of the shorter side, [b, 5, 4]: in the corners of the central
    square, and in its centre (``centre_boxes``).

    On a stored 256 x 256 image at 224/256 these are the patches of Krizhevsky et al. 2012, section
    4.1.
    """
    side, square = _centre(sizes, fraction)
    room = (sizes.min(1) - side)[:, None]
    corners = [square + room * np.array(at) for at in ((0, 0), (0, 1), (1, 0), (1, 1))]
    boxes = [np.column_stack([corner, side, side]) for corner in corners]
    return np.stack([*boxes, center_crop_boxes(sizes, fraction)], 1)


def random_crop_boxes(sizes: Ints, fraction: float, where: Floats) -> Ints:
    """A square of ``fraction`` of the shorter side anywhere in the central square.

    ``where`` [b, 2] is uniform in [0, 1). On a stored 256 x 256 image at 224/256 these are the
    crops of Krizhevsky et al. 2012, section 4.1.
    """
    side, square = _centre(sizes, fraction)
    room = sizes.min(1) - side + 1
    corner = square + (where * room[:, None]).astype(np.int64)
    return np.column_stack([corner, side, side])


def random_resized_crop_boxes(
    sizes: Ints,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    attempts: Floats,
    where: Floats,
) -> Ints:
    """Boxes of random area and shape, as torchvision's RandomResizedCrop draws them.

    ``scale`` bounds the area as a part of the image's, ``ratio`` width over height; the first of
    ``attempts`` [b, n, 2] that fits is taken, else the largest central box of a shape allowed.
    """
    height, width = sizes[:, 0], sizes[:, 1]
    area = (height * width)[:, None] * (scale[0] + attempts[..., 0] * (scale[1] - scale[0]))
    low, high = np.log(ratio[0]), np.log(ratio[1])
    shape = np.exp(low + attempts[..., 1] * (high - low))
    w = np.rint(np.sqrt(area * shape)).astype(np.int64)
    h = np.rint(np.sqrt(area / shape)).astype(np.int64)
    fits = (w > 0) & (h > 0) & (w <= width[:, None]) & (h <= height[:, None])
    first = fits.argmax(1)
    row = np.arange(len(sizes))
    h, w, found = h[row, first], w[row, first], fits[row, first]
    h = np.where(found, h, np.minimum(height, np.rint(width / ratio[0]).astype(np.int64)))
    w = np.where(found, w, np.minimum(width, np.rint(height * ratio[1]).astype(np.int64)))
    h, w = np.maximum(h, 1), np.maximum(w, 1)
    spot = np.where(found[:, None], where, 0.5)
    top = (spot[:, 0] * (height - h + 1)).astype(np.int64)
    left = (spot[:, 1] * (width - w + 1)).astype(np.int64)
    return np.column_stack([top, left, h, w])


@dataclass
class SamplePlan:
    """The plan of a training run over N images.

    Attributes:
        sizes: [N, 2], height and width of the stored images in pixels.
        batch: images in a global batch, B.
        fraction: side of the paper's crop over that of the image, 224/256.
        strength: of the colour noise after so many passes.
    """

    sizes: Ints
    batch: int
    seed: int
    crop: Crop = "paper"
    fraction: float = 224 / 256
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True
    strength: Callable[[float], float] = lambda passes: 0.0
    _order: tuple[int, Ints] | None = None

    @property
    def steps(self) -> int:
        """Steps of an epoch, floor(N / B): the tail, another one each epoch, is left out."""
        return len(self.sizes) // self.batch

    def order(self, epoch: int) -> Ints:
        """The epoch's permutation of the samples, cut to whole batches."""
        if self._order is None or self._order[0] != epoch:
            shuffled = self._generator(epoch, 0).permutation(len(self.sizes))
            self._order = epoch, shuffled[: self.steps * self.batch]
        return self._order[1]

    def draw(self, epoch: int, step: int, rows: slice = slice(None)) -> SampleParams:
        """The ``rows`` of global batch ``step`` of ``epoch``."""
        first = step * self.batch
        numbers = self.order(epoch)[first : first + self.batch][rows]
        # a position's numbers start at a count of their own, so that any batch can be drawn alone
        generator = self._generator(epoch, 1, count=first * (DRAWS // 4))
        draws = generator.random((self.batch, DRAWS))
        if self.crop == "chunked":
            alike = np.arange(self.batch) // CHUNK * CHUNK
            draws[:, [0, 5, 6]] = draws[alike][:, [0, 5, 6]]
        draws = draws[rows]
        where, attempts = draws[:, 5:7], draws[:, 8:28].reshape(-1, 10, 2)

        def boxes_of(numbers: Ints) -> Ints:
            sizes = self.sizes[numbers]
            if self.crop == "random_resized":
                return random_resized_crop_boxes(sizes, self.scale, self.ratio, attempts, where)
            return random_crop_boxes(sizes, self.fraction, where)

        radius = np.sqrt(-2 * np.log1p(-draws[:, 1:3]))  # Box and Muller
        angle = 2 * np.pi * draws[:, 3:5]
        normal = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], 1)
        flips = (draws[:, 0] < 0.5) & self.flip
        strength = self.strength(epoch + step / self.steps)
        return SampleParams(numbers, boxes_of(numbers), flips, normal[:, :3], boxes_of, strength)

    def epoch(self, epoch: int, first_step: int, rows: slice) -> Iterator[SampleParams]:
        """The draws of ``epoch`` from ``first_step`` to its end."""
        for step in range(first_step, self.steps):
            yield self.draw(epoch, step, rows)

    def _generator(self, epoch: int, stream: int, count: int = 0) -> np.random.Generator:
        key = np.random.SeedSequence((self.seed, epoch, stream)).generate_state(2, np.uint64)
        return np.random.Generator(np.random.Philox(key=key, counter=count))


Views = Literal[1, 10]

_REFLECTED = {1: [False], 10: [False] * 5 + [True] * 5}


@dataclass(frozen=True)
class EvalPlan:
    """Every image once, in order: by its central view, or ten times in a row by the paper's views,
    those of ``five_boxes`` and their reflections (Krizhevsky et al. 2012, section 4.1).

    ``draws`` gives each replica the same number of batches, empty ones where the images have run
    out, so that no process is left waiting.

    Attributes:
        batch: images in a global batch, however many views each has.
    """

    sizes: Ints
    batch: int
    fraction: float = 224 / 256
    views: Views = 1

    @property
    def steps(self) -> int:
        return -(-len(self.sizes) // self.batch)

    def draws(self, rows: slice) -> Iterator[SampleParams]:
        every = np.arange(len(self.sizes))
        for step in range(self.steps):
            images = every[step * self.batch : (step + 1) * self.batch][rows]
            numbers = np.repeat(images, self.views)
            yield SampleParams(
                numbers,
                self._boxes_of(numbers),
                np.tile(_REFLECTED[self.views], len(images)),
                np.zeros((len(numbers), 3)),
                self._boxes_of,
            )

    def _boxes_of(self, numbers: Ints) -> Ints:
        sizes = self.sizes[numbers]
        if self.views == 1:
            return center_crop_boxes(sizes, self.fraction)
        row = np.arange(len(numbers))
        return five_crop_boxes(sizes, self.fraction)[row, row % 5]
