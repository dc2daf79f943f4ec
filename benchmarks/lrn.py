"""How near response normalisation comes to the memory bandwidth of a GPU.

python -m benchmarks.lrn [--batch 512] [--out FILE.json]

The two normalisations of `paper` and of `owt`, in bf16: Triton's kernels and the product with a
band, forward and backward, beside torch's own kernels that move the same bytes and compute next to
nothing: a copy (one read, one write) and a sum (two reads, one write). In turns; a figure is the
median of several rounds, `of_copy` that of the rounds' ratios. The goal is 0.8.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from alexnet_dist.measuring.machine import machine
from alexnet_dist.model import triton_runs_on
from alexnet_dist.model.normalization import LocalResponseNorm, lrn_triton

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, help="where the JSON goes; benchmarks/results/ without")
    words = parser.parse_args()
    if not torch.cuda.is_available() or not triton_runs_on(GPU):
        print("torch sees no NVIDIA GPU here that Triton compiles for: nothing is measured")
        return
    record: dict[str, Any] = {
        "what": "benchmarks/lrn.py",
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(GPU),
        "batch": words.batch,
        "rounds": words.rounds,
        "layers": {},
    }
    for name, numbers in LAYERS.items():
        record["layers"][name] = compare(words.batch, *numbers, words.rounds)
        print(name, json.dumps(record["layers"][name], indent=1), flush=True)
    gpu = torch.cuda.get_device_name(GPU).lower().replace(" ", "-")
    out = words.out or RESULTS / f"lrn-{gpu}.json"
    out.write_text(json.dumps(record, indent=1) + "\n")
    print(out)


if __name__ == "__main__":
    main()
