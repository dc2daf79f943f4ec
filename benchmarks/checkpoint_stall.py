"""What a checkpoint of `paper` (61 million parameters and their velocities) costs training.

python -m benchmarks.checkpoint_stall [--rounds 3]

Two processes train on images of noise, and save every few steps or never; the two are repeated in
turn. A stall is all that training waits for: checking the weights, copying them, and waiting for
the previous save where that is not written yet.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from alexnet_dist.config import CheckpointConfig
from alexnet_dist.tracking.logger import read_events
from benchmarks.common import machine_info

BATCH, STEPS, EVERY, CLASSES = 32, 31, 10, 1000
KINDS = {
    "saves": [f"--checkpoint.interval_steps={EVERY}"],
    "none": ["--checkpoint.interval_steps=1000"],
}


def make_images(root: Path) -> None:
    generator = np.random.default_rng(0)
    for split, count in (("train", BATCH * 40), ("val", 8)):
        for number in range(count):
            folder = root / split / f"{number % CLASSES:03d}"
            folder.mkdir(parents=True, exist_ok=True)
            noise = generator.integers(0, 255, (256, 256, 3), np.uint8)
            Image.fromarray(noise).save(folder / f"{number:05d}.jpg", quality=50)


def train(images: Path, root: Path, kind: str) -> dict[str, Any]:
    """One run: stalls and times of its saves in the middle of training, in seconds."""
    command = [
        sys.executable,
        *("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
        *("-m", "alexnet_dist.train", f"--data.root={images}", f"--run.output_dir={root}"),
        *(f"--data.batch_size={BATCH}", f"--train.max_steps={STEPS}"),
        *("--train.log_interval=1", "--wandb.mode=off", f"--run.name={kind}", *KINDS[kind]),
        "--optim.lr=0.0001",
    ]
    subprocess.run(command, check=True, capture_output=True)
    events = read_events(root / kind)
    saves = [e for e in events if e["event"] == "checkpoint" and e["step"] < STEPS]
    steps = [e["seconds"] for e in events if e["event"] == "train"][1:]
    return {
        "stalls": [save["stall"] for save in saves],
        "seconds": [save["seconds"] for save in saves],
        "step": statistics.median(steps),
        "mean_step": statistics.fmean(steps),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", help="the JSON file; none is written without")
    args = parser.parse_args()
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory() as name:
        make_images(Path(name) / "images")
        for number in range(args.rounds):
            for kind in KINDS:
                found[kind].append(train(Path(name) / "images", Path(name) / str(number), kind))
    stall = statistics.median(s for run in found["saves"] for s in run["stalls"])
    save = statistics.median(s for run in found["saves"] for s in run["seconds"])
    step = statistics.median(run["step"] for run in found["none"])
    every = CheckpointConfig().interval_steps or 0
    result = {
        "machine": machine_info(),
        "processes": 2,
        "batch": BATCH,
        "stall_ms": round(1000 * stall, 1),
        "save_ms": round(1000 * save, 1),
        "step_ms": round(1000 * step, 1),
        "steps_between_saves_as_shipped": every,
        "percent_of_wall_time": round(100 * stall / (every * step + stall), 4),
        "relative_step_time_with_a_save_every_10_steps": round(
            statistics.median(run["mean_step"] for run in found["saves"])
            / statistics.median(run["mean_step"] for run in found["none"]),
            3,
        ),
        "rounds": found,
    }
    if args.output:
        Path(args.output).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({name: value for name, value in result.items() if name != "rounds"}, indent=1))


if __name__ == "__main__":
    main()
