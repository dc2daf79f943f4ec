"""Batch normalization whose running averages are parameters, and whose statistics may be those of
all processes."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class BatchNorm(nn.Module):
    """Batch normalization over every dimension but the features, in training by the statistics of
    the batch, in evaluation by running averages.

    Input and output: [B, features, ...], of one dtype; statistics are computed in float32 or wider.
    As torch.nn.BatchNorm2d, but ``running_mean`` and ``running_var`` are parameters without
    gradient, so that whoever initializes, saves, shards or loads parameters has them too.
    Source: Ioffe and Szegedy 2015.

    Args:
        features: number of features, C.
        eps: added to the variance.
        momentum: weight of the batch's statistics in the running averages.
        all_reduce: sums a tensor over all processes that hold a slice of the batch, with a
            gradient; None where this process has the full batch.
    """

    def __init__(
        self,
        features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        all_reduce: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.eps, self.momentum, self.all_reduce = eps, momentum, all_reduce
        self.weight = nn.Parameter(torch.empty(features))
        self.bias = nn.Parameter(torch.empty(features))
        self.running_mean = nn.Parameter(torch.empty(features), requires_grad=False)
        self.running_var = nn.Parameter(torch.empty(features), requires_grad=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Scale 1 and shift 0; running mean 0 and variance 1."""
        for parameter, value in zip(self.parameters(), (1, 0, 0, 1), strict=True):
            nn.init.constant_(parameter, value)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            averages = self.running_mean, self.running_var
            return F.batch_norm(x, *averages, self.weight, self.bias, eps=self.eps)
        if self.all_reduce is None:
            # with a momentum of 1 the kernel writes the batch's own statistics there
            mean, var = torch.zeros_like(self.running_mean), torch.zeros_like(self.running_var)
            y = F.batch_norm(x, mean, var, self.weight, self.bias, True, 1.0, self.eps)
        else:
            y, mean, var = self._sync_forward(x, self.all_reduce)
        self._update_running_stats(mean, var)
        return y

    def _sync_forward(
        self, x: Tensor, all_reduce: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The output [B, C, ...], and mean and unbiased variance [C] over all processes.

        Two sums, one after the other: squared differences from the global mean do not cancel, a sum
        is the same on every process whatever its slice is, and its gradient is a sum again. Merging
        local variances would take one sum, and a second formula backward.
        """
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        dims = [dim for dim in range(x.dim()) if dim != 1]
        shape = [-1 if dim == 1 else 1 for dim in range(x.dim())]
        images = wide.new_full((1,), len(x))  # not pixels: float32 counts up to 2**24 exactly
        sums, images = all_reduce(torch.cat([wide.sum(dims), images])).split([x.shape[1], 1])
        count = images.detach() * x.shape[2:].numel()
        mean = sums / count
        centered = wide - mean.view(shape)  # all that backward needs of the size of x
        squares = all_reduce(centered.square().sum(dims))
        scale = self.weight * (squares / count + self.eps).rsqrt()
        y = torch.addcmul(self.bias.view(shape), centered, scale.view(shape)).to(x.dtype)
        return y, mean.detach(), squares.detach() / (count - 1)

    @torch.no_grad()
    def _update_running_stats(self, mean: Tensor, var: Tensor) -> None:
        """Unless something in the batch is not finite: an update that is skipped then must leave
        no trace here either, and nobody waits for the device to report it."""
        finite = (mean.isfinite() & var.isfinite()).all()
        for average, of_batch in ((self.running_mean, mean), (self.running_var, var)):
            average.lerp_(torch.where(finite, of_batch, average), self.momentum)
