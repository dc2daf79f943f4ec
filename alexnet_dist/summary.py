"""A network's layers: output shapes, parameters, multiply-adds, and memory.

python -m alexnet_dist.summary ARCH [--num_classes N] [--image_size S]
"""

from math import prod

from alexnet_dist.config import CommandParser
from alexnet_dist.errors import UserError, run_command
from alexnet_dist.model import MODEL_REGISTRY
from alexnet_dist.model.layer_stats import LayerStats, layer_stats


def memory_estimate(layers: list[LayerStats], image_size: int) -> dict[str, float]:
    """MiB of float32 for one image: the input, all layers' outputs forward and backward, and the
    parameters."""
    values = {
        "input": 3 * image_size**2,
        "forward/backward": 2 * sum(prod(layer.shape) for layer in layers),
        "parameters": sum(layer.parameters for layer in layers),
    }
    values["total"] = sum(values.values())
    return {name: 4 * count / 2**20 for name, count in values.items()}


def table(arch: str, *, num_classes: int = 1000, image_size: int = 224) -> str:
    """The table as text."""
    layers = layer_stats(arch, num_classes=num_classes, image_size=image_size)
    line = "-" * 86
    head = f"{'layer (type)':<38}{'output':>18}{'parameters':>15}{'mult-adds':>15}"
    lines = [f"{arch}: {MODEL_REGISTRY[arch].source}", line, head, line]
    for index, layer in enumerate(layers, 1):
        shape, label = [-1, *layer.shape], f"{layer.name} ({layer.kind}-{index})"
        costs = f"{layer.parameters:>15,}{layer.multiply_adds:>15,}"
        lines.append(f"{label:<38}{shape!s:>18}{costs}")
    lines += [
        line,
        f"parameters: {sum(layer.parameters for layer in layers):,}",
        f"multiply-adds per image: {sum(layer.multiply_adds for layer in layers) / 1e9:.3f} G",
    ]
    memory = memory_estimate(layers, image_size)
    return "\n".join(lines + [f"{name} size (MiB): {size:.2f}" for name, size in memory.items()])


def main(arguments: list[str]) -> None:
    """Print a table, or the list of networks."""
    parser = CommandParser("summary", __doc__, trainer_options=False)
    parser.add_argument("arch", nargs="?", help=", ".join(MODEL_REGISTRY))
    parser.add_argument("--num_classes", type=int, default=1000)
    parser.add_argument("--image_size", type=int, default=224)
    args = parser.parse(arguments).args
    if args.arch is None:
        for name, spec in MODEL_REGISTRY.items():
            print(f"{name:<14}{spec.source}")
        return
    try:
        print(table(args.arch, num_classes=args.num_classes, image_size=args.image_size))
    except ValueError as error:
        raise UserError(str(error)) from None


if __name__ == "__main__":
    run_command(main)
