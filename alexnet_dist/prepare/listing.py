"""The images of a data set: where the bytes of each are, its class and its name."""

import json
import os
from collections import Counter
from dataclasses import dataclass, field
from os.path import splitext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from alexnet_dist.data.folders import LeftOut, sort_classes
from alexnet_dist.errors import UserError


class ImageEntry(NamedTuple):
    """One image: its split ("train" or "val"), class and file name, and where its encoded bytes
    are; length -1 for a file of its own."""

    split: str
    label: str
    name: str
    file: str
    offset: int = 0
    length: int = -1

    def read(self) -> NDArray[np.uint8]:
        """The encoded bytes, uint8 [length].

        Raises:
            OSError: this image cannot be read.
            UserError: nor can those beside it: the source is gone.
        """
        try:
            with open(self.file, "rb") as file:
                file.seek(self.offset)
                return np.frombuffer(file.read(self.length), np.uint8)
        except OSError as error:
            if self.length < 0 and Path(self.file).parent.is_dir():
                raise
            raise UserError(
                f"{self.file} cannot be read ({error.strerror}): bring the source back; the same "
                "command resumes"
            ) from None


@dataclass
class DatasetListing:
    """All images of a data set.

    Attributes:
        source: what they were found in, for people.
        entries: sorted by split, class and name.
        class_names: {"n01440764": "tench, Tinca tinca"}, where known.
        class_numbers: {"n01440764": 0}, where the source has numbered its classes.
        left_out: what else was found.
    """

    source: str
    entries: list[ImageEntry]
    class_names: dict[str, str] = field(default_factory=dict)
    class_numbers: dict[str, int] = field(default_factory=dict)
    left_out: LeftOut = field(default_factory=LeftOut)

    @property
    def classes(self) -> list[str]:
        return sort_classes({entry.label for entry in self.entries})

    @property
    def splits(self) -> dict[str, list[ImageEntry]]:
        found: dict[str, list[ImageEntry]] = {}
        for entry in self.entries:
            found.setdefault(entry.split, []).append(entry)
        return found


def sanitize_names(entries: list[ImageEntry]) -> list[ImageEntry]:
    """The entries, sorted, with unique names that fit any file system and webdataset, where the
    name of a sample ends at its first dot. Names lose their extension.

    Raises:
        UserError: two classes would have one name.
    """
    labels = {label: sanitize_name(label) for label in {entry.label for entry in entries}}
    if len(set(labels.values())) < len(labels):
        raise UserError(f"two classes would have one name: {', '.join(sorted(labels.values()))}")
    seen: Counter[str] = Counter()
    result = []
    for entry in sorted(entries):
        label, stem = labels[entry.label], sanitize_name(splitext(entry.name)[0]).replace(".", "_")
        seen[f"{entry.split}/{label}/{stem}"] += 1
        count = seen[f"{entry.split}/{label}/{stem}"]
        name = stem if count == 1 else f"{stem}_{count}"
        result.append(entry._replace(label=label, name=name))
    return sorted(result)


def sanitize_name(name: str) -> str:
    """A name as one component of a path, whatever an archive has in its place."""
    kept = "".join(c if c.isprintable() and c not in '/\\:*?"<>|' else "_" for c in name)
    return kept[:120].strip(" .") or "_"


def write_json(path: Path, value: Any, indent: int | None = None) -> None:
    """Write a value as JSON into a file that is complete or absent, whenever this is killed."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w") as file:
        file.write(json.dumps(value, indent=indent) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
