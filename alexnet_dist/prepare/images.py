"""An image made as small as training wants it, and what it adds to the statistics.

Decoding and encoding are torchvision's, resizing torch's antialiased bicubic: the fastest on a CPU
that gives Pillow's result, JPEGs to the byte and pixels to rounding (benchmarks/prepare.py).
libjpeg's scaled decoding is not among them: even where it leaves twice the wanted side, the result
differs by 1.5 of 255 on average from that of a whole decoding, and by up to 63.
"""

from dataclasses import dataclass
from io import BytesIO
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn.functional import interpolate

from alexnet_dist.data.formats import DECODE_ERROR, FORMATS, decode, parse_jpeg_size, validate_bytes

try:  # torchvision 0.29 announces that they will go
    from torchvision.io import ImageReadMode, decode_jpeg, encode_jpeg
except ImportError:
    decode_jpeg = encode_jpeg = None

Kind = Literal["shards", "pixels"]
Crop = Literal["none", "center"]

_LARGE = 2**26  # pixels; beyond it Pillow decides whether that is an image or an attack
_ENDINGS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp"}


@dataclass(frozen=True)
class Form:
    """What images are to become.

    Attributes:
        kind: "shards" of encoded images, or "pixels".
        size: the shorter side in pixels; a shorter one is left as it is.
        crop: "center" cuts the central size x size square, enlarging what is smaller.
        quality: of JPEG, 1 to 100.
    """

    kind: Kind
    size: int
    crop: Crop
    quality: int


class Small(NamedTuple):
    """An image in its form: encoded bytes, the ending of their file's name, and RGB pixels uint8
    [height, width, 3], as they were before they were encoded."""

    encoded: bytes
    ending: str
    pixels: NDArray[np.uint8]


def shrink(encoded: NDArray[np.uint8], form: Form) -> Small:
    """An image in its form. Bytes that are so already stay as they are.

    Raises:
        OSError: with the reason, where it is no whole image.
    """
    good = validate_bytes(encoded)
    kind, mode, height, width = _header(good)
    short = min(width, height)
    fits = height == width == form.size if form.crop == "center" else short <= form.size
    whole = _pixels(good, kind, mode)
    if fits:
        return Small(encoded.tobytes(), _ENDINGS[kind], whole.numpy())
    side = [(length * form.size + short // 2) // short for length in (height, width)]
    small = _resized(whole, side)
    if form.crop == "center":
        top, left = (side[0] - form.size) // 2, (side[1] - form.size) // 2
        small = small[top : top + form.size, left : left + form.size]
    small = small.contiguous()
    if form.kind == "pixels":
        return Small(b"", "", small.numpy())
    return Small(_jpeg(small, form.quality), "jpg", small.numpy())


def _header(encoded: NDArray[np.uint8]) -> tuple[str, str, int, int]:
    """Format and mode, in Pillow's words, height and width. A plain JPEG is called RGB even where
    it is grey, as both are decoded alike."""
    plain = parse_jpeg_size(encoded)
    if plain and plain[0] * plain[1] < _LARGE:
        return "JPEG", "RGB", plain[0], plain[1]
    try:
        with Image.open(BytesIO(encoded.data), formats=FORMATS) as header:
            return header.format or "", header.mode, header.height, header.width
    except Exception as error:  # struct.error, SyntaxError, EOFError, ...: it depends on the damage
        raise OSError(DECODE_ERROR) from error


def _pixels(encoded: NDArray[np.uint8], kind: str, mode: str) -> torch.Tensor:
    """RGB, uint8 [height, width, 3]."""
    if decode_jpeg is not None and kind == "JPEG" and mode in ("L", "RGB"):
        try:
            whole = decode_jpeg(torch.from_numpy(encoded.copy()), mode=ImageReadMode.RGB)
            return whole.permute(1, 2, 0).contiguous()
        except RuntimeError:
            pass  # Pillow has the last word
    return torch.from_numpy(np.array(decode(encoded)))


def _resized(image: torch.Tensor, size: list[int]) -> torch.Tensor:
    """An image of uint8 [height, width, 3] as [*size, 3]."""
    # as a batch of channels-last images, which torch neither takes apart nor puts together
    batch = image[None].permute(0, 3, 1, 2)
    return interpolate(batch, size, mode="bicubic", antialias=True)[0].permute(1, 2, 0)


def _jpeg(pixels: torch.Tensor, quality: int) -> bytes:
    """An image of uint8 [height, width, 3] as a JPEG file."""
    if encode_jpeg is not None:
        return encode_jpeg(pixels.permute(2, 0, 1), quality).numpy().tobytes()
    buffer = BytesIO()
    Image.fromarray(pixels.numpy()).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


class Moments:
    """Sums over images, each by its central square.

    They are kept a shard and added up in the order of shards, so that they do not depend on which
    process did what. Each image counts alike, whatever its size.

    Attributes:
        count: images.
        first, second: sums of each image's means of RGB, [3], and of their products, [3, 3].
        mean_image: sum of the squares, enlarged to size x size where they are smaller; uint32.
    """

    def __init__(self, size: int) -> None:
        self.count = 0
        self.first, self.second = np.zeros(3), np.zeros((3, 3))
        self.mean_image = np.zeros((size, size, 3), np.uint32)

    def add(self, pixels: NDArray[np.uint8]) -> None:
        """Add one image."""
        side, size = min(pixels.shape[:2]), len(self.mean_image)
        top, left = (pixels.shape[0] - side) // 2, (pixels.shape[1] - side) // 2
        square = pixels[top : top + side, left : left + side]
        # sums of 256 products of bytes are exact in float32, and so the fast way is the right one
        exact = np.float32 if side <= 256 else np.float64
        rows = torch.from_numpy(square.transpose(2, 0, 1).astype(exact, order="C")).transpose(0, 1)
        self.first += rows.sum(2).double().mean(0).numpy() / side
        self.second += torch.bmm(rows, rows.mT).double().mean(0).numpy() / side
        if side != size:
            square = _resized(torch.from_numpy(square), [size, size]).numpy()
        self.mean_image += square
        self.count += 1

    def arrays(self) -> dict[str, NDArray[Any]]:
        return {
            "count": np.array(self.count),
            "first": self.first,
            "second": self.second,
            "mean_image": self.mean_image,
        }
