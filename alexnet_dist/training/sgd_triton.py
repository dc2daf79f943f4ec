# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The paper's update on GPUs, by Triton: one launch for each group of parameters.

    b <- momentum * b + rate * (gradient + decay * w)        b = -v, as torch's SGD keeps it
    w <- w - b

Three reads and two writes, 20 bytes a parameter in fp32, which is what torch's fused SGD moves too;
22 where a copy of each weight in 16 bits is written as well, in place of the 6 that a cast takes
in the next step. The sum of all else is nothing beside memory: 61 million parameters move 1.2 GB.

The addresses of a group's tensors are arguments of the launch. A table of them on the device would
allow for one launch of all groups, but gradients lie elsewhere in each step, and the table would
have to be sent anew before the launch; as arguments they need no transfer, and a CUDA graph keeps
them. The rate alone comes from the device's memory, so that it can change between two replays.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from triton import language as tl

BLOCK = 1024  # parameters to a program: eight to a thread, two loads of 16 bytes from each tensor
WARPS = 4


@triton.jit
def _update(
    weights,
    momentum_buffers,
    gradients,
    copies,
    counts,
    rate_pointer,
    left_out_pointer,
    momentum,
    decay,
    tensors: tl.constexpr,
    moving: tl.constexpr,
    copying: tl.constexpr,
    block: tl.constexpr,
):
    program = tl.program_id(0)
    rate = tl.load(rate_pointer)
    if tl.load(left_out_pointer) != 0:
        return
    first = 0  # program of the tensor
    for i in tl.static_range(tensors):
        blocks = tl.cdiv(counts[i], block)
        if (program >= first) & (program < first + blocks):
            start = (program - first).to(tl.int64) * block
            at = tl.arange(0, block)
            there = at < counts[i] - start
            w = tl.load(weights[i] + start + at, mask=there, other=0.0)
            gradient = tl.load(gradients[i] + start + at, mask=there, other=0.0)
            b = rate * (gradient + decay * w)
            if moving:
                b += momentum * tl.load(momentum_buffers[i] + start + at, mask=there, other=0.0)
                tl.store(momentum_buffers[i] + start + at, b, mask=there)
            w -= b
            tl.store(weights[i] + start + at, w, mask=there)
            if copying:
                copy = w.to(copies[i].dtype.element_ty)
                tl.store(copies[i] + start + at, copy, mask=there)
        first += blocks


@torch.library.custom_op(
    "alexnet_dist::paper_update", mutates_args=("weights", "momentum_buffers", "copies")
)
def paper_update(
    weights: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    gradients: Sequence[Tensor],
    copies: Sequence[Tensor],
    rate: Tensor,
    left_out: Tensor,
    momentum: float,
    decay: float,
) -> None:
    """Update a group's parameters in place; without momentum the velocities are left alone.

    Args:
        weights, velocities, gradients: float32, the three of a parameter with the same strides and
            without gaps.
        copies: of each weight in 16 bits, or empty.
        rate: float32, one number.
        left_out: float32, one number; other than 0 where nothing is to change.
    """
    counts = tuple(weight.numel() for weight in weights)
    programs = sum(triton.cdiv(count, BLOCK) for count in counts)
    if programs:
        _update[(programs,)](
            tuple(weights),
            tuple(momentum_buffers),
            tuple(gradients),
            tuple(copies),
            counts,
            rate,
            left_out,
            momentum,
            decay,
            len(counts),
            momentum != 0,
            bool(copies),
            BLOCK,
            num_warps=WARPS,
        )


class Update:
    """The update of all groups of an optimizer that keeps velocities as PaperSGD does.

    Args:
        copies: of weights in 16 bits, by parameter, to be written too; of all parameters, or none.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, copies: Mapping[Tensor, Tensor] | None = None
    ) -> None:
        self._groups, self._state = optimizer.param_groups, optimizer.state
        self._copies = copies or {}
        device = self._groups[0]["params"][0].device
        # one tensor each, because addresses that 16 divides are loaded from otherwise
        self._rates = [torch.zeros((), device=device) for _ in self._groups]
        self._sent = [0.0] * len(self._groups)
        self._nothing = torch.zeros((), device=device)

    def send_rates(self) -> None:
        """Have the device know the groups' rates: a number travels as the argument of a launch,
        which waits for nothing, and not at all if it is the last one."""
        for at, group in enumerate(self._groups):
            if self._sent[at] != group["lr"]:
                self._rates[at].fill_(group["lr"])
                self._sent[at] = group["lr"]

    @torch.no_grad()
    def __call__(self, left_out: Tensor | None = None) -> None:
        """Update all parameters that have a gradient, unless ``left_out`` is other than 0."""
        self.send_rates()
        for group, rate in zip(self._groups, self._rates, strict=True):
            weights: list[Any] = [p for p in group["params"] if p.grad is not None]
            paper_update(
                weights,
                [self._state[w]["momentum_buffer"] for w in weights],
                [_like(w, w.grad) for w in weights],
                [self._copies[w] for w in weights] if self._copies else [],
                rate,
                self._nothing if left_out is None else left_out,
                group["momentum"],
                group["weight_decay"],
            )


def _like(weight: Tensor, gradient: Tensor) -> Tensor:
    """The gradient in the order in which the weight lies in memory, as autograd gives it."""
    if gradient.stride() == weight.stride():
        return gradient
    return torch.empty_like(weight).copy_(gradient)
