"""Find the images of ImageNet, in whichever form people have it."""

import csv
import re
from pathlib import Path

from alexnet_dist.data.index import SPLITS, Progress, class_folders, find_split, list_images
from alexnet_dist.errors import UserError
from alexnet_dist.prepare.archives import read_official_tars, read_parquet, read_webdataset
from alexnet_dist.prepare.listing import DatasetListing, ImageEntry, sanitize_name, sanitize_names


def discover_dataset(root: Path, scratch: Path, progress: Progress) -> DatasetListing:
    """Find all training and validation images in a folder.

    Args:
        scratch: a folder for what has to be unpacked; finished files in it are used again.

    Raises:
        UserError: the form is unknown, a file is corrupt, or there are no images of a split.
    """
    listing = _discover(root, scratch, progress)
    train, val = (
        {entry.label for entry in listing.entries if entry.split == split}
        for split in ("train", "val")
    )
    if not train or not val:
        missing = "validation" if train else "training"
        raise UserError(f"{root} has no {missing} images ({listing.source}): add them")
    if odd := sorted(val - train):
        raise UserError(
            f"there are validation images of classes without training images "
            f"({', '.join(odd[:5])}{', ...' if len(odd) > 5 else ''}): give both the same classes"
        )
    listing.entries = sanitize_names(listing.entries)
    names = {sanitize_name(label): name for label, name in listing.class_names.items()}
    listing.class_names = {label: names[label] for label in listing.classes if label in names}
    return listing


def _discover(root: Path, scratch: Path, progress: Progress) -> DatasetListing:
    if tables := sorted([*root.glob("*.parquet"), *root.glob("*/*.parquet")]):
        return read_parquet(root, _assign_splits(tables), scratch, progress)
    for folder in (root, root / "ILSVRC/Data/CLS-LOC"):
        if (folder / "train").is_dir():
            return _read_folders(folder)
    if (root / "ILSVRC2012_img_train.tar").is_file():
        return read_official_tars(root, progress)
    if tars := sorted(root.glob("*.tar")):
        return read_webdataset(root, _assign_splits(tars), progress)
    raise UserError(
        f"{root} is no folder with a known form of ImageNet: give one with the official tars, "
        "train/CLASS/ and val/CLASS/, Kaggle's ILSVRC/Data/CLS-LOC/, parquet files "
        "(train-*.parquet), or webdataset tars (train-*.tar)"
    )


def _read_folders(folder: Path) -> DatasetListing:
    """train/CLASS/ and val/CLASS/; or Kaggle's, whose val/ has no class folders, but tables of the
    images' classes and of the classes' names beside it or up to three folders above."""
    listing = DatasetListing(f"class folders of {folder}", [])
    for split in SPLITS:
        if (path := find_split(folder, split)) is None:
            continue
        listing.entries += [
            ImageEntry(split, label, name, f"{path}/{label}/{name}")
            for label in class_folders(path)
            for name in list_images(path / label)
        ]
        if split == "val" and (images := list_images(path)):
            _read_kaggle_val(path, images, listing)
    return listing


def _read_kaggle_val(folder: Path, images: list[str], listing: DatasetListing) -> None:
    tables = [parent / "LOC_val_solution.csv" for parent in folder.absolute().parents[:4]]
    table = next((table for table in tables if table.is_file()), None)
    if table is None:
        raise UserError(
            f"{folder} has images without class folders: put Kaggle's LOC_val_solution.csv into "
            f"{folder.parent}"
        )
    with table.open(newline="") as file:
        rows = [row for row in csv.reader(file) if len(row) > 1]
    labels = {name: boxes.partition(" ")[0] for name, boxes, *_ in rows[1:]}
    for name in images:
        if Path(name).stem not in labels:
            raise UserError(f"{table} has no line for {name}: download it again")
        listing.entries.append(ImageEntry("val", labels[Path(name).stem], name, f"{folder}/{name}"))
    listing.source = f"Kaggle's layout in {folder.parent}"
    names = table.with_name("LOC_synset_mapping.txt")
    lines = names.read_text().splitlines() if names.is_file() else []
    listing.class_names = {line[:9]: line[10:] for line in lines}


def _assign_splits(paths: list[Path]) -> dict[Path, str]:
    """The files of each split, by the words in their names, or by their folder's name."""
    known = {name for names in SPLITS.values() for name in names}
    found: dict[str, list[Path]] = {}
    for path in paths:
        words = [*re.split(r"[^a-z]+", path.name.lower()), path.parent.name, "train"]
        found.setdefault(next(word for word in words if word in known), []).append(path)
    best = {
        split: next((name for name in names if name in found), "")
        for split, names in SPLITS.items()
    }
    return {path: split for split, name in best.items() for path in found.get(name, [])}
