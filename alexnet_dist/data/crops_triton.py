# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Finished crops of raw pixels on a GPU, by Triton: bytes are read once, the batch written once."""

import triton
from torch import Tensor
from triton import language as tl

VALUES = 1024  # in a program


@triton.jit
def _cut(
    pixels,
    rows,
    boxes,
    flips,
    means,
    scales,
    out,
    height,
    width,
    side: tl.constexpr,
    values: tl.constexpr,
):
    image = tl.program_id(0)
    x = tl.program_id(1) * values + tl.arange(0, values)
    there = x < side * side * 3
    pixel, colour = x // 3, x % 3
    line, column = pixel // side, pixel % side
    column = tl.where(tl.load(flips + image) != 0, side - 1 - column, column)
    top, left = tl.load(boxes + 4 * image), tl.load(boxes + 4 * image + 1)
    first = (tl.load(rows + image) * height + top) * width + left  # int64, as the set may be large
    value = tl.load(pixels + first * 3 + (line * width + column) * 3 + colour, there).to(tl.float32)
    mean = tl.load(means + 3 * image + colour)
    scale = tl.load(scales + colour)
    place = image.to(tl.int64) * (side * side * 3) + x
    tl.store(out + place, (value - mean) * scale, there)


def cut_by_triton(
    pixels: Tensor,
    rows: Tensor,
    boxes: Tensor,
    flips: Tensor,
    means: Tensor,
    scales: Tensor,
    out: Tensor,
) -> None:
    """As ``crops.cut_by_torch``; ``flips`` are uint8 or bool."""
    b, side = out.shape[:2]
    if b:
        grid = (b, triton.cdiv(side * side * 3, VALUES))
        _, height, width, _ = pixels.shape
        _cut[grid](pixels, rows, boxes, flips, means, scales, out, height, width, side, VALUES)
