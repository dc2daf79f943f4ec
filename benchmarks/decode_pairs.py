"""The two processes of a pair see the same images: is each to decode all of them, or one half each,
to be exchanged?

torchrun --nproc_per_node=2 -m benchmarks.decode_pairs --data DIR [--out FILE.json]

Both in turns, in the same processes, with DALI: batches as towers.py gets them, and half batches
whose finished images are then gathered.
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from alexnet_dist.data import build_loader
from alexnet_dist.data.corrupt_images import Loader
from alexnet_dist.data.plan import SamplePlan
from alexnet_dist.data.sources import FolderDataset, scan_dataset
from alexnet_dist.data.transforms import build_normalization
from alexnet_dist.measuring.machine import machine
from alexnet_dist.parallel.collectives import all_gather
from alexnet_dist.parallel.mesh import Mesh, init_distributed


def batches(engine: Loader, plan: SamplePlan, rows: slice, mesh: Mesh) -> Iterator[int]:
    """Images of a whole batch, at hand on both processes."""
    for epoch in itertools.count():
        for batch in engine.batches(plan.epoch(epoch, 0, rows)):
            images = batch.images
            if rows != slice(None):
                images = all_gather(images.permute(0, 2, 3, 1), mesh.long_timeout_group).flatten(
                    0, 1
                )
            yield len(images)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="a folder with train/ and val/")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    words = parser.parse_args()

    mesh = init_distributed("cpu")
    catalogue = scan_dataset(str(words.data), "~/.cache/alexnet_dist", lambda *_: None)
    plan = SamplePlan(catalogue.train.sizes, words.batch, seed=1)
    ways = {"twice": slice(None), "halves": slice(mesh.rank, None, 2)}
    running = {}
    for name, rows in ways.items():
        engine = build_loader(
            "auto",
            FolderDataset(catalogue.train),
            build_normalization("centered", catalogue.statistics, side=224),
            plan=plan,
            fraction=plan.fraction,
            max_batch=len(range(words.batch)[rows]),
            device=mesh.device,
            threads=mesh.threads,
        )
        running[name] = batches(engine, plan, rows, mesh)
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(words.rounds):
        for name, one in running.items():
            for _ in range(3):  # what was prepared ahead meanwhile does not count
                next(one)
            dist.barrier()
            begin = time.perf_counter()
            images = sum(next(one) for _ in range(words.steps))
            dist.barrier()
            speeds[name].append(images / (time.perf_counter() - begin))
    ratios = [a / b for a, b in zip(speeds["halves"], speeds["twice"], strict=True)]
    record = {
        "what": "benchmarks/decode_pairs.py",
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(torch.device("cpu")),
        "batch": words.batch,
        "images_per_second": {k: round(statistics.median(v), 1) for k, v in speeds.items()},
        "halves_over_twice": round(statistics.median(ratios), 2),
        "ratios": [round(ratio, 2) for ratio in ratios],
    }
    if mesh.rank == 0:
        print(json.dumps(record, indent=2))
        if words.out:
            words.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
