"""Prepare ImageNet for training: small images in tar shards or as pixels, an index, statistics.

python -m alexnet_dist.prepare IMAGENET --out DIR
python -m alexnet_dist.prepare ILSVRC2012_img_train.tar --val ILSVRC2012_img_val.tar --out DIR
python -m alexnet_dist.prepare imagenette --download ARCHIVES --out DIR

What IN is, is found by looking: a folder with the official tars and the devkit, or the tars
themselves; class folders in train/ and val/ (or test/), or without them; Kaggle's
ILSVRC/Data/CLS-LOC with LOC_val_solution.csv; Hugging Face's parquet files; tars of webdataset or
of class folders; cifar-10-batches-py. It is only read. Tars are read where they are; compressed
ones and parquet files are first copied into DIR/.partial, which wants as much room until the end.

Images become RGB JPEGs with --size on the shorter side; smaller ones stay as they are, byte for
byte. DIR is the same to the bit for any number of workers; the same command goes on after a kill.
Train on it with --data.root DIR.
"""

import argparse
import concurrent.futures
import contextlib
import difflib
import fcntl
import functools
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from pathlib import Path
from typing import Any, NoReturn

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from alexnet_dist.errors import UserError, run_command, stderr
from alexnet_dist.prepare import shards
from alexnet_dist.prepare.images import Form
from alexnet_dist.prepare.inputs import find_images
from alexnet_dist.prepare.samples import Listing
from alexnet_dist.prepare.shards import OnCorruptImage, Shard

DOWNLOADS = {"imagenette": "imagenette2", "cifar10": "cifar-10-batches-py"}
"""What --download gets, and the folder that it makes."""

_EVERY = 30.0  # seconds between two lines of progress, where there is no terminal


def main(arguments: list[str]) -> None:
    """Prepare as the command line says."""
    words = understand(arguments)
    out: Path = words.out.absolute()
    inputs = [_downloaded(words.input, words.download)]
    form = Form(words.format, words.size, words.crop, words.quality)
    asked = {
        "input": [str(path.absolute()) for path in inputs],
        "val": [str(path.absolute()) for path in words.val],
        "shard_mb": words.shard_mb,
        "seed": words.seed,
        **vars(form),
    }
    if is_done(out, asked):
        print(f"{out} is prepared already, just so; remove it to prepare it anew")
        return
    check_places(out, [*inputs, *words.val])
    try:
        with only_one(out):
            start = time.perf_counter()
            prepared = prepare(out, inputs, words, form, asked)
            print(summary(out, prepared, time.perf_counter() - start), flush=True)
    except KeyboardInterrupt:
        stderr("interrupted; the same command goes on with what is not done")
        os._exit(130)  # the workers follow
    except OSError as error:
        raise UserError(
            f"{error.filename or out} cannot be written or read ({error.strerror or error}): make "
            "room, or see to its rights; the same command then goes on, and nothing is lost"
        ) from None


def prepare(
    out: Path, inputs: list[Path], words: argparse.Namespace, form: Form, asked: dict[str, Any]
) -> dict[str, Any]:
    """All of it, less what is done already; prepared.json's content."""
    partial = out / shards.PARTIAL
    with Meter() as meter:
        listing = find_images(inputs, words.val, partial, meter.show)
        per_shard = settle(out, listing, form, asked)
        work = list(shards.shards(listing, per_shard, words.seed))
        checked = partial / "checked"
        if not checked.exists():
            shards.make_room(out, listing, form)
            left = [shard for shard in work if not shards.record_of(out, shard).exists()]
            images = sum(len(shard.numbers) for shard in work)
            with workers(words.workers) as (pool, done):
                done.value = images - sum(len(shard.numbers) for shard in left)
                if done.value:
                    meter.say(f"going on: {done.value:,} of {images:,} images are done")
                for what, do, some in (
                    ("preparing", functools.partial(_write, words.on_bad_image), left),
                    ("reading back", _check, work),
                ):
                    jobs = [(out, form, shard) for shard in some]
                    for _ in run(pool, words.workers, do, jobs):
                        meter.show(what, done.value, images)
                    done.value = 0
            checked.touch()
        return shards.finish(out, listing, work, form, asked, meter.show)


def settle(out: Path, listing: Listing, form: Form, asked: dict[str, Any]) -> int:
    """How many images make a shard: as it was settled before, if this goes on.

    Raises:
        Failure: what was begun here is something else.
    """
    path = out / shards.PARTIAL / "plan.json"
    plan = {"asked": asked, "images": listing.digest()}
    if path.exists():
        begun = json.loads(path.read_text())
        _refuse_other(out, begun["asked"], asked)
        if begun["images"] != plan["images"]:
            raise UserError(
                f"the images of {listing.source} are others than when {out} was begun: remove "
                f"{out}, or give another --out"
            )
        return int(begun["per_shard"])
    per_shard = shards.per_shard(listing, form, asked["shard_mb"], asked["seed"])
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(plan | {"per_shard": per_shard}))
    os.replace(temporary, path)
    return per_shard


def is_done(out: Path, asked: dict[str, Any]) -> bool:
    """Whether the folder is finished.

    Raises:
        Failure: it is, but was made in another way.
    """
    path = out / shards.PREPARED
    if not path.is_file():
        return False
    try:
        prepared = json.loads(path.read_text())
    except ValueError:
        raise UserError(f"{path} is damaged: remove {out}, or give another --out") from None
    _refuse_other(out, prepared, asked)
    return True


def _refuse_other(out: Path, before: dict[str, Any], asked: dict[str, Any]) -> None:
    for name, value in asked.items():
        if before.get(name) != value:
            option = {"kind": "--format", "input": "the source"}.get(name, f"--{name}")
            raise UserError(
                f"{out} was made with {option} {_shown(before.get(name))}, not {_shown(value)}: "
                "give another --out, or remove it"
            )


def _shown(value: Any) -> str:
    return " ".join(value) or "none" if isinstance(value, list) else str(value)


def check_places(out: Path, inputs: list[Path]) -> None:
    """Refuse to write where it would change the source, or among other things."""
    for path in inputs:
        if path.is_dir() and out.resolve().is_relative_to(path.resolve()):
            raise UserError(f"--out {out} lies in the source, which is not to change: give another")
    if out.is_dir() and any(out.iterdir()) and not (out / shards.PARTIAL).is_dir():
        raise UserError(f"--out {out} has other things in it: give a new folder")


@contextlib.contextmanager
def only_one(out: Path) -> Iterator[None]:
    """Hold the folder against a second command like this one."""
    (out / shards.PARTIAL).mkdir(parents=True, exist_ok=True)
    with (out / shards.PARTIAL / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another command is preparing {out}: wait for it, or end it") from None
        yield


@contextlib.contextmanager
def workers(count: int) -> Iterator[tuple[ProcessPoolExecutor, Any]]:
    """Processes, and a counter that they share."""
    ways = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in ways else "spawn")
    if "forkserver" in ways:  # torch is imported once, and not by each
        context.set_forkserver_preload(["alexnet_dist.prepare.shards"])
    done = context.Value("q", 0)
    pool = ProcessPoolExecutor(count, context, _begin, (done,))
    try:
        yield pool, done
    except Exception:  # shards under way may as well be finished
        pool.shutdown(wait=True, cancel_futures=True)
        raise
    pool.shutdown()


def run(
    pool: ProcessPoolExecutor, count: int, do: Callable[..., None], jobs: list[tuple[Any, ...]]
) -> Iterator[None]:
    """Have ``count`` workers do all jobs, coming back now and then; a failure is raised."""
    waiting = iter(jobs)
    running: set[Future[None]] = set()
    try:
        while True:
            while len(running) < 2 * count and (job := next(waiting, None)):
                running.add(pool.submit(do, *job))
            yield
            if not running:
                return
            ended, running = concurrent.futures.wait(
                running, 0.5, concurrent.futures.FIRST_COMPLETED
            )
            for future in ended:
                future.result()
    except BrokenProcessPool:
        raise UserError(
            "a worker process was killed, perhaps for want of memory: the same command goes on, "
            "with fewer --workers if need be"
        ) from None


_done: Any = None  # in a worker: the counter


def _begin(done: Any) -> None:
    """Make a process a worker: one thread, deaf to Ctrl-C, gone when the command is."""
    global _done
    _done = done
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libjpeg speaks of every odd file
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _write(on_bad_image: OnCorruptImage, out: Path, form: Form, shard: Shard) -> None:
    shards.write_shard(out, form, shard, on_bad_image, _done)


def _check(out: Path, form: Form, shard: Shard) -> None:
    shards.check_shard(out, form, shard, _done)


class Meter:
    """Progress with the time left: a bar, or a line now and then where there is no terminal."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            expand=True,
            disable=not self._console.is_terminal,
        )
        self._what, self._task = "", self._bar.add_task("", speed="", visible=False)
        self._start, self._first, self._said = 0.0, 0, 0.0

    def __enter__(self) -> "Meter":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def say(self, line: str) -> None:
        self._console.print(line, markup=False, soft_wrap=True)

    def show(self, what: str, done: int, total: int) -> None:
        """So much of something is done."""
        now = time.perf_counter()
        if what != self._what:
            self._what, self._start, self._first, self._said = what, now, done, now
            self._bar.reset(
                self._task, description=what, total=total, completed=done, speed="", visible=True
            )
        speed = (done - self._first) / max(now - self._start, 1e-9)
        self._bar.update(self._task, completed=done, total=total, speed=f"{speed:,.0f}/s")
        if not self._console.is_terminal and now - self._said >= _EVERY and speed > 0:
            self._said = now
            left = time.strftime("%H:%M:%S", time.gmtime((total - done) / speed))
            self.say(f"{what}: {done:,} of {total:,}, {speed:,.0f}/s, {left} left")


def summary(out: Path, prepared: dict[str, Any], seconds: float) -> str:
    """What came of it, for people."""
    lines = []
    for split, made in prepared["splits"].items():
        size = sum(file["bytes"] for file in made["files"])
        files = f"{len(made['files'])} file{'s' if len(made['files']) > 1 else ''}"
        lines.append(f"{split}: {made['images']:,} images, {files}, {size / 1e6:,.1f} MB")
    if "val" not in prepared["splits"]:
        lines.append("there are no validation images, which training wants: give them by --val")
    if prepared["bad_images"]:
        count = len((out / prepared["bad_images"]).read_text().splitlines())
        lines.append(f"left out: {count:,} bad images, named in {out / prepared['bad_images']}")
    lines.append(
        f"{len(prepared['classes']):,} classes from {prepared['source']}, in {seconds:,.1f} s, "
        f"read back and found whole: {out}"
    )
    return "\n".join(lines)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message.removeprefix('argument ')}; --help lists all options")


def understand(arguments: list[str]) -> argparse.Namespace:
    """The command line.

    Raises:
        Failure: an option is unknown, or its value is none for it.
        SystemExit: --help was asked for.
    """
    parser = _Parser(
        prog="python -m alexnet_dist.prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("input", metavar="IN", help="what to prepare; or imagenette or cifar10, with --download")
    add("--out", type=Path, required=True, metavar="DIR", help="the folder to make")
    add(
        "--val",
        type=Path,
        nargs="+",
        default=[],
        metavar="IN2",
        help="where the validation images are, if IN does not hold them, and the devkit",
    )
    add(
        "--download",
        type=Path,
        metavar="DIR",
        help="get IN by torchvision into this folder, if it is not there yet",
    )
    add("--size", type=_number(8, 4096), default=256, help="pixels on the shorter side (256)")
    add(
        "--crop",
        choices=("none", "center"),
        default="none",
        help="center: the central square of that size, as the paper has it (none)",
    )
    add("--quality", type=_number(1, 100), default=95, help="of the JPEGs written (95)")
    add(
        "--format",
        choices=("shards", "pixels"),
        default="shards",
        help="pixels: one array of bytes a split, 197 kB an image of 256 x 256; wants --crop "
        "center (shards)",
    )
    add(
        "--shard_mb",
        type=_number(0.001, 1e6, float),
        default=256,
        help="megabytes of a shard, about (256)",
    )
    add(
        "--workers",
        type=_number(1, 1024),
        default=_available_cpus(),
        help="processes (as many as there are CPUs)",
    )
    add("--seed", type=_number(0, 2**63), default=0, help="of the order of images in shards (0)")
    add(
        "--on_bad_image",
        choices=("skip", "stop"),
        default="skip",
        help="skip: leave it out and name it in DIR/bad-images.jsonl (skip)",
    )
    add("--debug", action="store_true", help="show where an error came from")
    known = [name for name in parser._option_string_actions if name.startswith("--")]
    for word in arguments:
        name = word.partition("=")[0]
        if name.startswith("--") and name not in known:
            near = difflib.get_close_matches(name, known, 1, 0.5)
            mend = f"did you mean {near[0]}?" if near else "--help lists them all"
            raise UserError(f"there is no option {name}; {mend}")
    words = parser.parse_args(arguments)
    if words.format == "pixels" and words.crop != "center":
        raise UserError("--format pixels wants images of one size: give --crop center, too")
    return words


def _available_cpus() -> int:
    affinity = getattr(os, "sched_getaffinity", None)  # which macOS lacks
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _number(low: float, high: float, kind: type = int) -> Callable[[str], Any]:
    def check(word: str) -> Any:
        try:
            value = kind(word)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"it wants {what} of {low} to {high}, not {word}")
        return value

    return check


def _downloaded(word: str, folder: Path | None) -> Path:
    """Where the source lies, having got it if asked to."""
    if folder is None:
        if word in DOWNLOADS and not Path(word).exists():
            raise UserError(f"give --download DIR, the folder that {word} is to be downloaded into")
        return Path(word)
    if word not in DOWNLOADS:
        raise UserError(f"--download knows {' and '.join(DOWNLOADS)}, not {word}")
    there = folder / DOWNLOADS[word]
    if not there.is_dir():
        from torchvision import datasets

        try:
            if word == "cifar10":
                datasets.CIFAR10(str(folder), download=True)
            else:
                datasets.Imagenette(str(folder), download=True)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"{word} could not be downloaded ({' '.join(str(error).split())}): look after the "
                f"network, or put {DOWNLOADS[word]} into {folder} yourself"
            ) from None
    return there


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    run_command(main)
