"""What local response normalization costs.

python -m benchmarks.lrn [--arch one_column] [--batch 512] [--out FILE.json]
Forward and backward of a network with LRN, without it, and with torch.nn.LocalResponseNorm, in
images per second. On a GPU with Triton also what stands behind the first two convolutions of
`paper` and `owt` (bias, ReLU, LRN, pooling) in bf16, by the fused kernels and layer by layer,
beside a copy of the convolution's output (4 bytes a value; fused: 2.75 forward, 4.75 backward).
"""

import argparse
import json
import platform
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.benchmark import Timer

from alexnet_dist.model import build_model
from alexnet_dist.model.alexnet import fused_block
from alexnet_dist.model.dropout import has_triton
from alexnet_dist.model.lrn import BETA, SIZE, LocalResponseNorm

RESULTS = Path(__file__).with_name("results")
BLOCKS = {  # channels, height and width, towers
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


def time_block(batch: int, channels: int, size: int, towers: int) -> dict[str, dict[str, float]]:
    """Milliseconds of a block by each implementation. Tensors should exceed the GPU's cache."""
    z = torch.randn(batch, channels, size, size, device="cuda", dtype=torch.bfloat16)
    z = z.to(memory_format=torch.channels_last).requires_grad_()
    bias = torch.zeros(channels, device="cuda", requires_grad=True)
    lrn = LocalResponseNorm(ALPHA, K, towers)
    constants = K, ALPHA / SIZE, towers, True

    def fused() -> Tensor:
        return fused_block.norm_pool(z, bias, *constants)[0]

    def by_layers() -> Tensor:
        a = (z + bias.to(z.dtype)[:, None, None]).relu()
        return F.max_pool2d(lrn(a), 3, 2, ceil_mode=True)

    out = fused()
    grad, other = torch.randn_like(out), torch.empty_like(z)
    copy = seconds(lambda: other.copy_(z.detach()))
    times = {"forward": {"copy": copy}, "backward": {"copy": copy}}
    for name, work in (("fused", fused), ("by_layers", by_layers)):
        y = work()
        times["forward"][name] = seconds(work)
        times["backward"][name] = seconds(
            partial(torch.autograd.grad, y, (z, bias), grad, retain_graph=True)
        )
    return {way: {n: round(1000 * t, 4) for n, t in each.items()} for way, each in times.items()}


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
    if has_triton(device):
        record["block_ms"] = {block: time_block(batch, *dims) for block, dims in BLOCKS.items()}
    print(json.dumps(record, indent=1))
    out = args.out or RESULTS / f"lrn-{name.lower().replace(' ', '-')}.json"
    out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
