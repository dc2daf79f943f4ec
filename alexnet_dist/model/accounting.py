"""What the layers of a network give, and what they cost; nothing is computed for it."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from alexnet_dist.model.alexnet import build_on_meta


@dataclass(frozen=True)
class Row:
    """A layer: what it gives for one image, and what that costs; running averages are no
    parameters here."""

    kind: str
    name: str
    shape: tuple[int, ...]
    parameters: int
    multiply_adds: int


def _kind(layer: nn.Module) -> str:
    """A layer's name in torch, where it is one of torch's or made from one."""
    for kind in type(layer).__mro__:
        if kind.__module__.startswith("torch.nn") and kind is not nn.Module:
            return kind.__name__
    return type(layer).__name__


def rows(variant: str, *, num_classes: int = 1000, image_size: int = 224) -> list[Row]:
    """The layers of a variant in order; nothing is computed, and no weight takes memory."""
    found: list[Row] = []

    def note(name: str) -> object:
        def hook(layer: nn.Module, _: object, output: Tensor) -> None:
            parameters = sum(p.numel() for p in layer.parameters() if p.requires_grad)
            weight = getattr(layer, "weight", None)
            per_output = weight[0].numel() if weight is not None and weight.dim() > 1 else 0
            found.append(
                Row(
                    _kind(layer),
                    name,
                    tuple(output.shape[1:]),
                    parameters,
                    per_output * output[0].numel(),
                )
            )

        return hook

    with torch.device("meta"):
        model = build_on_meta(variant, num_classes=num_classes, image_size=image_size).eval()
        for name, layer in model.named_modules():
            if not list(layer.children()) and not isinstance(layer, nn.Flatten):
                layer.register_forward_hook(note(name))
        model(torch.empty(1, 3, image_size, image_size))
    return found


def training_operations(layers: list[Row]) -> int:
    """Floating-point operations of a training step for one image: an addition and a multiplication
    for each multiply-add forward, and twice as many backward, where the first layer has no
    gradient to hand on. What normalisation and pooling take does not count."""
    forward = sum(row.multiply_adds for row in layers)
    first = next(row.multiply_adds for row in layers if row.multiply_adds)
    return 2 * (3 * forward - first)
