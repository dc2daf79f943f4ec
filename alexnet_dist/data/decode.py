"""Decoding by Pillow, as every decoder here is to decode."""

from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps

FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
"""Pillow's names of what is taken, whatever a file's own name says."""

DECODE_ERROR = "the decoder gives up on it"
TOO_LARGE = "it has more than the 178,956,970 pixels that Pillow takes"
SIZE_MISMATCH = "it has another size than when it was indexed; a new start indexes it again"


def decode(
    encoded: NDArray[np.uint8], near: int | None = None, *, upright: bool = False
) -> Image.Image:
    """An image by Pillow, in RGB as DALI would give it: stored orientation, without its alpha.

    Args:
        encoded: the bytes of a file; pixels [H, W, 3] are taken as they are.
        near: a smaller image will do, if no side of it is shorter than this.
        upright: turn it as its EXIF data say.

    Raises:
        OSError: Pillow gives up on it.
    """
    if encoded.ndim == 3:
        return Image.fromarray(encoded)
    with open_image(BytesIO(encoded.tobytes())) as image:
        if near is not None:
            image.draft("RGB", (near, near))
        return _rgb(ImageOps.exif_transpose(image) if upright else image)


@contextmanager
def open_image(file: str | Path | BytesIO) -> Iterator[Image.Image]:
    """Pillow's image of a file, whose header is read; it may be decoded within.

    Raises:
        OSError: Pillow gives up on it.
    """
    try:
        with Image.open(file, formats=FORMATS) as image:
            yield image
    except Image.DecompressionBombError:
        raise OSError(TOO_LARGE) from None
    except Exception as error:  # struct.error, SyntaxError, EOFError, ...: it depends on the file
        raise OSError(DECODE_ERROR) from error


def read_size(path: str | Path, *, upright: bool = False) -> tuple[int, int]:
    """Height and width of an image, from its header alone; (0, 0) where that cannot be read.

    Args:
        upright: as its EXIF data say.
    """
    try:
        with open_image(path) as image:
            turned = upright and image.getexif().get(ExifTags.Base.Orientation, 1) > 4
            return image.size if turned else image.size[::-1]
    except OSError:
        return 0, 0


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits of gray; Pillow would cut off all above 255
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "CMYK":  # by DALI's arithmetic; Pillow takes all to be inverted as Adobe's are
        ink = np.asarray(image, np.uint16)
        light = 255 - ink if "adobe" in image.info else ink
        return Image.fromarray((light[..., :3] * light[..., 3:] // 255).astype(np.uint8))
    return image.convert("RGB")
