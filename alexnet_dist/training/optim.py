"""The optimizers, and the parameter groups whose learning rates move together."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from alexnet_dist.errors import UserError

TensorDict = dict[str, Tensor]


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


class Lars(KrizhevskySGD):
    """The paper's update with a learning rate of its own for each weight tensor:

        local <- trust * |w| / (|gradient| + weight_decay * |w|)
        v <- momentum * v - lr * local * (gradient + weight_decay * w)
        w <- w + v

    Groups marked as "bias" have the plain rate, and so has a tensor of zeros, which could not
    leave them otherwise. Source: You, Gitman, Ginsburg 2017 (arXiv 1708.03888), algorithm 1.

    Args:
        params: groups whose parameters have names.
        all_reduce_norms: sums of squares of local shards, by parameter name -> those of full
            parameters.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        *,
        trust: float = 0.001,
        all_reduce_norms: Callable[[TensorDict], TensorDict] = dict,
        **options: Any,
    ) -> None:
        super().__init__(params, lr, **options)
        self.trust, self._all_reduce_norms = trust, all_reduce_norms

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
        if not weights:
            return
        squares = torch.stack([_sum_of_squares(tensor) for tensor in weights + gradients])
        pairs = squares.view(2, len(names)).unbind(1)
        sums = self._all_reduce_norms(dict(zip(names, pairs, strict=True)))
        local_lrs = []
        for name, decay in zip(names, decays, strict=True):
            w, gradient = sums[name].sqrt().unbind()
            denominator = gradient + decay * w
            local = self.trust * w / denominator
            local_lrs.append(torch.where((w > 0) & (denominator > 0), local, torch.ones_like(w)))
        torch._foreach_add_(gradients, torch._foreach_mul(weights, decays))
        torch._foreach_mul_(gradients, local_lrs)


def _sum_of_squares(tensor: Tensor) -> Tensor:
    """Row by row: one float32 sum, as CPUs compute it, is wrong by 0.2 % for a tensor like fc6's,
    and for the shards of it by another amount."""
    rows = torch.linalg.vector_norm(tensor, dim=tuple(range(1, tensor.dim())))
    return rows.square().sum()


def build_optimizer(
    name: Literal["sgd2012", "sgd", "lars"],
    parameters: Mapping[str, nn.Parameter],
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    separate_groups: Iterable[str] = (),
    trust: float = 0.001,
    all_reduce_norms: Callable[[TensorDict], TensorDict] = dict,
) -> torch.optim.SGD:
    """An optimizer of the trainable ``parameters``, with the groups "weights" and "biases" (all
    vectors, so a batch norm's scale too; without weight decay), and one group for each parameter
    named in ``separate_groups``.

    Args:
        trust, all_reduce_norms: those of Lars.

    Raises:
        UserError: ``separate_groups`` names a parameter that does not exist.
    """
    parameters = trainable(parameters)
    separate = set(separate_groups) - {"weights", "biases"}
    for unknown in sorted(separate - set(parameters)):
        raise UserError(
            f"optim gives a learning rate for {unknown}, and the network has no such parameter: "
            f"give weights, biases, or one of {', '.join(parameters)}",
            on_all_ranks=True,
        )
    groups: dict[str, dict[str, Any]] = {}
    for full_name, parameter in parameters.items():
        bias = parameter.dim() == 1
        group_name = full_name if full_name in separate else ("biases" if bias else "weights")
        decay = 0.0 if bias else weight_decay
        group = groups.setdefault(
            group_name, {"params": [], "name": group_name, "bias": bias, "weight_decay": decay}
        )
        group["params"].append((full_name, parameter))
    kind: Any = {
        "sgd2012": KrizhevskySGD,
        "sgd": partial(torch.optim.SGD, fused=True),
        "lars": partial(Lars, trust=trust, all_reduce_norms=all_reduce_norms),
    }[name]
    optimizer: torch.optim.SGD = kind(list(groups.values()), lr=lr, momentum=momentum)
    # torch's SGD leaves them uninitialized where fp16 skips the first step
    momentum_buffers(optimizer, parameters)
    return optimizer


def trainable(parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Those of the ``parameters`` that an optimizer updates; running averages are not."""
    return {name: p for name, p in parameters.items() if p.requires_grad}


def momentum_buffers(
    optimizer: torch.optim.SGD, parameters: Mapping[str, nn.Parameter]
) -> dict[str, torch.Tensor]:
    """The optimizer's momentum buffer of each trainable parameter, by name; created where there
    is none yet."""
    parameters = trainable(parameters)
    for parameter in parameters.values():
        state = optimizer.state[parameter]
        if state.get("momentum_buffer") is None:
            state["momentum_buffer"] = torch.zeros_like(parameter)
    return {name: optimizer.state[p]["momentum_buffer"] for name, p in parameters.items()}
