"""The images of a data set: where the bytes of each are, its class and its name."""

import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from alexnet_dist.errors import UserError

WNID = re.compile(r"n\d{8}")
"""The WordNet ID of an ImageNet class."""

SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


class ImageEntry(NamedTuple):
    """One image: its split ("train" or "val"), class and file name, and where its encoded bytes
    are; length -1 for a file of its own."""

    split: str
    label: str
    name: str
    file: str
    offset: int = 0
    length: int = -1

    def __str__(self) -> str:
        return self.file if self.length < 0 else f"{self.label}/{self.name} in {self.file}"

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
    """

    source: str
    entries: list[ImageEntry]
    class_names: dict[str, str] = field(default_factory=dict)

    @property
    def classes(self) -> list[str]:
        return sorted({entry.label for entry in self.entries})

    @property
    def splits(self) -> dict[str, list[ImageEntry]]:
        found: dict[str, list[ImageEntry]] = {}
        for entry in self.entries:
            found.setdefault(entry.split, []).append(entry)
        return found

    def hash(self) -> str:
        """A checksum of which images there are, wherever their files are."""
        digest = hashlib.sha256()
        for entry in self.entries:
            digest.update(repr(entry._replace(file="")).encode())
        return digest.hexdigest()


def assign_splits(paths: list[Path]) -> dict[Path, str]:
    """The paths of training and validation images, by the words in their names or their folders'.

    "test" is for validation where nothing else is: ImageNet's test images have no labels.
    """
    splits = {}
    for path in paths:
        words = [word for word in re.split(r"[^a-z]+", path.name.lower()) if word in SPLITS]
        splits[path] = SPLITS[words[0] if words else SPLITS.get(path.parent.name, "train")]
    if "val" in splits.values():
        return {path: split for path, split in splits.items() if split != "test"}
    return {path: split.replace("test", "val") for path, split in splits.items()}


def sanitize_names(entries: list[ImageEntry]) -> list[ImageEntry]:
    """The entries, sorted, with unique names that fit any file system and webdataset, where the
    name of a sample ends at its first dot. Names lose their extension.

    Raises:
        UserError: two classes would have one name.
    """
    labels: dict[str, str] = {}
    for label in sorted({entry.label for entry in entries}):
        name = labels[label] = sanitize_name(label)
        if len(set(labels.values())) < len(labels):
            raise UserError(f"class {label!r} and another would both be called {name!r}: rename it")
    taken: dict[tuple[str, str, str], int] = {}
    result = []
    for entry in sorted(entries):
        label, stem = labels[entry.label], sanitize_name(Path(entry.name).stem).replace(".", "_")
        name = stem
        while (entry.split, label, name) in taken:
            taken[entry.split, label, stem] += 1
            name = f"{stem}_{taken[entry.split, label, stem]}"
        taken[entry.split, label, name] = 1
        result.append(entry._replace(label=label, name=name))
    return sorted(result)


def sanitize_name(name: str) -> str:
    """A name as one component of a path, whatever an archive has in its place."""
    kept = "".join(c if c.isprintable() and c not in '/\\:*?"<>|' else "_" for c in name)
    return kept[:120].strip(" .") or "_"
