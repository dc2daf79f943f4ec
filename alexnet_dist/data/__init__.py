"""From files to batches: datasets, the plan, and the loaders that carry it out."""

from typing import Any, Literal

import torch

from alexnet_dist.data import dali, dali_probe
from alexnet_dist.data.datasets import ImageDataset
from alexnet_dist.data.eval_plan import EvalPlan, needs_resize
from alexnet_dist.data.gpu_cache import GpuCacheLoader
from alexnet_dist.data.loader import Loader, OnCorruptImage
from alexnet_dist.data.normalization import Normalization
from alexnet_dist.data.packed import RawDataset
from alexnet_dist.data.plan import SamplePlan
from alexnet_dist.data.torch_loader import TorchLoader
from alexnet_dist.errors import UserError


def build_loader(
    name: Literal["auto", "dali", "torch", "gpu_cache"],
    dataset: ImageDataset,
    normalization: Normalization,
    plan: SamplePlan | EvalPlan,
    *,
    device: torch.device,
    max_batch_size: int,
    threads: int,
    on_corrupt: OnCorruptImage = "stop",
) -> Loader:
    """The loader for the samples of ``plan``.

    Args:
        max_batch_size: the most samples in a batch of this process.

    Raises:
        UserError: DALI is asked for by name and not installed, or gpu_cache for a dataset without
            raw pixels.
    """
    if name == "dali" and not dali.available():
        raise UserError(
            "DALI is not installed here: pip install nvidia-dali-cuda130 (Linux), or take "
            "--data.loader torch",
            on_all_ranks=True,
        )
    if name == "gpu_cache" and not isinstance(dataset, RawDataset):
        raise UserError(
            f"data.loader gpu_cache wants raw pixels, and {dataset.index.folder} holds none: "
            "prepare them by python -m alexnet_dist.prepare IN --out DIR --crop center --format "
            "pixels, or take --data.loader auto",
            on_all_ranks=True,
        )
    options: dict[str, Any] = {"device": device, "threads": threads, "on_corrupt": on_corrupt}
    if isinstance(dataset, RawDataset) and (
        name == "gpu_cache" or (name == "auto" and device.type == "cuda")
    ):
        return GpuCacheLoader(dataset, normalization, **options)
    if name == "torch" or not dali.available():
        return TorchLoader(dataset, normalization, **options)
    return dali.DaliLoader(
        dataset,
        normalization,
        decoder="none" if dataset.is_decoded else dali_probe.probe_decoder(device),
        resize=needs_resize(plan, normalization.size),
        max_batch_size=max_batch_size,
        **options,
    )
