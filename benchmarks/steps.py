"""Training steps under a layout, on images of noise."""

from functools import cache
from typing import Any

import torch

from alexnet_dist.model import build_on_meta, iter_initial_weights, make_dropout_masks
from alexnet_dist.parallel import LayoutConfig, parallelize
from alexnet_dist.parallel.mesh import Mesh
from alexnet_dist.parallel.precision import resolve_precision
from alexnet_dist.training.optim import build_optimizer

RANK = 4  # of PowerSGD's matrices


class Steps:
    """``paper`` under a layout: "ddp", "towers" or "sharded", with "+bf16", "+fp16" or
     "+powersgd" behind it where gradients are compressed.

    Args:
        batch: images in a global batch.
        power_after: steps of PowerSGD's that are not compressed, beside two.
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
        kind, _, compress = name.partition("+")
        self.precision = resolve_precision("auto", mesh.device)
        self.model = build_on_meta("paper", num_classes=classes, image_size=image_size)
        self.dropouts = self.model.dropout_layers()
        weights = _weights(classes, image_size)
        self.layout = parallelize(
            self.model,
            mesh,
            LayoutConfig(
                batch,
                precision=self.precision,
                fc="sharded" if kind == "sharded" else "replicated",
                grad_compression=compress or "none",  # type: ignore[arg-type]
                powersgd_rank=RANK,
                powersgd_start=power_after,
            ),
        )
        self.layout.sharding.load_full_weights(self.layout.parameters, iter(weights))
        self.optimizer = build_optimizer(
            "sgd2012", self.layout.parameters, lr=1e-4, momentum=0.9, weight_decay=5e-4
        )

    def inputs(self, batch: int) -> tuple[Any, ...]:
        """For a step on a global ``batch``: it, and images, labels and masks of this process."""
        count, side, device = self.mesh.local_batch(batch), self.image_size, self.mesh.device
        rows = self.layout.dropout_rows
        masks = make_dropout_masks(
            self.dropouts, seed=1, step=0, batch=batch, rows=rows, device=device
        )
        images = torch.randn(count, 3, side, side, device=device)
        images = images.to(memory_format=torch.channels_last)
        return batch, images, torch.randint(self.classes, (count,), device=device), masks

    def take(self, inputs: tuple[Any, ...]) -> None:
        """One update on what ``inputs`` gives."""
        self.compute(inputs)
        self.update()

    def compute(self, inputs: tuple[Any, ...]) -> None:
        """The gradients."""
        self.layout.batch_size, images, labels, masks = inputs
        self.layout.forward_backward(images, labels, masks)

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


@cache
def _weights(classes: int, image_size: int) -> list[tuple[str, torch.Tensor]]:
    torch.manual_seed(1)
    return list(
        iter_initial_weights(build_on_meta("paper", num_classes=classes, image_size=image_size))
    )
