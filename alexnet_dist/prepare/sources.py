"""Find the images of ImageNet, in whichever form people have it."""

import csv
from pathlib import Path

from alexnet_dist.data.sources import Progress, class_folders, list_images
from alexnet_dist.errors import UserError
from alexnet_dist.prepare.archives import read_parquet, read_tars
from alexnet_dist.prepare.listing import (
    SPLITS,
    DatasetListing,
    ImageEntry,
    assign_splits,
    sanitize_name,
    sanitize_names,
)

_FORMS = (
    "the official tars (ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and the devkit), "
    "train/CLASS/ and val/CLASS/ (or only CLASS/), Kaggle's ILSVRC/Data/CLS-LOC/, parquet files "
    "(train-*.parquet), webdataset tars (train-*.tar)"
)
_OFFICIAL_TARS = ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar")


def discover_dataset(
    root: Path, val: Path | None, scratch: Path, progress: Progress
) -> DatasetListing:
    """Find all training and validation images.

    Args:
        val: where the validation images are, if not in ``root``.
        scratch: a folder for what has to be unpacked; finished files in it are used again.

    Raises:
        UserError: the form is unknown, a file is corrupt, or there are no training images.
    """
    listing = _discover(root, scratch, progress)
    if val is not None:
        more = _discover(val, scratch, progress)
        held_out = [entry for entry in more.entries if entry.split == "val"] or more.entries
        listing.entries = [entry for entry in listing.entries if entry.split == "train"]
        listing.entries += [entry._replace(split="val") for entry in held_out]
        listing.source += f"; validation images from {more.source}"
        listing.class_names = more.class_names | listing.class_names
    labels: dict[str, set[str]] = {"train": set(), "val": set()}
    for entry in listing.entries:
        labels[entry.split].add(entry.label)
    if not labels["train"]:
        raise UserError(
            f"{root} has no training images ({listing.source}): give their folder or file first, "
            "and the validation images by --val"
        )
    if odd := sorted(labels["val"] - labels["train"]):
        raise UserError(
            f"there are validation images of classes without training images "
            f"({', '.join(odd[:5])}{', ...' if len(odd) > 5 else ''}): give both the same classes"
        )
    listing.entries = sanitize_names(listing.entries)
    names = {sanitize_name(label): name for label, name in listing.class_names.items()}
    listing.class_names = {label: names[label] for label in listing.classes if label in names}
    return listing


def _discover(path: Path, scratch: Path, progress: Progress) -> DatasetListing:
    if not path.exists():
        raise UserError(f"there is no {path}: give a folder or file with {_FORMS}")
    splits = [path, path / "ILSVRC/Data/CLS-LOC"]
    splits = [folder for folder in splits if (folder / "train").is_dir()]
    tables = [path, *sorted(path.glob("*.parquet")), *sorted(path.glob("*/*.parquet"))]
    tables = [file for file in tables if file.suffix == ".parquet" and file.is_file()]
    tars = [file for file in [path, *sorted(path.glob("*.tar"))] if file.suffix == ".tar"]
    if tables:
        listing = read_parquet(tables, scratch, progress)
    elif splits:
        listing = _read_split_folders(splits[0])
    elif tars:
        listing = read_tars([tar for tar in tars if tar.name in _OFFICIAL_TARS] or tars, progress)
    else:
        entries = _read_class_folders("train", path) if path.is_dir() else []
        listing = DatasetListing(f"class folders of {path}", entries)
    if not listing.entries:
        raise UserError(f"{path} holds no images in a known form: {_FORMS}")
    return listing


def _read_split_folders(folder: Path) -> DatasetListing:
    """train/CLASS/ and val/CLASS/; or Kaggle's, whose val/ has no class folders, but tables of the
    images' classes and of the classes' names beside it or up to three folders above."""
    listing = DatasetListing(f"class folders of {folder}", [])
    places = [folder.absolute(), *folder.absolute().parents][:4]
    table = next((p for p in places if (p / "LOC_val_solution.csv").is_file()), None)
    paths = [folder / name for name in class_folders(folder) if name in SPLITS]
    for path, split in assign_splits(paths).items():
        listing.entries += _read_class_folders(split, path)
        if split == "val" and (images := list_images(path)):
            if table is None:
                raise UserError(
                    f"{path} has images without class folders: put Kaggle's LOC_val_solution.csv "
                    f"into {folder}"
                )
            listing.source = f"Kaggle's layout in {folder}"
            listing.entries += _read_kaggle_val(path, images, table / "LOC_val_solution.csv")
    if table and (names := table / "LOC_synset_mapping.txt").is_file():
        lines = [line.partition(" ") for line in names.read_text().splitlines()]
        listing.class_names = {wnid: name for wnid, _, name in lines}
    return listing


def _read_kaggle_val(folder: Path, images: list[str], table: Path) -> list[ImageEntry]:
    with table.open(newline="") as file:
        rows = [row for row in csv.reader(file) if len(row) > 1]
    labels = {name: boxes.partition(" ")[0] for name, boxes, *_ in rows[1:]}
    missing = [name for name in images if Path(name).stem not in labels]
    if missing:
        raise UserError(f"{table} has no line for {missing[0]}: download it again")
    return [ImageEntry("val", labels[Path(n).stem], n, f"{folder}/{n}") for n in images]


def _read_class_folders(split: str, folder: Path) -> list[ImageEntry]:
    return [
        ImageEntry(split, label, name, f"{folder}/{label}/{name}")
        for label in class_folders(folder)
        for name in list_images(folder / label)
    ]
