"""This trainer against the loop that everybody starts from, in turns, on the same images.

The loop is that of PyTorch's ImageNet example, written anew here: float32, torchvision's AlexNet,
RandomResizedCrop and a flip in a DataLoader's worker processes, torch's SGD. Ours is the
trainer's own engine, layout and optimizer with `--model.variant torchvision`.

python benchmarks/vs_pytorch_example.py --data DIR [--out FILE.json]

Each figure is the median of several rounds, in which the two take turns, so that what the machine
does otherwise hits both; the ratios are those of the rounds, pair by pair.
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
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
from alexnet_dist.data.plan import Plan, centre_boxes
from alexnet_dist.data.sources import FolderSource, make_catalogue
from alexnet_dist.model import VARIANTS, build_model, draw_masks
from alexnet_dist.parallel.ddp import DataParallel
from alexnet_dist.parallel.mesh import Mesh, choose_precision, start
from alexnet_dist.training.loop import train_step
from alexnet_dist.training.optim import build_optimizer


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


def in_turns(
    ours: Callable[[], Iterator[int]],
    theirs: Callable[[], Iterator[int]],
    *,
    steps: int,
    rounds: int,
    device: torch.device,
    label: str,
) -> dict[str, Any]:
    """Both, round by round, each begun anew so that neither works ahead during the other's turn."""
    pairs = []
    for number in range(rounds):
        pair = []
        for make in (ours, theirs):
            running = make()
            for _ in range(3):  # processes start, caches fill
                next(running)
            pair.append(speed(running, steps, device))
            running.close()  # type: ignore[attr-defined]
        pairs.append(pair)
        print(
            f"{label} {number + 1}/{rounds}: ours {pair[0]:,.0f}  theirs {pair[1]:,.0f} images/s  "
            f"ratio {pair[0] / pair[1]:.2f}",
            flush=True,
        )
    ratios = [a / b for a, b in pairs]
    return {
        "ours_images_per_second": round(statistics.median(a for a, _ in pairs), 1),
        "theirs_images_per_second": round(statistics.median(b for _, b in pairs), 1),
        "ratio": round(statistics.median(ratios), 2),
        "ratios": [round(ratio, 2) for ratio in ratios],
        "steps": steps,
    }


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures were measured on."""
    flags, name = "", platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), name)
        flags = next((x for x in lines if x.startswith("flags")), "")
    record: dict[str, Any] = {
        "processor": name,
        "processors": len(os.sched_getaffinity(0)),
        "amx_bf16": "amx_bf16" in flags,
        "avx512_bf16": "avx512_bf16" in flags,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "python": platform.python_version(),
    }
    try:
        from nvidia import dali

        record["dali"] = dali.__version__
    except ImportError:
        record["dali"] = None
    if device.type == "cuda":
        record["gpu"] = torch.cuda.get_device_name(device)
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--data", type=Path, required=True, help="a folder with train/ and val/")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=8, help="of training, in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    words = parser.parse_args()

    mesh = start()
    catalogue = make_catalogue(str(words.data), "~/.cache/alexnet_dist", lambda *_: None)
    source = FolderSource(catalogue.train)
    side = int(min(catalogue.train.sizes.min(), 224) * 200 / 224)

    def engine(plan: Plan, image_side: int) -> Engine:
        return build_engine(
            "auto",
            source,
            pixels_for(VARIANTS["torchvision"].pixels, catalogue.statistics, side=image_side),
            plan=plan,
            fraction=plan.fraction,
            max_batch=words.batch,
            device=mesh.device,
            threads=mesh.threads,
        )

    sizes = catalogue.train.sizes
    train_plan = Plan(sizes, words.batch, seed=1, crop="random_resized")
    crop_plan = Plan(sizes, words.batch, seed=1, fraction=side / int(sizes.min()))
    same = (centre_boxes(sizes, crop_plan.fraction)[:, 2] == side).all()
    training, loading = engine(train_plan, 224), engine(crop_plan, side)
    results = {
        "training": in_turns(
            lambda: ours(training, train_plan, mesh, words.batch),
            lambda: example(words.data, mesh, words.batch),
            steps=words.steps,
            rounds=words.rounds,
            device=mesh.device,
            label="training",
        ),
        "loading": in_turns(
            lambda: engine_alone(loading, crop_plan),
            lambda: loader_alone(words.data, mesh, words.batch, side),
            steps=30,
            rounds=words.rounds,
            device=mesh.device,
            label=f"loading crops of {side}",
        ),
    }
    record = {
        "what": "benchmarks/vs_pytorch_example.py",
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(mesh.device),
        "batch": words.batch,
        "images": len(sizes),
        "precision": choose_precision("auto", mesh.device),
        "engine": training.description,
        "crops_without_resize": bool(same),
        **results,
    }
    text = json.dumps(record, indent=2)
    print(text)
    if words.out:
        words.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
