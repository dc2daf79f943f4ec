"""A prepared folder, written: images in tar shards or as raw pixels, an index, statistics.

What goes into which shard is settled before any is written, by the seed. A shard is the work of one
process; when it is whole, its record is put into DIR/.partial, and it is not done again. From the
records, in their order, index and statistics are made, so that every byte is the same for any
number of processes, killed or not. DIR/prepared.json comes last.
"""

import errno
import hashlib
import json
import os
import shutil
import tarfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from alexnet_dist.data.formats import decode, validate_bytes
from alexnet_dist.data.prepared import FORMAT, PREPARED
from alexnet_dist.data.sources import Progress
from alexnet_dist.data.statistics import stats_from_moments
from alexnet_dist.errors import UserError
from alexnet_dist.prepare.images import Form, Moments, shrink
from alexnet_dist.prepare.samples import WHOLE, Listing, Sample, read

PARTIAL = ".partial"
BAD_IMAGES = "bad-images.jsonl"

_OF_ONE_FILE = (errno.ENOENT, errno.EISDIR, errno.ELOOP, errno.EACCES)
"""Errors that say something of one image; others, as of a disk that is gone, of the source."""

_LOOK_AT = 64  # images by which the size of all is guessed
_BLOCK = 1 << 22

OnCorruptImage = Literal["skip", "stop"]


@dataclass(frozen=True)
class Shard:
    """One shard's work.

    Attributes:
        number: of the shard in its split.
        first: row of its first image, where a split is one array of pixels.
        numbers: the samples' numbers in their split.
        labels: their classes' numbers.
    """

    split: str
    number: int
    first: int
    numbers: list[int]
    samples: list[Sample]
    labels: list[int]

    @property
    def name(self) -> str:
        return f"{self.split}-{self.number:05d}"


def by_split(listing: Listing) -> dict[str, list[Sample]]:
    found: dict[str, list[Sample]] = {}
    for sample in listing.samples:
        found.setdefault(sample.split, []).append(sample)
    return found


def per_shard(listing: Listing, form: Form, shard_mb: float, seed: int) -> int:
    """How many images make a shard of about so many megabytes, by some of them."""
    training = by_split(listing)["train"]
    some = np.random.Generator(np.random.Philox(seed)).permutation(len(training))[:_LOOK_AT]
    sizes = []
    for number in some.tolist():
        try:
            small = shrink(read(training[number]), form)
        except OSError:
            continue
        sizes.append(len(small.encoded) + 1024 if form.kind == "shards" else small.pixels.size)
    mean = sum(sizes) / len(sizes) if sizes else 1e5
    return max(round(shard_mb * 1e6 / mean), 1)


def shards(listing: Listing, per_shard: int, seed: int) -> Iterator[Shard]:
    """The work, split by split; the order of images in it is shuffled with the seed."""
    labels = {label: n for n, label in enumerate(classes(listing))}
    for key, (split, samples) in enumerate(by_split(listing).items()):
        drawn = np.random.Generator(np.random.Philox([seed, key])).permutation(len(samples))
        for number, first in enumerate(range(0, len(samples), per_shard)):
            numbers = drawn[first : first + per_shard].tolist()
            some = [samples[n] for n in numbers]
            yield Shard(split, number, first, numbers, some, [labels[s.label] for s in some])


def classes(listing: Listing) -> list[str]:
    return sorted({sample.label for sample in listing.samples})


def record_of(out: Path, shard: Shard) -> Path:
    """Where the record of a finished shard lies."""
    return out / PARTIAL / f"{shard.name}.npz"


def write_shard(
    out: Path, form: Form, shard: Shard, on_bad_image: OnCorruptImage, done: Any = None
) -> None:
    """Prepare a shard's images, and then its record.

    Args:
        done: a shared counter of images.

    Raises:
        Failure: an image is bad, and this is to stop it; or the source is gone.
        OSError: the folder cannot be written.
    """
    moments = Moments(form.size)
    kept: list[tuple[int, ...]] = []
    endings: list[str] = []
    bad: list[dict[str, str]] = []
    tar = out / PARTIAL / f"{shard.name}.tmp"
    pixels = out / PARTIAL / f"{shard.split}.pixels"
    file = tar.open("wb") if form.kind == "shards" else pixels.open("r+b")
    with file:
        written = _Digested(file, 0 if form.kind == "shards" else shard.first * form.size**2 * 3)
        for number, sample, label in zip(shard.numbers, shard.samples, shard.labels, strict=True):
            try:
                small = shrink(_bytes(sample), form)
            except OSError as error:
                reason = error.strerror or str(error)
                if on_bad_image == "stop":
                    raise UserError(
                        f"{_path(sample)} cannot be decoded ({reason}): mend or remove it, or "
                        "leave it out by --on_bad_image skip"
                    ) from None
                bad.append(_bad(sample, reason))
                continue
            finally:
                if done is not None:
                    with done.get_lock():
                        done.value += 1
            height, width, _ = small.pixels.shape
            if form.kind == "pixels":
                offset, length = written.at, written.write(small.pixels.tobytes())
            else:
                stem = f"{sample.label}/{sample.name}"
                offset, length = _add(written, f"{stem}.{small.ending}", small.encoded)
                _add(written, f"{stem}.cls", str(label).encode())
            kept.append((number, label, height, width, offset, length))
            endings.append(small.ending or "jpg")
            if shard.split == "train":
                moments.add(small.pixels)
        if form.kind == "shards":
            written.write(bytes(2 * tarfile.BLOCKSIZE))
        file.flush()
        os.fsync(file.fileno())
    if form.kind == "shards":
        os.replace(tar, out / f"{shard.name}.tar")
    _save(
        record_of(out, shard),
        kept=np.array(kept, np.int64).reshape(-1, 6),
        endings=np.array(endings, np.str_),
        bad=_text(json.dumps(bad)),
        bytes=np.array(written.count),
        sha256=_text(written.digest.hexdigest()),
        **moments.arrays(),
    )


def check_shard(out: Path, form: Form, shard: Shard, done: Any = None) -> None:
    """Read a shard back: its digest, how many images it has, and whether one of them decodes.

    Raises:
        Failure: it is not what was written. Its record is removed, so that it is made again.
    """
    record = _load(record_of(out, shard))
    kept = record["kept"]
    if form.kind == "shards":
        path, start = out / f"{shard.name}.tar", 0
    else:
        path, start = out / PARTIAL / f"{shard.split}.pixels", shard.first * form.size**2 * 3
    same = _digest(path, start, int(record["bytes"])) == _words(record["sha256"])
    if same and form.kind == "shards":
        with tarfile.open(path, "r:") as tar:
            same = sum(1 for _ in tar) == 2 * len(kept)
        if same and len(kept):
            *_, height, width, offset, length = kept[len(kept) // 2].tolist()
            with path.open("rb") as file:
                file.seek(offset)
                encoded = np.frombuffer(file.read(length), np.uint8)
            same = decode(validate_bytes(encoded)).size == (width, height)
    if not same:
        record_of(out, shard).unlink()
        raise UserError(
            f"{path} does not read back as it was written: look after the disk; the same command "
            "writes that part again"
        )
    if done is not None:
        with done.get_lock():
            done.value += len(shard.numbers)


def make_room(out: Path, listing: Listing, form: Form) -> None:
    """Make each split's array of pixels, where that is the form, still without pixels."""
    if form.kind == "pixels":
        for split, samples in by_split(listing).items():
            with (out / PARTIAL / f"{split}.pixels").open("ab") as file:
                file.truncate(len(samples) * form.size**2 * 3)


def finish(
    out: Path,
    listing: Listing,
    all_shards: list[Shard],
    form: Form,
    about: dict[str, Any],
    progress: Progress,
) -> dict[str, Any]:
    """Make index, statistics and report of the records, and prepared.json; what is in it.

    Raises:
        Failure: not one training image was good.
    """
    splits: dict[str, Any] = {}
    bad: list[dict[str, str]] = []
    for split in by_split(listing):
        mine = [shard for shard in all_shards if shard.split == split]
        records = [_load(record_of(out, shard)) for shard in mine]
        bad += [one for record in records for one in json.loads(_words(record["bad"]))]
        if split == "train":
            _write_statistics(out, records, form)
        samples = by_split(listing)[split]
        images = _write_index(out, split, samples, records, form)
        if form.kind == "pixels":
            files = [_close_pixels(out, split, records, form, progress)]
        else:
            files = [
                {
                    "name": f"{shard.name}.tar",
                    "bytes": int(record["bytes"]),
                    "sha256": _words(record["sha256"]),
                }
                for shard, record in zip(mine, records, strict=True)
            ]
        splits[split] = {"images": images, "files": files}
    if bad:
        lines = [json.dumps(one, ensure_ascii=False) for one in sorted(bad, key=_where)]
        _replace(out / BAD_IMAGES, ("\n".join(lines) + "\n").encode())
    prepared = {
        "format": FORMAT,
        **asdict(form),
        "source": listing.source,
        "classes": classes(listing),
        "class_names": listing.class_names,
        "splits": splits,
        "bad_images": BAD_IMAGES if bad else None,
        **about,
    }
    _replace(out / PREPARED, (json.dumps(prepared, indent=1, ensure_ascii=False) + "\n").encode())
    shutil.rmtree(out / PARTIAL)
    return prepared


def _write_index(
    out: Path, split: str, samples: list[Sample], records: list[dict[str, Any]], form: Form
) -> int:
    """The index of a split, sorted by class and file; how many images it has."""
    rows = np.concatenate([record["kept"] for record in records])
    endings = np.concatenate([record["endings"] for record in records])
    which = np.repeat(np.arange(len(records)), [len(record["kept"]) for record in records])
    names = [
        (samples[number].label, f"{samples[number].name}.{ending}")
        for number, ending in zip(rows[:, 0].tolist(), endings.tolist(), strict=True)
    ]
    order = sorted(range(len(names)), key=names.__getitem__)
    rows, which = rows[order], which[order]
    if form.kind == "shards":
        places = {"shards": which, "offsets": rows[:, 4], "lengths": rows[:, 5]}
    else:
        at = rows[:, 4] // (form.size**2 * 3)
        moved = dict(_moves(at))
        places = {"rows": np.array([moved.get(row, row) for row in at.tolist()], np.int64)}
    _save(
        out / f"{split}.index.npz",
        names=_text("\n".join("/".join(names[number]) for number in order)),
        labels=rows[:, 1],
        sizes=rows[:, 2:4],
        **places,
    )
    return len(rows)


def _write_statistics(out: Path, records: list[dict[str, Any]], form: Form) -> None:
    count = sum(int(record["count"]) for record in records)
    if count == 0:
        raise UserError(
            f"not one training image could be decoded: mend the source, remove {out}, and prepare "
            "it anew"
        )
    total = Moments(form.size)
    mean_image = total.mean_image.astype(np.float64)
    for record in records:
        total.first += record["first"]
        total.second += record["second"]
        mean_image += record["mean_image"]
    statistics = stats_from_moments(total.first / count, total.second / count)
    covariance = total.second / count - np.outer(statistics.mean, statistics.mean)
    _save(
        out / "statistics.npz",
        **vars(statistics),
        mean_image=(mean_image / count).astype(np.float32),
        covariance=covariance,
    )


def _moves(rows: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Which rows of an array go where, so that rows left empty by bad images are at its end."""
    count = len(rows)
    empty = np.setdiff1d(np.arange(count), rows)
    behind = np.sort(rows[rows >= count])
    return list(zip(behind.tolist(), empty.tolist(), strict=True))


def _close_pixels(
    out: Path, split: str, records: list[dict[str, Any]], form: Form, progress: Progress
) -> dict[str, Any]:
    """Fill the rows of bad images with the last ones, and cut the file behind the last image."""
    image = form.size**2 * 3
    partial, path = out / PARTIAL / f"{split}.pixels", out / f"{split}.pixels"
    rows = np.concatenate([record["kept"][:, 4] for record in records]) // image
    size = len(rows) * image
    if partial.exists():
        with partial.open("r+b") as file:
            for source, target in _moves(rows) if partial.stat().st_size > size else ():
                file.seek(source * image)
                pixels = file.read(image)
                file.seek(target * image)
                file.write(pixels)
            file.flush()
            os.fsync(file.fileno())
            file.truncate(size)
        os.replace(partial, path)
    digest = _digest(path, 0, size, lambda at: progress(f"reading {path.name}", at, size))
    return {"name": path.name, "bytes": size, "sha256": digest}


class _Digested:
    """A file being written from an offset on, with a digest of what was."""

    def __init__(self, file: Any, start: int) -> None:
        self._file, self._start = file, start
        self.count, self.digest = 0, hashlib.sha256()
        file.seek(start)

    @property
    def at(self) -> int:
        return self._start + self.count

    def write(self, content: bytes) -> int:
        self._file.write(content)
        self.digest.update(content)
        self.count += len(content)
        return len(content)


def _add(file: _Digested, name: str, content: bytes) -> tuple[int, int]:
    """Add a member to a tar; where its bytes lie, and how many they are."""
    info = tarfile.TarInfo(name)  # its times, owners and mode are fixed: 0, 0 and 0644
    info.size = len(content)
    file.write(info.tobuf(tarfile.PAX_FORMAT, "utf-8", "strict"))
    place = file.at, len(content)
    file.write(content)
    file.write(bytes(-len(content) % tarfile.BLOCKSIZE))
    return place


def _bytes(sample: Sample) -> NDArray[np.uint8]:
    try:
        return read(sample)
    except OSError as error:
        alone = sample.length == WHOLE and error.errno in _OF_ONE_FILE
        if error.errno is None or (alone and Path(sample.file).parent.is_dir()):
            raise
        raise UserError(
            f"{sample.file} cannot be read ({error.strerror}): bring the source back; the same "
            "command goes on"
        ) from None


def _path(sample: Sample) -> str:
    """What to call an image when speaking to people."""
    if sample.length == WHOLE:
        return sample.file
    return f"{sample.label}/{sample.name} in {sample.file}"


def _bad(sample: Sample, reason: str) -> dict[str, str]:
    name = f"{sample.label}/{sample.name}"
    return {"split": sample.split, "name": name, "reason": reason, "done": "left out"}


def _where(bad: dict[str, str]) -> tuple[str, str]:
    return bad["split"], bad["name"]


def _digest(path: Path, start: int, size: int, progress: Any = None) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(start)
        left = size
        while left and (block := file.read(min(_BLOCK, left))):
            digest.update(block)
            left -= len(block)
            if progress is not None:
                progress(size - left)
    return digest.hexdigest()


def _text(words: str) -> NDArray[np.uint8]:
    return np.frombuffer(words.encode(), np.uint8)


def _words(text: NDArray[np.uint8]) -> str:
    return text.tobytes().decode()


def _save(path: Path, **arrays: NDArray[Any]) -> None:
    buffer = BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    _replace(path, buffer.getvalue())


def _load(path: Path) -> dict[str, Any]:
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


def _replace(path: Path, content: bytes) -> None:
    """Write a file that is whole or absent."""
    partial = path.with_name(f".{path.name}.tmp")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
