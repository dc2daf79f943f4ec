"""Packed folders for the tests of loaders."""

import json
from pathlib import Path

from PIL import Image

from alexnet_dist.prepare.__main__ import main
from tests.data.loading import scan


def write_prepared(plain: Path, folder: Path, kind: str) -> Path:
    """The images of a folder of squares as they are, in small tars or as raw pixels."""
    size = Image.open(next(plain.glob("train/*/*"))).height
    words = [f"--format={kind}", f"--size={size}", "--crop=center", "--shard_mb=0.3", "--workers=1"]
    main([str(plain), f"--out={folder}", *words])
    # those that training measures of a folder differ by rounding
    stats = scan(plain).stats
    facts = json.loads((folder / "prepared.json").read_text()) | {"statistics": stats.to_json()}
    (folder / "prepared.json").write_text(json.dumps(facts))
    return folder
