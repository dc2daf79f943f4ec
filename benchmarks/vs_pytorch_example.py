"""This trainer against the loop that everybody starts from, in turns, on the same images.

The loop is that of PyTorch's ImageNet example, written anew here: float32, torchvision's AlexNet,
RandomResizedCrop and a flip in a DataLoader's worker processes, torch's SGD. Ours is the
trainer's own engine, layout and optimizer with `--model.variant torchvision`.

python -m benchmarks.vs_pytorch_example --data DIR [--out FILE.json]

Each figure is the median of several rounds, in which the two take turns, each in a process of its
own, so that what the machine does otherwise hits both and nothing that the trainer sets up helps
the loop; the ratio is the median of the rounds' ratios.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from alexnet_dist.data import build_engine
from alexnet_dist.data.augment import pixels_for
from alexnet_dist.data.engine import Engine
from alexnet_dist.data.plan import Plan
from alexnet_dist.data.sources import FolderSource, make_catalogue
from alexnet_dist.model import VARIANTS, build_model, draw_masks
from alexnet_dist.parallel.arithmetic import choose_precision
from alexnet_dist.parallel.ddp import DataParallel
from alexnet_dist.parallel.mesh import Mesh, start, usable_processors
from alexnet_dist.training.loop import train_step
from alexnet_dist.training.optim import build_optimizer
from benchmarks.machine import machine


def example(data: Path, mesh: Mesh, batch: int) -> Iterator[int]:
    """The plain loop: yields images done after every step."""
    normalise = transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    augment = transforms.Compose(
        [
            transforms.RandomResizedCrop(224),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            normalise,
        ]
    )
    loader: DataLoader[Any] = DataLoader(
        ImageFolder(str(data / "train"), augment),
        batch_size=batch,
        shuffle=True,
        num_workers=mesh.threads,
        pin_memory=mesh.device.type == "cuda",
        drop_last=True,
        persistent_workers=True,
    )
    model = torchvision.models.alexnet(num_classes=1000).to(mesh.device)
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=1e-4)
    model.train()
    while True:
        for images, labels in loader:
            images = images.to(mesh.device, non_blocking=True)
            labels = labels.to(mesh.device, non_blocking=True)
            loss = criterion(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            yield len(images)


def ours(engine: Engine, plan: Plan, mesh: Mesh, batch: int) -> Iterator[int]:
    """This trainer: yields images done after every step."""
    model = build_model("torchvision", num_classes=1000)
    precision = choose_precision("auto", mesh.device)
    layout = DataParallel(model, mesh, batch=batch, precision=precision)
    optimizer = build_optimizer("sgd", layout.parameters, lr=0.01, momentum=0.9, weight_decay=1e-4)
    step = 0
    for epoch in itertools.count():
        for finished in engine.batches(plan.epoch(epoch, 0, slice(None))):
            masks = draw_masks(
                model.dropouts(),
                seed=0,
                step=step,
                batch=batch,
                rows=slice(None),
                device=mesh.device,
            )
            train_step(layout, optimizer, finished, masks)
            step += 1
            yield len(finished.numbers)


def loader_alone(data: Path, mesh: Mesh, batch: int, side: int) -> Iterator[int]:
    """A DataLoader with torchvision's transforms: one random crop without a resize, and a flip."""
    augment = transforms.Compose(
        [
            transforms.RandomCrop(side),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )
    loader: DataLoader[Any] = DataLoader(
        ImageFolder(str(data / "train"), augment),
        batch_size=batch,
        shuffle=True,
        num_workers=mesh.threads,
        drop_last=True,
        persistent_workers=True,
    )
    while True:
        for images, _ in loader:
            yield len(images)


def engine_alone(engine: Engine, plan: Plan) -> Iterator[int]:
    """DALI with the same crops."""
    for epoch in itertools.count():
        for finished in engine.batches(plan.epoch(epoch, 0, slice(None))):
            yield len(finished.numbers)


def speed(steps: Iterator[int], count: int, device: torch.device) -> float:
    """Images a second over ``count`` steps."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    images = sum(next(steps) for _ in range(count))
    if device.type == "cuda":
        torch.cuda.synchronize()
    return images / (time.perf_counter() - begin)


def turn(words: argparse.Namespace) -> float:
    """One turn of one of the four, in this process: images a second."""
    torch.manual_seed(1)
    theirs = words.turn in ("example", "dataloader")
    mesh = plain_process() if theirs else start()
    catalogue = make_catalogue(str(words.data), "~/.cache/alexnet_dist", lambda *_: None)
    sizes = catalogue.train.sizes
    side = crop_side(sizes)
    if words.turn == "example":
        running = example(words.data, mesh, words.batch)
    elif words.turn == "dataloader":
        running = loader_alone(words.data, mesh, words.batch, side)
    else:
        training = words.turn == "trainer"
        plan = (
            Plan(sizes, words.batch, seed=1, crop="random_resized")
            if training
            else Plan(sizes, words.batch, seed=1, fraction=side / int(sizes.min()))
        )
        engine = build_engine(
            "auto",
            FolderSource(catalogue.train),
            pixels_for(
                VARIANTS["torchvision"].pixels, catalogue.statistics, side=224 if training else side
            ),
            plan=plan,
            fraction=plan.fraction,
            max_batch=words.batch,
            device=mesh.device,
            threads=mesh.threads,
        )
        running = ours(engine, plan, mesh, words.batch) if training else engine_alone(engine, plan)
    for _ in range(4):  # processes start, caches and queues fill
        next(running)
    return speed(running, words.steps, mesh.device)


def plain_process() -> Mesh:
    """What the plain loop has: torch's own threads and memory, and nothing of ours."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    torch.set_num_threads(usable_processors())
    return Mesh(0, 1, 0, 1, device, usable_processors(), None, None)  # type: ignore[arg-type]


def crop_side(sizes: Any) -> int:
    """Side of a crop that every image has without a resize."""
    return int(min(sizes.min(), 224) * 200 / 224)


def in_turns(ours: str, theirs: str, steps: int, words: argparse.Namespace) -> dict[str, Any]:
    """Both, round by round, each turn in a process of its own."""

    def one(name: str) -> float:
        options = ["--data", str(words.data), "--batch", str(words.batch), "--steps", str(steps)]
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.vs_pytorch_example"]
        command += [*options, "--turn", name]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        return float(done.stdout.split()[-1])

    pairs = []
    for number in range(words.rounds):
        pair = one(ours), one(theirs)
        pairs.append(pair)
        print(
            f"{ours} / {theirs} {number + 1}/{words.rounds}: {pair[0]:,.0f} / {pair[1]:,.0f} "
            f"images/s, ratio {pair[0] / pair[1]:.2f}",
            flush=True,
        )
    ratios = [a / b for a, b in pairs]
    return {
        f"{ours}_images_per_second": round(statistics.median(a for a, _ in pairs), 1),
        f"{theirs}_images_per_second": round(statistics.median(b for _, b in pairs), 1),
        "ratio": round(statistics.median(ratios), 2),
        "ratios": [round(ratio, 2) for ratio in ratios],
        "steps": steps,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="a folder with train/ and val/")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=8, help="of training, in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--turn", help="for the script itself: trainer, example, ...")
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    words = parser.parse_args()

    if words.turn:
        print(turn(words))
        return
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    catalogue = make_catalogue(str(words.data), "~/.cache/alexnet_dist", lambda *_: None)
    record = {
        "what": "benchmarks/vs_pytorch_example.py",
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(device),
        "batch": words.batch,
        "images": len(catalogue.train),
        "precision": {"trainer": choose_precision("auto", device), "example": "fp32"},
        "training": in_turns("trainer", "example", words.steps, words),
        "loading": {
            "crop": crop_side(catalogue.train.sizes),
            **in_turns("engine", "dataloader", 30, words),
        },
    }
    text = json.dumps(record, indent=2)
    print(text)
    if words.out:
        words.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
