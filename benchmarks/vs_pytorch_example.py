"""This trainer against the loop of PyTorch's ImageNet example, and its loader against that loop's
DataLoader and NVIDIA's DALI example, on the same folder of JPEGs; on a GPU as on a CPU.

python -m benchmarks.vs_pytorch_example --data DIR [--rounds 5] [--out FILE.json] [trainer options]

The cases take turns, each in a fresh process, so that nothing that one sets up helps another. All
train torchvision's AlexNet on random-resized crops of DIR/train/CLASS. The trainer takes
configs/fast.yaml; the examples are written from scratch here, in as few lines as they need.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from alexnet_dist.bench import BenchCase, TrainBenchmark, summarize, time_interleaved
from alexnet_dist.config import CommandParser
from alexnet_dist.data import dali
from alexnet_dist.data.normalization import IMAGENET_MEAN, IMAGENET_STD
from alexnet_dist.parallel.mesh import available_cpus, init_distributed
from benchmarks.common import save_record

SAME_CROPS = ["--data.train_crop=random_resized", "--data.pca_noise=none"]
DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def example_training(train: Path, batch_size: int) -> Iterator[int]:
    """The example's loop in float32; yields the images of each step."""
    model = torchvision.models.alexnet(num_classes=len(ImageFolder(str(train)).classes)).to(DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=1e-4)
    model.train()
    for images, labels in _example_batches(train, batch_size):
        output = model(images.to(DEVICE, non_blocking=True))
        loss = nn.functional.cross_entropy(output, labels.to(DEVICE, non_blocking=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield len(images)


def example_loading(train: Path, batch_size: int) -> Iterator[int]:
    """The example's DataLoader alone; yields the images of each batch."""
    for images, _ in _example_batches(train, batch_size):
        yield len(images)


def _example_batches(train: Path, batch_size: int) -> Iterator[Any]:
    """Endless batches: images [B, 3, 224, 224] and labels [B]."""
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(224),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN.tolist(), IMAGENET_STD.tolist()),
        ]
    )
    loader: DataLoader[Any] = DataLoader(
        ImageFolder(str(train), transform),
        batch_size=batch_size,
        shuffle=True,
        num_workers=available_cpus(),
        pin_memory=DEVICE.type == "cuda",
        drop_last=True,
        persistent_workers=True,
    )
    while True:
        yield from loader


def nvidia_loading(train: Path, batch_size: int) -> Iterator[int]:
    """NVIDIA's pipeline: DALI's own reader, random crop, resize and flip; yields the images of
    each batch."""
    from nvidia.dali import fn, pipeline_def, types

    gpu = DEVICE.type == "cuda"

    @pipeline_def(  # type: ignore[untyped-decorator]
        batch_size=batch_size,
        num_threads=available_cpus(),
        device_id=0 if gpu else None,
        seed=1,
    )
    def pipeline() -> Any:
        files, labels = fn.readers.file(file_root=str(train), random_shuffle=True)
        images = fn.decoders.image_random_crop(
            files,
            device="mixed" if gpu else "cpu",
            random_area=[0.08, 1.0],
            random_aspect_ratio=[3 / 4, 4 / 3],
        )
        images = fn.resize(images, size=[224, 224], interp_type=types.INTERP_TRIANGULAR)
        images = fn.crop_mirror_normalize(
            images,
            mirror=fn.random.coin_flip(),
            output_layout="CHW",
            mean=(255 * IMAGENET_MEAN).tolist(),
            std=(255 * IMAGENET_STD).tolist(),
        )
        return images, labels

    running = pipeline()
    running.build()
    while True:
        yield len(running.run()[0])


EXAMPLES: dict[str, Callable[[Path, int], Iterator[int]]] = {
    "example training": example_training,
    "example loading": example_loading,
    "nvidia loading": nvidia_loading,
}


def measure(case: str, data: Path, seconds: float, options: list[str]) -> float:
    """Images per second of one round of a case, in this process."""
    config = CommandParser().parse(options).config
    if case in EXAMPLES:
        torch.set_num_threads(available_cpus())
        images = EXAMPLES[case](data / "train", config.data.batch_size)
        # workers keep two batches each ready
        bench_case = BenchCase(lambda: next(images), 2 * available_cpus() + 1)
    else:
        mesh = init_distributed(config.runtime.device, config.runtime.threads).with_layout(1)
        benchmark = TrainBenchmark(config, mesh)
        loader = benchmark.data.loader
        bench_case = (
            benchmark.training_case(benchmark.batches(loader))
            if case == "our training"
            else benchmark.loading_case(loader)
        )
    return time_interleaved({case: bench_case}, rounds=1, seconds=seconds)[case][0]


def main() -> None:
    """Compare; the last line that a case's process prints is its images per second."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="a folder with train/CLASS/")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each round, at least")
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    words, more = parser.parse_known_args()
    if words.case:
        options = ["--config=configs/fast.yaml", f"--data.root={words.data}", *more]
        options += SAME_CROPS if "loading" in words.case else []
        print(measure(words.case, words.data, words.seconds, options))
        return
    cases = ["our training", "example training", "our loading", "example loading"]
    cases += ["nvidia loading"] if dali.available() else []
    speeds: dict[str, list[float]] = {case: [] for case in cases}
    for _ in range(words.rounds):
        for case, found in speeds.items():
            command = [sys.executable, "-W", "ignore", "-m", "benchmarks.vs_pytorch_example"]
            command += [f"--case={case}", f"--data={words.data}", f"--seconds={words.seconds}"]
            done = subprocess.run([*command, *more], stdout=subprocess.PIPE, text=True)
            if done.returncode:
                raise SystemExit(f"{case} failed")
            found.append(float(done.stdout.split()[-1]))
            print(f"{case}: {found[-1]:,.1f} images/s", flush=True)
    ratios = {  # the median of the ratios round by round
        f"{ours} over {case}": round(float(np.median(np.divide(speeds[ours], speeds[case]))), 2)
        for ours, kind in (("our training", "training"), ("our loading", "loading"))
        for case in cases
        if case.endswith(kind) and case != ours
    }
    summary = {case: summarize(found) for case, found in speeds.items()}
    save_record(
        "vs_pytorch_example.py",
        {"options": more, "images_per_second": summary, "speedup": ratios},
        words.out,
        DEVICE,
    )


if __name__ == "__main__":
    main()
