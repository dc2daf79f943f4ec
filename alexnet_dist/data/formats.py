"""Which files are complete images: the same for every decoder.

Decoders differ in what they forgive. DALI decodes a region of a JPEG whose rest is missing, Pillow
decodes a PNG without its last chunk, each knows formats that the other does not. So bytes are
validated before any decoder sees them, and where Pillow and DALI read a good file in two ways, one
of them is made to agree with the other, here. What is wrong inside a file is left to the decoders.
"""

from io import BytesIO

import numpy as np
from numpy.typing import NDArray

from alexnet_dist.data.decode import decode

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
