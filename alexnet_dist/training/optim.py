"""The optimizers, and the groups of parameters whose rates move together."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from alexnet_dist.errors import UserError

try:
    from alexnet_dist.training import sgd_triton
except ImportError:  # Triton is not to be had for every platform
    sgd_triton = None  # type: ignore[assignment]

Sums = dict[str, Tensor]


class KrizhevskySGD(torch.optim.SGD):
    """The paper's update, in which the learning rate sits inside the velocity:

        v <- momentum * v - weight_decay * lr * w - lr * gradient
        w <- w + v

    A change of the rate leaves the old velocity as it is, where torch's SGD multiplies the whole
    velocity by the new rate. Source: Krizhevsky et al. 2012, section 5; weights.cu of the 2012
    source.

    torch's fused update computes b <- momentum * b + (1 - dampening) * (g + weight_decay * w),
    then w <- w - rate * b: with a rate of 1 and a dampening of 1 - lr its b is -v.

    Args:
        triton: compute it by the kernel of sgd_triton.py instead, to rounding the same.
        copies: of each parameter in 16 bits, which that kernel writes too; or none.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        momentum: float = 0.9,
        *,
        triton: bool = False,
        copies: Mapping[Tensor, Tensor] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(params, lr=lr, momentum=momentum, **options)
        for group in self.param_groups:
            for parameter in group["params"]:  # torch's first step would leave the rate out
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(
                    parameter, memory_format=torch.preserve_format
                )
        self.by_triton = sgd_triton.Update(self, copies) if triton else None

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update all parameters by their gradients."""
        if self.by_triton is not None:
            self.by_triton(getattr(self, "found_inf", None))  # a scaler's, which has unscaled
            return None
        rates = [group["lr"] for group in self.param_groups]
        for group, rate in zip(self.param_groups, rates, strict=True):
            if group["momentum"]:  # without any, torch leaves the dampening out: plain descent
                group["lr"], group["dampening"] = 1.0, 1.0 - rate
        try:
            return super().step(closure)
        finally:
            for group, rate in zip(self.param_groups, rates, strict=True):
                group["lr"], group["dampening"] = rate, 0.0


class Lars(KrizhevskySGD):
    """The paper's update with a rate of its own for each weight tensor:

        local <- trust * |w| / (|gradient| + weight_decay * |w|)
        v <- momentum * v - lr * local * (gradient + weight_decay * w)
        w <- w + v

    Groups marked as "bias" have the plain rate, and so has a tensor of zeros, which could not
    leave them otherwise. Source: You, Gitman, Ginsburg 2017 (arXiv 1708.03888), algorithm 1.

    Args:
        params: groups whose parameters have names.
        whole: makes of sums over a process's parts of tensors, by name, those over whole tensors.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        momentum: float = 0.9,
        *,
        trust: float = 0.001,
        whole: Callable[[Sums], Sums] = dict,
        **options: Any,
    ) -> None:
        super().__init__(params, lr, momentum, **options)
        self.trust, self._whole = trust, whole

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update all parameters by their gradients, which are another's afterwards."""
        adapted = [group for group in self.param_groups if not group["bias"]]
        decays = [group["weight_decay"] for group in adapted]
        self._adapt(adapted)
        for group in adapted:
            group["weight_decay"] = 0.0  # it is in the gradients
        try:
            return super().step(closure)
        finally:
            for group, decay in zip(adapted, decays, strict=True):
                group["weight_decay"] = decay

    @torch.no_grad()
    def _adapt(self, groups: list[dict[str, Any]]) -> None:
        """Make of each gradient local * (gradient + weight_decay * w), without waiting for the
        device to tell the norms."""
        names = [name for group in groups for name in group["param_names"]]
        weights: list[Tensor] = [p for group in groups for p in group["params"]]
        gradients = [w.grad for w in weights if w.grad is not None]
        decays = [group["weight_decay"] for group in groups for _ in group["params"]]
        if not weights:
            return
        squares = torch.stack([_square(tensor) for tensor in weights + gradients])
        pairs = squares.view(2, len(names)).unbind(1)
        sums = self._whole(dict(zip(names, pairs, strict=True)))
        rates = []
        for name, decay in zip(names, decays, strict=True):
            w, gradient = sums[name].sqrt().unbind()
            below = gradient + decay * w
            local = self.trust * w / below
            rates.append(torch.where((w > 0) & (below > 0), local, torch.ones_like(w)))
        torch._foreach_add_(gradients, torch._foreach_mul(weights, decays))
        torch._foreach_mul_(gradients, rates)


def _square(tensor: Tensor) -> Tensor:
    """The sum of the squares, row by row: float32 in one go, as CPUs have it, is wrong by 0.2 % for
    a tensor like fc6's, and for the parts that a layout makes of it by another amount."""
    rows = torch.linalg.vector_norm(tensor, dim=tuple(range(1, tensor.dim())))
    return rows.square().sum()


def build_optimizer(
    name: Literal["sgd2012", "sgd", "lars"],
    parameters: Mapping[str, nn.Parameter],
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    own: Iterable[str] = (),
    trust: float = 0.001,
    whole: Callable[[Sums], Sums] = dict,
    triton: bool = False,
    copies: Mapping[str, Tensor] | None = None,
    fused: bool = True,
) -> torch.optim.SGD:
    """An optimizer of the ``parameters`` that want a gradient, with groups named "weights",
    "biases" (all vectors, so a batch normalisation's scale too; without decay), and one for each
    parameter that is named in ``own``.

    Args:
        trust, whole: those of Lars.
        triton, copies: those of PaperSGD, by name; torch's SGD has neither.
        fused: whether torch's own update is one kernel, or one operation after another.

    Raises:
        Failure: there is no parameter of a name in ``own``.
    """
    parameters = learned(parameters)
    own = set(own) - {"weights", "biases"}
    for name_of in sorted(own - set(parameters)):
        raise UserError(
            f"optim names a rate for {name_of}, and the network has no such parameter: give "
            f"weights, biases, or one of {', '.join(parameters)}",
            on_all_ranks=True,
        )
    groups: dict[str, dict[str, Any]] = {}
    for full_name, parameter in parameters.items():
        bias = parameter.dim() == 1
        name_of = full_name if full_name in own else ("biases" if bias else "weights")
        decay = 0.0 if bias else weight_decay
        group = groups.setdefault(
            name_of, {"params": [], "name": name_of, "bias": bias, "weight_decay": decay}
        )
        group["params"].append((full_name, parameter))
    of_each: dict[Tensor, Tensor] = {
        parameters[name_of]: copy for name_of, copy in (copies or {}).items()
    }
    kind: Any = torch.optim.SGD
    if name == "sgd2012":
        kind = partial(KrizhevskySGD, triton=triton, copies=of_each)
    elif name == "lars":
        kind = partial(Lars, trust=trust, whole=whole, triton=triton, copies=of_each)
    optimizer: torch.optim.SGD = kind(list(groups.values()), lr=lr, momentum=momentum, fused=fused)
    momentum_buffers(
        optimizer, parameters
    )  # torch leaves them unwritten where fp16 skips the first step
    return optimizer


def learned(parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Those of the ``parameters`` that an optimizer moves, and running averages are not."""
    return {name: p for name, p in parameters.items() if p.requires_grad}


def momentum_buffers(
    optimizer: torch.optim.SGD, parameters: Mapping[str, nn.Parameter]
) -> dict[str, torch.Tensor]:
    """The optimizer's velocity of each parameter that it moves, by its name; made where there is
    none yet."""
    found = {}
    for name, parameter in learned(parameters).items():
        state = optimizer.state[parameter]
        if state.get("momentum_buffer") is None:
            state["momentum_buffer"] = torch.zeros_like(
                parameter, memory_format=torch.preserve_format
            )
        found[name] = state["momentum_buffer"]
    return found
