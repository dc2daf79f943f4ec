"""ImageNet as people have it: which images there are, found by looking.

Whatever it comes in, an image is a stretch of bytes in a file, or a whole file: any process can
read any of them in any order.
"""

import csv
import os
from collections.abc import Iterator
from pathlib import Path

from alexnet_dist.data.sources import Progress
from alexnet_dist.errors import UserError
from alexnet_dist.prepare.archives import TARS, cifar10, is_devkit, parquet_files, tars
from alexnet_dist.prepare.samples import (
    SPLITS,
    WHOLE,
    WNID,
    Listing,
    Sample,
    clean,
    is_image,
    with_clean_names,
)

_OFFICIAL = ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar")
_FORMS = (
    "the official tars (ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and the devkit), "
    "train/CLASS/ and val/CLASS/ (or only CLASS/), Kaggle's ILSVRC/Data/CLS-LOC/, parquet files "
    "(train-*.parquet), tars of class folders or of webdataset, cifar-10-batches-py/"
)


def find_images(inputs: list[Path], val: list[Path], scratch: Path, progress: Progress) -> Listing:
    """Find all images of the inputs, by looking at what they are.

    Args:
        val: where the validation images are, if not in ``inputs``.
        scratch: a folder for what has to be unpacked. Files there that are finished are used again.

    Raises:
        Failure: there is nothing of a known form, or it is damaged, or it has no training images.
    """
    listing = _look(inputs, scratch, progress)
    if val:
        more = _look(val, scratch, progress)
        held_out = [s for s in more.samples if s.split != "train"] or more.samples
        listing.samples = [s for s in listing.samples if s.split == "train"]
        listing.samples += [s._replace(split="val") for s in held_out]
        listing.source += f"; validation images from {more.source}"
        listing.class_names = more.class_names | listing.class_names
    splits = {sample.split for sample in listing.samples}
    if "val" in splits:  # what is called test beside it has no labels, or is for the last day
        listing.samples = [s for s in listing.samples if s.split != "test"]
    else:
        listing.samples = [s._replace(split=_evaluated(s.split)) for s in listing.samples]
    if "train" not in splits:
        raise UserError(
            f"{inputs[0]} has no training images ({listing.source}): give what holds them first, "
            "and the validation images by --val"
        )
    odd = {s.label for s in listing.samples if s.split == "val"} - {
        s.label for s in listing.samples if s.split == "train"
    }
    if odd:
        raise UserError(
            f"there are validation images of classes without training images "
            f"({', '.join(sorted(odd)[:5])}{', ...' if len(odd) > 5 else ''}): give both the same "
            "classes"
        )
    listing.samples = with_clean_names(listing.samples)
    known = {sample.label for sample in listing.samples}
    names = {clean(label): words for label, words in listing.class_names.items()}
    listing.class_names = {label: names[label] for label in sorted(known & names.keys())}
    return listing


def _evaluated(split: str) -> str:
    return "val" if split == "test" else split


def _look(paths: list[Path], scratch: Path, progress: Progress) -> Listing:
    """All that lies at the paths, of which one may be the devkit of the official tars."""
    for path in paths:
        if not path.exists():
            raise UserError(f"there is no {path}: give a folder or file with {_FORMS}")
    devkits = [path for path in paths if is_devkit(path)]
    found = []
    for path in (path for path in paths if path not in devkits):
        found.append(_look_at(path, devkits, scratch, progress))
        if not found[-1].samples:
            raise UserError(f"{path} holds no images in a form that is known here: {_FORMS}")
    if not found:
        raise UserError(f"{paths[0]} is the devkit, without images: give the tars, too")
    return Listing(
        " and ".join(dict.fromkeys(one.source for one in found)),
        [sample for one in found for sample in one.samples],
        {label: words for one in found for label, words in one.class_names.items()},
    )


def _look_at(path: Path, devkits: list[Path], scratch: Path, progress: Progress) -> Listing:
    if path.is_file():
        if path.suffix == ".parquet":
            return parquet_files([path], scratch, progress)
        if path.name.endswith(TARS):
            return tars([path], devkits, scratch, progress)
        raise UserError(f"{path} is none of what is known here: {_FORMS}")
    below = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
    splits = [entry for entry in below if entry.name in SPLITS and _folders(entry)]
    for inner in (".", "ILSVRC/Data/CLS-LOC", "Data/CLS-LOC", "CLS-LOC"):
        folder = path / inner
        if (folder / "train").is_dir() and (folder.name == "CLS-LOC" or _solution(folder, 2)):
            return _kaggle(folder)
    batches = path if path.name == "cifar-10-batches-py" else path / "cifar-10-batches-py"
    if (batches / "data_batch_1").is_file():
        return cifar10(batches, scratch, progress)
    if splits:
        samples = [s for entry in splits for s in _class_folders(SPLITS[entry.name], entry)]
        return Listing(f"class folders of {path}", samples)
    tables = sorted([*path.glob("*.parquet"), *path.glob("*/*.parquet")])
    if tables:
        return parquet_files(tables, scratch, progress)
    packed = [entry for entry in below if entry.is_file() and entry.name.endswith(TARS)]
    if packed:
        kits = [entry for entry in below if is_devkit(entry)]
        official = [entry for entry in packed if entry.name in _OFFICIAL]
        packed = official or [entry for entry in packed if entry not in kits]
        return tars(packed, devkits or kits, scratch, progress)
    if _folders(path):
        return Listing(f"class folders of {path}", list(_class_folders("train", path)))
    flat = [name for name in _files(path) if WNID.match(name)]
    samples = [Sample("train", name[:9], name, f"{path}/{name}", 0, WHOLE) for name in flat]
    return Listing(f"images of {path} named by their class", samples)


def _folders(path: Path) -> list[str]:
    """Names of the folders in a folder, sorted."""
    if not path.is_dir():
        return []
    with os.scandir(path) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


def _files(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if is_image(e.name))


def _class_folders(split: str, folder: Path) -> Iterator[Sample]:
    for label in _folders(folder):
        for name in _files(folder / label):
            yield Sample(split, label, name, f"{folder}/{label}/{name}", 0, WHOLE)


def _solution(folder: Path, levels: int) -> Path | None:
    """Kaggle's table of the classes of validation images, in the folder or above it."""
    places = [folder.absolute(), *folder.absolute().parents][:levels]
    tables = [place / "LOC_val_solution.csv" for place in places]
    return next((table for table in tables if table.is_file()), None)


def _kaggle(folder: Path) -> Listing:
    """Kaggle's layout: validation images in one folder, their classes in a table."""
    samples = list(_class_folders("train", folder / "train"))
    class_names = {}
    table = _solution(folder, 5)
    val = folder / "val"
    flat = _files(val) if val.is_dir() else []
    if table is not None:
        words = table.with_name("LOC_synset_mapping.txt")
        if words.is_file():
            lines = [line.partition(" ") for line in words.read_text().splitlines()]
            class_names = {wnid: name for wnid, _, name in lines}
    if flat and table is None:
        raise UserError(
            f"{val} has images without classes: put Kaggle's LOC_val_solution.csv into {folder}"
        )
    if flat and table is not None:
        with table.open(newline="") as file:
            rows = [row for row in csv.reader(file) if len(row) > 1]
        classes = {name: boxes.partition(" ")[0] for name, boxes, *_ in rows[1:]}
        for name in flat:
            label = classes.get(Path(name).stem)
            if label is None:
                raise UserError(f"{table} has no line for {name}: it is cut short, get it again")
            samples.append(Sample("val", label, name, f"{val}/{name}", 0, WHOLE))
    elif val.is_dir():  # sorted into classes, as many scripts do
        samples += _class_folders("val", val)
    return Listing(f"Kaggle's layout in {folder}", samples, class_names)
