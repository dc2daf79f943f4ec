"""Record what a commit computes, to the bit, and compare another commit with it.

python -m benchmarks.pins record FILE.json [CASE ...]
python -m benchmarks.pins compare FILE.json [CASE ...]
Twelve steps on the embedded digits (which need no resize) in float32 without dropout, under each
layout, optimizer and compression. Recorded are the losses, the hash of the order of samples, the
exact evaluation, and a digest of every tensor of the last checkpoint. Bits depend on the processor:
record and compare on one machine. Run in a checkout of 9be3073, options take their names of then.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from safetensors import safe_open

COMMON = [
    "--config=configs/quickstart.yaml",
    "--data.batch_size=12",
    "--model.dropout=0",
    "--optim.schedule.name=constant",
    "--train.max_steps=12",
    "--train.log_interval=1",
    "--runtime.precision=fp32",
    "--runtime.threads=1",
    "--runtime.device=cpu",
    "--wandb.mode=off",
]
CASES: dict[str, tuple[int, list[str]]] = {
    "ddp-1": (1, []),
    "ddp-2": (2, []),
    "ddp-3": (3, []),
    "towers-2": (2, ["--parallel.towers=2"]),
    "sharded-2": (2, ["--parallel.fc=sharded"]),
    "sharded-3": (3, ["--parallel.fc=sharded"]),
    "bf16-gradients-2": (2, ["--parallel.grad_compression=bf16"]),
    "powersgd-2": (2, ["--parallel.grad_compression=powersgd", "--parallel.powersgd_start=2"]),
    "accumulate-1": (1, ["--train.grad_accum_steps=3"]),
    "lars-1": (1, ["--optim.name=lars", "--optim.lr=1"]),
    "lars-sharded-2": (2, ["--optim.name=lars", "--optim.lr=1", "--parallel.fc=sharded"]),
    "sgd-1": (1, ["--optim.name=sgd"]),
    "pca-noise-1": (1, ["--data.pca_noise=source", "--data.train_crop=chunked"]),
    "torch-loader-1": (1, ["--data.loader=torch"]),
}
NAMES_OF_9BE3073 = {
    "train.log_interval": "train.log_every",
    "wandb.mode": "track.wandb",
    "run.output_dir": "run.root",
    "data.cache_dir": "data.cache",
    "parallel.grad_compression": "parallel.compress",
    "train.grad_accum_steps": "train.accumulate",
    "data.pca_noise": "data.colour",
    "data.train_crop": "data.crop",
    "data.loader=torch": "data.engine=dataloader",
}
OLD = Path("alexnet_dist/measuring/turns.py").exists()


def main() -> None:
    """Record, or compare and exit with 1 where anything differs."""
    action, file, *names = sys.argv[1:]
    found = {name: run(*CASES[name], ten_crop=name == "ddp-1") for name in names or CASES}
    if action == "record":
        Path(file).write_text(json.dumps(found, indent=1) + "\n")
        return
    pinned = json.loads(Path(file).read_text())
    for name, now in found.items():
        wrong = [key for key, value in pinned[name].items() if now[key] != value]
        print(f"{name:<18}{'the same bits' if not wrong else 'DIFFERENT: ' + ', '.join(wrong)}")
        for key in wrong:
            print(f"  {key}: {pinned[name][key]}\n  now: {now[key]}")
    if any(now != pinned[name] for name, now in found.items()):
        raise SystemExit(1)


def run(processes: int, options: list[str], *, ten_crop: bool) -> dict[str, Any]:
    """Train a case to its end, and collect what it has come to."""
    with tempfile.TemporaryDirectory() as folder:
        words = [*COMMON, f"--run.output_dir={folder}", "--run.name=run", *options]
        _command("alexnet_dist.train", words, processes)
        path = Path(folder, "run")
        events = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        by_kind: dict[str, list[dict[str, Any]]] = {}
        for event in events:
            by_kind.setdefault(event["event"], []).append(event)
        epoch, evaluation = by_kind["epoch"][-1], by_kind["eval"][-1]
        result: dict[str, Any] = {
            "losses": [event["loss"] for event in by_kind["train"]],
            "sample_order": epoch.get("sample_order_hash") or epoch["order_digest"],
            "evaluation": [evaluation[key] for key in ("top1_error", "top5_error", "loss")],
            "tensors": _digest((path / "checkpoints/last").resolve()),
        }
        if ten_crop:
            views = ["--views", "10"] if OLD else ["--ten_crop"]
            line = _command("alexnet_dist.evaluate", ["--checkpoint", str(path), *views], 1)
            record = json.loads(line.strip().splitlines()[-1])
            result["ten_crop"] = [record[key] for key in ("top1_error", "top5_error", "loss")]
        return result


def _command(module: str, words: list[str], processes: int) -> str:
    if OLD:
        for new, old in NAMES_OF_9BE3073.items():
            words = [word.replace(f"--{new}", f"--{old}") for word in words]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *launcher, "-m", module, *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done.stdout


def _digest(checkpoint: Path) -> str:
    """Of all tensors of a checkpoint, by the files and names that they have there."""
    digest = hashlib.sha256()
    for file in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(file, "np") as tensors:
            for name in sorted(tensors.keys()):
                digest.update(f"{file.name} {name}".encode())
                digest.update(tensors.get_tensor(name).tobytes())
    return digest.hexdigest()


if __name__ == "__main__":
    main()
