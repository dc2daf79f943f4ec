"""Which files are complete images: the same for every decoder.

Decoders differ in what they forgive. DALI decodes a region of a JPEG whose rest is missing, Pillow
decodes a PNG without its last chunk, each knows formats that the other does not. So bytes are
validated before any decoder sees them, and where Pillow and DALI read a good file in two ways, one
of them is made to agree with the other, here. What is wrong inside a file is left to the decoders.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
"""Pillow's names of what is taken, whatever a file's own name says."""

DECODE_ERROR = "the decoder gives up on it"
TOO_LARGE = "it has more than the 178,956,970 pixels that Pillow takes"
SIZE_MISMATCH = "it has another size than when it was indexed; a new start indexes it again"

_JPEG, _END_OF_JPEG, _SCAN = b"\xff\xd8\xff", b"\xff\xd9", 0xDA
_PNG = b"\x89PNG\r\n\x1a\n"


def validate_bytes(encoded: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Bytes that every decoder reads alike: those given, but for a PNG of 16 bits a channel.

    Raises:
        OSError: with the reason, where decoders would not agree that this is an image.
    """
    if encoded[-2:].tobytes() == _END_OF_JPEG and encoded[:3].tobytes() == _JPEG:
        return encoded
    data = encoded.tobytes()
    reason = _defect(data)
    if reason:
        raise OSError(reason)
    if data.startswith(_PNG) and data[24:25] == b"\x10":
        buffer = BytesIO()  # DALI rounds 16 bits a channel to 8, Pillow cuts them off
        decode(encoded).save(buffer, "PNG", compress_level=0)
        return np.frombuffer(buffer.getvalue(), np.uint8)
    return encoded


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


def _defect(data: bytes) -> str | None:
    if not data:
        return "the file is empty"
    if data.startswith(_JPEG):
        return None if _jpeg_ends(data) else "it is cut short: a JPEG without its end marker"
    if data.startswith(_PNG):
        return None if _png_ends(data) else "it is cut short: a PNG without its last chunk"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return None
    if data[:2] == b"BM":
        if data[28:30] == b"\x10\0":  # DALI refuses some and shifts in zeros, Pillow scales
            return "a BMP of 16 bits a pixel, which decoders read in different ways"
        return None
    return "it is no JPEG, PNG, WebP or BMP"


def _jpeg_ends(data: bytes) -> bool:
    """Whether the end marker comes anywhere behind the first scan: cameras append things to a
    JPEG. That of a thumbnail, which lies in a segment before the scan, does not count."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        if data[at + 1] == _SCAN:
            return data.rfind(_END_OF_JPEG, at) >= 0
        fill = data[at + 1] == 0xFF
        at += 1 if fill else 2 + int.from_bytes(data[at + 2 : at + 4])
    return False


def _png_ends(data: bytes) -> bool:
    """Whether the chunks lead to a complete last one; what follows it does not matter."""
    at = len(_PNG)
    while at + 12 <= len(data):
        if data[at + 4 : at + 8] == b"IEND":
            return True
        at += 12 + int.from_bytes(data[at : at + 4])
    return False


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits of gray; Pillow would cut off all above 255
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "CMYK":  # by DALI's arithmetic; Pillow takes all to be inverted as Adobe's are
        ink = np.asarray(image, np.uint16)
        light = 255 - ink if "adobe" in image.info else ink
        return Image.fromarray((light[..., :3] * light[..., 3:] // 255).astype(np.uint8))
    return image.convert("RGB")
