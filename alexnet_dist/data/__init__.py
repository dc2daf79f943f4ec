"""From files to finished batches: sources, the plan, and the engines that carry it out."""

from typing import Literal

import numpy as np
import torch

from alexnet_dist.data import dali
from alexnet_dist.data.corrupt_images import Loader, OnCorruptImage
from alexnet_dist.data.gpu_cache import GpuCacheLoader, fits
from alexnet_dist.data.plan import SamplePlan, center_crop_boxes
from alexnet_dist.data.prepared import RawDataset
from alexnet_dist.data.sources import ImageDataset
from alexnet_dist.data.torch_loader import TorchLoader
from alexnet_dist.data.transforms import Normalization
from alexnet_dist.errors import UserError


def build_loader(
    name: Literal["auto", "dali", "torch", "gpu_cache"],
    source: ImageDataset,
    pixels: Normalization,
    *,
    plan: SamplePlan | None,
    fraction: float,
    max_batch: int,
    device: torch.device,
    decoder: Literal["auto", "roi", "full", "cpu"] = "auto",
    threads: int,
    ahead: int = 2,
    policy: OnCorruptImage = "stop",
) -> Loader:
    """The engine that carries out ``plan``, or an evaluation where it is None.

    Raises:
        Failure: DALI is asked for by name and not installed, or the resident engine for images that
            are not raw pixels.
    """
    if name == "dali" and not dali.available():
        raise UserError(
            "DALI is not installed here: pip install nvidia-dali-cuda130 (Linux), or take "
            "--data.loader torch",
            on_all_ranks=True,
        )
    on_gpu = device.type == "cuda" and isinstance(source, RawDataset) and fits(source, device)
    if name == "gpu_cache" or (name == "auto" and on_gpu):
        return GpuCacheLoader(
            source,
            pixels,
            max_batch=max_batch,
            device=device,
            on_gpu=on_gpu,
            threads=threads,
            ahead=ahead,
            policy=policy,
        )
    if name == "torch" or not dali.available():
        return TorchLoader(
            source, pixels, device=device, threads=threads, ahead=ahead, policy=policy
        )
    sides = np.unique(center_crop_boxes(source.index.sizes, fraction)[:, 2])
    resize = sides.tolist() != [pixels.side] or (plan is not None and plan.crop != "paper")
    chosen: dali.Decoder = "none"
    if not source.raw:
        chosen = dali.choose_decoder(device) if decoder == "auto" else decoder
    return dali.DaliLoader(
        source,
        pixels,
        max_batch=max_batch,
        device=device,
        decoder=chosen,
        resize=resize,
        threads=threads,
        ahead=ahead,
        policy=policy,
    )
