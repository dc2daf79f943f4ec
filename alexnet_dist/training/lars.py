"""The paper's update with a learning rate for each layer."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from alexnet_dist.training.sgd2012 import KrizhevskySGD

TensorDict = dict[str, Tensor]


class Lars(KrizhevskySGD):
    """The paper's update with a learning rate of its own for each weight tensor:

        local <- 0.001 * |w| / (|gradient| + weight_decay * |w|)
        v <- momentum * v - lr * local * (gradient + weight_decay * w)
        w <- w + v

    Groups marked as "bias" have the plain rate, and so has a tensor of zeros, which could not
    leave them otherwise. Source: You, Gitman, Ginsburg 2017 (arXiv 1708.03888), algorithm 1.

    Args:
        params: groups whose parameters have names.
        all_reduce_norms: sums of squares of local shards, by parameter name -> those of full
            parameters.
    """

    trust_coefficient = 0.001

    def __init__(
        self,
        params: Any,
        lr: float,
        *,
        all_reduce_norms: Callable[[TensorDict], TensorDict] = dict,
        **options: Any,
    ) -> None:
        super().__init__(params, lr, **options)
        self._all_reduce_norms = all_reduce_norms

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update all parameters by their gradients, which are overwritten."""
        adapted = [group for group in self.param_groups if not group["bias"]]
        decays = [group["weight_decay"] for group in adapted]
        self._adapt(adapted)
        for group in adapted:
            group["weight_decay"] = 0.0  # it is in the gradients now
        result = super().step(closure)
        for group, decay in zip(adapted, decays, strict=True):
            group["weight_decay"] = decay
        return result

    @torch.no_grad()
    def _adapt(self, groups: list[dict[str, Any]]) -> None:
        """Turn each gradient into local * (gradient + weight_decay * w), without waiting for the
        device to compute the norms."""
        names = [name for group in groups for name in group["param_names"]]
        weights: list[Tensor] = [p for group in groups for p in group["params"]]
        gradients = [w.grad for w in weights if w.grad is not None]
        decays = [group["weight_decay"] for group in groups for _ in group["params"]]
        squares = torch.stack([_sum_of_squares(tensor) for tensor in weights + gradients])
        pairs = squares.view(2, len(names)).unbind(1)
        sums = self._all_reduce_norms(dict(zip(names, pairs, strict=True)))
        local_lrs = []
        for name, decay in zip(names, decays, strict=True):
            w, gradient = sums[name].sqrt().unbind()
            denominator = gradient + decay * w
            local = self.trust_coefficient * w / denominator
            local_lrs.append(torch.where((w > 0) & (denominator > 0), local, torch.ones_like(w)))
        torch._foreach_add_(gradients, torch._foreach_mul(weights, decays))
        torch._foreach_mul_(gradients, local_lrs)


def _sum_of_squares(tensor: Tensor) -> Tensor:
    """Row by row: one float32 sum, as CPUs compute it, is wrong by 0.2 % for a tensor like fc6's,
    and for the shards of it by another amount."""
    return torch.linalg.vector_norm(tensor, dim=tuple(range(1, tensor.dim()))).square().sum()
