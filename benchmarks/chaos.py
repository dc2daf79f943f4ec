"""A run under faults ends with the bits of the same run undisturbed, or this fails.

python -m benchmarks.chaos [--faults 50] [--seed 2012] [--steps 392] [--out FILE.json]

Two processes train the paper's network on small images of noise, three of which are corrupt (in the
undisturbed run, too). Faults are sampled from the seed and injected one after another; whatever
ends the run is followed by the same command again, as a batch script would do it. As root the run
folder is a small file system in memory, which can be filled; otherwise that fault is skipped.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors import safe_open

from alexnet_dist.errors import UserError
from alexnet_dist.tracking import Event
from alexnet_dist.tracking.logger import read_events
from benchmarks.common import save_record

SIZE, BATCH_SIZE, TRAIN_IMAGES, CORRUPT = 76, 7, 199, (17, 91, 154)
OPTIONS = f"""
    --data.image_size=67 --data.resize_size={SIZE} --data.batch_size={BATCH_SIZE}
    --data.eval_batch_size=8 --data.on_corrupt_image=skip
    --runtime.precision=fp32 --runtime.threads=1 --runtime.hang_timeout=8
    --train.log_interval=1 --optim.lr=0.001 --optim.schedule.name=constant
    --checkpoint.interval_steps=5 --wandb.mode=offline --run.name=run""".split()
FAULTS = [
    *("kill_rank", "kill_launcher", "kill_all", "terminate", "preempt", "stop_rank"),
    *("fill_disk", "flip_bit", "truncate_file", "kill_wandb"),
]
SURVIVED = ("fill_disk", "kill_wandb")  # without a restart
MARK = "ALEXNET_DIST_CHAOS"  # in the environment of every process of a run
STEP_TIMEOUT = 180  # seconds without a step, after which the run counts as hung


class Run:
    """A training run under torchrun, and the faults that can be injected into it."""

    def __init__(self, images: Path, root: Path, epochs: int) -> None:
        self.root, self.path, self.log = root, root / "run", root.with_name(f"{root.name}.log")
        self.command = [
            sys.executable,
            *("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
            *("--max-restarts=3", "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR2"),
            *("-m", "alexnet_dist.train", *OPTIONS, f"--train.epochs={epochs}"),
            *(f"--data.root={images}", f"--run.output_dir={root}"),
        ]
        self.launcher: subprocess.Popen[bytes] | None = None
        self.starts = 0

    def start(self) -> None:
        """Start the run, or resume it: it is the same command."""
        launched = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "WANDB_API_KEY")
        env = {name: value for name, value in os.environ.items() if name not in launched}
        with self.log.open("ab") as log:
            self.launcher = subprocess.Popen(
                self.command,
                stdout=log,
                stderr=log,
                env=env | {MARK: str(self.root)},
                start_new_session=True,
            )
        self.starts += 1

    def run_until(self, done: Callable[[], bool]) -> None:
        """Keep the run going until ``done``, or its end; start it again whenever it has ended."""
        last, since = self.step(), time.monotonic()
        while not done():
            if not self.is_running():
                if self.has_finished():
                    return
                self.start()
            if self.step() != last:
                last, since = self.step(), time.monotonic()
            if time.monotonic() - since > STEP_TIMEOUT:
                raise SystemExit(f"no step for {STEP_TIMEOUT} s after step {last}: see {self.log}")
            time.sleep(0.1)

    def is_running(self) -> bool:
        return self.launcher is not None and self.launcher.poll() is None

    def has_finished(self) -> bool:
        with contextlib.suppress(OSError, ValueError):
            return bool(json.loads((self.path / "status.json").read_text())["status"] == "ended")
        return False

    def events(self) -> list[Event]:
        with contextlib.suppress(UserError):
            return read_events(self.path, superseded=True)
        return []

    def step(self) -> int:
        """The last step recorded, whatever came of it."""
        return next((e["step"] for e in reversed(self.events()) if e["event"] == "train"), 0)

    def checkpoint_digest(self) -> str:
        """Of every tensor of the last checkpoint, to the bit."""
        digest = hashlib.sha256()
        for file in sorted((self.path / "checkpoints/last").resolve().glob("*.safetensors")):
            with safe_open(file, "np") as tensors:
                for name in sorted(tensors.keys()):
                    digest.update(name.encode() + tensors.get_tensor(name).tobytes())
        return digest.hexdigest()

    def sample_order(self) -> list[str]:
        """The hash of each epoch's order of samples."""
        events = read_events(self.path)
        return [event["sample_order_hash"] for event in events if event["event"] == "epoch"]

    def processes(self) -> list[int]:
        """Everything that this run has started and that is alive."""
        mark, pids = f"{MARK}={self.root}".encode(), [p for p in os.listdir("/proc") if p.isdigit()]
        return [int(pid) for pid in pids if mark in _read(f"/proc/{pid}/environ")]

    def inject(self, fault: str, rng: random.Random) -> bool:
        """Returns whether the fault could be injected."""
        assert self.launcher is not None
        pid = self.launcher.pid
        ranks = [int(child) for child in _read(f"/proc/{pid}/task/{pid}/children").split()]
        rng.shuffle(ranks)
        match fault:
            case "kill_rank":
                return _signal(ranks[:1], signal.SIGKILL)
            case "stop_rank":
                return _signal(ranks[:1], signal.SIGSTOP)
            case "kill_launcher":
                return _signal([pid], signal.SIGKILL)
            case "kill_all":
                return _signal([*ranks, pid], signal.SIGKILL)
            case "terminate":
                return _signal([pid], signal.SIGTERM)
            case "kill_wandb":
                alive = self.processes()
                wandb = [p for p in alive if b"wandb-core" in _read(f"/proc/{p}/cmdline")]
                return _signal(wandb[:1], signal.SIGKILL)
            case "preempt":
                (self.path / "PREEMPT").touch()
                return True
            case "fill_disk":
                return self._fill_disk()
            case _:  # of the newest checkpoint, where there is one before it
                _signal([*ranks, pid], signal.SIGKILL)
                _wait(lambda: not self.processes(), 30)
                return self._corrupt_checkpoint(fault, rng)

    def _fill_disk(self) -> bool:
        """Until a checkpoint could not be written."""

        def failures() -> int:
            return self.log.read_bytes().count(b"could not be written")

        before, filler = failures(), self.root / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 20))
        _wait(lambda: failures() > before or not self.is_running(), 60)
        filler.unlink()
        return failures() > before

    def _corrupt_checkpoint(self, fault: str, rng: random.Random) -> bool:
        checkpoints = sorted((self.path / "checkpoints").glob("step-*"))
        if len(checkpoints) < 2:
            return False
        file = rng.choice([f for f in sorted(checkpoints[-1].iterdir()) if f.stat().st_size])
        content = bytearray(file.read_bytes())
        at = rng.randrange(len(content))
        content[at] ^= 1
        file.write_bytes(content[:at] if fault == "truncate_file" else content)
        return True


def _signal(pids: list[int], which: signal.Signals) -> bool:
    """Returns whether all of them got it, one at least."""
    with contextlib.suppress(ProcessLookupError):
        for pid in pids:
            os.kill(pid, which)
        return bool(pids)
    return False


def _read(path: str) -> bytes:
    """A file of /proc; nothing where the process is gone."""
    with contextlib.suppress(OSError):
        return Path(path).read_bytes()
    return b""


def _wait(done: Callable[[], bool], seconds: float) -> None:
    until = time.monotonic() + seconds
    while not done() and time.monotonic() < until:
        time.sleep(0.1)


def inject(run: Run, fault: str, rng: random.Random) -> dict[str, Any] | None:
    """Inject a fault, and run until training is beyond it; None where it was not possible."""
    step, starts, seen, began = run.step(), run.starts, len(run.events()), time.monotonic()
    if not run.inject(fault, rng):
        return None

    def is_restart(event: Event) -> bool:
        return event["event"] in ("start", "resume")

    def is_beyond() -> bool:
        events = run.events()[seen:]
        if fault not in SURVIVED:
            restarts = [i for i, event in enumerate(events) if is_restart(event)]
            events = events[restarts[-1] :] if restarts else []
        return any(event["event"] == "train" and event["step"] > step for event in events)

    run.run_until(is_beyond)
    events = run.events()[seen:]
    before = takewhile(lambda event: not is_restart(event), events)
    reached = max([step, *(event["step"] for event in before if event["event"] == "train")])
    resumed = [event["step"] for event in events if is_restart(event)]
    for quarantined in (run.path / "checkpoints").glob("corrupt-*"):
        shutil.rmtree(quarantined)  # the log names it, and the small disk needs its room
    return {
        "fault": fault,
        "step": reached,
        "steps_repeated": reached - resumed[-1] if resumed else 0,
        "restarted_by": "us" if run.starts > starts else "torchrun" if resumed else "nobody",
        "seconds": round(time.monotonic() - began, 1),
    }


def make_images(root: Path) -> None:
    """Three classes of noise; the ``CORRUPT`` images are cut off in the middle."""
    generator = np.random.default_rng(7)
    for split, count in (("train", TRAIN_IMAGES), ("val", 13)):
        for index in range(count):
            folder = root / split / "abc"[index % 3]
            folder.mkdir(parents=True, exist_ok=True)
            noise = generator.normal(60 + 60 * (index % 3), 40, (SIZE, SIZE, 3))
            file = folder / f"{index:03d}.jpg"
            Image.fromarray(noise.clip(0, 255).astype(np.uint8)).save(file, quality=95)
            if split == "train" and index in CORRUPT:
                os.truncate(file, file.stat().st_size // 2)


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """A file system of 900 MiB, room for four checkpoints; False if we may not mount one."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=900m", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=50)
    parser.add_argument("--seed", type=int, default=2012)
    parser.add_argument("--steps", type=int, default=392, help="of the whole run")
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    words = parser.parse_args()
    epochs, rng = max(words.steps // (TRAIN_IMAGES // BATCH_SIZE), 1), random.Random(words.seed)
    with tempfile.TemporaryDirectory(prefix="chaos-") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        make_images(folder / "images")
        reference = Run(folder / "images", folder / "reference", epochs)
        reference.run_until(reference.has_finished)
        _wait(lambda: not reference.processes(), 20)
        print(f"undisturbed: {reference.step()} steps", flush=True)
        mounted = stack.enter_context(small_disk(folder / "faulty"))
        possible = [fault for fault in FAULTS if mounted or fault != "fill_disk"]
        run, began = Run(folder / "images", folder / "faulty", epochs), time.monotonic()
        faults: list[dict[str, Any]] = []
        waiting: list[str] = []
        while len(faults) < words.faults:
            waiting = waiting or rng.sample(possible, len(possible))
            target = run.step() + rng.randint(1, 6)
            run.run_until(lambda target=target: run.step() >= target)  # type: ignore[misc]
            if run.has_finished():
                raise SystemExit(f"the run ended after {len(faults)} faults: give more --steps")
            result = inject(run, waiting.pop(), rng)
            if result is not None:
                faults.append(result)
                print(len(faults), result, flush=True)
        run.run_until(run.has_finished)
        _wait(lambda: not run.processes(), 20)
        left = [p for p in run.path.rglob("*") if ".partial" in p.name or p.name == "PREEMPT"]
        corrupt = {Path(e["path"]).name for e in run.events() if e["event"] == "corrupt_image"}
        results = {
            "seed": words.seed,
            "steps": reference.step(),
            "seconds": round(time.monotonic() - began),
            "starts": run.starts,
            "steps_repeated": sum(fault["steps_repeated"] for fault in faults),
            "corrupt_images": sorted(corrupt),
            "same_bits": run.checkpoint_digest() == reference.checkpoint_digest(),
            "same_order": run.sample_order() == reference.sample_order(),
            "processes_left": len(run.processes()),
            "files_left": [str(path.relative_to(run.path)) for path in left],
            "faults": faults,
        }
    save_record("chaos.py", results, words.out)
    same = results["same_bits"] and results["same_order"]
    if not same or results["processes_left"] or results["files_left"]:
        raise SystemExit("the run under faults does not end as the undisturbed one")


if __name__ == "__main__":
    main()
