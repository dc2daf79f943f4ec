"""Local response normalization (LRN): across neighboring channels, and within a channel.

Both divide an activation by a power of the sum of squares around it:

    y = x * s ** -beta        s = k + alpha * mean of x ** 2 over the window

with a window of n channels (Krizhevsky et al. 2012, section 3.3) or n x n pixels (layer "cnorm2" of
layers-145.cfg). The mean counts what hangs over the edge as zeros, so alpha means what it means in
torch.nn.LocalResponseNorm; the paper's formula does not divide by n, so its alpha of 1e-4 at n = 5
is 5e-4 here.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SIZE, BETA = 5, 0.75
"""The n and the exponent of every network here."""

Mean = Callable[[Tensor], Tensor]
"""The mean of the window around each activation: [B, C, H, W] to [B, C, H, W]."""


class LocalResponseNorm(nn.Module):
    """Normalize each activation by its neighbors among the channels, within each group.

    The sum over the window of SIZE channels is a convolution. On NVIDIA GPUs one kernel computes it
    together with what is around it, see fused_block.py.

    Args:
        alpha, k: as in torch.nn.LocalResponseNorm (alpha is divided by SIZE).
        groups: slices of the channels that a window never leaves; the paper's towers.

    Input and output: [B, C, H, W], C a multiple of ``groups``; the output has the input's dtype.
    Source: Krizhevsky et al. 2012, section 3.3.
    """

    def __init__(self, alpha: float = 5e-4, k: float = 2.0, groups: int = 1) -> None:
        super().__init__()
        self.alpha, self.k, self.groups = alpha, k, groups
        self._windows: dict[tuple[int, torch.device, torch.dtype], Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        window = self._window_kernel(x)

        def mean(squares: Tensor) -> Tensor:
            return F.conv2d(squares, window, groups=self.groups).div_(SIZE)

        return _normalize(x, mean, self.k, self.alpha)

    def _window_kernel(self, x: Tensor) -> Tensor:
        """[C, C / groups, 1, 1]: a band of ones, the window as a 1 x 1 convolution. That is a
        matrix product, which processors are good at; five shifted sums are bound by memory."""
        channels = x.shape[1] // self.groups
        key = (channels, x.device, x.dtype)
        if key not in self._windows:
            index = torch.arange(channels, device=x.device)
            band = (index[:, None] - index[None, :]).abs() <= SIZE // 2
            self._windows[key] = band.to(x.dtype).repeat(self.groups, 1)[:, :, None, None]
        return self._windows[key]


class WithinChannelLRN(nn.Module):
    """Normalize each activation by the SIZE x SIZE pixels around it in its own channel.

    Input and output: [B, C, H, W]. Source: "cnorm2" in layers-145.cfg (type rnorm, scale 0.001
    divided by the size squared, power 0.75, minDiv 1); the paper does not mention it.
    """

    def __init__(self, alpha: float = 1e-3) -> None:
        super().__init__()
        self.alpha = alpha

    def forward(self, x: Tensor) -> Tensor:
        def mean(squares: Tensor) -> Tensor:
            return F.avg_pool2d(squares, SIZE, stride=1, padding=SIZE // 2)

        return _normalize(x, mean, 1.0, self.alpha)


class _ResponseNorm(torch.autograd.Function):
    """y = x * s ** -BETA for any window whose mean is a symmetric linear map.

    With a backward of its own, because autograd's keeps five tensors of the network's largest
    activations, and because a symmetric window serves forward and backward alike.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Mean, k: float, alpha: float) -> Tensor:
        s = mean(x * x).mul_(alpha).add_(k)
        root = s.rsqrt()
        factor = root * root.sqrt()  # two roots cost a tenth of a power
        ctx.save_for_backward(x, s, factor)
        ctx.mean, ctx.scale = mean, 2 * alpha * BETA
        return x * factor

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,) = grads
        x, s, factor = ctx.saved_tensors
        scaled = grad * factor
        return scaled - ctx.mean(scaled * x / s).mul_(ctx.scale).mul_(x), None, None, None


def _normalize(x: Tensor, mean: Mean, k: float, alpha: float) -> Tensor:
    """In the dtype of ``x``, which autocast would lower inside."""
    # only where it is on: an exported graph is to have no trace of autocast
    on = x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)
    with torch.autocast(x.device.type, enabled=False) if on else nullcontext():
        y: Tensor = _ResponseNorm.apply(x, mean, k, alpha)
    return y
