"""Make one image as small as training needs it, and measure what it adds to the statistics.

Decoding and encoding are torchvision's, resizing is torch's antialiased bicubic: the fastest on a
CPU that give Pillow's result, JPEG files to the byte and pixels to rounding
(benchmarks/prepare.py). libjpeg's scaled decoding is not used: even at twice the wanted size its
pixels differ from those of full decoding by 1.5 of 255 on average, and by up to 63.
"""

from dataclasses import dataclass
from io import BytesIO
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn.functional import interpolate

from alexnet_dist.data.formats import DECODE_ERROR, FORMATS, decode, validate_bytes

try:  # torchvision 0.29 announces their removal
    from torchvision.io import ImageReadMode, decode_jpeg, encode_jpeg
except ImportError:
    decode_jpeg = encode_jpeg = None

_EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp"}


@dataclass(frozen=True)
class OutputFormat:
    """What images become.

    Attributes:
        kind: "shards" of encoded images, or raw "pixels".
        size: shorter side in pixels; a shorter one is kept.
        crop: "center" cuts the central size x size square, enlarging smaller images.
        quality: of JPEG, 1 to 100.
    """

    kind: Literal["shards", "pixels"]
    size: int
    crop: Literal["none", "center"]
    quality: int


class ResizedImage(NamedTuple):
    """An image in its output format: encoded bytes with the extension of their file's name, and RGB
    pixels before encoding, uint8 [H, W, 3]."""

    encoded: bytes
    extension: str
    pixels: NDArray[np.uint8]


def resize_image(encoded: NDArray[np.uint8], form: OutputFormat) -> ResizedImage:
    """An image in its output format; one that has the size already keeps its bytes.

    Raises:
        OSError: with the reason, where it is no complete image.
    """
    valid = validate_bytes(encoded)
    try:
        with Image.open(BytesIO(valid.data), formats=FORMATS) as header:
            file_type, mode, (width, height) = header.format or "", header.mode, header.size
    except Exception as error:  # struct.error, SyntaxError, EOFError, ...: it depends on the damage
        raise OSError(DECODE_ERROR) from error
    pixels = _decode(valid, plain_jpeg=file_type == "JPEG" and mode in ("L", "RGB"))
    short = min(width, height)
    if height == width == form.size if form.crop == "center" else short <= form.size:
        return ResizedImage(encoded.tobytes(), _EXTENSIONS[file_type], pixels.numpy())
    size = [(side * form.size + short // 2) // short for side in (height, width)]
    small = _resize(pixels, size)
    if form.crop == "center":
        top, left = (size[0] - form.size) // 2, (size[1] - form.size) // 2
        small = small[top : top + form.size, left : left + form.size]
    small = small.contiguous()
    jpeg = _encode(small, form.quality) if form.kind == "shards" else b""
    return ResizedImage(jpeg, "jpg", small.numpy())


def _decode(encoded: NDArray[np.uint8], *, plain_jpeg: bool) -> torch.Tensor:
    """RGB pixels, uint8 [H, W, 3]."""
    if decode_jpeg is not None and plain_jpeg:
        try:
            image = decode_jpeg(torch.from_numpy(encoded.copy()), mode=ImageReadMode.RGB)
            return image.permute(1, 2, 0).contiguous()
        except RuntimeError:
            pass  # Pillow decides
    return torch.from_numpy(np.array(decode(encoded)))


def _resize(image: torch.Tensor, size: list[int]) -> torch.Tensor:
    """An image, uint8 [H, W, 3], as [*size, 3]."""
    # as a channels-last batch, which torch resizes without copying it
    batch = image[None].permute(0, 3, 1, 2)
    return interpolate(batch, size, mode="bicubic", antialias=True)[0].permute(1, 2, 0)


def _encode(pixels: torch.Tensor, quality: int) -> bytes:
    """Pixels, uint8 [H, W, 3], as a JPEG file."""
    if encode_jpeg is not None:
        return encode_jpeg(pixels.permute(2, 0, 1), quality).numpy().tobytes()
    buffer = BytesIO()
    Image.fromarray(pixels.numpy()).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


class RunningMoments:
    """Sums over images of what their statistics are computed from; images count alike, whatever
    their size, each by its central square.

    Attributes:
        count: number of images.
        first: [3], sum of each image's mean of RGB.
        second: [3, 3], sum of each image's mean of the products of RGB.
    """

    def __init__(self) -> None:
        self.count, self.first, self.second = 0, np.zeros(3), np.zeros((3, 3))

    def add(self, pixels: NDArray[np.uint8]) -> None:
        """Add one image, uint8 [H, W, 3]."""
        side = min(pixels.shape[:2])
        top, left = (pixels.shape[0] - side) // 2, (pixels.shape[1] - side) // 2
        square = pixels[top : top + side, left : left + side].transpose(2, 0, 1)
        # sums of 256 products of bytes are exact in float32, which is the faster type
        exact = np.float32 if side <= 256 else np.float64
        rows = torch.from_numpy(square.astype(exact, order="C")).transpose(0, 1)
        self.count += 1
        self.first += rows.sum(2).double().mean(0).numpy() / side
        self.second += torch.bmm(rows, rows.mT).double().mean(0).numpy() / side
