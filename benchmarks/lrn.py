"""What local response normalization costs.

python -m benchmarks.lrn [--arch one_column] [--batch 512] [--out FILE.json]
Forward and backward of a network with LRN, without it, and with torch.nn.LocalResponseNorm, in
images per second. On a GPU that Triton supports also the two LRN layers of `paper` and `owt` in
bf16, by Triton and by convolution, beside torch kernels that move the same bytes (forward a copy,
backward a sum of two). The goal is 0.8 in both: of the speed without LRN, and of those kernels'.
"""

import argparse
import json
import platform
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from alexnet_dist.model import build_model
from alexnet_dist.model.lrn import BETA, SIZE, LocalResponseNorm, is_triton_supported, lrn_triton

RESULTS = Path(__file__).with_name("results")
LAYERS = {  # channels, height and width, towers
    "paper lrn1": (96, 55, 2),
    "paper lrn2": (256, 27, 2),
    "owt lrn1": (64, 55, 1),
    "owt lrn2": (192, 27, 1),
}
K, ALPHA = 2.0, 5e-4


def seconds(work: Callable[[], object]) -> float:
    """Of one call, on the device: the median of a second's."""
    timer = Timer("work()", globals={"work": work}, num_threads=torch.get_num_threads())
    return float(timer.blocked_autorange(min_run_time=1).median)


def time_network(arch: str, batch: int, device: torch.device) -> dict[str, float]:
    """Images per second, forward and backward, in bf16 on GPUs and fp32 on CPUs."""
    images = torch.randn(batch, 3, 227, 227, device=device).mul_(50)
    images = images.to(memory_format=torch.channels_last)
    speed = {}
    for name in ("with_lrn", "without_lrn", "torch_lrn"):
        model = build_model(arch, image_size=227).to(device).to(memory_format=torch.channels_last)
        for at, layer in model.named_children():
            if not isinstance(layer, LocalResponseNorm) or name == "with_lrn":
                continue
            theirs = nn.LocalResponseNorm(SIZE, layer.alpha, BETA, layer.k)
            setattr(model, at, theirs if name == "torch_lrn" else nn.Identity())

        def step(model: nn.Module = model) -> None:
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss = model(images).float().square().mean()
            loss.backward()

        speed[name] = round(batch / seconds(step), 1)
    return speed


def time_layer(batch: int, channels: int, size: int, towers: int) -> dict[str, dict[str, float]]:
    """Milliseconds of one layer by each implementation. Tensors should exceed the GPU's cache."""
    x = torch.randn(batch, channels, size, size, device="cuda", dtype=torch.bfloat16)
    x = x.to(memory_format=torch.channels_last)
    grad, other, leaf = torch.randn_like(x), torch.empty_like(x), x.clone().requires_grad_()
    layer = LocalResponseNorm(ALPHA, K, towers)
    y = layer.forward_conv(leaf)
    constants = K, ALPHA / SIZE, towers

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, leaf, grad, retain_graph=True)

    works: dict[str, dict[str, Callable[[], object]]] = {
        "forward": {
            "same_bytes": lambda: other.copy_(x),
            "triton": lambda: lrn_triton.lrn(x, *constants),
            "convolution": lambda: layer.forward_conv(x),
        },
        "backward": {
            "same_bytes": lambda: torch.add(x, grad, out=other),
            "triton": lambda: lrn_triton.lrn_backward(x, grad, *constants),
            "convolution": backward,
        },
    }
    return {
        direction: {name: round(1000 * seconds(work), 4) for name, work in each.items()}
        for direction, each in works.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="one_column", help="a network of one tower")
    parser.add_argument("--batch", type=int, help="images; 512 on a GPU, else 64")
    parser.add_argument("--out", type=Path, help="where the JSON goes; benchmarks/results/ without")
    args = parser.parse_args()
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", 0) if gpu else torch.device("cpu")
    batch = args.batch or (512 if gpu else 64)
    name = torch.cuda.get_device_name() if gpu else "cpu"
    speed = time_network(args.arch, batch, device)
    record = {
        "machine": f"{name}, {platform.machine()}, torch {torch.__version__}",
        "arch": args.arch,
        "batch": batch,
        "images_per_second": speed,
        "of_without_lrn": {
            way: round(value / speed["without_lrn"], 3) for way, value in speed.items()
        },
    }
    if is_triton_supported(device):
        record["layer_ms"] = {layer: time_layer(batch, *dims) for layer, dims in LAYERS.items()}
    print(json.dumps(record, indent=1))
    out = args.out or RESULTS / f"lrn-{name.lower().replace(' ', '-')}.json"
    out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
