"""The paper's update of the weights."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def sgd2012_update(
    parameters: list[tuple[Tensor, Tensor, Tensor, Tensor, float]],
    momentum: float,
    found_inf: Tensor | None,
) -> None:
    """The paper's update, in place. The learning rate sits inside the velocity:

        v <- momentum * v - weight_decay * lr * w - lr * gradient
        w <- w + v

    Source: Krizhevsky et al. 2012, section 5; weights.cu of the 2012 source.

    Args:
        parameters: of each w, the momentum buffer and the gradient, of one shape; lr, a scalar
            tensor, so that a captured CUDA graph obeys a changed one; and weight_decay. A buffer
            holds -v, as torch's SGD keeps it.
        found_inf: a gradient scaler's scalar; where it is not 0 nothing changes.
    """
    for w, buffer, gradient, lr, weight_decay in parameters:
        new_buffer = momentum * buffer + lr * (gradient + weight_decay * w)
        new_w = w - new_buffer
        if found_inf is not None:
            new_buffer = torch.where(found_inf == 0, new_buffer, buffer)
            new_w = torch.where(found_inf == 0, new_w, w)
        buffer.copy_(new_buffer)
        w.copy_(new_w)


class KrizhevskySGD(torch.optim.SGD):
    """The paper's update: ``sgd2012_update`` under torch.compile on GPUs, torch's fused kernel on
    CPUs.

    That kernel computes b <- momentum * b + (1 - dampening) * (g + weight_decay * w), then
    w <- w - lr * b: with an lr of 1 and a dampening of 1 - lr its b is -v.

    Args:
        fused: torch's fused kernel rather than ``sgd2012_update``; by default on CPUs.
    """

    def __init__(
        self, params: Any, lr: float, *, fused: bool | None = None, **options: Any
    ) -> None:
        super().__init__(params, lr=lr, fused=True, **options)
        everything = [p for group in self.param_groups for p in group["params"]]
        for parameter in everything:  # torch's first step would ignore the dampening
            self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        device = everything[0].device
        self._fused = device.type == "cpu" if fused is None else fused
        self._update = sgd2012_update
        if device.type == "cuda":
            self._update = torch.compile(sgd2012_update, dynamic=False)
        self._lrs = [everything[0].new_zeros(()) for _ in self.param_groups]
        self._synced_lrs = [0.0] * len(self._lrs)

    def sync_lr(self) -> None:
        """Write changed learning rates into the tensors that ``sgd2012_update`` reads: before a
        CUDA graph is captured, which must not contain it, and before each replay."""
        for at, group in enumerate(self.param_groups):
            if self._synced_lrs[at] != group["lr"]:
                self._lrs[at].fill_(group["lr"])  # does not wait for the device
                self._synced_lrs[at] = group["lr"]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        if not self._fused:
            self.sync_lr()
            parameters = [
                (w, self.state[w]["momentum_buffer"], w.grad, lr, group["weight_decay"])
                for group, lr in zip(self.param_groups, self._lrs, strict=True)
                for w in group["params"]
                if w.grad is not None
            ]
            # a gradient scaler has unscaled already, and sets found_inf
            self._update(parameters, self.defaults["momentum"], getattr(self, "found_inf", None))
            return None
        lrs = [group["lr"] for group in self.param_groups]
        for group, lr in zip(self.param_groups, lrs, strict=True):
            if group["momentum"]:  # without momentum torch ignores the dampening
                group["lr"], group["dampening"] = 1.0, 1.0 - lr
        try:
            return super().step(closure)
        finally:
            for group, lr in zip(self.param_groups, lrs, strict=True):
                group["lr"], group["dampening"] = lr, 0.0
