"""How near the paper's update comes to the memory bandwidth, and what a CUDA graph brings.

python -m benchmarks.update [--batch 128] [--out FILE.json]

The 61 million parameters of `paper` with torch's foreach and fused updates and, on an NVIDIA GPU,
Triton's kernel; with bf16 copies of the weights, too: written by the kernel, or cast behind torch's
fused update. Beside them a sum (two reads, one write), whose bytes a second are the bandwidth.
`bytes` are those that a way moves for a parameter, `of_bandwidth` what they come to; in turns, and
a figure is the median of several rounds.

On a GPU also whole steps of `paper` in bf16: launched one by one, and as a CUDA graph.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from alexnet_dist.measuring.machine import machine
from alexnet_dist.model import (
    build_on_meta,
    iter_initial_weights,
    make_dropout_masks,
    triton_runs_on,
)
from alexnet_dist.parallel import mesh
from alexnet_dist.parallel.ddp import DDPLayout
from alexnet_dist.training.cuda_graph import WARM_UP, CudaGraphStep
from alexnet_dist.training.optim import KrizhevskySGD, build_optimizer
from alexnet_dist.training.step import train_step

RESULTS = Path(__file__).with_name("results")
NUMBERS: dict[str, Any] = {"lr": 1e-6, "momentum": 0.9, "weight_decay": 0.0005}


@dataclass
class Batch:
    """What a step takes."""

    images: Tensor
    labels: Tensor


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Of one call, by the device's clock."""
    if device.type != "cuda":
        begun = time.perf_counter()
        for _ in range(2):
            work()
        return (time.perf_counter() - begun) / 2
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(20):
        work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000 / 20


def in_turns(
    works: dict[str, Callable[[], object]], rounds: int, device: torch.device
) -> dict[str, float]:
    """Median seconds of each."""
    for work in works.values():  # compiled, and the clock up
        seconds(work, device)
    taken: dict[str, list[float]] = {way: [] for way in works}
    for _ in range(rounds):
        for way, work in works.items():
            taken[way].append(seconds(work, device))
    return {way: statistics.median(found) for way, found in taken.items()}


def compare_updates(device: torch.device, rounds: int) -> dict[str, Any]:
    """Time, bytes and share of the bandwidth of each way."""
    weights = [
        nn.Parameter(torch.randn(p.shape, device=device))
        for p in build_on_meta("paper").parameters()
    ]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    count = sum(weight.numel() for weight in weights)
    copies: dict[Tensor, Tensor] = {
        w: torch.empty_like(w, dtype=torch.bfloat16, requires_grad=False) for w in weights
    }
    a, b, c = (torch.randn(count, device=device) for _ in range(3))
    fused = KrizhevskySGD(weights, **NUMBERS, fused=True)

    def fused_and_cast() -> None:
        fused.step()
        with torch.no_grad():
            torch._foreach_copy_(list(copies.values()), list(copies))

    # foreach: decay to gradient, momentum, both to velocity, that to weight: 7 reads and 4 writes
    ways: dict[str, tuple[int, Callable[[], object]]] = {
        "sum": (12, lambda: torch.add(a, b, out=c)),
        "foreach": (44, KrizhevskySGD(weights, **NUMBERS, foreach=True).step),
        "fused": (20, fused.step),
        "fused, and a cast": (26, fused_and_cast),
    }
    if triton_runs_on(device):
        ways["triton"] = (20, KrizhevskySGD(weights, **NUMBERS, triton=True).step)
        with_copies = KrizhevskySGD(weights, **NUMBERS, triton=True, copies=copies)
        ways["triton, with copies"] = (22, with_copies.step)
    found = in_turns({way: work for way, (_, work) in ways.items()}, rounds, device)
    bandwidth = 12 * count / found["sum"]
    return {
        way: {
            "ms": round(1000 * found[way], 4),
            "bytes": moved,
            "gigabytes_per_second": round(moved * count / 1e9 / found[way], 1),
            "of_bandwidth": round(moved * count / found[way] / bandwidth, 3),
        }
        for way, (moved, _) in ways.items()
    }


def compare_steps(device: torch.device, batch: int, rounds: int) -> dict[str, Any]:
    """Images a second of whole steps, from images that lie on the GPU."""
    here = mesh.start("cuda").arrange(1)
    images = torch.randn(batch, 3, 224, 224, device=device).mul_(50)
    given = Batch(
        images.to(memory_format=torch.channels_last),
        torch.randint(1000, (batch,), device=device),
    )
    works: dict[str, Callable[[], object]] = {}
    for way, copies in (("plain", False), ("graph", False), ("graph, with copies", True)):
        model = build_on_meta("paper")
        weights = iter_initial_weights(model)
        layout = DDPLayout(model, here, batch=batch, precision="bf16", weight_copies=copies)
        layout.sharding.fill(layout.parameters, weights)
        optimizer = build_optimizer(
            "sgd2012", layout.parameters, **NUMBERS, triton=way != "plain", copies=layout.copies
        )
        masks = make_dropout_masks(
            model.dropouts(), seed=1, step=0, batch=batch, rows=slice(None), device=device
        )
        if way == "plain":
            works[way] = partial(train_step, layout, optimizer, given, masks)
            continue
        step = CudaGraphStep(layout, optimizer)
        for _ in range(WARM_UP + 1):
            step(given, masks)
        works[way] = partial(step, given, masks)
    found = in_turns(works, rounds, device)
    mesh.leave()
    return {
        way: {"ms": round(1000 * taken, 3), "images_per_second": round(batch / taken)}
        for way, taken in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, help="where the JSON goes; benchmarks/results/ without")
    words = parser.parse_args()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    record: dict[str, Any] = {
        "what": "benchmarks/update.py",
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(device),
        "rounds": words.rounds,
        "updates": compare_updates(device, words.rounds),
    }
    print(json.dumps(record["updates"], indent=1), flush=True)
    if triton_runs_on(device):
        record["batch"] = words.batch
        record["steps"] = compare_steps(device, words.batch, words.rounds)
        print(json.dumps(record["steps"], indent=1), flush=True)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    out = words.out or RESULTS / f"update-{name.lower().replace(' ', '-')}.json"
    out.write_text(json.dumps(record, indent=1) + "\n")
    print(out)


if __name__ == "__main__":
    main()
