"""Packed folders for the tests of loaders."""

from pathlib import Path

import numpy as np
from PIL import Image

from alexnet_dist.data.index import scan_dataset
from alexnet_dist.prepare import shards
from alexnet_dist.prepare.images import OutputFormat
from alexnet_dist.prepare.sources import discover_dataset


def write_prepared(plain: Path, folder: Path, kind: str) -> Path:
    """The images of a folder of squares as they are, 16 a tar or as raw pixels."""
    (folder / shards.PARTIAL).mkdir(parents=True)
    listing = discover_dataset(plain, folder, lambda *_: None)
    listing.class_names = {name: f"the color {name}" for name in listing.classes}
    size = Image.open(listing.entries[0].file).height
    form = OutputFormat(kind, size, "center", 95)  # type: ignore[arg-type]
    jobs = list(shards.plan_jobs(folder, listing, form, 16))
    for job in jobs:
        shards.write_shard("stop", job)
    shards.finalize(folder, listing, jobs, vars(form))
    # those that training measures of a folder differ by rounding
    stats = scan_dataset(str(plain), str(plain), lambda *_: None).stats
    np.savez(folder / "statistics.npz", **vars(stats))
    return folder
