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
START, END, SCAN = b"\xff\xd8", b"\xff\xd9", b"\xff\xda"


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


def png_chunk(name: bytes, content: bytes) -> bytes:
    crc = zlib.crc32(name + content)
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", crc)


def png_of_16_bits(pixels: np.ndarray) -> bytes:
    """A PNG of uint16 pixels [H, W, channels], which Pillow does not write."""
    height, width, channels = pixels.shape
    color_type = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, color_type, 0, 0, 0)
    chunks = (b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks)


def bmp_of_16_bits() -> bytes:
    pixels = np.asarray(photograph()).astype(np.uint16) >> 3
    packed = (pixels[..., 0] << 11 | pixels[..., 1] << 6 | pixels[..., 2]).tobytes()
    header = struct.pack("<IiiHHIIiiII", 40, WIDTH, HEIGHT, 1, 16, 3, len(packed), 0, 0, 0, 0)
    content = header + struct.pack("<III", 0xF800, 0x7E0, 0x1F) + packed
    return b"BM" + struct.pack("<IHHI", 14 + len(content), 0, 0, 66) + content


def with_thumbnail(jpeg: bytes) -> bytes:
    """A JPEG with another, smaller one, end marker and all, in its EXIF segment."""
    content = b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0" + encode(photograph(24, 32), "JPEG")
    return START + b"\xff\xe1" + struct.pack(">H", len(content) + 2) + content + jpeg[2:]


def without_adobes_mark(jpeg: bytes) -> bytes:
    at = jpeg.index(b"\xff\xee")
    return jpeg[:at] + jpeg[at + 2 + int.from_bytes(jpeg[at + 2 : at + 4]) :]


def inks() -> Image.Image:
    """Cyan, magenta, yellow and, what Pillow's conversion leaves out, black."""
    black = photograph().convert("L").point(lambda value: value // 2)
    return Image.merge("CMYK", (*photograph().split(), black))


def see_through() -> Image.Image:
    image = photograph()
    image.putalpha(photograph().convert("L"))
    return image


def odd_images() -> dict[str, bytes]:
    """Kinds that are to be decoded, and alike by all decoders."""
    image = photograph()
    gray, palette, alpha = image.convert("L"), image.quantize(64), see_through()
    jpeg = encode(image, "JPEG", quality=90)
    rotated = Image.Exif()
    rotated[0x0112] = 6
    deep = np.asarray(alpha).astype(np.uint16) * 257 + 100
    turned = image.transpose(Image.Transpose.ROTATE_180)
    large = photograph(500, 400).resize((4000, 5000))
    return {
        "JPEG": jpeg,
        "JPEG, colors at full resolution": encode(image, "JPEG", subsampling=0),
        "JPEG, progressive": encode(image, "JPEG", progressive=True),
        "JPEG, grayscale": encode(gray, "JPEG"),
        "JPEG, RGB": encode(image, "JPEG", keep_rgb=True),
        "JPEG, CMYK": encode(inks(), "JPEG"),
        "JPEG, CMYK without Adobe's mark": without_adobes_mark(encode(inks(), "JPEG")),
        "JPEG, rotated by EXIF": encode(image, "JPEG", exif=rotated),
        "JPEG, thumbnail in its EXIF": with_thumbnail(jpeg),
        "JPEG, EXIF damaged": START + b"\xff\xe1\0\x10Exif\0\0II*\0\xff\xff\xff\x7f" + jpeg[2:],
        "JPEG, bytes behind its end": jpeg + b"camera" * 9,
        "JPEG, two in one file (MPO)": encode(image, "MPO", save_all=True, append_images=[turned]),
        "JPEG, 20 megapixels": encode(large, "JPEG"),
        "JPEG, 1 pixel wide": encode(photograph(90, 1), "JPEG"),
        "JPEG, 1 pixel high": encode(photograph(1, 90), "JPEG"),
        "JPEG, 1 pixel": encode(photograph(1, 1), "JPEG"),
        "PNG": encode(image, "PNG"),
        "PNG, grayscale": encode(gray, "PNG"),
        "PNG, black and white": encode(image.convert("1"), "PNG"),
        "PNG, palette": encode(palette, "PNG"),
        "PNG, palette with alpha": encode(palette, "PNG", transparency=bytes(range(0, 256, 4))),
        "PNG, alpha": encode(alpha, "PNG"),
        "PNG, grayscale with alpha": encode(alpha.convert("LA"), "PNG"),
        "PNG, 16 bits": png_of_16_bits(deep[..., :3]),
        "PNG, 16 bits, grayscale": png_of_16_bits(deep[..., :1]),
        "PNG, 16 bits, alpha": png_of_16_bits(deep),
        "PNG, rotated by EXIF": encode(image, "PNG", exif=rotated),
        "PNG, bytes behind its end": encode(image, "PNG") + b"more",
        "PNG, 1 pixel wide": encode(photograph(90, 1), "PNG"),
        "WebP": encode(image, "WEBP"),
        "WebP, lossless": encode(image, "WEBP", lossless=True),
        "WebP, alpha": encode(alpha, "WEBP", lossless=True, exact=True),
        "WebP, animated": encode(image, "WEBP", save_all=True, append_images=[turned]),
        "BMP": encode(image, "BMP"),
        "BMP, palette": encode(palette, "BMP"),
        "BMP, alpha": encode(alpha, "BMP"),
    }


def corrupt_files() -> dict[str, Content]:
    """Kinds that are to be named."""
    image = photograph()
    jpeg = encode(image, "JPEG", quality=90)
    progressive = encode(image, "JPEG", progressive=True)
    png, webp, bmp = (encode(image, kind) for kind in ("PNG", "WEBP", "BMP"))
    thumbnail = with_thumbnail(jpeg)
    flipped = bytearray(png)
    flipped[len(png) // 2] ^= 1

    def cut(content: bytes, part: float) -> bytes:
        return content[: int(len(content) * part)]

    return {
        "JPEG cut in its header": jpeg[:100],
        "JPEG cut before its scan": jpeg[: jpeg.index(SCAN)],
        "JPEG cut at a half": cut(jpeg, 0.5),
        "JPEG cut at nine tenths": cut(jpeg, 0.9),
        "JPEG without its end marker": jpeg[:-2],
        "JPEG without its last byte": jpeg[:-1],
        "JPEG, its second half zeros": cut(jpeg, 0.5) + bytes(len(jpeg) // 2),
        "JPEG, progressive, cut at nine tenths": cut(progressive, 0.9),
        "JPEG, progressive, without its end marker": progressive[:-2],
        "JPEG with a thumbnail, cut at nine tenths": cut(thumbnail, 0.9),
        "JPEG with a thumbnail, cut at the thumbnail's end": thumbnail[: thumbnail.index(END) + 2],
        "PNG cut at a half": cut(png, 0.5),
        "PNG without its last chunk": png[:-12],
        "PNG cut in its last chunk": png[:-5],
        "PNG, a bit flipped": bytes(flipped),
        "PNG that claims 60,000 x 60,000 pixels": png[:8]
        + png_chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0))
        + png[33:],
        "WebP cut at a half": cut(webp, 0.5),
        "WebP without its last byte": webp[:-1],
        "BMP cut at nine tenths": cut(bmp, 0.9),
        "BMP, 16 bits": bmp_of_16_bits(),
        "GIF": encode(image.quantize(64), "GIF"),
        "TIFF": encode(image, "TIFF"),
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
