"""The embedded default: the handwritten digits inside scikit-learn, written as JPEG files.

1,797 scans of digits in ten classes (UCI's test set of optical digits), enlarged to 256 x 256, so
that the paper's crop of 224 needs no resize. They lie in ImageNet's own layout, and from there
on nothing knows that they are not ImageNet.
"""

import shutil
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from alexnet_dist.errors import UserError

VALIDATION_IMAGES = 500
SIDE = 256


def write_digits(folder: Path) -> Path:
    """Write train/ and val/ with a folder a digit below ``folder``, once.

    Raises:
        Failure: scikit-learn is missing.
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
    digits = load_digits()
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".digits-", dir=folder.parent))
    order = np.random.Generator(np.random.Philox(2012)).permutation(len(digits.images))
    for place, index in enumerate(order):
        split = "val" if place < VALIDATION_IMAGES else "train"
        target = partial / split / str(digits.target[index])
        target.mkdir(parents=True, exist_ok=True)
        pixels = (digits.images[index] * (255 / 16)).astype(np.uint8)
        image = Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        image.convert("RGB").save(target / f"{index:04d}.jpg", quality=90)
    try:
        partial.rename(folder)
    except OSError:  # another run was faster
        shutil.rmtree(partial, ignore_errors=True)
    return folder
