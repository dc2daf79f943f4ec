"""The last steps from raw pixels to a finished batch, many images at once: crop, resize, flip, mean
and scale. The arithmetic is that of augment.py, to the bit where nothing is resized.

On CPUs memory is the limit: a crop of 200 x 200 is read as 120 KB and written as 480 KB, which
torch's operators write three times, and through the caches. So crops.c does it in one go, and is
compiled here in less than a second; without a compiler torch does it. On GPUs it is Triton, or
torch where there is none.
"""

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

Bytes = NDArray[np.uint8]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Floats = NDArray[np.float32]


@functools.cache
def compiled() -> Callable[..., None] | None:
    """``cut`` of crops.c, compiled for this processor; None where that cannot be done."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "crops.so"
        options = ["-O3", "-march=native", "-ffp-contract=off", "-shared", "-fPIC"]
        command = [compiler, *options, "-o", str(library), str(Path(__file__).with_name("crops.c"))]
        try:
            subprocess.run(command, check=True, capture_output=True, timeout=60)
            cut = ctypes.CDLL(str(library)).cut  # leaves the GIL while it runs
        except (OSError, subprocess.SubprocessError):
            return None
    cut.argtypes = [ctypes.c_void_p, *[ctypes.c_int64] * 4, *[ctypes.c_void_p] * 6]
    cut.restype = None
    return cut


def cut_on_cpu(
    pixels: Bytes,
    rows: Ints,
    boxes: Ints,
    flips: Bools,
    means: Floats,
    scales: Floats,
    out: Tensor,
) -> None:
    """Finish crops that need no resize.

    Args:
        pixels: [N, H, W, 3].
        rows: [b], which of them.
        boxes: [b, 4], of the side of ``out``.
        means, scales: [b, 3] and [3]; out = (pixels - mean) * scale.
        out: float32 [b, side, side, 3].
    """
    cut, side = compiled(), out.shape[1]
    if cut is None:
        for row, (top, left, *_) in enumerate(boxes.tolist()):
            box = pixels[rows[row], top : top + side, left : left + side].copy()
            image = torch.from_numpy(box)
            image = image.flip(1) if flips[row] else image
            mean, scale = (torch.from_numpy(np.tile(x, side)) for x in (means[row], scales))
            out[row].flatten(1).copy_(image.flatten(1)).sub_(mean).mul_(scale)
        return
    _, height, width, _ = pixels.shape
    arrays = [np.ascontiguousarray(each) for each in (rows, boxes, flips, means, scales)]
    given = (each.ctypes.data for each in arrays)
    cut(pixels.ctypes.data, height, width, side, len(rows), *given, out.data_ptr())


def resized_on_cpu(pixels: Bytes | Sequence[Bytes], rows: Ints, boxes: Ints, side: int) -> Bytes:
    """The boxes of images [H, W, 3], resized: [b, side, side, 3].

    One by one: torch's resize of bytes is five times as fast here as matrix products are. All else
    is left to numpy, as torch would copy an image in several threads, which wait for each other.
    """
    images = np.empty((len(rows), side, side, 3), np.uint8)
    for row, (top, left, height, width) in enumerate(boxes.tolist()):
        box = pixels[rows[row]][top : top + height, left : left + width]
        if (height, width) != (side, side):
            image = torch.from_numpy(np.require(box, requirements=["C", "W"])).permute(2, 0, 1)
            box = F.interpolate(image[None], [side, side], mode="bilinear", antialias=True)
            box = box[0].permute(1, 2, 0).numpy()
        images[row] = box
    return images
