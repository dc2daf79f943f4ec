"""Prepare ImageNet for training: 256-pixel JPEGs in tar shards, or raw pixels.

python -m alexnet_dist.prepare IMAGENET --out DIR

IMAGENET is a folder, recognized by its content: the official tars and the devkit; class folders in
train/ and val/; Kaggle's ILSVRC/Data/CLS-LOC with LOC_val_solution.csv; Hugging Face's parquet
files; webdataset tars. It is only read. Parquet files are copied into DIR/.partial first, which
takes as much room until the end.

Images become RGB JPEGs with --size pixels on the shorter side; smaller ones keep their bytes. DIR
has the same bytes for any number of workers; after a kill, the same command resumes. Train on it
with --data.root DIR.
"""

import argparse
import contextlib
import fcntl
import functools
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from alexnet_dist.config import CommandParser
from alexnet_dist.data.folders import LeftOut
from alexnet_dist.data.packed import PREPARED
from alexnet_dist.errors import UserError, run_command
from alexnet_dist.prepare import shards
from alexnet_dist.prepare.archives import UNPAIRED
from alexnet_dist.prepare.images import OutputFormat
from alexnet_dist.prepare.listing import write_json
from alexnet_dist.prepare.sources import discover_dataset
from alexnet_dist.prepare.workers import run_jobs
from alexnet_dist.tracking.console import ProgressReporter


def main(arguments: list[str]) -> None:
    """Prepare as the command line says."""
    args = parse_args(arguments)
    out: Path = args.out.absolute()
    form = OutputFormat(args.format, args.size, args.crop, args.quality)
    source = str(args.input.absolute())
    request = {"input": source, "shard_mb": args.shard_mb, **vars(form)}
    if (out / PREPARED).is_file():
        prepared = json.loads((out / PREPARED).read_text())
        check_same_request(out, prepared, request)
        print(f"{out} is already prepared with these options; remove it to start from scratch")
        refuse_unpaired(prepared)
        return
    check_output_dir(out, args.input)
    try:
        with exclusive_lock(out):
            start = time.perf_counter()
            prepared = prepare(out, args, form, request)
            print(summarize(out, prepared, time.perf_counter() - start), flush=True)
            refuse_unpaired(prepared)
    except OSError as error:
        raise UserError(
            f"{error.filename or out} cannot be written or read ({error.strerror or error}): make "
            "room, or check its permissions; the same command then resumes"
        ) from None


def prepare(
    out: Path, args: argparse.Namespace, form: OutputFormat, request: dict[str, Any]
) -> dict[str, Any]:
    """Write and index all shards, less what is done already; prepared.json's content."""
    with ProgressReporter() as progress:
        listing = discover_dataset(args.input, out / shards.PARTIAL, progress)
        total = len(listing.entries)
        names = repr([listing.classes, *(entry[:3] for entry in listing.entries)])
        request |= {"image list": hashlib.sha256(names.encode()).hexdigest()[:16]}
        plan = out / shards.PARTIAL / "plan.json"
        if not plan.exists():
            image_bytes = shards.estimate_image_bytes(listing, form)
            size, free = image_bytes * total / 1e9, shutil.disk_usage(out).free / 1e9
            if size > free:
                raise UserError(f"about {size:.1f} GB are needed and {free:.1f} GB free: make room")
            images_per_shard = max(round(args.shard_mb * 1e6 / image_bytes), 1)
            write_json(plan, request | {"images_per_shard": images_per_shard})
        planned = json.loads(plan.read_text())
        check_same_request(out, planned, request)
        jobs = list(shards.plan_jobs(out, listing, form, planned["images_per_shard"]))
        missing = [job for job in jobs if not job.record.exists()]
        done = total - sum(len(job.entries) for job in missing)
        write = functools.partial(shards.write_shard, args.on_corrupt_image)
        for job in run_jobs(args.workers, write, missing):
            done += len(job.entries)
            progress("preparing", done, total)
        return shards.finalize(out, listing, jobs, request)


def check_same_request(out: Path, before: dict[str, Any], request: dict[str, Any]) -> None:
    """Refuse to resume with other options or images."""
    for name, value in request.items():
        if before.get(name) != value:
            raise UserError(
                f"{out} was made with {name} {before.get(name)}, not {value}: give another --out, "
                "or remove it"
            )


def check_output_dir(out: Path, source: Path) -> None:
    """Refuse to write into the source, or among other files."""
    if out.resolve().is_relative_to(source.resolve()):
        raise UserError(f"--out {out} is in the source, which is only read: give another --out")
    if out.is_dir() and any(out.iterdir()) and not (out / shards.PARTIAL).is_dir():
        raise UserError(f"--out {out} has other files in it: give a new folder")


@contextlib.contextmanager
def exclusive_lock(out: Path) -> Iterator[None]:
    """Hold the folder against a second command."""
    (out / shards.PARTIAL).mkdir(parents=True, exist_ok=True)
    with (out / shards.PARTIAL / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another command is preparing {out}: wait for it, or end it") from None
        yield


def refuse_unpaired(prepared: dict[str, Any]) -> None:
    """End with an error where images may have been meant, and are not there.

    Raises:
        UserError: members of a webdataset tar are left out.
    """
    if found := prepared.get("left_out", {}).get(UNPAIRED):
        raise UserError(
            f"{found[0]} members of tars were left out, as {found[1][0]}: a name ends at its first "
            "dot, and an image and its .cls share it; rename them and prepare again, if they "
            "belong to the data set"
        )


def summarize(out: Path, prepared: dict[str, Any], seconds: float) -> str:
    """What was made, for people."""
    lines = []
    for split, made in prepared["splits"].items():
        size = sum(file["bytes"] for file in made["files"])
        lines.append(f"{split}: {made['images']:,} images, {size / 1e6:,.1f} MB")
    if count := prepared["num_corrupt"]:
        lines.append(f"skipped: {count:,} corrupt images, listed in {out / shards.CORRUPT_IMAGES}")
    if left_out := LeftOut(prepared["left_out"]):
        lines.append(f"left out: {left_out}")
    classes, source = len(prepared["classes"]), prepared["source"]
    return "\n".join([*lines, f"{classes:,} classes from {source}, in {seconds:,.1f} s: {out}"])


def parse_args(arguments: list[str]) -> argparse.Namespace:
    """The command line.

    Raises:
        UserError: an unknown option, or a wrong value.
        SystemExit: after --help.
    """
    parser = CommandParser("prepare", __doc__, trainer_options=False)
    add = parser.add_argument
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    add("input", type=Path, metavar="IMAGENET", help="folder with the images")
    add("--out", type=Path, required=True, metavar="DIR", help="folder to make")
    add("--size", type=int, default=256, help="pixels on the shorter side (256)")
    crop_help = "center: the central square of that size, as in the paper (none)"
    add("--crop", choices=("none", "center"), default="none", help=crop_help)
    add("--quality", type=int, default=95, help="of JPEG, up to 100 (95)")
    format_help = "pixels: one array a split, 197 kB an image of size 256; needs --crop center"
    add("--format", choices=("shards", "pixels"), default="shards", help=format_help)
    add("--shard_mb", type=float, default=256, help="megabytes of a shard, about (256)")
    add("--workers", type=int, default=cpus, help="processes (one a CPU)")
    corrupt_help = "skip: list it in DIR/corrupt-images.jsonl (skip)"
    add("--on_corrupt_image", choices=("skip", "stop"), default="skip", help=corrupt_help)
    args = parser.parse(arguments).args
    for name, low, high in (("size", 8, 4096), ("quality", 1, 100), ("workers", 1, 1024)):
        if not low <= getattr(args, name) <= high:
            raise UserError(f"--{name} must be from {low} to {high}, not {getattr(args, name)}")
    if args.format == "pixels" and args.crop != "center":
        raise UserError("--format pixels needs images of one size: give --crop center, too")
    return args


if __name__ == "__main__":
    run_command(main)
