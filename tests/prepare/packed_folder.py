"""A small writer of prepared folders, after the layout in alexnet_dist/data/prepared.py."""

import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np

from alexnet_dist.data.formats import decode
from alexnet_dist.data.sources import open_datasets, scan_dataset


def write_prepared(plain: Path, folder: Path, kind: str, *, shards: int = 2) -> Path:
    """The images of a plain folder as they are, in ``shards`` tar files or as raw pixels."""
    catalogue = scan_dataset(str(plain), str(plain), lambda *_: None)
    folder.mkdir(parents=True)
    splits = {}
    for split, source in zip(("train", "val"), open_datasets(catalogue), strict=True):
        index, count = source.index, len(source.index)
        order = np.random.default_rng(0).permutation(count)
        encoded = [np.fromfile(source.path(number), np.uint8) for number in range(count)]
        columns: dict[str, Any] = {
            "names": np.frombuffer("\n".join(index.names).encode(), np.uint8)
        }
        columns |= {"labels": index.labels, "sizes": index.sizes}
        if kind == "shards":
            files = [folder / f"{split}-{number:05d}.tar" for number in range(shards)]
            columns |= {
                name: np.zeros(count, np.int64) for name in ("shards", "offsets", "lengths")
            }
            for shard, file in enumerate(files):
                with tarfile.open(file, "w", format=tarfile.USTAR_FORMAT) as tar:
                    for number in order[shard::shards].tolist():
                        columns["shards"][number] = shard
                        columns["offsets"][number] = tar.offset + tarfile.BLOCKSIZE
                        columns["lengths"][number] = len(encoded[number])
                        label = str(index.labels[number]).encode()
                        stem = index.names[number].rpartition(".")[0]
                        for name, data in (
                            (index.names[number], encoded[number].tobytes()),
                            (f"{stem}.cls", label),
                        ):
                            member = tarfile.TarInfo(name)
                            member.size = len(data)
                            tar.addfile(member, io.BytesIO(data))
        else:
            files = [folder / f"{split}.pixels"]
            columns["rows"] = order.argsort()
            with files[0].open("wb") as written:
                for number in order.tolist():
                    written.write(np.asarray(decode(encoded[number])).tobytes())
        np.savez(folder / f"{split}.index.npz", **columns)
        about = [{"name": f.name, "bytes": f.stat().st_size, "sha256": _digest(f)} for f in files]
        splits[split] = {"images": count, "files": about}
    np.savez(folder / "statistics.npz", **vars(catalogue.stats))
    classes = catalogue.train.classes
    facts = {
        "format": 1,
        "kind": kind,
        "size": int(catalogue.train.sizes.min()),
        "classes": classes,
        "class_names": {name: f"the colour {name}" for name in classes},
        "splits": splits,
    }
    (folder / "prepared.json").write_text(json.dumps(facts))
    return folder


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
