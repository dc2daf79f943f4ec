"""A run under faults, against the same run that nobody touched: the same bits, or it fails.

python -m benchmarks.chaos [--faults 50] [--seed 2012] [--steps 392]

Two processes train the paper's network on small images of noise, a few of which cannot be decoded
(in the calm run, too). Faults are drawn from the seed and inflicted one after another; whatever
ends the run is followed by the same command again, as a batch script would do it. As root the run
lies in a small file system in memory, which can be filled; else that fault is left out.
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
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors import safe_open

from alexnet_dist.tracking import Event
from alexnet_dist.tracking.logger import drop_superseded, read_events
from benchmarks.common import machine_info

SIDE, BATCH, IMAGES, BAD = 76, 7, 199, (17, 91, 154)
OPTIONS = [
    "--data.image_size=67",
    f"--data.resize_size={SIDE}",
    f"--data.batch_size={BATCH}",
    "--data.eval_batch_size=8",
    "--data.threads=1",
    "--data.on_corrupt_image=skip",
    "--runtime.precision=fp32",
    "--runtime.threads=1",
    "--runtime.hang_timeout=8",
    "--train.log_interval=1",
    "--optim.lr=0.001",
    "--optim.schedule.name=constant",
    "--checkpoint.interval_steps=5",
    "--wandb.mode=offline",
    "--run.name=run",
]
MARK = "ALEXNET_DIST_CHAOS"
"""In the environment of everything that a run starts."""

PATIENCE = 180
"""Seconds for a run to take its next step; more is a hang, and fails."""


class Chaos:
    """A run, the command that starts it again, and what can be done to it."""

    def __init__(self, images: Path, root: Path, epochs: int) -> None:
        self.run = root / "run"
        self.command = [
            sys.executable,
            *("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
            *("--max-restarts=3", "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR2"),
            *("-m", "alexnet_dist.train", *OPTIONS, f"--train.epochs={epochs}"),
            *(f"--data.root={images}", f"--run.output_dir={root}"),
        ]
        self.log = root.with_name(f"{root.name}.log")
        self.launcher: subprocess.Popen[bytes] | None = None
        self.starts = 0

    def start(self) -> None:
        """Start the run, or start it again."""
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "WANDB_API_KEY")
        environment = {name: value for name, value in os.environ.items() if name not in names}
        environment[MARK] = str(self.run.parent)
        with self.log.open("ab") as log:
            self.launcher = subprocess.Popen(
                self.command, stdout=log, stderr=log, env=environment, start_new_session=True
            )
        self.starts += 1

    @property
    def alive(self) -> bool:
        return self.launcher is not None and self.launcher.poll() is None

    @property
    def status(self) -> str:
        try:
            return str(json.loads((self.run / "status.json").read_text())["status"])
        except (OSError, ValueError):
            return ""

    def events(self) -> list[Event]:
        return (
            read_events(self.run / "metrics.jsonl") if (self.run / "metrics.jsonl").exists() else []
        )

    def step(self) -> int:
        """The last step recorded, whatever came of it."""
        return next((e["step"] for e in reversed(self.events()) if e["event"] == "train"), 0)

    def go_on_to(self, done: Callable[[], bool]) -> None:
        """Keep the run going until then, starting it again as often as it takes."""
        last, since = self.step(), time.monotonic()
        while not done():
            if not self.alive:
                if self.status == "ended":
                    return
                self.start()
            if self.step() != last:
                last, since = self.step(), time.monotonic()
            if time.monotonic() - since > PATIENCE:
                raise SystemExit(f"no step for {PATIENCE} s after step {last}: see {self.log}")
            time.sleep(0.1)

    def processes(self) -> list[int]:
        """Everything that this run has started and that is alive."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if f"{MARK}={self.run.parent}".encode() in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
        return found

    def workers(self) -> list[int]:
        launcher = self.launcher
        return [] if launcher is None else _children(launcher.pid)

    def checkpoints(self) -> list[Path]:
        return sorted((self.run / "checkpoints").glob("step-*"))

    # faults; each returns whether it could be inflicted

    def kill_a_rank(self, dice: random.Random) -> bool:
        return _signal(self.workers(), signal.SIGKILL, dice)

    def stop_a_rank(self, dice: random.Random) -> bool:
        return _signal(self.workers(), signal.SIGSTOP, dice)

    def kill_the_launcher(self, dice: random.Random) -> bool:
        return _signal([self.launcher.pid] if self.launcher else [], signal.SIGKILL, dice)

    def kill_all(self, dice: random.Random) -> bool:
        pids = [*self.workers(), *([self.launcher.pid] if self.launcher else [])]
        return all([_signal([pid], signal.SIGKILL, dice) for pid in pids])

    def terminate(self, dice: random.Random) -> bool:
        return _signal([self.launcher.pid] if self.launcher else [], signal.SIGTERM, dice)

    def preempt(self, dice: random.Random) -> bool:
        (self.run / "PREEMPT").touch()
        return True

    def flip_a_byte(self, dice: random.Random) -> bool:
        """Of the newest checkpoint, where there is one before it; then all are killed."""
        self.kill_all(dice)
        self._gone()
        file = self._file_of_newest(dice)
        if file is None:
            return False
        with file.open("r+b") as content:
            content.seek(dice.randrange(file.stat().st_size))
            byte = content.read(1)
            content.seek(-1, os.SEEK_CUR)
            content.write(bytes([byte[0] ^ 1]))
        return True

    def cut_a_file(self, dice: random.Random) -> bool:
        self.kill_all(dice)
        self._gone()
        file = self._file_of_newest(dice)
        if file is None:
            return False
        os.truncate(file, dice.randrange(file.stat().st_size))
        return True

    def fill_the_disk(self, dice: random.Random) -> bool:
        """Until a save has failed."""
        before = len([e for e in self.events() if e["event"] == "checkpoint_failed"])
        filler = self.run.parent / "filler"
        with filler.open("wb") as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(1 << 20))
                file.flush()
        until = time.monotonic() + 60
        seen = False
        while self.alive and not seen and time.monotonic() < until:
            failed = (self.log.read_bytes()).count(b"could not be written")
            seen = failed > before
            time.sleep(0.1)
        filler.unlink()
        return seen

    def kill_wandb(self, dice: random.Random) -> bool:
        pids = [pid for pid in self.processes() if b"wandb-core" in _words(pid)]
        return _signal(pids, signal.SIGKILL, dice)

    def _file_of_newest(self, dice: random.Random) -> Path | None:
        if len(self.checkpoints()) < 2:
            return None
        files = sorted(self.checkpoints()[-1].iterdir())
        return dice.choice([file for file in files if file.stat().st_size])

    def _gone(self) -> None:
        until = time.monotonic() + 30
        while self.processes():
            if time.monotonic() > until:
                raise SystemExit(f"processes were left behind: {self.processes()}")
            time.sleep(0.1)


def inflict(chaos: Chaos, kind: str, dice: random.Random) -> dict[str, Any] | None:
    """One fault, and what became of it; None where there was nothing to do it to."""
    step, starts, seen = chaos.step(), chaos.starts, len(chaos.events())
    began = time.monotonic()
    if not getattr(chaos, kind)(dice):
        return None

    def over() -> bool:
        """Whether the run is beyond where it was, and knows of the fault."""
        news = chaos.events()[seen:]
        if kind in ("fill_the_disk", "kill_wandb"):
            return any(e["event"] == "train" and e["step"] > step for e in news)
        later = [n for n, e in enumerate(news) if e["event"] in ("resume", "start")]
        return bool(later) and any(
            e["event"] == "train" and e["step"] > step for e in news[later[-1] :]
        )

    chaos.go_on_to(over)
    news = chaos.events()[seen:]
    back = [e["step"] for e in news if e["event"] in ("resume", "start")]
    last = max([e["step"] for e in news if e["event"] == "train"] + [step])
    reached = max([step, *(e["step"] for e in _until_resume(news) if e["event"] == "train")])
    for damaged in (chaos.run / "checkpoints").glob("damaged-*"):
        shutil.rmtree(damaged)  # named in the records, and its room is wanted
    return {
        "fault": kind,
        "step": reached,
        "went_on_from": back[-1] if back else None,
        "steps_repeated": reached - back[-1] if back else 0,
        "seconds": round(time.monotonic() - began, 1),
        "started_again_by": _who(chaos.starts > starts, bool(back)),
        "beyond": last,
    }


def _who(by_us: bool, again: bool) -> str:
    return "the same command" if by_us else ("torchrun" if again else "nobody")


def _until_resume(news: list[Event]) -> Iterator[Event]:
    for event in news:
        if event["event"] in ("resume", "start"):
            return
        yield event


def make_images(root: Path) -> None:
    """Three classes of noise, of which a few images are cut off in the middle."""
    generator = np.random.default_rng(7)
    for split, count in (("train", IMAGES), ("val", 13)):
        for number in range(count):
            folder = root / split / "abc"[number % 3]
            folder.mkdir(parents=True, exist_ok=True)
            noise = generator.normal(60 + 60 * (number % 3), 40, (SIDE, SIDE, 3))
            file = folder / f"{number:03d}.jpg"
            Image.fromarray(noise.clip(0, 255).astype(np.uint8)).save(file, quality=95)
            if split == "train" and number in BAD:
                file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def digest(run: Path) -> str:
    """Of every tensor of the run's last checkpoint, to the bit."""
    found = {}
    for file in sorted((run / "checkpoints/last").resolve().glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (no mapping)
                found[name] = tensors.get_tensor(name).numpy().tobytes()
    together = hashlib.sha256()
    for name in sorted(found):
        together.update(name.encode() + found[name])
    return together.hexdigest()


def orders(run: Path) -> list[str]:
    kept = drop_superseded(read_events(run / "metrics.jsonl"))
    return [event["sample_order_hash"] for event in kept if event["event"] == "epoch"]


@contextlib.contextmanager
def _small_disk(folder: Path) -> Iterator[bool]:
    """A file system of 900 MiB, room for four checkpoints, where this user may mount one."""
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=900m", "tmpfs", str(folder)]
    mounted = subprocess.run(words, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def _children(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def _words(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def _signal(pids: list[int], which: signal.Signals, dice: random.Random) -> bool:
    with contextlib.suppress(ProcessLookupError, IndexError):
        os.kill(dice.choice(pids), which)
        return True
    return False


KINDS = (
    "kill_a_rank",
    "kill_the_launcher",
    "kill_all",
    "terminate",
    "preempt",
    "stop_a_rank",
    "fill_the_disk",
    "flip_a_byte",
    "cut_a_file",
    "kill_wandb",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=50)
    parser.add_argument("--seed", type=int, default=2012)
    parser.add_argument("--steps", type=int, default=392, help="of the whole run")
    parser.add_argument("--output", help="the JSON file; none is written without")
    words = parser.parse_args()
    epochs = max(words.steps // (IMAGES // BATCH), 1)
    dice = random.Random(words.seed)
    with tempfile.TemporaryDirectory(prefix="chaos-") as name:
        place = Path(name)
        make_images(place / "images")
        calm = Chaos(place / "images", place / "calm", epochs)
        (place / "calm").mkdir()
        calm.go_on_to(lambda: calm.status == "ended")
        calm.launcher.wait()  # type: ignore[union-attr]
        print(f"calm: {calm.step()} steps", flush=True)
        with _small_disk(place / "wild") as mounted:
            kinds = [kind for kind in KINDS if mounted or kind != "fill_the_disk"]
            wild = Chaos(place / "images", place / "wild", epochs)
            faults: list[dict[str, Any]] = []
            bag: list[str] = []
            began = time.monotonic()
            while len(faults) < words.faults:
                bag = bag or dice.sample(kinds, len(kinds))
                target = wild.step() + dice.randint(1, 6)
                wild.go_on_to(lambda target=target: wild.step() >= target)  # type: ignore[misc]
                if wild.status == "ended":
                    raise SystemExit(f"the run ended after {len(faults)} faults: give more --steps")
                kind = bag.pop()
                fault = inflict(wild, kind, dice)
                if fault is not None:
                    faults.append(fault)
                    print(len(faults), fault, flush=True)
            wild.go_on_to(lambda: wild.status == "ended")
            wild.launcher.wait()  # type: ignore[union-attr]
            seconds = time.monotonic() - began
            time.sleep(1)
            left = [p for p in wild.run.rglob("*") if ".partial" in p.name or p.name == "PREEMPT"]
            result = {
                "machine": machine_info(),
                "seed": words.seed,
                "steps": calm.step(),
                "faults": faults,
                "starts": wild.starts,
                "seconds": round(seconds),
                "steps_repeated": sum(fault["steps_repeated"] for fault in faults),
                "bad_images": sorted(
                    {Path(e["path"]).name for e in wild.events() if e["event"] == "corrupt_image"}
                ),
                "same_bits": digest(wild.run) == digest(calm.run),
                "same_order": orders(wild.run) == orders(calm.run),
                "processes_left": len(wild.processes()),
                "files_left": [str(path.relative_to(wild.run)) for path in left],
            }
    if words.output:
        Path(words.output).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({name: value for name, value in result.items() if name != "faults"}, indent=1))
    good = result["same_bits"] and result["same_order"]
    if not good or result["processes_left"] or result["files_left"]:
        raise SystemExit("the run under faults is not the calm one")


if __name__ == "__main__":
    main()
