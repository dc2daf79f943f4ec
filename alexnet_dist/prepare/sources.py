"""Find the images of ImageNet, in whichever form people have it."""

import csv
import re
from pathlib import Path

from alexnet_dist.data.folders import (
    PARQUET,
    SPLITS,
    count_unused_splits,
    find_archives,
    find_form,
    find_split,
    is_image_name,
    list_images,
    list_split,
)
from alexnet_dist.data.index import Progress
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
        missing = "validation images: add them in val/" if train else "training images: add them"
        besides = f"; left out are {listing.left_out}" if listing.left_out else ""
        raise UserError(f"{listing.source} have no {missing}{besides}")
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
    form = find_form(root)
    if form == "parquet files":
        tables = find_archives(root, *PARQUET)
        return read_parquet(root, *_assign_splits(tables), scratch, progress)
    if form == "webdataset tars":
        return read_webdataset(root, *_assign_splits(find_archives(root, "*.tar")), progress)
    if form == "official tars":
        return read_official_tars(root, progress)
    if form is not None:
        return _read_folders(root if form == "class folders" else root / "ILSVRC/Data/CLS-LOC")
    raise UserError(
        f"{root} is no folder with a known form of ImageNet: give one with the official tars, "
        "train/CLASS/ and val/CLASS/, Kaggle's ILSVRC/Data/CLS-LOC/, parquet files "
        "(train-*.parquet), or webdataset tars (train-*.tar)"
    )


def _read_folders(folder: Path) -> DatasetListing:
    """train/CLASS/ and val/CLASS/; or a val/ without class folders, whose classes are in a table:
    Kaggle's, beside it or up to three folders above, or Tiny ImageNet's, in it."""
    listing = DatasetListing(f"class folders of {folder}", [])
    count_unused_splits(folder, listing.left_out)
    for split in SPLITS:
        if (path := find_split(folder, split)) is None:
            continue
        if split == "val" and (table := _find_table(path)):
            _read_table(path, table, listing)
            continue
        files = list_split(path)
        listing.left_out.merge(files.left_out)
        listing.entries += [
            ImageEntry(split, files.classes[label], name.partition("/")[2], f"{path}/{name}")
            for name, label in zip(files.names, files.labels.tolist(), strict=True)
        ]
    return listing


def _find_table(val: Path) -> Path | None:
    """The file with the classes of validation images, if these are not in folders of them."""
    if (tiny := val / "val_annotations.txt").is_file():
        return tiny
    tables = [parent / "LOC_val_solution.csv" for parent in val.absolute().parents[:4]]
    flat = any(is_image_name(path.name) for path in val.iterdir())
    return next((table for table in tables if flat and table.is_file()), None)


def _read_table(folder: Path, table: Path, listing: DatasetListing) -> None:
    kaggle = table.suffix == ".csv"
    with table.open(newline="") as file:
        rows = [row for row in csv.reader(file, delimiter="," if kaggle else "\t") if len(row) > 1]
    labels = {Path(name).stem: label.partition(" ")[0] for name, label, *_ in rows}
    images = list_images(folder, listing.left_out)
    if not kaggle:
        listing.left_out.pop(".txt files")  # the table
    for name, *_ in images:
        if Path(name).stem not in labels:
            raise UserError(f"{table} has no line for {name}: download it again")
        listing.entries.append(ImageEntry("val", labels[Path(name).stem], name, f"{folder}/{name}"))
    listing.source = f"{'Kaggle' if kaggle else 'Tiny ImageNet'}'s layout in {folder.parent}"
    names = table.with_name("LOC_synset_mapping.txt") if kaggle else folder.parent / "words.txt"
    lines = names.read_text().splitlines() if names.is_file() else []
    listing.class_names = {line[:9]: line[10:] for line in lines}


def _assign_splits(paths: list[Path]) -> tuple[dict[Path, str], list[Path]]:
    """The files of each split, by the words in their names, or by their folder's name; and the
    files of other splits."""
    known = {name for names in SPLITS.values() for name in names}
    found: dict[str, list[Path]] = {}
    for path in paths:
        words = [*re.split(r"[^a-z]+", path.name.lower()), path.parent.name, "train"]
        found.setdefault(next(word for word in words if word in known), []).append(path)
    best = {
        split: next((name for name in names if name in found), "")
        for split, names in SPLITS.items()
    }
    used = {path: split for split, name in best.items() for path in found.pop(name, [])}
    return used, [path for others in found.values() for path in others]
