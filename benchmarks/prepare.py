"""What one core prepares in a second, beside a plain Pillow loop.

python -m benchmarks.prepare --data DIR [--out FILE.json]

DIR is a folder of photographs. The loop opens, converts to RGB, resizes the whole image so that its
shorter side is 256 (smaller ones are kept), and saves a JPEG. Ours is what a worker of
alexnet_dist.prepare does to an image, without and with its part in the statistics. All take turns
in one process with one thread, from bytes to bytes, and are timed by the processor's time, so that
other work on the machine does not count.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from alexnet_dist.data.statistics import compute_moments
from alexnet_dist.prepare.images import OutputFormat, resize_image
from benchmarks.common import machine_info

SIZE, QUALITY = 256, 95
FORM = OutputFormat("shards", SIZE, "none", QUALITY)
FILTERS = {"lanczos": Image.Resampling.LANCZOS, "bicubic": Image.Resampling.BICUBIC}


def resize_by_pillow(encoded: bytes, resample: Image.Resampling) -> Image.Image:
    with Image.open(BytesIO(encoded)) as file:
        image = file.convert("RGB")
    short = min(image.size)
    width, height = ((side * SIZE + short // 2) // short for side in image.size)
    return image.resize((width, height), resample) if short > SIZE else image


def pillow(resample: Image.Resampling, encoded: bytes) -> None:
    resize_by_pillow(encoded, resample).save(BytesIO(), "JPEG", quality=QUALITY)


def ours(encoded: bytes) -> np.ndarray:
    return resize_image(np.frombuffer(encoded, np.uint8), FORM)[0]


def with_statistics(encoded: bytes) -> None:
    compute_moments(ours(encoded))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="a folder of photographs")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    args = parser.parse_args()

    torch.set_num_threads(1)
    files = [path.read_bytes() for path in sorted(args.data.rglob("*.JPEG"))]
    cases: dict[str, Callable[[bytes], Any]] = {
        f"Pillow, {name}": partial(pillow, resample) for name, resample in FILTERS.items()
    }
    cases |= {"ours": ours, "ours with statistics": with_statistics}
    speeds: dict[str, list[float]] = {name: [] for name in cases}
    for repeat in range(args.rounds + 1):
        for name, case in cases.items():
            start = time.process_time()
            for encoded in files:
                case(encoded)
            if repeat:  # the first warms up
                speeds[name].append(len(files) / (time.process_time() - start))
    ratios = {
        f"{one} / {other}": [a / b for a, b in zip(speeds[one], speeds[other], strict=True)]
        for one in ("ours", "ours with statistics")
        for other in ("Pillow, lanczos", "Pillow, bicubic")
    }
    differences = []
    for encoded in files:
        reference = np.asarray(resize_by_pillow(encoded, FILTERS["bicubic"]))
        differences.append(np.abs(ours(encoded).astype(int) - reference))
    record = {
        "what": "benchmarks/prepare.py",
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine_info(),
        "load": round(os.getloadavg()[0], 1),
        "images": len(files),
        "images_per_cpu_second": {k: round(statistics.median(v), 1) for k, v in speeds.items()},
        "ratios": {k: round(statistics.median(v), 2) for k, v in ratios.items()},
        "ratios_of_rounds": {k: [round(x, 2) for x in v] for k, v in ratios.items()},
        "difference_from_pillow_of_255": {
            "mean": round(statistics.mean(float(d.mean()) for d in differences), 4),
            "max": max(int(d.max()) for d in differences),
        },
    }
    print(json.dumps(record, indent=2))
    if args.out:
        args.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
