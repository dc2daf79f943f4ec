"""Training on several hosts under faults loses nothing, or this fails.

python -m benchmarks.chaos [--faults 40] [--seed 2012] [--hosts 4] [--processes 1] [--out FILE.json]

Hosts are network namespaces (benchmarks/hosts.py, as root). On each, launch/multinode.sh is started
again whenever it has ended, as a batch system does. Faults come one after another in an order drawn
from the seed, each kind once before any comes twice. In the end the steps that counted are taken
again without faults on one host, each on as many processes as it was taken on: losses, order of
samples and weights have to be the same, to the bit.
"""

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from safetensors.numpy import load_file

from alexnet_dist.tracking import Event
from alexnet_dist.tracking.logger import read_events
from alexnet_dist.tracking.run_dir import read_status
from benchmarks.common import save_record
from benchmarks.hosts import Hosts, call

SIZE, BATCH_SIZE, TRAIN_IMAGES, EPOCH = 36, 16, 199, 199 // 16
RATE = "20mbit"  # links on which a step takes a quarter of a second: runs need not be so long
OPTIONS = f"""
    --model.arch=figure1_relu --data.image_size=32 --data.resize_size={SIZE}
    --data.batch_size={BATCH_SIZE} --data.eval_batch_size={BATCH_SIZE}
    --runtime.precision=fp32 --runtime.threads=1 --runtime.hang_timeout=10
    --train.log_interval=1 --optim.lr=0.001 --optim.schedule.name=constant --train.epochs=10000
    --checkpoint.interval_steps=5 --wandb.mode=offline --run.name=run""".split()
# an agent is lost after 3 times 2 s; those that are there wait 15 s for others to come
RENDEZVOUS = "last_call_timeout=15,keep_alive_interval=2,keep_alive_max_attempt=3"
TRAINER = b"-u\0-m\0alexnet_dist.train"  # in the command line of what torchrun starts
STEP, RESTART = ("train",), ("start", "resume")  # events
STEP_TIMEOUT = 400  # seconds without a record, after which the run counts as hung

KINDS = {  # how many seconds a fault lasts, and whether training has to restart
    "process killed": (0, True),
    "process stopped": (0, True),
    "agent killed": (0, True),
    "SIGTERM to one agent": (0, True),
    "PREEMPT": (0, True),
    "host gone for 20 s": (20, True),
    "host gone for good": (0, True),
    "store's host gone for 20 s": (20, True),
    "link down for 5 s": (5, False),
    "link down for 60 s": (60, True),
    "one direction dead for 40 s": (40, True),
    "link at 1 Mbit/s for 20 s": (20, False),
    "2 % of packets lost for 20 s": (20, False),
    "run folder read-only for 10 s": (10, False),
    "disk full for 10 s": (10, False),
    "disk hung for 30 s": (30, False),
    "checkpoint with a flipped bit": (0, True),
    "checkpoint cut short": (0, True),
    "image corrupted": (0, True),
    "W&B's process killed": (0, False),
}
BY_IPTABLES = ("one direction dead for 40 s", "2 % of packets lost for 20 s")


class Run:
    """A training run on hosts, and the faults that can be injected into it."""

    def __init__(self, hosts: Hosts, folder: Path, processes: int) -> None:
        self.hosts, self.folder, self.processes = hosts, folder, processes
        self.images, self.disk, self.path = folder / "images", folder / "disk", folder / "disk/run"
        self.logs = [folder / f"host{n}.log" for n in range(hosts.count)]
        self.agents: dict[int, subprocess.Popen[Any]] = {}
        self.gone: set[int] = set()
        self.starts, self._bytes_read = 0, 0
        self.events: list[Event] = []

    def start(self, n: int, *more: str) -> None:
        """Start the agent of host ``n``, or start it again: it is the same command."""
        count, address = self.hosts.count, self.hosts.address
        env = os.environ | {"INTERFACE": "eth0", "PYTHON": sys.executable, "RESTARTS": "100"}
        env |= {"PROCESSES": str(self.processes), "PET_LOCAL_ADDR": address(n)}
        env |= {"PET_RDZV_CONF": f"is_host={int(n == 0)},{RENDEZVOUS}", "TMPDIR": str(self.folder)}
        command = ["launch/multinode.sh", f"{(count + 1) // 2}:{count}", address(0), *OPTIONS]
        command += [f"--data.root={self.images}", f"--run.output_dir={self.disk}", *more]
        with self.logs[n].open("ab") as log:
            self.agents[n] = self.hosts.start(n, command, env, stdout=log, stderr=log)
        self.starts += 1

    def run_until(self, done: Callable[[], Any], least: float = 0, *, restart: bool = True) -> None:
        """Let the run go on until ``done``, for ``least`` seconds at least; start agents again that
        have ended, on hosts that are not gone."""
        begun = last = time.monotonic()
        while not done() or time.monotonic() < begun + least:
            for n in set(range(self.hosts.count)) - self.gone if restart else ():
                if n not in self.agents or self.agents[n].poll() is not None:
                    self.start(n)
            if self.read():
                last = time.monotonic()
            if time.monotonic() > last + least + STEP_TIMEOUT:
                raise SystemExit(
                    f"nothing happens after step {self.last(STEP, 'step')}: see {self.folder}"
                )
            time.sleep(0.2)
        self.read()

    def read(self) -> int:
        """Read what has come to the records; how many events."""
        before = len(self.events)
        with contextlib.suppress(OSError):
            text = (self.path / "metrics.jsonl").read_bytes()[self._bytes_read :]
            lines = text[: text.rfind(b"\n") + 1]
            self._bytes_read += len(lines)
            for line in lines.splitlines():
                with contextlib.suppress(ValueError):
                    self.events.append(json.loads(line))
        return len(self.events) - before

    def last(self, kinds: tuple[str, ...], field: str) -> int:
        """``field`` of the last event of these ``kinds``, whatever came of it."""
        return next((e[field] for e in reversed(self.events) if e["event"] in kinds), 0)

    def has_ended(self, status: str) -> bool:
        """Whether no process is left on any host, and the run's status is this."""
        return not self.hosts.processes() and read_status(self.path).get("status") == status

    def inject(self, kind: str, rng: random.Random) -> Callable[[], object] | None:
        """Begin a fault; what ends it, or None where it was not possible."""
        hosts, n = self.hosts, rng.randrange(self.hosts.count)
        match kind:
            case "process killed" | "process stopped":
                which = signal.SIGKILL if "killed" in kind else signal.SIGSTOP
                return _signal(hosts.processes(n, TRAINER)[:1], which)
            case "agent killed" | "SIGTERM to one agent":
                which = signal.SIGKILL if "killed" in kind else signal.SIGTERM
                return _signal([self.agents[n].pid], which)
            case "W&B's process killed":
                return _signal(hosts.processes(None, b"wandb-core")[:1], signal.SIGKILL)
            case "PREEMPT":
                (self.path / "PREEMPT").touch()
            case "host gone for 20 s" | "host gone for good" | "store's host gone for 20 s":
                n = 0 if "store" in kind else rng.randrange(1, hosts.count)
                self.gone.add(n)
                hosts.set_link(n, "down")
                hosts.kill(n)
                return lambda: hosts.set_link(n, "up")
            case "link down for 5 s" | "link down for 60 s":
                hosts.set_link(n, "down")
                return lambda: hosts.set_link(n, "up")
            case kind if kind in BY_IPTABLES:
                hosts.drop(n, 0.02 if "2 %" in kind else 1)
                return lambda: hosts.drop(n, 0)
            case "link at 1 Mbit/s for 20 s":
                hosts.limit(n, "1mbit")
                return lambda: hosts.limit(n, RATE)
            case "run folder read-only for 10 s":  # what is open stays writable
                call(f"mount --bind {self.disk} {self.disk}")
                call(f"mount -o remount,ro,bind {self.disk}")
                return lambda: call(f"umount --lazy {self.disk}")
            case "disk hung for 30 s":  # for all who write
                call(f"fsfreeze --freeze {self.disk}")
                return lambda: call(f"fsfreeze --unfreeze {self.disk}")
            case "disk full for 10 s":
                for _ in range(10):  # also what a checkpoint leaves that replaces another
                    fill = f"cat /dev/zero >> {self.disk}/filler; sleep 0.3"
                    subprocess.run(fill, shell=True, stderr=subprocess.DEVNULL)
                return (self.disk / "filler").unlink
            case "image corrupted":  # which a person repairs, once the run has ended
                file = rng.choice(sorted((self.images / "train").rglob("*.jpg")))
                content = file.read_bytes()
                file.write_bytes(content[: len(content) // 2])
                self.run_until(lambda: self.has_ended("failed"), restart=False)
                file.write_bytes(content)
            case _:  # of the newest checkpoint, where there is one before it
                hosts.kill()
                checkpoints = sorted((self.path / "checkpoints").glob("step-*"))
                if len(checkpoints) < 2:
                    return None
                file = rng.choice([f for f in checkpoints[-1].iterdir() if f.stat().st_size])
                changed = bytearray(file.read_bytes())
                changed[at := rng.randrange(len(changed))] ^= 1
                file.write_bytes(changed[:at] if "cut" in kind else changed)
        return lambda: None


def count_steps(events: list[Event]) -> int:
    return sum(event["event"] == "train" for event in events)


def _signal(pids: list[int], which: signal.Signals) -> Callable[[], object] | None:
    for pid in pids:
        os.kill(pid, which)
    return (lambda: None) if pids else None


def inject(run: Run, kind: str, rng: random.Random) -> dict[str, Any] | None:
    """Inject a fault after a few steps, and run until training is beyond it; None if it cannot."""
    target = max(run.last(STEP, "step") + rng.randint(1, 6), EPOCH)
    run.run_until(lambda: run.last(STEP, "step") >= target)
    (seconds, has_to_restart), seen, starts = KINDS[kind], len(run.events), run.starts
    old, begun = set(run.hosts.processes(None, TRAINER)), time.time()
    log_sizes = [log.stat().st_size for log in run.logs]
    undo = run.inject(kind, rng)
    if undo is None:
        return None
    phases: dict[str, float] = {}  # seconds from the fault until each of them was over

    def has_restarted() -> bool:
        """Whether a step was taken after a restart."""
        restarts = [n for n in range(seen, len(run.events)) if run.events[n]["event"] in RESTART]
        has_stepped = bool(restarts) and count_steps(run.events[restarts[0] :]) > 0
        if has_to_restart and "first step" not in phases:
            trainers, now = run.hosts.processes(None, TRAINER), time.time() - begun
            locked = (run.path / "status.json").stat().st_mtime - begun
            is_over = {
                "detecting": not old.intersection(trainers),
                "rendezvous": "detecting" in phases and bool(trainers),
                "imports": locked > phases.get("rendezvous", now),
                "loading": bool(restarts),
                "first step": has_stepped,
            }
            phases.update({k: round(now, 1) for k in is_over if is_over[k] and k not in phases})
        return has_stepped

    def has_lasted() -> bool:
        return (has_restarted() and count_steps(run.events[seen:]) > 20) or "good" not in kind

    run.run_until(has_lasted, seconds)
    undo()
    run.gone.clear()
    ended, reached, undone = len(run.events), run.last(STEP, "step"), time.time()

    def is_beyond() -> bool:
        as_needed = has_restarted() or not has_to_restart
        complete = run.last(RESTART, "world_size") == run.hosts.count * run.processes
        steps = count_steps(run.events[ended:])
        if steps and not complete and time.time() > undone + 90:
            (run.path / "PREEMPT").touch()  # torchrun lets nobody join any more: all start again
        return as_needed and complete and steps > 2

    run.run_until(is_beyond)
    for quarantined in (run.path / "checkpoints").glob("corrupt-*"):
        shutil.rmtree(quarantined)  # the log names it, and the small disk needs its room
    now = run.events[seen:]
    steps = [begun, *(event["time"] for event in now if event["event"] == "train")]
    logs = [log.read_bytes()[size:] for log, size in zip(run.logs, log_sizes, strict=True)]
    text = re.sub(rf"{run.folder}/|(?<=of step) \d+", "", b"".join(logs).decode("utf-8", "replace"))
    return {
        "fault": kind,
        "time": begun,
        "step": reached,
        "seconds": round(time.time() - begun, 1),
        "longest_pause": round(max(b - a for a, b in pairwise(steps)), 1),
        "agents_started": run.starts - starts,
        "world_sizes": [event["world_size"] for event in now if event["event"] in RESTART],
        "phases": phases,
        "said": sorted(set(re.findall(r"(?:alexnet_dist|warning): (.*)", text))),
    }


def finish(run: Run) -> None:
    """Let the run end with its epoch, and all processes by themselves."""
    (run.path / "PREEMPT").touch()
    run.run_until(lambda: run.has_ended("preempted"), restart=False)
    for n in range(run.hosts.count):
        run.start(n, f"--train.max_steps={(run.last(STEP, 'step') // EPOCH + 1) * EPOCH}")
    run.run_until(lambda: run.has_ended("stopped"), restart=False)


def repeat_without_faults(run: Run) -> Path:
    """The steps that counted, on one host, each on as many processes as it was taken on."""
    world_sizes, world_size = [], 0
    for event in read_events(run.path):
        world_size = event["world_size"] if event["event"] in RESTART else world_size
        world_sizes += [world_size] * (event["event"] == "train")
    step, root = 0, run.folder / "undisturbed"
    for world_size, steps in groupby(world_sizes):
        step += len(list(steps))
        torchrun = ["torch.distributed.run", "--standalone", f"--nproc_per_node={world_size}"]
        options = [*OPTIONS, f"--data.root={run.images}", f"--run.output_dir={root}"]
        options += [f"--train.max_steps={step}", "--wandb.mode=off"]
        with (run.folder / "undisturbed.log").open("ab") as log:
            command = [sys.executable, "-m", *torchrun, "-m", "alexnet_dist.train", *options]
            subprocess.run(command, stdout=log, stderr=log, check=True)
    return root / "run"


def compare(run: Path, undisturbed: Path) -> dict[str, bool]:
    """What two runs have to have in common."""

    def tensors(path: Path) -> dict[str, bytes]:
        files = (path / "checkpoints/last").resolve().glob("*.safetensors")
        return {name: t.tobytes() for file in files for name, t in load_file(file).items()}

    def records(path: Path, kind: str, field: str, every: int = 1) -> list[tuple[int, Any]]:
        kept = [event for event in read_events(path) if event["event"] == kind]
        return [(event["step"], event[field]) for event in kept if event["step"] % every == 0]

    losses = records(run, "train", "loss")
    order, theirs = (records(p, "epoch", "sample_order_hash", EPOCH) for p in (run, undisturbed))
    return {
        "each_step_once": [step for step, _ in losses] == list(range(1, len(losses) + 1)),
        "same_losses": losses == records(undisturbed, "train", "loss"),
        "same_order": order == theirs and len(order) == len(losses) // EPOCH,
        "same_weights": tensors(run) == tensors(undisturbed),
    }


def attempts(events: list[Event], begun: float) -> list[dict[str, Any]]:
    """From one restart to the next: on how many processes, and the steps taken when."""
    found: list[dict[str, Any]] = []
    for event in events:
        now = round(event["time"] - begun, 1)
        if event["event"] in RESTART:
            world_size, step = event["world_size"], event["step"]
            found.append({"world_size": world_size, "from": step, "to": step, "start": now})
        elif event["event"] == "train":
            found[-1] = {"first": now} | found[-1] | {"to": event["step"], "end": now}
    return found


def summarize(faults: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Seconds from a fault until training went on, by what they went into (medians)."""
    found = {}
    for kind in KINDS:
        each = [f["phases"] for f in faults if f["fault"] == kind and len(f["phases"]) == 5]
        if each:
            medians = {name: statistics.median(p[name] for p in each) for name in each[0]}
            parts = pairwise([("", 0.0), *medians.items()])
            found[kind] = {name: round(now - before, 1) for (_, before), (name, now) in parts}
            worst = max(phases["first step"] for phases in each)
            found[kind] |= {"all": medians["first step"], "worst": worst, "times": len(each)}
    return found


def make_images(root: Path) -> None:  # three classes of noise
    generator = np.random.default_rng(7)
    for index in range(TRAIN_IMAGES + 13):
        folder = root / ("train" if index < TRAIN_IMAGES else "val") / "abc"[index % 3]
        folder.mkdir(parents=True, exist_ok=True)
        noise = generator.integers(0, 256, (SIZE, SIZE, 3), np.uint8)
        Image.fromarray(noise).save(folder / f"{index:03d}.jpg", quality=95)


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """An ext4 of 96 MiB in a file, which can be full, or hang, while others are not."""
    folder.mkdir()
    file = folder.with_suffix(".ext4")
    call(f"truncate --size=96M {file}")
    call(f"mkfs.ext4 -q {file}")
    call(f"mount -o loop {file} {folder}")
    try:
        yield
    finally:
        subprocess.run(["fsfreeze", "--unfreeze", folder], stderr=subprocess.DEVNULL)
        call(f"umount --lazy {folder}")


def plot(results: dict[str, Any], path: Path) -> None:
    """The time line of a run: its steps, and the faults."""
    figure = Figure(figsize=(15, 9), layout="constrained")
    axes = figure.subplots()
    points = []
    for one in results["attempts"]:
        first, end = (one.get(k, one["start"]) / 60 for k in ("first", "end"))
        points += [(first, one["from"]), (end, one["to"])]
        color = "tab:blue" if one["world_size"] == results["world_size"] else "tab:red"
        axes.plot([first, end], [one["from"], one["to"]], color=color, linewidth=2)
    axes.plot(*zip(*points, strict=True), color="0.7", linewidth=1, zorder=0)
    kinds = list(KINDS)
    for n, fault in enumerate(results["faults"]):
        x, y = fault["time"] / 60, fault["step"] + n % 3 * results["steps"] / 50
        axes.text(x, y, str(kinds.index(fault["fault"]) + 1), fontsize=9, ha="right", va="bottom")
    legend = "\n".join(f"{n + 1} {kind}" for n, kind in enumerate(kinds))
    axes.text(0.01, 0.99, legend, fontsize=9, va="top", transform=axes.transAxes)
    axes.set(xlabel="minutes (red: on fewer processes; gray: to the next restart)", ylabel="step")
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in {"faults": 40, "seed": 2012, "hosts": 4, "processes": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS, metavar="KIND")
    parser.add_argument("--out", type=Path, help="the JSON; beside it a time line, FILE.png")
    words = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # not without thawing the disk
    rng, begun = random.Random(words.seed), time.time()
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))  # stays where this fails
    make_images(folder / "images")
    skipped = [] if shutil.which("iptables") else [k for k in words.kinds if k in BY_IPTABLES]
    kinds = [kind for kind in words.kinds if kind not in skipped]
    with Hosts(words.hosts, RATE) as hosts, small_disk(folder / "disk"):
        run, waiting = Run(hosts, folder, words.processes), list[str]()
        faults: list[dict[str, Any]] = []
        while len(faults) < words.faults:
            waiting = waiting or rng.sample(kinds, len(kinds))
            if (result := inject(run, waiting.pop(), rng)) is not None:
                faults.append(result | {"time": round(result["time"] - begun, 1)})
                print(len(faults), json.dumps(faults[-1]), flush=True)
        finish(run)
        same = compare(run.path, repeat_without_faults(run))
        left = [p for p in run.path.rglob("*") if ".partial" in p.name or p.name == "PREEMPT"]
        results = {
            "seed": words.seed,
            "world_size": words.hosts * words.processes,
            "steps": run.last(STEP, "step"),
            "steps_repeated": count_steps(run.events) - run.last(STEP, "step"),
            "seconds": round(time.time() - begun),
            **same,
            "skipped": skipped,
            "files_left": [str(path.relative_to(run.path)) for path in left],
            "seconds_to_resume": summarize(faults),
            "faults": faults,
            "attempts": attempts(run.events, begun),
        }
    save_record("chaos.py", results, words.out)
    if words.out:
        plot(results, words.out.with_suffix(".png"))
    if not all(same.values()) or left:
        raise SystemExit(f"the run under faults does not end as the undisturbed one: see {folder}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
