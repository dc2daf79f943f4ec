"""The transfers that layouts are made of, so that each says what it sends in one line."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from alexnet_dist.parallel.waits import WAITS

# torch 2.14 gave both other names, and warns of the old ones
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class AsyncAllGather:
    """``x`` of every process on its way to all; it has the same shape on each."""

    def __init__(self, x: Tensor, group: dist.ProcessGroup) -> None:
        self._sent = x.contiguous().view(-1)  # lives until it has gone
        self._shape = (group.size(), *x.shape)
        self._everyone = x.new_empty(group.size() * x.numel())
        self._work = _all_gather(self._everyone, self._sent, group=group, async_op=True)

    def output(self) -> Tensor:
        """[processes, *x.shape], which holds what it should once ``wait`` has returned."""
        return self._everyone.view(self._shape)

    def wait(self) -> Tensor:
        WAITS.begin(self._sent.device)
        self._work.wait()
        WAITS.end()
        return self.output()


class AsyncReduceScatter:
    """Parts of sums on their way: block r of ``x`` [processes, ...] goes to process r.

    A reduce-scatter made of an all-to-all and a sum in float32 (or more): the same bytes, one
    rounding, and the same order of adding on every backend.
    """

    def __init__(self, x: Tensor, group: dist.ProcessGroup) -> None:
        self._sent = x.contiguous()
        self._received = torch.empty_like(self._sent)
        self._work: Any = dist.all_to_all_single(
            self._received, self._sent, group=group, async_op=True
        )

    def wait(self) -> Tensor:
        WAITS.begin(self._sent.device)
        self._work.wait()
        WAITS.end()
        return upcast_to_fp32(self._received).sum(0)


def all_gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """``x`` of every process, [processes, *x.shape]."""
    return AsyncAllGather(x, group).wait()


@torch.compiler.disable  # type: ignore[untyped-decorator]
def all_reduce_autograd(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """``x`` summed over the processes, the same bits on each; its gradient is summed as well."""
    total: Tensor = _Sum.apply(x, group)
    return total


class _Sum(torch.autograd.Function):
    """What every process reads of a sum, its loss depends on: so backward is a sum again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        return _all_reduced(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _all_reduced(grads[0], ctx.group), None


def _all_reduced(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    total = x.clone()
    WAITS.begin(x.device)
    dist.all_reduce(total, group=group)
    WAITS.end()
    return total


def upcast_to_fp32(x: Tensor) -> Tensor:
    """float32, unless it is more already."""
    return x if x.dtype == torch.float64 else x.float()
