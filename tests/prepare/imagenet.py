"""A tiny ImageNet, in each form in which people have it."""

import csv
import json
import tarfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np

from tests.data.corrupt_images import encode, photograph

CLASSES = {
    "n01440764": "tench, Tinca tinca",
    "n02102040": "English springer",
    "n03000684": "chain saw, chainsaw",
}
LABELS = {wnid: label for label, wnid in enumerate(CLASSES)}


def make_images() -> dict[tuple[str, str, str], bytes]:
    """(split, class, name) -> file: large and small, portrait and landscape, JPEG, grayscale, and a
    PNG that is called JPEG, as ImageNet has one."""
    files = {}
    for split, count in (("train", 12), ("val", 6)):
        for number in range(count):
            wnid = [*CLASSES][number % 3]
            image = photograph(*[(70, 110), (120, 64), (40, 52), (150, 151)][number % 4])
            image = image.rotate(7 * number).convert("L" if number == 5 else "RGB")
            train = split == "train"
            name = f"{wnid}_{number}" if train else f"ILSVRC2012_val_{number + 1:08d}"
            files[split, wnid, f"{name}.JPEG"] = encode(image, "PNG" if number == 4 else "JPEG")
    return files


IMAGES = make_images()


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def write_tar(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as file:  # type: ignore[call-overload]
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, BytesIO(content))
    return path


def class_folders(root: Path, val: str = "val") -> Path:
    for (split, wnid, name), content in IMAGES.items():
        write(root / (val if split == "val" else split) / wnid / name, content)
    return root


def kaggle(root: Path) -> Path:
    rows = [["ImageId", "PredictionString"]]
    for (split, wnid, name), content in IMAGES.items():
        folder = root / "ILSVRC/Data/CLS-LOC" / split
        write(folder / (wnid if split == "train" else ".") / name, content)
        if split == "val":
            rows.append([Path(name).stem, f"{wnid} 1 2 30 40 {wnid} 5 6 7 8"])
    with (root / "LOC_val_solution.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    lines = [f"{wnid} {words}" for wnid, words in CLASSES.items()]
    (root / "LOC_synset_mapping.txt").write_text("\n".join(lines))
    return root


def official_tars(root: Path, *, unpacked_devkit: bool = False) -> Path:
    from scipy.io import savemat

    train, val = ({k[1:]: v for k, v in IMAGES.items() if k[0] == s} for s in ("train", "val"))
    inner = {}
    for wnid in CLASSES:
        members = {name: content for (label, name), content in train.items() if label == wnid}
        inner[f"{wnid}.tar"] = write_tar(root / "inner.tar", members).read_bytes()
    write_tar(root / "ILSVRC2012_img_train.tar", inner)
    write_tar(root / "ILSVRC2012_img_val.tar", {name: data for (_, name), data in val.items()})
    ids = dict(zip(CLASSES, (3, 1, 2), strict=True))  # not in the order of the classes
    fields = [("ILSVRC2012_ID", "i4"), ("WNID", "O"), ("words", "O")]
    matrix = BytesIO()
    rows = [(ids[wnid], wnid, words) for wnid, words in CLASSES.items()]
    savemat(matrix, {"synsets": np.array(rows, fields)})
    truth = "\n".join(str(ids[wnid]) for wnid, _ in val)
    folder = "ILSVRC2012_devkit_t12"
    devkit = {
        f"{folder}/data/meta.mat": matrix.getvalue(),
        f"{folder}/data/ILSVRC2012_validation_ground_truth.txt": truth.encode(),
    }
    if not unpacked_devkit:
        write_tar(root / f"{folder}.tar.gz", devkit, "w:gz")
    for path, content in devkit.items() if unpacked_devkit else ():
        write(root / path, content)
    return root


def parquet(root: Path, *, paths: bool = True) -> Path:
    import pyarrow
    from pyarrow.parquet import write_table

    root.mkdir(parents=True)
    names = list(CLASSES.values())
    metadata = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
    rows: dict[str, tuple[list[object], list[int]]] = {}
    for number, ((split, wnid, name), content) in enumerate(IMAGES.items()):
        name = name if split == "train" else f"{Path(name).stem}_{wnid}.JPEG"
        images, labels = rows.setdefault(f"{split}-{number % 2:05d}", ([], []))
        images.append({"bytes": content, "path": name if paths else None})
        labels.append(LABELS[wnid])
    rows["test-00000"] = [{"bytes": b"", "path": "ILSVRC2012_test_00000001.JPEG"}], [-1]
    for name, (images, labels) in rows.items():
        table = pyarrow.table({"image": images, "label": labels})
        table = table.replace_schema_metadata({b"huggingface": json.dumps(metadata).encode()})
        write_table(table, root / f"{name}-of-00002.parquet".replace("val", "validation"))
    return root


def webdataset(root: Path) -> Path:
    shards: dict[str, dict[str, bytes]] = {}
    for number, ((split, wnid, name), content) in enumerate(IMAGES.items()):
        name = name if split == "train" else f"{Path(name).stem}_{wnid}.JPEG"
        facts = {"filename": name, "class_name": CLASSES[wnid], "label": LABELS[wnid]}
        shards.setdefault(f"{split}-{number % 2:04d}.tar", {}).update(
            {
                f"{number:06d}.jpg": content,
                f"{number:06d}.cls": str(LABELS[wnid]).encode(),
                f"{number:06d}.json": json.dumps(facts).encode(),
            }
        )
    for name, members in shards.items():
        write_tar(root / name, members)
    return root


FORMS: dict[str, Callable[[Path], Path]] = {
    "class folders": class_folders,
    "train and test": lambda root: class_folders(root, "test"),
    "Kaggle": kaggle,
    "official tars": official_tars,
    "official tars, devkit unpacked": lambda root: official_tars(root, unpacked_devkit=True),
    "parquet": parquet,
    "webdataset": webdataset,
}
