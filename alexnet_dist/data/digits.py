"""The digits inside scikit-learn, as class folders: images for a first run."""

import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from alexnet_dist.errors import UserError

DIGITS = "digits"


def write_digits(folder: Path) -> Path:
    """Write the digits inside scikit-learn below ``folder`` as train/ and val/, once.

    They are 1,797 scans in ten classes (UCI's test set of optical digits), enlarged to 256 x 256,
    so that the paper's crop of 224 needs no resize.
    """
    if folder.is_dir():
        return folder
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError(
            "the embedded digits come with scikit-learn, which is not installed: "
            "pip install 'alexnet-dist[quickstart]', or give --data.root a folder of images"
        ) from None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".digits-", dir=folder.parent) as unfinished:
            _draw_digits(load_digits(), Path(unfinished, DIGITS))
            with suppress(OSError):  # where another run was faster
                Path(unfinished, DIGITS).rename(folder)
    except OSError as error:
        raise UserError(
            f"the digits cannot be written to {folder} ({error.strerror}): give --data.cache_dir a "
            "folder that can be written"
        ) from None
    return folder


def _draw_digits(digits: Any, folder: Path) -> None:
    order = np.random.Generator(np.random.Philox(2012)).permutation(len(digits.images))
    for position, index in enumerate(order):
        target = folder / ("val" if position < 500 else "train") / str(digits.target[index])
        target.mkdir(parents=True, exist_ok=True)
        pixels = (digits.images[index] * (255 / 16)).astype(np.uint8)
        image = Image.fromarray(pixels).resize((256, 256), Image.Resampling.BICUBIC)
        image.convert("RGB").save(target / f"{index:04d}.jpg", quality=90)
