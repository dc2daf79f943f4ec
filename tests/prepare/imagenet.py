"""A tiny ImageNet, in each form in which people have it."""

import gzip
import json
import tarfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np

from tests.data.corrupt_images import encode, photograph

CLASSES = {"n01440764": "tench, Tinca tinca", "n02102040": "English springer", "n03000684": "saw"}
LABELS = {wnid: label for label, wnid in enumerate(CLASSES)}


def make_images() -> dict[tuple[str, str, str], bytes]:
    """(split, class, name) -> file: large and small, portrait and landscape, JPEG, grayscale, and a
    PNG that is called JPEG, as ImageNet has one."""
    files = {}
    for number in range(18):
        wnid = [*CLASSES][number % 3]
        image = photograph(*[(70, 110), (120, 64), (40, 52), (150, 151)][number % 4])
        image = image.rotate(7 * number).convert("L" if number == 5 else "RGB")
        content = encode(image, "PNG" if number == 4 else "JPEG")
        train = "train", wnid, f"{wnid}_{number}.JPEG"
        val = "val", wnid, f"ILSVRC2012_val_{number - 11:08d}.JPEG"
        files[train if number < 12 else val] = content
    return files


IMAGES = make_images()
WITH_WNID = {
    (split, wnid, name if split == "train" else f"{Path(name).stem}_{wnid}.JPEG"): content
    for (split, wnid, name), content in IMAGES.items()
}
"""The names that Hugging Face and webdataset give them."""


def write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def tar(members: dict[str, bytes]) -> bytes:
    buffer = BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, BytesIO(content))
    return buffer.getvalue()


def class_folders(root: Path, val: str = "val") -> Path:
    for (split, wnid, name), content in IMAGES.items():
        write(root / (val if split == "val" else split) / wnid / name, content)
    return root


def kaggle(root: Path) -> Path:
    table = "ImageId,PredictionString\n"
    for (split, wnid, name), content in IMAGES.items():
        folder = root / "ILSVRC/Data/CLS-LOC" / split
        write(folder / (wnid if split == "train" else ".") / name, content)
        table += f"{Path(name).stem},{wnid} 1 2 30 40 {wnid} 5 6 7 8 \n" if split == "val" else ""
    write(root / "LOC_val_solution.csv", table.encode())
    lines = [f"{wnid} {words}" for wnid, words in CLASSES.items()]
    write(root / "LOC_synset_mapping.txt", "\n".join(lines).encode())
    return root


def official_tars(root: Path) -> Path:
    from scipy.io import savemat

    splits: dict[str, dict[str, bytes]] = {}
    for (split, wnid, name), content in IMAGES.items():
        splits.setdefault(wnid if split == "train" else "val", {})[name] = content
    write(root / "ILSVRC2012_img_val.tar", tar(splits.pop("val")))
    class_tars = {f"{wnid}.tar": tar(members) for wnid, members in splits.items()}
    write(root / "ILSVRC2012_img_train.tar", tar(class_tars))
    ids = dict(zip(CLASSES, (3, 1, 2), strict=True))  # not in the order of the classes
    fields = [("ILSVRC2012_ID", "i4"), ("WNID", "O"), ("words", "O")]
    rows = [(ids[wnid], wnid, words) for wnid, words in CLASSES.items()]
    savemat(matrix := BytesIO(), {"synsets": np.array(rows, fields)})
    truth = "\n".join(str(ids[wnid]) for split, wnid, _ in IMAGES if split == "val")
    data = "ILSVRC2012_devkit_t12/data"
    devkit = {
        f"{data}/meta.mat": matrix.getvalue(),
        f"{data}/ILSVRC2012_validation_ground_truth.txt": truth.encode(),
    }
    write(root / "ILSVRC2012_devkit_t12.tar.gz", gzip.compress(tar(devkit)))
    return root


def parquet(root: Path, *, paths: bool = True) -> Path:
    import pyarrow
    from pyarrow.parquet import write_table

    root.mkdir(parents=True)
    label = {"names": list(CLASSES.values()), "_type": "ClassLabel"}
    metadata = json.dumps({"info": {"features": {"label": label}}}).encode()
    rows = {"test-0": [{"image": {"bytes": b"", "path": "test.JPEG"}, "label": -1}]}
    for number, ((split, wnid, name), content) in enumerate(WITH_WNID.items()):
        image = {"bytes": content, "path": name if paths else None}
        file = f"{split.replace('val', 'validation')}-{number % 2}"
        rows.setdefault(file, []).append({"image": image, "label": LABELS[wnid]})
    for file, some in rows.items():
        table = pyarrow.Table.from_pylist(some).replace_schema_metadata({b"huggingface": metadata})
        write_table(table, root / f"{file}.parquet")
    return root


def webdataset(root: Path) -> Path:
    shards: dict[str, dict[str, bytes]] = {}
    for number, ((split, wnid, name), content) in enumerate(WITH_WNID.items()):
        facts = {"filename": name, "class_name": CLASSES[wnid]}
        members = shards.setdefault(f"{split}-{number % 2}.tar", {})
        members[f"{number:06d}.jpg"] = content
        members[f"{number:06d}.cls"] = str(LABELS[wnid]).encode()
        members[f"{number:06d}.json"] = json.dumps(facts).encode()
    for name, members in shards.items():
        write(root / name, tar(members))
    return root


FORMS: dict[str, Callable[[Path], Path]] = {
    "class folders": class_folders,
    "train and test": lambda root: class_folders(root, "test"),
    "Kaggle": kaggle,
    "official tars": official_tars,
    "parquet": parquet,
    "webdataset": webdataset,
}
