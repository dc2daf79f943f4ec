"""What a run tells of itself, in words and pictures."""

import os
import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from alexnet_dist import __version__
from alexnet_dist.assembly.parts import Images, Learner
from alexnet_dist.config import Config
from alexnet_dist.data.corrupt_images import Batch
from alexnet_dist.data.sources import DIGITS
from alexnet_dist.model import MODEL_REGISTRY
from alexnet_dist.parallel.mesh import Mesh
from alexnet_dist.parallel.precision import device_name
from alexnet_dist.tracking.reporter import Logger

NEXT = """\
next: Imagenette  --config configs/imagenette.yaml --data.root DIR
      CIFAR-10    --data.root DIR (its own files, or folders of images)
      ImageNet    --config configs/paper2012.yaml --data.root IMAGENET"""
"""What to try after the embedded digits."""


def facts(mesh: Mesh, images: Images, learner: Learner) -> dict[str, Any]:
    """What a life begins with, for the records."""
    return {
        "world_size": mesh.world,
        "device": device_name(mesh.device),
        "precision": learner.precision,
        "compiled": learner.compiles,
        "cuda_graph": learner.graphs,
        "threads": mesh.threads,
        "engine": images.engine.description,
        "layout": learner.layout.description,
        "parameters": sum(p.numel() for p in learner.model.parameters() if p.requires_grad),
        "train_images": len(images.catalogue.train),
        "val_images": len(images.catalogue.val),
        "fingerprint": images.catalogue.fingerprint,
        "versions": versions(),
        "lives": _lives(),
    }


def opening(config: Config, images: Images, known: dict[str, Any], path: Path) -> str:
    """The same for people."""
    many = "processes" if known["world_size"] > 1 else "process"
    more = ", compiled" * known["compiled"] + ", a step a CUDA graph" * known["cuda_graph"]
    return (
        f"{config.model.arch}: {known['parameters']:,} parameters, "
        f"{len(images.catalogue.train.classes)} classes, {known['train_images']:,} training "
        f"and {known['val_images']:,} validation images\n"
        f"{known['world_size']} {many} on {known['device']}, {known['threads']} threads each, "
        f"{known['precision']}{more}; {known['engine']}\n"
        f"{known['layout']}\n"
        f"the run is in {path}"
    )


def closing(images: Images, result: dict[str, float], path: Path, stopped: str) -> str:
    """What training has come to, and what to do next; ``stopped`` says where, if too early."""
    lines = [
        f"top-1 accuracy {100 - result['top1_error']:.2f} %  (error {result['top1_error']:.2f} "
        f"%, top-5 {result['top5_error']:.2f} %) on {result['images']} validation images",
        f"records, curves and kernels: {path}",
    ]
    if stopped:
        lines.append(f"stopped at {stopped}; the same command goes on from here")
    if Path(images.catalogue.train.folder).parent.name == DIGITS:
        lines.append(NEXT)
    return "\n".join(lines)


def show_first(report: Logger, images: Images, batch: Batch) -> None:
    """What the network really sees, as a picture."""
    if not report.speaks:
        return
    names = _names(images)
    seen = images.pixels.seen(batch.images[:32], images.colour_strength(0))
    captions = [names[label] for label in batch.labels[:32].tolist()]
    title = "the first training batch, as the network sees it"
    report.sheet("first_batch", 0, seen, captions, title)


def show_predictions(
    report: Logger, images: Images, learner: Learner, mesh: Mesh, step: int
) -> None:
    """A few validation images with what the network takes them for.

    All processes compute the same ones: under some layouts it takes all of them.
    """
    plan = images.evaluation
    first = next(iter(plan.draws(slice(None))))
    count = min(16, len(first.numbers), max(plan.batch // mesh.replicas, 1))
    spread = np.linspace(0, len(images.catalogue.val) - 1, count).astype(np.int64)
    some = first.only(np.arange(len(first.numbers)) < count).substituted(spread)
    batch = next(iter(images.val_engine.batches([some])))
    chances = learner.layout.logits(batch.images).softmax(1).max(1)
    if not report.speaks:
        return
    names = _names(images)
    captions = [
        f"{names[best]} {chance:.0%}" + ("" if best == label else f"\n(is {names[label]})")
        for best, chance, label in zip(
            chances.indices.tolist(), chances.values.tolist(), batch.labels.tolist(), strict=True
        )
    ]
    seen = images.val_pixels.seen(batch.images)
    report.sheet("predictions", step, seen, captions, "validation images")


def show_kernels(
    report: Logger, config: Config, tensors: dict[str, Tensor], step: int, passes: float
) -> None:
    """The first layer's kernels, of a checkpoint's ``tensors``; all processes call it together."""
    first = next(tensor for tensor in tensors.values() if tensor.dim() == 4)
    kernels = first.full_tensor() if isinstance(first, DTensor) else first
    report.kernels(
        step,
        kernels.float().cpu().numpy(),
        MODEL_REGISTRY[config.model.arch].towers,
        f"first-layer kernels after {passes:.4g} passes",
    )


def versions() -> dict[str, str]:
    """Of what computes."""
    return {
        "alexnet_dist": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _names(images: Images) -> list[str]:
    """What to call the classes in few words: "tench" of "tench, Tinca tinca"."""
    catalogue = images.catalogue
    titles = [catalogue.titles.get(name, name) for name in catalogue.train.classes]
    return [title.partition(",")[0] for title in titles]


def _lives() -> dict[str, str]:
    """Which of its lives this is, as launcher and cluster count them."""
    names = {
        "torchrun_restarts": "TORCHELASTIC_RESTART_COUNT",
        "slurm_job": "SLURM_JOB_ID",
        "slurm_restarts": "SLURM_RESTART_COUNT",
    }
    return {name: os.environ[word] for name, word in names.items() if word in os.environ}
