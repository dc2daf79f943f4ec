"""The images that a data set is made of, wherever their bytes lie."""

import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from alexnet_dist.data.sources import IMAGES
from alexnet_dist.errors import UserError

WHOLE = -1
"""The length of an image that is a file of its own."""

WNID = re.compile(r"n\d{8}")
"""A class of ImageNet, by its number in WordNet."""

SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
"""What splits are called, and what they are."""


class Sample(NamedTuple):
    """An image: its split ("train", "val"), class and file name as they are written out, and where
    its bytes lie."""

    split: str
    label: str
    name: str
    file: str
    offset: int
    length: int


@dataclass
class Listing:
    """What was found.

    Attributes:
        source: what it is, in words.
        samples: all images, sorted by split, class and name.
        class_names: classes in words, where they are known.
    """

    source: str
    samples: list[Sample]
    class_names: dict[str, str] = field(default_factory=dict)

    def digest(self) -> str:
        """Which images there are, wherever they lie."""
        digest = hashlib.sha256()
        for split, label, name, _, offset, length in self.samples:
            digest.update(f"{split}/{label}/{name}:{offset}:{length}\n".encode())
        return digest.hexdigest()


def read(sample: Sample) -> NDArray[np.uint8]:
    """The encoded bytes of an image.

    Raises:
        OSError: with a reason and no errno, where the file ends too early; else as open() does.
    """
    if sample.length == WHOLE:
        return np.fromfile(sample.file, np.uint8)
    with open(sample.file, "rb") as file:
        file.seek(sample.offset)
        encoded = file.read(sample.length)
    if len(encoded) < sample.length:
        raise OSError(f"{sample.file} ends before it")
    return np.frombuffer(encoded, np.uint8)


def with_clean_names(samples: list[Sample]) -> list[Sample]:
    """The samples sorted, under names that are fit for any file system and for webdataset, which
    ends a sample's name at its first dot; no two have the same."""
    classes: dict[str, str] = {}
    for label in sorted({sample.label for sample in samples}):
        same = classes.setdefault(clean(label), label)
        if same != label:
            raise UserError(
                f"the classes {same!r} and {label!r} would both be called {clean(label)!r}: "
                "rename one"
            )
    called = {label: name for name, label in classes.items()}
    taken: dict[tuple[str, str, str], int] = {}
    found = []
    for sample in sorted(samples):
        label, stem = called[sample.label], clean(Path(sample.name).stem).replace(".", "_")
        name = stem
        while (sample.split, label, name) in taken:
            taken[sample.split, label, stem] += 1
            name = f"{stem}_{taken[sample.split, label, stem]}"
        taken[sample.split, label, name] = 1
        found.append(sample._replace(label=label, name=name))
    return sorted(found)


def clean(word: str) -> str:
    """A word as one part of a path, whatever a hostile tar has put there."""
    kept = "".join(c if c.isprintable() and c not in '/\\:*?"<>|' else "_" for c in word)
    return kept[:120].strip(" .") or "_"


def is_image(name: str) -> bool:
    return Path(name).suffix.lower() in IMAGES and not name.startswith(".")
