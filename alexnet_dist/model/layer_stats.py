"""Shapes, parameters and multiply-adds of a network's layers; nothing is computed for them."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from alexnet_dist.model.networks import build_on_meta


@dataclass(frozen=True)
class LayerStats:
    """A layer: its torch class, its output's shape for one image, and what that costs. Running
    averages are no parameters here."""

    kind: str
    name: str
    shape: tuple[int, ...]
    parameters: int
    multiply_adds: int


def layer_stats(arch: str, *, num_classes: int = 1000, image_size: int = 224) -> list[LayerStats]:
    """The layers of a network in order, on the meta device.

    Raises:
        ValueError: as ``build_on_meta``.
    """
    stats: list[LayerStats] = []
    size = {"num_classes": num_classes, "image_size": image_size}
    model = build_on_meta(arch, **size).eval()
    names = {layer: name for name, layer in model.named_modules()}

    def hook(layer: nn.Module, _: object, output: Tensor) -> None:
        bases = [cls for cls in type(layer).__mro__ if cls.__module__.startswith("torch.nn")]
        kind = bases[0] if bases[0] is not nn.Module else type(layer)
        parameters = sum(p.numel() for p in layer.parameters() if p.requires_grad)
        weight = getattr(layer, "weight", None)
        per_output = weight[0].numel() if weight is not None and weight.dim() > 1 else 0
        shape, multiply_adds = tuple(output.shape[1:]), per_output * output[0].numel()
        stats.append(LayerStats(kind.__name__, names[layer], shape, parameters, multiply_adds))

    for layer in model.modules():
        if not list(layer.children()) and not isinstance(layer, nn.Flatten):
            layer.register_forward_hook(hook)
    images = torch.empty(1, 3, image_size, image_size, device="meta")
    as_written: Any = type(model).__mro__[1]  # torch's class: one layer after another
    as_written.forward(model, images)
    return stats


def training_flops(arch: str, num_classes: int, image_size: int) -> int:
    """Floating-point operations of a training step for one image: two for each multiply-add
    forward, and twice as many backward, where the first layer computes no gradient of its input.
    Normalization and pooling do not count."""
    layers = layer_stats(arch, num_classes=num_classes, image_size=image_size)
    products = [layer.multiply_adds for layer in layers if layer.multiply_adds]
    return 2 * (3 * sum(products) - products[0])
