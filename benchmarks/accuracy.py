"""What recipes come to on the same images over the same passes, with several seeds each.

python -m benchmarks.accuracy fast --data DIR [--seeds 2012 2013 2014] [--out FILE.json]

Each run is the trainer's own command. SETS names what is compared: "fast", all that makes training
faster against none of it; "large_batch", 512 images a step against 64: the paper's update at a rate
eight times that of 64, and at the best of 0.02, 0.04 and 0.08 with one seed; and LARS at 6, where
12 was as good with one seed, and 2 worse. Images are of 91 pixels, so that a run takes minutes on
two cores; more options of the trainer can follow.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from alexnet_dist.tracking.logger import read_events
from benchmarks.common import machine_info

SMALL = ["--data.image_size=91", "--data.resize_size=91", "--data.scale=[0.25,1.0]"]
COMMON = [*SMALL, "--data.ratio=[1.0,1.0]", "--train.epochs=4", "--wandb.mode=off"]
FAST = ["--config=configs/fast.yaml", "--model.arch=paper", "--data.batch_size=64"]
LARGE = ["--config=configs/large512.yaml", "--train.epochs=10"]
PLAIN = [*LARGE, "--optim.name=sgd2012", "--optim.bias_lr_mult=1"]
SETS: dict[str, dict[str, list[str]]] = {
    "fast": {
        "fast": [*FAST, "--runtime.precision=bf16"],
        "plain": [
            *FAST,
            "--runtime.precision=fp32",
            "--runtime.compile=false",
            "--runtime.cuda_graph=false",
            "--data.loader=torch",
        ],
    },
    "large_batch": {
        "64": [*PLAIN, "--data.batch_size=64", "--optim.lr=0.01"],
        "512, linear scaling": [*PLAIN, "--optim.lr=0.08"],
        "512": [*PLAIN, "--optim.lr=0.02"],
        "512, LARS": [*LARGE, "--optim.lr=6"],
    },
}


def train(name: str, options: list[str], seed: int, data: Path, root: Path) -> dict[str, Any]:
    """One run: error after each pass, and what it took."""
    run = f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"
    command = [sys.executable, "-W", "ignore", "-m", "alexnet_dist.train", *COMMON, *options]
    command += [f"--data.root={data}", f"--run.output_dir={root}", f"--run.name={run}"]
    command += [f"--train.seed={seed}"]
    begin = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    events = read_events(root / run / "metrics.jsonl")
    errors = [event["top1_error"] for event in events if event["event"] == "eval"]
    return {"seed": seed, "top1_errors": errors, "seconds": round(time.perf_counter() - begin)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("set", choices=SETS)
    parser.add_argument("--data", type=Path, required=True, help="a folder with train/ and val/")
    parser.add_argument("--seeds", type=int, nargs="*", default=[2012, 2013, 2014])
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    words, more = parser.parse_known_args()
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in SETS[words.set]}
    with tempfile.TemporaryDirectory() as folder:
        for seed in words.seeds:
            for name, options in SETS[words.set].items():
                result = train(name, [*options, *more], seed, words.data, Path(folder))
                runs[name].append(result)
                print(name, result, flush=True)
    last = {name: [run["top1_errors"][-1] for run in each] for name, each in runs.items()}
    record = {
        "what": f"benchmarks/accuracy.py {words.set}",
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine_info(),
        "images": words.data.name,
        "options": {n: [*COMMON, *options, *more] for n, options in SETS[words.set].items()},
        "runs": runs,
        "top1_error": {
            name: {
                "mean": round(statistics.mean(each), 2),
                "lowest": round(min(each), 2),
                "highest": round(max(each), 2),
            }
            for name, each in last.items()
        },
    }
    print(json.dumps(record["top1_error"], indent=1))
    if words.out:
        words.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
