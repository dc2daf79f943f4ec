"""Training end to end, in turns with another checkout: is this tree as fast?

python -m benchmarks.speed_vs_base --base DIR --data IMAGENETTE --rounds 5 --out FILE.json
python -m benchmarks.speed_vs_base --base DIR --data digits --config configs/quickstart.yaml \
    --nproc_per_node 2

Each run is the trainer's own command, in a fresh process with a run folder of its own. Options that
follow are the trainer's, by the names of this tree; a checkout of 9be3073 gets them by its own.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from alexnet_dist.tracking.logger import read_events
from benchmarks.common import save_record
from benchmarks.pins import NAMES_OF_9BE3073

HERE = Path(__file__).parents[1]


def train(tree: Path, options: list[str], processes: int, last: int) -> float:
    """Images per second of one run in ``tree``, over its last records of training."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    with tempfile.TemporaryDirectory() as folder:
        options = [*options, f"--run.output_dir={folder}", f"--data.cache_dir={folder}"]
        options += ["--run.name=run"]
        if (tree / "alexnet_dist/measuring/turns.py").exists():
            for new, old in NAMES_OF_9BE3073.items():
                options = [option.replace(f"--{new}", f"--{old}") for option in options]
        done = subprocess.run(
            [sys.executable, *launcher, "-m", "alexnet_dist.train", *options],
            cwd=tree,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(tree)},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise SystemExit(f"{tree}: {done.stderr[-3000:]}")
        events = read_events(Path(folder, "run"))
    records = [event for event in events if event["event"] == "train"][-last:]
    images = sum(record["images_per_second"] * record["seconds"] for record in records)
    return float(images / sum(record["seconds"] for record in records))


def main() -> None:
    """Run both checkouts in turns; print and store the ratio of each pair, and the median."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--base", type=Path, required=True, help="the other checkout")
    parser.add_argument("--data", required=True, help="the trainer's data.root")
    parser.add_argument("--config", default="configs/fast.yaml", help="of each checkout")
    parser.add_argument("--nproc_per_node", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5, help="pairs of runs")
    parser.add_argument("--steps", type=int, default=40, help="of each run")
    parser.add_argument("--last", type=int, help="of these, the last that count (half)")
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    words, more = parser.parse_known_args()
    options = [f"--config={words.config}", f"--data.root={words.data}", *more]
    options += [f"--train.max_steps={words.steps}", "--train.log_interval=1", "--wandb.mode=off"]
    speeds: dict[str, list[float]] = {"this": [], "base": []}
    trees = {"this": HERE, "base": words.base}
    for number in range(words.rounds):
        for name in sorted(trees, reverse=number % 2 == 0):  # each goes first every other time
            last = words.last or words.steps // 2
            speeds[name].append(train(trees[name], options, words.nproc_per_node, last))
            print(f"{name}: {speeds[name][-1]:,.1f} images/s", flush=True)
    ratios = [a / b for a, b in zip(speeds["this"], speeds["base"], strict=True)]
    results = {
        "config": words.config,
        "processes": words.nproc_per_node,
        "options": [*more, f"--train.max_steps={words.steps}"],
        "images_per_second": {k: [round(x, 1) for x in v] for k, v in speeds.items()},
        "ratios": [round(ratio, 3) for ratio in ratios],
        "ratio": round(statistics.median(ratios), 3),
    }
    save_record("speed_vs_base.py", results, words.out)


if __name__ == "__main__":
    main()
