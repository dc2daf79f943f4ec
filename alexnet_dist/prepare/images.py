"""Make one image as small as training needs it.

Decoding is torchvision's, resizing is torch's antialiased bicubic: the fastest on a CPU that give
Pillow's result, to rounding (benchmarks/prepare.py). libjpeg's scaled decoding is not used: even at
twice the wanted size its pixels differ from those of full decoding by 1.5 of 255 on average, and by
up to 63.
"""

from dataclasses import dataclass
from io import BytesIO
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn.functional import interpolate

from alexnet_dist.data.decode import decode, open_image
from alexnet_dist.data.formats import validate_bytes

try:  # torchvision 0.29 announces its removal
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:
    decode_jpeg = None

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


def resize_image(
    encoded: NDArray[np.uint8], form: OutputFormat
) -> tuple[NDArray[np.uint8], bytes, str]:
    """An image in its output format; one that has the size already keeps its bytes.

    Returns:
        RGB pixels, uint8 [H, W, 3]; its encoded bytes, for shards; and their files' extension.

    Raises:
        OSError: with the reason, where it is no complete image.
    """
    valid = validate_bytes(encoded)
    with open_image(BytesIO(valid.data)) as header:
        file_type, mode, (width, height) = header.format or "", header.mode, header.size
    pixels = _decode(valid, plain_jpeg=file_type == "JPEG" and mode in ("L", "RGB"))
    short = min(width, height)
    if height == width == form.size if form.crop == "center" else short <= form.size:
        return pixels.numpy(), encoded.tobytes(), _EXTENSIONS[file_type]
    size = [(side * form.size + short // 2) // short for side in (height, width)]
    # as a channels-last batch, which torch resizes without copying it
    batch = pixels[None].permute(0, 3, 1, 2)
    small = interpolate(batch, size, mode="bicubic", antialias=True)[0].permute(1, 2, 0)
    if form.crop == "center":
        top, left = (size[0] - form.size) // 2, (size[1] - form.size) // 2
        small = small[top : top + form.size, left : left + form.size]
    resized = small.contiguous().numpy()
    file = BytesIO()
    if form.kind == "shards":
        Image.fromarray(resized).save(file, "JPEG", quality=form.quality)
    return resized, file.getvalue(), "jpg"


def _decode(encoded: NDArray[np.uint8], *, plain_jpeg: bool) -> torch.Tensor:
    """RGB pixels, uint8 [H, W, 3]."""
    if decode_jpeg is not None and plain_jpeg:
        try:
            image = decode_jpeg(torch.from_numpy(encoded.copy()), mode=ImageReadMode.RGB)
            return image.permute(1, 2, 0).contiguous()
        except RuntimeError:
            pass  # Pillow decides
    return torch.from_numpy(np.array(decode(encoded)))
