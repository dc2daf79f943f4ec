"""What one core prepares in a second, beside a plain Pillow loop.

python -m benchmarks.prepare --data DIR [--out FILE.json]

DIR is a folder of photographs. The loop opens, converts to RGB, resizes the whole image so that
its shorter side is 256 (smaller ones stay as large as they are), and saves a JPEG. Ours is what a
worker of alexnet_dist.prepare does to an image, without and with its part in the statistics. All in
turns in one process with one thread, from bytes to bytes, by the processor's time, so that other
work on the machine does not count.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from PIL import Image
from torch.nn.functional import interpolate

from alexnet_dist.prepare.images import OutputFormat, compute_moments, resize_image
from benchmarks.common import machine_info

SIDE, QUALITY = 256, 95
FORM = OutputFormat("shards", SIDE, "none", QUALITY)
FILTERS = {"bicubic": Image.Resampling.BICUBIC, "lanczos": Image.Resampling.LANCZOS}


def target(width: int, height: int) -> tuple[int, int]:
    short = max(min(width, height), 1)
    if short <= SIDE:
        return width, height
    return tuple((x * SIDE + short // 2) // short for x in (width, height))  # type: ignore[return-value]


def plain(encoded: bytes, way: Image.Resampling) -> bytes:
    with Image.open(BytesIO(encoded)) as image:
        whole = image.convert("RGB")
    buffer = BytesIO()
    whole.resize(target(*whole.size), way).save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def ours(encoded: bytes) -> np.ndarray:
    return resize_image(np.frombuffer(encoded, np.uint8), FORM)[0]


def apart(first: np.ndarray, second: np.ndarray) -> tuple[float, int]:
    difference = np.abs(first.astype(int) - second)
    return float(difference.mean()), int(difference.max())


def precision(files: list[bytes]) -> dict[str, Any]:
    """How far from Pillow's whole decoding and resizing others are, in steps of 255: ours; and
    libjpeg's decoding at a half that leaves twice the target's side, which ours does not use."""
    pillow, halved = [], []
    for encoded in files:
        with Image.open(BytesIO(encoded)) as image:
            whole = image.convert("RGB")
        size = target(*whole.size)
        if size != whole.size:
            reference = np.asarray(whole.resize(size, FILTERS["bicubic"]))
            pillow.append(apart(ours(encoded), reference))
        side = min(whole.size) // 4
        small = [length * side // min(whole.size) for length in whole.size]
        with Image.open(BytesIO(encoded)) as image:
            image.draft("RGB", (2 * side, 2 * side))
            half = image.convert("RGB")
        both = []
        for one in (whole, half):
            pixels = torch.from_numpy(np.array(one)).permute(2, 0, 1)[None]
            both.append(interpolate(pixels, small[::-1], mode="bicubic", antialias=True).numpy())
        halved.append(apart(*both))
    return {
        name: {
            "mean": round(statistics.mean(mean for mean, _ in found), 4),
            "mean of the worst image": round(max(mean for mean, _ in found), 4),
            "most": max(most for _, most in found),
        }
        for name, found in (("ours", pillow), ("scaled decoding to twice the side", halved))
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="a folder of photographs")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    words = parser.parse_args()

    torch.set_num_threads(1)
    files = [path.read_bytes() for path in sorted(words.data.rglob("*.JPEG"))]
    ways: dict[str, Callable[[bytes], Any]] = {
        "Pillow, lanczos": lambda encoded: plain(encoded, FILTERS["lanczos"]),
        "Pillow, bicubic": lambda encoded: plain(encoded, FILTERS["bicubic"]),
        "ours": ours,
        "ours with statistics": lambda encoded: compute_moments(ours(encoded)),
    }
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(words.rounds + 1):
        for name, way in ways.items():
            begin = time.process_time()
            for encoded in files:
                way(encoded)
            if turn:  # the first warms up
                speeds[name].append(len(files) / (time.process_time() - begin))
    ratios = {
        f"{one} / {other}": [a / b for a, b in zip(speeds[one], speeds[other], strict=True)]
        for one in ("ours", "ours with statistics")
        for other in ("Pillow, lanczos", "Pillow, bicubic")
    }
    sizes = [Image.open(BytesIO(encoded)).size for encoded in files]
    record = {
        "what": "benchmarks/prepare.py",
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine_info() | {"pillow": PIL.__version__},
        "load": round(os.getloadavg()[0], 1),
        "images": len(files),
        "larger": sum(min(size) > SIDE for size in sizes),
        "mean_pixels": round(statistics.mean(w * h for w, h in sizes)),
        "images_per_cpu_second": {k: round(statistics.median(v), 1) for k, v in speeds.items()},
        "ratios": {k: round(statistics.median(v), 2) for k, v in ratios.items()},
        "ratios_of_rounds": {k: [round(x, 2) for x in v] for k, v in ratios.items()},
        "difference": precision(files),
    }
    print(json.dumps(record, indent=2))
    if words.out:
        words.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
