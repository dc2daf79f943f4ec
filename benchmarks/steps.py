"""Training steps of ``paper`` under a layout, on images of noise."""

from functools import cache
from typing import Any

import torch

from alexnet_dist.model import build_on_meta, iter_initial_weights
from alexnet_dist.parallel import LayoutConfig, parallelize
from alexnet_dist.parallel.mesh import Mesh
from alexnet_dist.parallel.precision import resolve_precision
from alexnet_dist.training.optim import build_optimizer

RANK = 4  # of PowerSGD's matrices


class Steps:
    """Steps under a layout: "ddp", "towers" or "sharded", with "+bf16", "+fp16" or "+powersgd"
    behind it where gradients are compressed.

    Args:
        batch: images of the global batch.
        power_after: steps that PowerSGD does not compress, besides the first two.
    """

    def __init__(
        self,
        name: str,
        mesh: Mesh,
        batch: int,
        *,
        classes: int,
        image_size: int = 224,
        power_after: int = 2,
    ) -> None:
        self.mesh, self.classes, self.image_size = mesh, classes, image_size
        kind, _, compression = name.partition("+")
        model = build_on_meta("paper", num_classes=classes, image_size=image_size)
        options = LayoutConfig(
            batch,
            precision=resolve_precision("auto", mesh.device),
            towers=mesh.split_size,
            fc="sharded" if kind == "sharded" else "replicated",
            grad_compression=compression or "none",  # type: ignore[arg-type]
            powersgd_rank=RANK,
            powersgd_start=power_after,
        )
        self.layout = parallelize(model, mesh, options)
        weights = iter(_initial_weights(classes, image_size))
        self.layout.sharding.load_full_weights(self.layout.parameters, weights)
        self.optimizer = build_optimizer(
            "sgd2012", self.layout.parameters, lr=1e-4, momentum=0.9, weight_decay=5e-4
        )

    def inputs(self, batch: int) -> tuple[Any, ...]:
        """Of a global ``batch``: its size, and this rank's images [B, 3, H, W] and labels [B]."""
        local, size, device = self.mesh.local_batch(batch), self.image_size, self.mesh.device
        images = torch.randn(local, 3, size, size, device=device)
        images = images.to(memory_format=torch.channels_last)
        return batch, images, torch.randint(self.classes, (local,), device=device)

    def take(self, inputs: tuple[Any, ...]) -> None:
        """One update."""
        self.layout.batch_size, images, labels = inputs
        masks = self.layout.dropout_masks(1, 0)
        self.layout.forward_backward(images, labels, masks)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


@cache
def _initial_weights(classes: int, image_size: int) -> list[tuple[str, torch.Tensor]]:
    torch.manual_seed(1)
    model = build_on_meta("paper", num_classes=classes, image_size=image_size)
    return list(iter_initial_weights(model))
