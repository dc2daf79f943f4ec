"""What it costs to load images from a folder, from shards and from raw pixels, by each loader.

python -m benchmarks.sources --data DIR [--images N] [--out FILE.json]

Images of DIR/train/CLASS that are square and of one size are put into each form as they are. All
then make the same crops of them, without a resize, in turns and with nothing else to do; a figure
is the median of several rounds, a ratio that of the rounds' ratios to the first loader, "example":
the DataLoader of PyTorch's ImageNet example, with torchvision's transforms on an image at a time.
"""

import argparse
import itertools
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
from alexnet_dist.data.datasets import ImageDataset
from alexnet_dist.data.index import open_datasets, scan_dataset
from alexnet_dist.data.plan import SampleParams, SamplePlan
from alexnet_dist.data.transforms import IMAGENET_MEAN, IMAGENET_STD, build_normalization
from alexnet_dist.parallel.mesh import available_cpus, tune_malloc
from benchmarks.common import save_record
from tests.prepare.packed_folder import write_prepared

CPU = torch.device("cpu")
WAYS = [
    ("example", "folder"),
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


def load(root: Path, name: str, batch: int) -> Generator[int, None, None]:
    """Images of batch after batch."""
    info = scan_dataset(str(root), str(root), lambda *_: None)
    sizes = info.train.sizes
    size = int(sizes.min()) * 25 // 28
    plan = SamplePlan(sizes, batch, seed=1, crop_fraction=size / int(sizes.min()))
    dataset = open_datasets(info)[0]
    epochs = (plan.epoch(epoch, 0, slice(None)) for epoch in itertools.count())
    if name == "example":
        yield from example_loader(dataset, epochs)
        return
    running = build_loader(
        name,  # type: ignore[arg-type]
        dataset,
        build_normalization("centered", info.stats, size=size),
        plan,
        max_batch_size=batch,
        device=CPU,
        threads=available_cpus(),
    )
    for samples in epochs:
        for loaded in running.batches(samples):
            yield len(loaded.indices)


class CropDataset(Dataset[tuple[Tensor, int]]):
    """An image of a folder, cropped and flipped as planned, then torchvision's usual steps."""

    def __init__(self, dataset: ImageDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, params: tuple[int, list[int], bool]) -> tuple[Tensor, int]:
        index, box, flip = params
        image = TF.crop(default_loader(self.dataset.path(index)), *box)
        image = TF.to_tensor(TF.hflip(image) if flip else image)
        image = TF.normalize(image, IMAGENET_MEAN.tolist(), IMAGENET_STD.tolist())
        return image, int(self.dataset.index.labels[index])


def example_loader(
    dataset: ImageDataset, epochs: Iterator[Iterator[SampleParams]]
) -> Generator[int, None, None]:
    """Images of batch after batch, by a DataLoader as people write it."""
    batches = (
        list(zip(s.indices.tolist(), s.crop_boxes.tolist(), s.flips.tolist(), strict=True))
        for s in itertools.chain.from_iterable(epochs)
    )
    loader: DataLoader[tuple[Tensor, int]] = DataLoader(
        CropDataset(dataset), batch_sampler=batches, num_workers=available_cpus()
    )
    for images, _ in loader:
        yield len(images)


def speed(batches: Iterator[int], steps: int) -> float:
    """Images per second over ``steps`` batches."""
    for _ in range(4):  # what was prefetched meanwhile does not count
        next(batches)
    begin = time.perf_counter()
    return sum(next(batches) for _ in range(steps)) / (time.perf_counter() - begin)


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
    args = parser.parse_args()

    tune_malloc()  # as in training
    torch.set_num_threads(available_cpus())
    speeds: dict[str, list[float]] = {" ".join(way): [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        roots = {"folder": some_images(args.data, Path(folder) / "folder", args.images)}
        for kind in ("shards", "pixels"):
            roots[kind] = write_prepared(roots["folder"], Path(folder) / kind, kind)
        for index in range(args.rounds):
            for loader, form in WAYS:
                batches = load(roots[form], loader, args.batch)
                speeds[f"{loader} {form}"].append(speed(batches, args.steps))
                batches.close()
            last = {name: round(found[-1]) for name, found in speeds.items()}
            print(f"round {index + 1}/{args.rounds}: {last}", flush=True)
    results = {"images": args.images, "batch": args.batch, "steps": args.steps}
    save_record("sources.py", results | {"images_per_second": medians(speeds)}, args.out)


if __name__ == "__main__":
    main()
