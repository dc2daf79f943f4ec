"""From files to finished batches: sources, the plan, and the engines that carry it out."""

from typing import Literal

import numpy as np
import torch

from alexnet_dist.data import dali
from alexnet_dist.data.augment import Pixels
from alexnet_dist.data.dataloader import DataLoaderEngine
from alexnet_dist.data.engine import Engine, OnBadImage
from alexnet_dist.data.plan import Plan, centre_boxes
from alexnet_dist.data.prepared import PixelSource
from alexnet_dist.data.resident import ResidentEngine, fits
from alexnet_dist.data.sources import Source
from alexnet_dist.errors import Failure


def build_engine(
    name: Literal["auto", "dali", "dataloader", "resident"],
    source: Source,
    pixels: Pixels,
    *,
    plan: Plan | None,
    fraction: float,
    max_batch: int,
    device: torch.device,
    decoder: Literal["auto", "region", "full", "cpu"] = "auto",
    threads: int,
    ahead: int = 2,
    policy: OnBadImage = "stop",
) -> Engine:
    """The engine that carries out ``plan``, or an evaluation where it is None.

    Raises:
        Failure: DALI is asked for by name and not installed, or the resident engine for images that
            are not raw pixels.
    """
    if name == "dali" and not dali.available():
        raise Failure(
            "DALI is not installed here: pip install nvidia-dali-cuda130 (Linux), or take "
            "--data.engine dataloader",
            everywhere=True,
        )
    on_gpu = device.type == "cuda" and isinstance(source, PixelSource) and fits(source, device)
    if name == "resident" or (name == "auto" and on_gpu):
        return ResidentEngine(
            source,
            pixels,
            max_batch=max_batch,
            device=device,
            on_gpu=on_gpu,
            threads=threads,
            ahead=ahead,
            policy=policy,
        )
    if name == "dataloader" or not dali.available():
        return DataLoaderEngine(
            source, pixels, device=device, threads=threads, ahead=ahead, policy=policy
        )
    sides = np.unique(centre_boxes(source.index.sizes, fraction)[:, 2])
    resize = sides.tolist() != [pixels.side] or (plan is not None and plan.crop != "paper")
    chosen: dali.Decoder = "none"
    if not source.raw:
        chosen = dali.choose_decoder(device) if decoder == "auto" else decoder
    return dali.DaliEngine(
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
