"""The error that configs reach on the same images in the same epochs, with several seeds each.

python -m benchmarks.accuracy fast --data DIR [--seeds 2012 2013 2014] [--out FILE.json]

``fast`` compares configs/fast.yaml in bf16 with float32, eager, and the PyTorch loader;
``large_batch`` compares batches of 512 with batches of 64. Images have 91 pixels, so that a run
takes minutes on two cores. Options that follow are the trainer's.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from alexnet_dist.tracking.logger import read_events
from benchmarks.common import save_record

SMALL = ["--data.image_size=91", "--data.resize_size=91", "--data.scale=[0.25,1.0]"]
COMMON = [*SMALL, "--data.ratio=[1.0,1.0]", "--train.epochs=4", "--wandb.mode=off"]
FAST = ["--config=configs/fast.yaml", "--model.arch=paper", "--data.batch_size=64"]
EAGER = ["--runtime.compile=false", "--runtime.cuda_graph=false", "--data.loader=torch"]
LARS = ["--config=configs/large512.yaml", "--train.epochs=10"]
SGD = [*LARS, "--optim.name=sgd2012", "--optim.lr_mults={}"]
SETS: dict[str, dict[str, list[str]]] = {
    "fast": {
        "fast": [*FAST, "--runtime.precision=bf16"],
        "plain": [*FAST, "--runtime.precision=fp32", *EAGER],
    },
    "large_batch": {  # with one seed, 0.02 was the best of 0.02, 0.04, 0.08; LARS: 12 as good as 6
        "64": [*SGD, "--data.batch_size=64", "--optim.lr=0.01"],
        "512, linear scaling": [*SGD, "--optim.lr=0.08"],
        "512": [*SGD, "--optim.lr=0.02"],
        "512, LARS": [*LARS, "--optim.lr=6"],
    },
}


def train(options: list[str], seed: int) -> dict[str, Any]:
    """One run: its error after each epoch, in percent, and its seconds."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-W", "ignore", "-m", "alexnet_dist.train", *COMMON, *options]
        command += [f"--run.output_dir={folder}", "--run.name=run", f"--train.seed={seed}"]
        begin = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        events = read_events(Path(folder, "run"))
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
    for seed in words.seeds:
        for name, options in SETS[words.set].items():
            runs[name].append(train([*options, f"--data.root={words.data}", *more], seed))
            print(name, runs[name][-1], flush=True)
    last = {name: [run["top1_errors"][-1] for run in each] for name, each in runs.items()}
    results = {
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
    save_record(f"accuracy.py {words.set}", results, words.out)


if __name__ == "__main__":
    main()
