"""A network's layers: output shapes, parameters, multiply-adds and megabytes.

python -m alexnet_dist.summary VARIANT [--num_classes N] [--image_size S]
"""

import torch

from alexnet_dist.config import CommandParser
from alexnet_dist.errors import UserError, run_command
from alexnet_dist.model import MODEL_REGISTRY
from alexnet_dist.model.accounting import Row, rows

MEGABYTE = 2**20


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
    lines = [f"{variant}: {MODEL_REGISTRY[variant].source}", line, head, line]
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
    parser = CommandParser("summary", __doc__, trainer_options=False)
    parser.add_argument("variant", nargs="?", help=", ".join(MODEL_REGISTRY))
    parser.add_argument("--num_classes", type=int, default=1000)
    parser.add_argument("--image_size", type=int, default=224)
    words = parser.parse(arguments).args
    if words.variant is None:
        for name, variant in MODEL_REGISTRY.items():
            print(f"{name:<14}{variant.source}")
        return
    try:
        print(table(words.variant, num_classes=words.num_classes, image_size=words.image_size))
    except ValueError as error:
        raise UserError(str(error)) from None


if __name__ == "__main__":
    run_command(main)
