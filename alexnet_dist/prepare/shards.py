"""Write the shards of a packed folder, and make the index of all.

Which images go into which shard is decided before any is written. A shard is the job
of one process; when it is complete, its record is put into DIR/.partial, and it is not done again.
Index and statistics are made from the records in their order, so that every byte is the same for
any number of processes, killed or not. DIR/prepared.json comes last.
"""

import contextlib
import json
import os
import shutil
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from alexnet_dist.data.packed import PACKED_FORMAT, PREPARED, pack_names
from alexnet_dist.data.statistics import ChannelStats, compute_moments, stats_from_moments
from alexnet_dist.errors import UserError
from alexnet_dist.prepare.images import OutputFormat, resize_image
from alexnet_dist.prepare.listing import DatasetListing, ImageEntry, write_json

PARTIAL = ".partial"
CORRUPT_IMAGES = "corrupt-images.jsonl"
SEED = 0  # of the order of images in shards
_NUM_SAMPLED_IMAGES = 64  # by which the size of all is estimated


@dataclass(frozen=True)
class ShardJob:
    """The work on one shard.

    Attributes:
        path, start: the file that its images are written to, and where in it, in bytes.
        record: the file that is there when the shard is complete.
        entries, labels: its images, and the indices of their classes.
    """

    split: str
    form: OutputFormat
    path: Path
    start: int
    record: Path
    entries: list[ImageEntry]
    labels: list[int]


def estimate_image_bytes(listing: DatasetListing, form: OutputFormat) -> float:
    """How many bytes an image takes on average, estimated from some of them."""
    train = listing.splits["train"]
    chosen = np.random.Generator(np.random.Philox(SEED)).permutation(len(train))
    sizes = []
    for index in chosen[:_NUM_SAMPLED_IMAGES].tolist():
        with contextlib.suppress(OSError):
            pixels, encoded, _ = resize_image(train[index].read(), form)
            sizes.append(len(encoded) + 1024 if form.kind == "shards" else pixels.size)
    return sum(sizes) / len(sizes) if sizes else 1e5


def plan_jobs(
    out: Path, listing: DatasetListing, form: OutputFormat, images_per_shard: int
) -> Iterator[ShardJob]:
    """The jobs, split by split; the images of a split are shuffled over its shards."""
    labels = {label: index for index, label in enumerate(listing.classes)}
    for key, (split, entries) in enumerate(listing.splits.items()):
        order = np.random.Generator(np.random.Philox([SEED, key])).permutation(len(entries))
        for number, first in enumerate(range(0, len(entries), images_per_shard)):
            path, start = out / f"{split}-{number:05d}.tar", 0
            record = out / PARTIAL / f"{split}-{number:05d}.json"
            if form.kind == "pixels":
                path, start = out / f"{split}.pixels", first * form.size**2 * 3
            chosen = [entries[index] for index in order[first : first + images_per_shard].tolist()]
            indices = [labels[entry.label] for entry in chosen]
            yield ShardJob(split, form, path, start, record, chosen, indices)


def write_shard(on_corrupt_image: Literal["skip", "stop"], job: ShardJob) -> None:
    """Write the images of a shard, and then its record.

    Raises:
        UserError: an image is corrupt, and the command is to stop; or the source cannot be read.
        OSError: the folder cannot be written.
    """
    count, first, second = 0, np.zeros(3), np.zeros((3, 3))
    images: list[tuple[str, int, int, int, int, int]] = []
    corrupt: list[dict[str, str]] = []
    job.path.touch()
    with job.path.open("r+b") as file:
        file.seek(job.start)
        if job.form.kind == "shards":
            file.truncate()
        for entry, label in zip(job.entries, job.labels, strict=True):
            name = f"{entry.label}/{entry.name}"
            try:
                pixels, encoded, extension = resize_image(entry.read(), job.form)
            except OSError as error:
                reason = error.strerror or str(error)
                if on_corrupt_image == "stop":
                    raise UserError(
                        f"{name} in {entry.file} cannot be decoded ({reason}): fix or remove it, "
                        "or skip it by --on_corrupt_image skip"
                    ) from None
                corrupt.append({"split": job.split, "name": name, "reason": reason})
                continue
            if job.form.kind == "pixels":
                offset, length = file.tell(), file.write(pixels.tobytes())
            else:
                offset, length = _add_member(file, f"{name}.{extension}", encoded)
                _add_member(file, f"{name}.cls", str(label).encode())
            height, width, _ = pixels.shape
            images.append((f"{name}.{extension}", label, height, width, offset, length))
            if job.split == "train":
                mean, products = compute_moments(pixels)
                count, first, second = count + 1, first + mean, second + products
        if job.form.kind == "shards":
            file.write(bytes(2 * tarfile.BLOCKSIZE))
        file.flush()
        os.fsync(file.fileno())
    record = {
        "images": images,
        "corrupt": corrupt,
        "count": count,
        "first": first.tolist(),
        "second": second.tolist(),
    }
    write_json(job.record, record)


def finalize(
    out: Path, listing: DatasetListing, jobs: list[ShardJob], request: dict[str, Any]
) -> dict[str, Any]:
    """Make index, statistics, the list of corrupt images, and prepared.json; its content.

    Raises:
        UserError: not one training image could be decoded.
    """
    splits: dict[str, Any] = {}
    corrupt: list[dict[str, str]] = []
    for split in listing.splits:
        mine = [job for job in jobs if job.split == split]
        records = [json.loads(job.record.read_text()) for job in mine]
        corrupt += [image for record in records for image in record["corrupt"]]
        if split == "train":
            stats = _merge_statistics(out, records)
        paths = list(dict.fromkeys(job.path for job in mine))
        files = [{"name": path.name, "bytes": path.stat().st_size} for path in paths]
        images = [
            (*name.split("/"), *rest, paths.index(job.path))
            for job, record in zip(mine, records, strict=True)
            for name, *rest in record["images"]
        ]
        _write_index(out / f"{split}.index.npz", images)
        splits[split] = {"images": len(images), "files": files}
    if corrupt:
        corrupt.sort(key=lambda image: (image["split"], image["name"]))
        lines = [json.dumps(image) + "\n" for image in corrupt]
        (out / CORRUPT_IMAGES).write_text("".join(lines))
    prepared = {
        "format": PACKED_FORMAT,
        "source": listing.source,
        "classes": listing.classes,
        "class_names": listing.class_names,
        "class_numbers": listing.class_numbers,
        "left_out": listing.left_out,
        "statistics": stats.to_json(),
        "splits": splits,
        "num_corrupt": len(corrupt),
        **request,
    }
    write_json(out / PREPARED, prepared, indent=1)
    shutil.rmtree(out / PARTIAL)
    return prepared


def _write_index(path: Path, images: list[tuple[Any, ...]]) -> None:
    """The index of a split, sorted by label and file name.

    ``images``: of each the class, the file's name, label, height, width, offset and length in
    bytes, and the number of the file that it is in.
    """
    images.sort(key=lambda image: (image[2], image[1]))
    names = pack_names([f"{label}/{name}" for label, name, *_ in images])
    columns = np.array([image[2:] for image in images], np.int64).reshape(-1, 6)
    labels, sizes, offsets = columns[:, 0], columns[:, 1:3], columns[:, [5, 3, 4]]
    np.savez(path, names=names, labels=labels, sizes=sizes, offsets=offsets)


def _merge_statistics(out: Path, records: list[dict[str, Any]]) -> ChannelStats:
    count = sum(record["count"] for record in records)
    if count == 0:
        raise UserError(
            f"not one training image could be decoded: fix the source, remove {out}, and "
            "run the same command again"
        )
    first, second = (sum(np.array(r[key]) for r in records) for key in ("first", "second"))
    return stats_from_moments(first / count, second / count)


def _add_member(file: BinaryIO, name: str, content: bytes) -> tuple[int, int]:
    """Add a member to a tar; offset and length of its content in bytes."""
    info = tarfile.TarInfo(name)  # times, owners and mode are fixed: 0, 0 and 0644
    info.size = len(content)
    file.write(info.tobuf(tarfile.PAX_FORMAT, "utf-8", "strict"))
    offset = file.tell()
    file.write(content + bytes(-len(content) % tarfile.BLOCKSIZE))
    return offset, len(content)
