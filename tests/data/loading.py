"""Small folders as datasets, and loaders of them."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from alexnet_dist.data import build_loader
from alexnet_dist.data.datasets import ImageDataset
from alexnet_dist.data.eval_plan import EvalPlan
from alexnet_dist.data.index import DatasetInfo, open_datasets, scan_dataset
from alexnet_dist.data.loader import Batch, Loader
from alexnet_dist.data.normalization import Normalization
from alexnet_dist.data.plan import SampleParams, SamplePlan

SIZE = 64
BYTES = Normalization(np.zeros(3), np.ones(3), np.zeros((3, 3)), SIZE)
"""What leaves pixels as they are."""


def scan(root: Path, cache: Path | None = None) -> DatasetInfo:
    return scan_dataset(str(root), str(cache or root / "cache"), lambda *_: None)


def open_train(root: Path) -> ImageDataset:
    return open_datasets(scan(root))[0]


def build(
    name: Any,
    dataset: ImageDataset,
    plan: SamplePlan | EvalPlan,
    normalization: Normalization = BYTES,
    **options: Any,
) -> Loader:
    defaults: dict[str, Any] = {"device": torch.device("cpu"), "threads": 2}
    defaults["max_batch_size"] = max(plan.batch_size, 60)
    return build_loader(name, dataset, normalization, plan, **defaults | options)


def load(
    name: str,
    dataset: ImageDataset,
    plan: SamplePlan | EvalPlan,
    samples: list[SampleParams],
    normalization: Normalization = BYTES,
    **options: Any,
) -> tuple[list[Batch], list[dict[str, Any]]]:
    """A loader's batches, and its events."""
    loader = build(name, dataset, plan, normalization, **options)
    try:
        return list(loader.batches(samples)), loader.corrupt.pop_events()
    finally:
        loader.close()
