"""A network's layers: output shapes, parameters, multiply-adds and megabytes.

python -m alexnet_dist.summary VARIANT [--num_classes N] [--image_size S]
"""

from argparse import ArgumentParser
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from alexnet_dist.errors import Failure, run_command
from alexnet_dist.model import VARIANTS, outline

MEGABYTE = 2**20


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
            per_output = weight[0].numel() if weight is not None else 0
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
        model = outline(variant, num_classes=num_classes, image_size=image_size).eval()
        for name, layer in model.named_modules():
            if not list(layer.children()) and not isinstance(layer, nn.Flatten):
                layer.register_forward_hook(note(name))
        model(torch.empty(1, 3, image_size, image_size))
    return found


def megabytes(layers: list[Row], image_size: int) -> dict[str, float]:
    """For one image in float32, of 2**20 bytes: the input, every layer's output forward and
    backward, the parameters, and all together."""
    outputs = sum(torch.Size(row.shape).numel() for row in layers)
    sizes = {
        "input": 3 * image_size**2 * 4 / MEGABYTE,
        "forward/backward": outputs * 2 * 4 / MEGABYTE,
        "parameters": sum(row.parameters for row in layers) * 4 / MEGABYTE,
    }
    return sizes | {"total": sum(sizes.values())}


def table(variant: str, *, num_classes: int = 1000, image_size: int = 224) -> str:
    """The table as text."""
    layers = rows(variant, num_classes=num_classes, image_size=image_size)
    line = "-" * 86
    head = f"{'layer (type)':<38}{'output':>18}{'parameters':>15}{'mult-adds':>15}"
    lines = [f"{variant}: {VARIANTS[variant].source}", line, head, line]
    for number, row in enumerate(layers, 1):
        shape = "[" + ", ".join(str(n) for n in (-1, *row.shape)) + "]"
        label = f"{row.name} ({row.kind}-{number})"
        lines.append(f"{label:<38}{shape:>18}{row.parameters:>15,}{row.multiply_adds:>15,}")
    sizes = megabytes(layers, image_size)
    lines += [
        line,
        f"parameters: {sum(row.parameters for row in layers):,}",
        f"multiply-adds an image: {sum(row.multiply_adds for row in layers) / 1e9:.3f} G",
        f"input size (MB): {sizes['input']:.2f}",
        f"forward/backward pass size (MB): {sizes['forward/backward']:.2f}",
        f"parameters size (MB): {sizes['parameters']:.2f}",
        f"estimated total size (MB): {sizes['total']:.2f}",
    ]
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    """Print a table, or the list of variants."""
    parser = ArgumentParser(
        prog="python -m alexnet_dist.summary", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("variant", nargs="?", help=", ".join(VARIANTS))
    parser.add_argument("--num_classes", type=int, default=1000)
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--debug", action="store_true")
    words = parser.parse_args(arguments)
    if words.variant is None:
        for name, variant in VARIANTS.items():
            print(f"{name:<14}{variant.source}")
        return
    try:
        print(table(words.variant, num_classes=words.num_classes, image_size=words.image_size))
    except ValueError as error:
        raise Failure(str(error)) from None


if __name__ == "__main__":
    run_command(main)
