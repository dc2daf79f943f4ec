"""What it costs to load images from a folder, from shards and from raw pixels, by each engine.

python -m benchmarks.sources --data DIR [--images N] [--out FILE.json]

Images of DIR/train/CLASS that are square and of one size are put into each form as they are. All
then make the same crops of them, without a resize, in turns and with nothing else to do; a figure
is the median of several rounds, a ratio that of the rounds' ratios to the first. That is "usual":
the DataLoader of PyTorch's ImageNet example, torchvision's transforms on an image at a time; the
engine for machines without DALI ("torch") crops bytes, and normalises them by the batch.
Images are counted by the second, and by the second of one processor's time, which depends less on
what the machine does otherwise.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets.folder import default_loader
from torchvision.transforms import functional as TF

from alexnet_dist.data import build_loader
from alexnet_dist.data.datasets import ImageDataset, open_datasets, scan_dataset
from alexnet_dist.data.plan import SampleParams, SamplePlan
from alexnet_dist.data.transforms import IMAGENET_MEAN, IMAGENET_STD, build_normalization
from alexnet_dist.parallel.mesh import available_cpus, tune_malloc
from benchmarks.common import machine_info
from tests.prepare.packed_folder import write_prepared

CPU = torch.device("cpu")
WAYS = [
    ("usual", "folder"),
    *itertools.product(("torch", "dali"), ("folder", "shards", "pixels")),
    ("gpu_cache", "pixels"),
]


def some_images(data: Path, folder: Path, count: int) -> Path:
    """Links to ``count`` images, as many of each class, all for training; one of each for
    validation."""
    classes = sorted(path for path in (data / "train").iterdir() if path.is_dir())
    for path in classes:
        for index, image in enumerate(sorted(path.iterdir())[: count // len(classes)]):
            for split in ("train", "val") if index == 0 else ("train",):
                (folder / split / path.name).mkdir(parents=True, exist_ok=True)
                (folder / split / path.name / image.name).symlink_to(image.resolve())
    return folder


def loading(root: Path, engine: str, batch: int) -> Generator[int, None, None]:
    """Images of batch after batch."""
    catalogue = scan_dataset(str(root), str(root), lambda *_: None)
    sizes = catalogue.train.sizes
    side = int(sizes.min()) * 25 // 28
    plan = SamplePlan(sizes, batch, seed=1, crop_fraction=side / int(sizes.min()))
    source = open_datasets(catalogue)[0]
    epochs = (plan.epoch(epoch, 0, slice(None)) for epoch in itertools.count())
    if engine == "usual":
        yield from usual(source, epochs)
        return
    running = build_loader(
        engine,  # type: ignore[arg-type]
        source,
        build_normalization("centered", catalogue.stats, size=side),
        plan,
        max_batch_size=batch,
        device=CPU,
        threads=available_cpus(),
    )
    for draws in epochs:
        for finished in running.batches(draws):
            yield len(finished.indices)


class Cropped(Dataset[tuple[Tensor, int]]):
    """An image of a folder, cropped and flipped as it is told, then torchvision's usual steps."""

    def __init__(self, source: ImageDataset) -> None:
        self.source = source

    def __getitem__(self, order: tuple[int, list[int], bool]) -> tuple[Tensor, int]:
        index, box, flip = order
        image = TF.crop(default_loader(self.source.path(index)), *box)
        image = TF.to_tensor(TF.hflip(image) if flip else image)
        image = TF.normalize(image, IMAGENET_MEAN.tolist(), IMAGENET_STD.tolist())
        return image, int(self.source.index.labels[index])


def usual(
    source: ImageDataset, epochs: Iterator[Iterator[SampleParams]]
) -> Generator[int, None, None]:
    """Images of batch after batch, by a DataLoader as people write it."""
    orders = (
        list(
            zip(
                draws.indices.tolist(), draws.crop_boxes.tolist(), draws.flips.tolist(), strict=True
            )
        )
        for draws in itertools.chain.from_iterable(epochs)
    )
    loader: DataLoader[tuple[Tensor, int]] = DataLoader(
        Cropped(source), batch_sampler=orders, num_workers=available_cpus()
    )
    for images, _ in loader:
        yield len(images)


def speed(batches: Iterator[int], steps: int) -> tuple[float, float]:
    """Images a second over ``steps`` batches, and by the second of a processor."""
    for _ in range(4):  # what was prepared ahead meanwhile does not count
        next(batches)
    begin, used = time.perf_counter(), processor_seconds()
    images = sum(next(batches) for _ in range(steps))
    return images / (time.perf_counter() - begin), images / (processor_seconds() - used)


def processor_seconds() -> float:
    """What this process and its workers have used."""
    seconds = time.process_time()
    for worker in multiprocessing.active_children():
        fields = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()
        seconds += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return seconds


def medians(speeds: dict[str, list[float]]) -> dict[str, Any]:
    """Of the figures, and of their ratios to the first one in the same round."""
    first = next(iter(speeds.values()))
    ratios = {
        name: [round(one / other, 2) for one, other in zip(found, first, strict=True)]
        for name, found in speeds.items()
    }
    return {
        "median": {name: round(statistics.median(found)) for name, found in speeds.items()},
        "ratio": {name: round(statistics.median(found), 2) for name, found in ratios.items()},
        "ratios": ratios,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="a folder with train/CLASS/")
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=20, help="batches in a turn")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    words = parser.parse_args()

    tune_malloc()  # as in training
    torch.set_num_threads(available_cpus())
    speeds: dict[str, list[tuple[float, float]]] = {" ".join(way): [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        roots = {"folder": some_images(words.data, Path(folder) / "folder", words.images)}
        for kind in ("shards", "pixels"):
            roots[kind] = write_prepared(roots["folder"], Path(folder) / kind, kind)
        for index in range(words.rounds):
            for engine, form in WAYS:
                batches = loading(roots[form], engine, words.batch)
                speeds[f"{engine} {form}"].append(speed(batches, words.steps))
                batches.close()
            last = {name: [round(one) for one in found[-1]] for name, found in speeds.items()}
            print(f"round {index + 1}/{words.rounds}: {last}", flush=True)
    record = {
        "what": "benchmarks/sources.py",
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine_info(CPU),
        "images": words.images,
        "batch": words.batch,
        "steps": words.steps,
        "load_average": round(os.getloadavg()[1], 1),
        "images_per_second": medians({k: [a for a, _ in v] for k, v in speeds.items()}),
        "images_per_processor_second": medians({k: [b for _, b in v] for k, v in speeds.items()}),
    }
    print(json.dumps(record, indent=1))
    if words.out:
        words.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
