"""Write the shards of a packed folder, verify them, and make the index of all.

Which images go into which shard is decided before any is written, by the seed. A shard is the job
of one process; when it is complete, its record is put into DIR/.partial, and it is not done again.
Index and statistics are made from the records in their order, so that every byte is the same for
any number of processes, killed or not. DIR/prepared.json comes last.
"""

import json
import os
import shutil
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from alexnet_dist.data.formats import decode, validate_bytes
from alexnet_dist.data.prepared import FORMAT, PREPARED
from alexnet_dist.data.statistics import stats_from_moments
from alexnet_dist.errors import UserError
from alexnet_dist.prepare.files import sha256, write_file, write_json
from alexnet_dist.prepare.images import OutputFormat, RunningMoments, resize_image
from alexnet_dist.prepare.listing import DatasetListing, ImageEntry

PARTIAL = ".partial"
CORRUPT_IMAGES = "corrupt-images.jsonl"

_NUM_SAMPLED_IMAGES = 64  # by which the size of all is estimated


@dataclass(frozen=True)
class ShardJob:
    """The work on one shard.

    Attributes:
        out: the packed folder.
        number: of the shard in its split.
        first_row: of its images, where a split is one array of pixels.
        entries: its images.
        labels: indices of their classes.
    """

    out: Path
    form: OutputFormat
    split: str
    number: int
    first_row: int
    entries: list[ImageEntry]
    labels: list[int]

    @property
    def record(self) -> Path:
        """Where the record of the finished shard is."""
        return self.out / PARTIAL / f"{self.split}-{self.number:05d}.json"

    @property
    def path(self) -> Path:
        """The file that its images are in."""
        if self.form.kind == "pixels":
            return self.out / f"{self.split}.pixels"
        return self.out / f"{self.split}-{self.number:05d}.tar"

    @property
    def start(self) -> int:
        """Where in the file they begin, in bytes."""
        return self.first_row * self.form.size**2 * 3 if self.form.kind == "pixels" else 0


def estimate_image_bytes(listing: DatasetListing, form: OutputFormat, seed: int) -> float:
    """How many bytes an image takes on average, estimated from some of them."""
    train = listing.splits["train"]
    chosen = np.random.Generator(np.random.Philox(seed)).permutation(len(train))
    sizes = []
    for index in chosen[:_NUM_SAMPLED_IMAGES].tolist():
        try:
            image = resize_image(train[index].read(), form)
        except OSError:
            continue
        sizes.append(len(image.encoded) + 1024 if form.kind == "shards" else image.pixels.size)
    return sum(sizes) / len(sizes) if sizes else 1e5


def plan_jobs(
    out: Path, listing: DatasetListing, form: OutputFormat, images_per_shard: int, seed: int
) -> Iterator[ShardJob]:
    """The jobs, split by split; the seed shuffles the images of a split over its shards."""
    labels = {label: index for index, label in enumerate(listing.classes)}
    for key, (split, entries) in enumerate(listing.splits.items()):
        order = np.random.Generator(np.random.Philox([seed, key])).permutation(len(entries))
        for number, first in enumerate(range(0, len(entries), images_per_shard)):
            chosen = [entries[index] for index in order[first : first + images_per_shard].tolist()]
            indices = [labels[entry.label] for entry in chosen]
            yield ShardJob(out, form, split, number, first, chosen, indices)


def write_shard(on_corrupt_image: Literal["skip", "stop"], job: ShardJob) -> None:
    """Write the images of a shard, and then its record.

    Raises:
        UserError: an image is corrupt, and the command is to stop; or the source cannot be read.
        OSError: the folder cannot be written.
    """
    moments = RunningMoments()
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
                image = resize_image(entry.read(), job.form)
            except OSError as error:
                reason = error.strerror or str(error)
                if on_corrupt_image == "stop":
                    raise UserError(
                        f"{entry} cannot be decoded ({reason}): fix or remove it, or skip it by "
                        "--on_corrupt_image skip"
                    ) from None
                corrupt.append({"split": job.split, "name": name, "reason": reason})
                continue
            if job.form.kind == "pixels":
                offset, length = file.tell(), file.write(image.pixels.tobytes())
            else:
                offset, length = _add_member(file, f"{name}.{image.extension}", image.encoded)
                _add_member(file, f"{name}.cls", str(label).encode())
            height, width, _ = image.pixels.shape
            images.append((f"{name}.{image.extension}", label, height, width, offset, length))
            if job.split == "train":
                moments.add(image.pixels)
        if job.form.kind == "shards":
            file.write(bytes(2 * tarfile.BLOCKSIZE))
        size = file.tell() - job.start
        file.flush()
        os.fsync(file.fileno())
    record = {
        "images": images,
        "corrupt": corrupt,
        "bytes": size,
        "sha256": sha256(job.path, job.start, size),
        "count": moments.count,
        "first": moments.first.tolist(),
        "second": moments.second.tolist(),
    }
    write_json(job.record, record)


def verify_shard(job: ShardJob) -> None:
    """Read a shard back: its checksum, and whether the index leads to an image in it.

    Raises:
        UserError: it is not what was written. Its record is removed, so that it is written again.
    """
    record = json.loads(job.record.read_text())
    same = sha256(job.path, job.start, record["bytes"]) == record["sha256"]
    if same and job.form.kind == "shards" and record["images"]:
        *_, height, width, offset, length = record["images"][len(record["images"]) // 2]
        encoded = ImageEntry("", "", "", str(job.path), offset, length).read()
        same = decode(validate_bytes(encoded)).size == (width, height)
    if not same:
        job.record.unlink()
        raise UserError(
            f"{job.path} does not read back as it was written: check the disk; the same command "
            "writes that shard again"
        )


def finalize(
    out: Path, listing: DatasetListing, jobs: list[ShardJob], request: dict[str, Any]
) -> dict[str, Any]:
    """Make index, statistics, the list of corrupt images, and prepared.json, whose content is
    returned.

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
            _write_statistics(out, records)
        if mine[0].form.kind == "pixels":
            files = [{"name": mine[0].path.name, "bytes": mine[0].path.stat().st_size}]
        else:
            files = [
                {"name": job.path.name, "bytes": record["bytes"], "sha256": record["sha256"]}
                for job, record in zip(mine, records, strict=True)
            ]
        num_images = _write_index(out / f"{split}.index.npz", records, mine[0].form)
        splits[split] = {"images": num_images, "files": files}
    if corrupt:
        corrupt.sort(key=lambda image: (image["split"], image["name"]))
        lines = [json.dumps(image, ensure_ascii=False) + "\n" for image in corrupt]
        write_file(out / CORRUPT_IMAGES, "".join(lines).encode())
    prepared = {
        "format": FORMAT,
        "source": listing.source,
        "classes": listing.classes,
        "class_names": listing.class_names,
        "splits": splits,
        "num_corrupt": len(corrupt),
        **request,
    }
    write_json(out / PREPARED, prepared, indent=1)
    shutil.rmtree(out / PARTIAL)
    return prepared


def _write_index(path: Path, records: list[dict[str, Any]], form: OutputFormat) -> int:
    """The index of a split, sorted by class and file name; how many images it has."""
    rows = [
        (*name.split("/"), *rest, shard)
        for shard, record in enumerate(records)
        for name, *rest in record["images"]
    ]
    rows.sort()
    names = "\n".join(f"{label}/{name}" for label, name, *_ in rows)
    columns = np.array([row[2:] for row in rows], np.int64).reshape(-1, 6)
    labels, _, _, offsets, lengths, shards = columns.T
    arrays = {
        "names": np.frombuffer(names.encode(), np.uint8),
        "labels": labels,
        "sizes": columns[:, 1:3],
    }
    if form.kind == "shards":
        arrays |= {"shards": shards, "offsets": offsets, "lengths": lengths}
    else:
        arrays |= {"rows": offsets // (form.size**2 * 3)}
    _write_arrays(path, arrays)
    return len(rows)


def _write_statistics(out: Path, records: list[dict[str, Any]]) -> None:
    count = sum(record["count"] for record in records)
    if count == 0:
        raise UserError(
            f"not one training image could be decoded: fix the source, remove {out}, and run the "
            "same command again"
        )
    first, second = np.zeros(3), np.zeros((3, 3))
    for record in records:
        first += record["first"]
        second += record["second"]
    _write_arrays(out / "statistics.npz", vars(stats_from_moments(first / count, second / count)))


def _write_arrays(path: Path, arrays: dict[str, Any]) -> None:
    buffer = BytesIO()
    np.savez(buffer, **arrays)
    write_file(path, buffer.getvalue())


def _add_member(file: BinaryIO, name: str, content: bytes) -> tuple[int, int]:
    """Add a member to a tar; offset and length of its content in bytes."""
    info = tarfile.TarInfo(name)  # times, owners and mode are fixed: 0, 0 and 0644
    info.size = len(content)
    file.write(info.tobuf(tarfile.PAX_FORMAT, "utf-8", "strict"))
    offset = file.tell()
    file.write(content + bytes(-len(content) % tarfile.BLOCKSIZE))
    return offset, len(content)
