"""Files that are complete or absent, checksums, and free space."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from alexnet_dist.errors import UserError

_BLOCK = 1 << 22  # bytes


def write_file(path: Path, content: bytes) -> None:
    """Write a file that is complete or absent, whenever this process is killed."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path: Path, value: Any, indent: int | None = None) -> None:
    """Write a value as JSON into a file that is complete or absent."""
    write_file(path, (json.dumps(value, indent=indent, ensure_ascii=False) + "\n").encode())


def sha256(path: Path, start: int, size: int) -> str:
    """The checksum of ``size`` bytes of a file, or of fewer if it ends earlier."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(start)
        while block := file.read(min(_BLOCK, size)):
            digest.update(block)
            size -= len(block)
    return digest.hexdigest()


def check_free_space(folder: Path, size: float, what: str) -> None:
    """Raise UserError unless ``size`` bytes fit on the disk of a folder."""
    free = shutil.disk_usage(folder).free
    if size > free:
        raise UserError(
            f"{what} takes about {size / 1e9:,.1f} GB, and {folder} has {free / 1e9:,.1f} GB left: "
            "make room, or give another --out"
        )
