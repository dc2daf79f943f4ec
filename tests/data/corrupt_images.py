"""Image files of every odd and every corrupt kind, made with Pillow and by hand."""

import struct
import zlib
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

Content = bytes | Literal["folder", "link", "nothing"]

HEIGHT, WIDTH = 96, 128
START, END = b"\xff\xd8", b"\xff\xd9"


def photograph(height: int = HEIGHT, width: int = WIDTH) -> Image.Image:
    """Smooth colors with a little noise, so that pixels at other places are other pixels."""
    generator = np.random.default_rng(5)
    y, x = np.mgrid[0:height, 0:width]
    smooth = np.stack([x * 220 / width, y * 220 / height, (x + 2 * y) % 220], 2)
    return Image.fromarray((smooth + generator.integers(0, 35, smooth.shape)).astype(np.uint8))


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(height: int, width: int, channels: int, bits: int, pixels: bytes) -> bytes:
    """A PNG as Pillow does not write it."""
    color_type = {1: 0, 3: 2, 4: 6}[channels]
    header = struct.pack(">IIBBBBB", width, height, bits, color_type, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n"
    for chunk in (b"IHDR" + header, b"IDAT" + zlib.compress(pixels), b"IEND"):
        content += struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return content


def png_of_16_bits(pixels: np.ndarray) -> bytes:
    """Of uint16 pixels [H, W, channels]."""
    height, width, channels = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    return png(height, width, channels, 16, rows)


def with_thumbnail(jpeg: bytes) -> bytes:
    """A JPEG with another, smaller one, end marker and all, in its EXIF segment."""
    content = b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0" + encode(photograph(24, 32), "JPEG")
    return START + b"\xff\xe1" + struct.pack(">H", len(content) + 2) + content + jpeg[2:]


def odd_images() -> dict[str, bytes]:
    """Kinds that are to be decoded, and alike by all decoders."""
    image, alpha, rotated = photograph(), photograph(), Image.Exif()
    gray, palette = image.convert("L"), image.quantize(64)
    alpha.putalpha(gray)
    inks = Image.merge("CMYK", (*image.split(), gray.point(lambda value: value // 2)))
    rotated[0x0112] = 6
    more: dict[str, Any] = {"save_all": True, "append_images": [image.rotate(180)]}
    cmyk = encode(inks, "JPEG")
    at = cmyk.index(b"\xff\xee")  # Adobe's mark
    unmarked = cmyk[:at] + cmyk[at + 2 + int.from_bytes(cmyk[at + 2 : at + 4]) :]
    jpeg, deep = encode(image, "JPEG", quality=90), np.asarray(alpha).astype(np.uint16) * 257 + 100
    made: dict[str, tuple[Image.Image, dict[str, Any]]] = {
        "JPEG, progressive": (image, {"progressive": True}),
        "JPEG, grayscale": (gray, {}),
        "JPEG, RGB": (image, {"keep_rgb": True}),
        "JPEG, CMYK": (inks, {}),
        "JPEG, rotated by EXIF": (image, {"exif": rotated}),
        "JPEG, 1 pixel wide": (photograph(90, 1), {}),
        "JPEG, 1 pixel": (photograph(1, 1), {}),
        "MPO, two in one file": (image, more),
        "PNG": (image, {}),
        "PNG, black and white": (image.convert("1"), {}),
        "PNG, palette with alpha": (palette, {"transparency": bytes(range(0, 256, 4))}),
        "PNG, alpha": (alpha, {}),
        "PNG, grayscale with alpha": (alpha.convert("LA"), {}),
        "PNG, rotated by EXIF": (image, {"exif": rotated}),
        "WEBP": (image, {}),
        "WEBP, alpha": (alpha, {"lossless": True, "exact": True}),
        "WEBP, animated": (image, more),
        "BMP": (image, {}),
        "BMP, palette": (palette, {}),
        "BMP, alpha": (alpha, {}),
    }
    return {kind: encode(i, kind.partition(",")[0], **o) for kind, (i, o) in made.items()} | {
        "JPEG": jpeg,
        "JPEG, CMYK without Adobe's mark": unmarked,
        "JPEG, thumbnail in its EXIF": with_thumbnail(jpeg),
        "JPEG, EXIF damaged": START + b"\xff\xe1\0\x10Exif\0\0II*\0\xff\xff\xff\x7f" + jpeg[2:],
        "JPEG, bytes behind its end": jpeg + b"camera" * 9,
        "PNG, bytes behind its end": encode(image, "PNG") + b"more",
        "PNG, 16 bits, grayscale": png_of_16_bits(deep[..., :1]),
        "PNG, 16 bits, alpha": png_of_16_bits(deep),
    }


def corrupt_files() -> dict[str, Content]:
    """Kinds that are to be named."""
    image = photograph()
    jpeg, progressive = (encode(image, "JPEG", quality=90, progressive=p) for p in (False, True))
    kinds = "PNG", "WEBP", "BMP", "TIFF"
    png_, webp, bmp, tiff = (encode(image, kind) for kind in kinds)
    thumbnail, half = with_thumbnail(jpeg), len(png_) // 2
    return {
        "JPEG cut at nine tenths": jpeg[: len(jpeg) * 9 // 10],
        "JPEG, its second half zeros": jpeg[: len(jpeg) // 2] + bytes(len(jpeg) // 2),
        "JPEG, progressive, without its end marker": progressive[:-2],
        "JPEG with a thumbnail, cut at the thumbnail's end": thumbnail[: thumbnail.index(END) + 2],
        "PNG without its last chunk": png_[:-12],
        "PNG, a bit flipped": png_[:half] + bytes([png_[half] ^ 1]) + png_[half + 1 :],
        "PNG that claims 60,000 x 60,000 pixels": png(60000, 60000, 3, 8, bytes(99)),
        "WebP without its last byte": webp[:-1],
        "BMP cut at nine tenths": bmp[: len(bmp) * 9 // 10],
        "BMP, 16 bits": bmp[:28] + b"\x10" + bmp[29:],
        "TIFF": tiff,
        "text": b"404 Not Found\n" * 40,
        "empty file": b"",
        "folder": "folder",
        "broken link": "link",
        "no file any more": "nothing",
    }


def corrupt_inside() -> dict[str, bytes]:
    """JPEGs that have their end, so that only a decoder can tell, if it comes upon the damage."""
    jpeg = encode(photograph(), "JPEG", quality=90)
    half, most = len(jpeg) // 2, len(jpeg) * 3 // 4
    noise = bytes(index * 37 % 255 for index in range(60))
    return {
        "JPEG, 60 bytes overwritten": jpeg[:half] + noise + jpeg[half + 60 :],
        "JPEG, its second half missing before the end marker": jpeg[:half] + END,
        "JPEG, a start marker at three quarters": jpeg[:most] + START + jpeg[most + 2 :],
    }


def put(path: Path, content: Content) -> None:
    """Make ``path`` what ``content`` says, whatever is there."""
    path.unlink(missing_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "folder":
        path.mkdir()
    elif content == "link":
        path.symlink_to(path.with_name("nowhere"))


def write_folder(root: Path, contents: Mapping[str, Content]) -> dict[str, Path]:
    """A data set in ImageNet's layout of these files, all named .JPEG, each followed by a plain
    JPEG that can stand in for it; where the training images lie, by their kinds."""
    plain = encode(photograph(), "JPEG", quality=90)
    for split in ("val", "train"):
        folder = root / split / "all"
        folder.mkdir(parents=True)
        paths = {kind: folder / f"{index:03d}.JPEG" for index, kind in enumerate(contents)}
        for kind, path in paths.items():
            put(path, contents[kind])
            put(path.with_suffix(".plain.JPEG"), plain)
    return paths
