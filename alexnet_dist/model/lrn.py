"""Local response normalization across channels, and within a channel.

Both divide an activation by a power of the sum of squares around it:

    y = x * s ** -beta        s = k + alpha * mean of x ** 2 over the window

with the window n channels wide (Krizhevsky et al. 2012, section 3.3) or n by n pixels (layer
"cnorm2" of layers-145.cfg). The mean counts what hangs over the edge as zeros, so alpha means
what it means in torch.nn.LocalResponseNorm; the paper's formula does not divide by n, so its
alpha of 1e-4 at n = 5 is 5e-4 here.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

try:
    from alexnet_dist.model import lrn_triton
except ImportError:  # Triton is not to be had for every platform
    lrn_triton = None  # type: ignore[assignment]


class _ResponseNorm(torch.autograd.Function):
    """y = x * s ** -beta for any window whose mean is a symmetric linear map.

    A backward of its own, because autograd's keeps five tensors of the largest activations of the
    network, and because the window, being symmetric, serves forward and backward alike.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mean: Callable[[Tensor], Tensor], k: float, alpha: float, beta: float
    ) -> Tensor:
        s = mean(x * x).mul_(alpha).add_(k)
        if beta == 0.75:  # two roots cost a tenth of a power
            factor = s.rsqrt()
            factor = factor * factor.sqrt()
        else:
            factor = s.pow(-beta)
        ctx.save_for_backward(x, s, factor)
        ctx.mean, ctx.scale = mean, 2 * alpha * beta
        return x * factor

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,) = grads
        x, s, factor = ctx.saved_tensors
        scaled = grad * factor
        return scaled - ctx.mean(scaled * x / s).mul_(ctx.scale).mul_(x), None, None, None, None


def _normalise(
    x: Tensor, mean: Callable[[Tensor], Tensor], k: float, alpha: float, beta: float
) -> Tensor:
    """In the type of ``x``, which autocast would lower inside; meta tensors have no autocast, and
    an exported graph is to be plain."""
    plain = x.is_meta or torch.compiler.is_exporting()
    context = nullcontext() if plain else torch.autocast(x.device.type, enabled=False)
    with context:
        y: Tensor = _ResponseNorm.apply(x, mean, k, alpha, beta)
    return y


class LocalResponseNorm(nn.Module):
    """Normalise each activation by its neighbours among the kernels, within each group.

    Args:
        size: kernels in the window, n; odd.
        alpha, beta, k: as in torch.nn.LocalResponseNorm (alpha is divided by ``size``).
        groups: towers; a window never reaches across two of them.
        kernel: "triton": Triton's kernels compute it where they can, on a GPU from a channels-last
            tensor with the paper's size and beta, and elsewhere a product with a band does;
            "band": that everywhere; "torch": torch's own function.

    Input and output: [B, C, H, W], C a multiple of ``groups``; the output has the input's type.
    Source: Krizhevsky et al. 2012, section 3.3.
    """

    def __init__(
        self,
        size: int = 5,
        alpha: float = 1e-4,
        beta: float = 0.75,
        k: float = 2.0,
        groups: int = 1,
        kernel: Literal["triton", "band", "torch"] = "triton",
    ) -> None:
        super().__init__()
        if size % 2 == 0:
            raise ValueError(f"the window must be odd to have a middle, not {size}")
        self.size, self.alpha, self.beta, self.k, self.groups = size, alpha, beta, k, groups
        self.kernel = kernel
        self._bands: dict[tuple[int, torch.device, torch.dtype], Tensor] = {}

    def _band(self, x: Tensor) -> Tensor:
        """The window as the 0/1 band of a 1 x 1 convolution: a matrix product, which processors
        are good at, where five shifted sums are bound by memory."""
        channels = x.shape[1] // self.groups
        key = (channels, x.device, x.dtype)
        if key not in self._bands:
            place = torch.arange(channels, device=x.device)
            band = (place[:, None] - place[None, :]).abs() <= self.size // 2
            self._bands[key] = band.to(x.dtype).repeat(self.groups, 1)[:, :, None, None]
        return self._bands[key]

    def _suits_triton(self, x: Tensor) -> bool:
        return (
            self.kernel == "triton"
            and not torch.compiler.is_exporting()  # other programs have no such kernels
            and is_triton_supported(x.device)
            and (self.size, self.beta) == (5, 0.75)
            and lrn_triton.suits(x, self.groups)
        )

    def forward(self, x: Tensor) -> Tensor:
        if self._suits_triton(x):
            y: Tensor = lrn_triton.response_norm(x, self.k, self.alpha / self.size, self.groups)
            return y
        if self.kernel == "torch":
            return self._by_torch(x)
        band = self._band(x)

        def mean(squares: Tensor) -> Tensor:
            return F.conv2d(squares, band, groups=self.groups).div_(self.size)

        return _normalise(x, mean, self.k, self.alpha, self.beta)

    def _by_torch(self, x: Tensor) -> Tensor:
        numbers = self.size, self.alpha, self.beta, self.k
        towers = [F.local_response_norm(tower, *numbers) for tower in x.chunk(self.groups, 1)]
        return towers[0] if self.groups == 1 else torch.cat(towers, 1)

    def extra_repr(self) -> str:
        return (
            f"size={self.size}, alpha={self.alpha:g}, beta={self.beta:g}, k={self.k:g}, "
            f"groups={self.groups}"
        )


def is_triton_supported(device: torch.device) -> bool:
    """Whether Triton is installed, and compiles for ``device``: a GPU no older than Ampere."""
    return (
        lrn_triton is not None
        and device.type == "cuda"
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


class WithinChannelLRN(nn.Module):
    """Normalise each activation by the ``size`` x ``size`` pixels around it in its own map.

    Input and output: [B, C, H, W]. Source: "cnorm2" in layers-145.cfg (type rnorm, scale 0.001
    divided by the size squared, power 0.75, minDiv 1); the paper does not mention it.
    """

    def __init__(
        self, size: int = 5, alpha: float = 1e-3, beta: float = 0.75, k: float = 1.0
    ) -> None:
        super().__init__()
        if size % 2 == 0:
            raise ValueError(f"the window must be odd to have a middle, not {size}")
        self.size, self.alpha, self.beta, self.k = size, alpha, beta, k

    def forward(self, x: Tensor) -> Tensor:
        def mean(squares: Tensor) -> Tensor:
            return F.avg_pool2d(squares, self.size, stride=1, padding=self.size // 2)

        return _normalise(x, mean, self.k, self.alpha, self.beta)

    def extra_repr(self) -> str:
        return f"size={self.size}, alpha={self.alpha:g}, beta={self.beta:g}, k={self.k:g}"
