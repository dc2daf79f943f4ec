"""What a run tells of itself, in words and pictures."""

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
from alexnet_dist.data.datasets import DIGITS
from alexnet_dist.model import MODEL_REGISTRY
from alexnet_dist.parallel.mesh import Mesh
from alexnet_dist.parallel.precision import device_name
from alexnet_dist.tracking.logger import QUICKSTART_HINT, Logger
from alexnet_dist.tracking.run_dir import restart_info


def facts(mesh: Mesh, images: Images, learner: Learner) -> dict[str, Any]:
    """What a life begins with, for the records."""
    return {
        "world_size": mesh.world_size,
        "device": device_name(mesh.device),
        "precision": learner.precision,
        "compiled": learner.compiles,
        "cuda_graph": learner.graphs,
        "threads": mesh.threads,
        "loader": images.engine.description,
        "layout": learner.layout.description,
        "parameters": sum(p.numel() for p in learner.model.parameters() if p.requires_grad),
        "num_classes": len(images.catalogue.train.classes),
        "train_images": len(images.catalogue.train),
        "val_images": len(images.catalogue.val),
        "dataset_hash": images.catalogue.dataset_hash,
        "versions": versions(),
        "restarts": restart_info(),
    }


def hint(images: Images) -> str:
    """What to do after the embedded digits."""
    is_quickstart = Path(images.catalogue.train.folder).parent.name == DIGITS
    return QUICKSTART_HINT if is_quickstart else ""


def show_first(report: Logger, images: Images, batch: Batch) -> None:
    """What the network really sees, as a picture."""
    if not report.is_active:
        return
    seen = images.pixels.to_uint8_images(batch.images[:32], images.plan.pca_noise_std(0))
    report.log_labeled_images(seen, batch.labels[:32], _names(images))


def show_predictions(
    report: Logger, images: Images, learner: Learner, mesh: Mesh, step: int
) -> None:
    """A few validation images with what the network takes them for.

    All processes compute the same ones: under some layouts it takes all of them.
    """
    plan = images.evaluation
    images_in_val = len(images.catalogue.val)
    count = min(16, images_in_val, max(plan.batch_size // mesh.dp_size, 1))
    spread = np.linspace(0, images_in_val - 1, count).astype(np.int64)
    batch = next(iter(images.val_engine.batches([plan.samples(spread)])))
    probs = learner.layout.logits(batch.images).softmax(1)
    if report.is_active:
        seen = images.val_pixels.to_uint8_images(batch.images)
        report.log_predictions(step, seen, batch.labels, probs, _names(images))


def show_kernels(report: Logger, config: Config, tensors: dict[str, Tensor], step: int) -> None:
    """The first layer's kernels, of a checkpoint's ``tensors``; all processes call it together."""
    first = next(tensor for tensor in tensors.values() if tensor.dim() == 4)
    kernels = first.full_tensor() if isinstance(first, DTensor) else first
    towers = MODEL_REGISTRY[config.model.arch].towers
    report.log_kernels(step, kernels.float().cpu().numpy(), towers)


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
    titles = [catalogue.class_names.get(name, name) for name in catalogue.train.classes]
    return [title.partition(",")[0] for title in titles]
