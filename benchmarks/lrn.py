"""What response normalisation costs a step, and how near it comes to the memory bandwidth of a GPU.

python -m benchmarks.lrn [--variant one_column] [--batch 512] [--out FILE.json]

Forward and backward of a whole network with it, by the best kernels that the machine has and by
torch's own, as parts of the speed without it: the goal is 0.8. Then, on a GPU, the two
normalisations of `paper` and of `owt`, in bf16: Triton's kernels and the product with a
band, forward and backward, beside torch's own kernels that move the same bytes and compute next to
nothing: a copy (one read, one write) and a sum (two reads, one write). In turns; a figure is the
median of several rounds, `of_copy` that of the rounds' ratios. The goal is 0.8 here, too.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from alexnet_dist.bench import BenchCase, time_interleaved
from alexnet_dist.model import (
    build_on_meta,
    choose_kernels,
    is_triton_supported,
    iter_initial_weights,
    make_dropout_masks,
)
from alexnet_dist.model.lrn import LocalResponseNorm, lrn_triton
from alexnet_dist.parallel import mesh
from alexnet_dist.parallel.ddp import DDPLayout
from alexnet_dist.parallel.precision import resolve_precision
from benchmarks.common import machine_info

GPU = torch.device("cuda", 0)
RESULTS = Path(__file__).with_name("results")
LAYERS = {  # kernels, side, towers
    "paper norm1": (96, 55, 2),
    "paper norm2": (256, 27, 2),
    "owt norm1": (64, 55, 1),
    "owt norm2": (192, 27, 1),
}
K, ALPHA = 2.0, 5e-4


def seconds(work: Callable[[], object], times: int = 20) -> float:
    """Of one call, by the GPU's clock."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(times):
        work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000 / times


def compare(batch: int, kernels: int, side: int, towers: int, rounds: int) -> dict[str, Any]:
    """The figures of one layer. Tensors should be larger than the GPU's cache."""
    x = torch.randn(batch, kernels, side, side, device=GPU, dtype=torch.bfloat16)
    x = x.to(memory_format=torch.channels_last)
    grad, other = torch.randn_like(x), torch.empty_like(x)
    band = LocalResponseNorm(5, ALPHA, 0.75, K, towers, kernel="band")
    leaf = x.clone().requires_grad_()
    numbers = (K, ALPHA / 5, towers)
    normalised = band(leaf)
    ways: dict[str, dict[str, Callable[[], object]]] = {
        "forward": {
            "copy": lambda: other.copy_(x),
            "triton": lambda: lrn_triton.response_norm(x, *numbers),
            "band": lambda: band(x),
        },
        "backward": {
            "copy": lambda: torch.add(x, grad, out=other),
            "triton": lambda: lrn_triton.response_norm_backward(x, grad, *numbers),
            "band": lambda: torch.autograd.grad(normalised, leaf, grad, retain_graph=True),
        },
    }
    result: dict[str, Any] = {"megabytes_of_a_tensor": round(x.nbytes / 1e6)}
    for name, tensors in (("forward", 2), ("backward", 3)):
        works = ways[name]
        for work in works.values():  # compiled, and the clock up
            seconds(work)
        taken: dict[str, list[float]] = {way: [] for way in works}
        for _ in range(rounds):
            for way, work in works.items():
                taken[way].append(seconds(work))
        result[name] = {
            way: {
                "ms": round(1000 * statistics.median(found), 4),
                "gigabytes_per_second": round(tensors * x.nbytes / 1e9 / statistics.median(found)),
                "of_copy": round(
                    statistics.median(
                        copied / mine for copied, mine in zip(taken["copy"], found, strict=True)
                    ),
                    3,
                ),
            }
            for way, found in taken.items()
        }
    return result


def steps(variant: str, batch: int, rounds: int) -> dict[str, Any]:
    """Images a second of the passes of a network, with its normalisations and without."""
    here = mesh.init_distributed().with_layout(1)
    precision = resolve_precision("auto", here.device)
    images = torch.randn(batch, 3, 227, 227, device=here.device).mul_(50)
    images = images.to(memory_format=torch.channels_last)
    labels = torch.zeros(batch, dtype=torch.int64, device=here.device)
    works = {}
    for way in ("without", "best", "torch"):
        model = build_on_meta(variant, num_classes=1000, image_size=227)
        weights = iter_initial_weights(model)
        choose_kernels(
            model, lrn="torch" if way == "torch" else "auto", stem="auto", pool_first=True
        )
        if way == "without":
            for name, layer in list(model.named_children()):
                if isinstance(layer, LocalResponseNorm):
                    setattr(model, name, nn.Identity())
        layout = DDPLayout(model, here, batch=batch, precision=precision)
        layout.sharding.load_full_weights(layout.parameters, weights)
        masks = make_dropout_masks(
            model.dropout_layers(),
            seed=1,
            step=0,
            batch=batch,
            rows=slice(None),
            device=here.device,
        )

        def once(layout: DDPLayout = layout, masks: Any = masks) -> float:
            for parameter in layout.parameters.values():
                parameter.grad = None
            layout.forward_backward(images, labels, masks)
            return float(batch)

        works[way] = BenchCase(once, warmup=2)
    found = time_interleaved(works, rounds=rounds, seconds=0.0)
    mesh.destroy_distributed()
    return {
        "variant": variant,
        "batch": batch,
        "precision": precision,
        "images_per_second": {way: figure.summary() for way, figure in found.items()},
        "of_without": {
            way: round(figure.speedup_over(found["without"]), 3)
            for way, figure in found.items()
            if way != "without"
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variant", default="one_column", help="of which steps are taken")
    parser.add_argument("--batch", type=int, help="images; 512 on a GPU, else 64")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, help="where the JSON goes; benchmarks/results/ without")
    words = parser.parse_args()
    device = GPU if torch.cuda.is_available() else torch.device("cpu")
    batch = words.batch or (512 if device == GPU else 64)
    record: dict[str, Any] = {
        "what": "benchmarks/lrn.py",
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine_info(device),
        "rounds": words.rounds,
        "steps": steps(words.variant, batch, words.rounds),
    }
    print(json.dumps(record["steps"], indent=1), flush=True)
    if is_triton_supported(device):
        record |= {"batch": batch, "layers": {}}
        for name, numbers in LAYERS.items():
            record["layers"][name] = compare(batch, *numbers, words.rounds)
            print(name, json.dumps(record["layers"][name], indent=1), flush=True)
    name = torch.cuda.get_device_name(GPU) if device == GPU else "cpu"
    out = words.out or RESULTS / f"lrn-{name.lower().replace(' ', '-')}.json"
    out.write_text(json.dumps(record, indent=1) + "\n")
    print(out)


if __name__ == "__main__":
    main()
