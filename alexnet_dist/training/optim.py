"""The optimizers, and the groups of parameters whose rates move together."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import nn

from alexnet_dist.errors import Failure


class PaperSGD(torch.optim.SGD):
    """The paper's update, in which the learning rate sits inside the velocity:

        v <- momentum * v - weight_decay * lr * w - lr * gradient
        w <- w + v

    A change of the rate leaves the old velocity as it is, where torch's SGD multiplies the whole
    velocity by the new rate. Source: Krizhevsky et al. 2012, section 5; weights.cu of the 2012
    source.

    torch's fused update computes b <- momentum * b + (1 - dampening) * (g + weight_decay * w),
    then w <- w - rate * b: with a rate of 1 and a dampening of 1 - lr its b is -v.
    """

    def __init__(self, params: Any, lr: float, momentum: float = 0.9, **options: Any) -> None:
        super().__init__(params, lr=lr, momentum=momentum, **options)
        for group in self.param_groups:
            for parameter in group["params"]:  # torch's first step would leave the rate out
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(
                    parameter, memory_format=torch.preserve_format
                )

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update all parameters by their gradients."""
        rates = [group["lr"] for group in self.param_groups]
        for group, rate in zip(self.param_groups, rates, strict=True):
            if group["momentum"]:  # without any, torch leaves the dampening out: plain descent
                group["lr"], group["dampening"] = 1.0, 1.0 - rate
        try:
            return super().step(closure)
        finally:
            for group, rate in zip(self.param_groups, rates, strict=True):
                group["lr"], group["dampening"] = rate, 0.0


def build_optimizer(
    name: Literal["paper", "sgd"],
    parameters: Mapping[str, nn.Parameter],
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    own: Iterable[str] = (),
) -> torch.optim.SGD:
    """An optimizer with groups named "weights", "biases" (without decay), and one for each
    parameter that is named in ``own``.

    Raises:
        Failure: there is no parameter of a name in ``own``.
    """
    own = set(own) - {"weights", "biases"}
    for name_of in sorted(own - set(parameters)):
        raise Failure(
            f"optim.schedule.table has a row {name_of}, and the network no such parameter: give "
            f"weights, biases, or one of {', '.join(parameters)}",
            everywhere=True,
        )
    groups: dict[str, dict[str, Any]] = {}
    for full_name, parameter in parameters.items():
        bias = full_name.endswith("bias")
        name_of = full_name if full_name in own else ("biases" if bias else "weights")
        decay = 0.0 if bias else weight_decay
        group = groups.setdefault(
            name_of, {"params": [], "name": name_of, "bias": bias, "weight_decay": decay}
        )
        group["params"].append(parameter)
    kind = PaperSGD if name == "paper" else torch.optim.SGD
    optimizer = kind(list(groups.values()), lr=lr, momentum=momentum, fused=True)
    velocities(optimizer, parameters)  # torch leaves them unwritten where fp16 skips the first step
    return optimizer


def velocities(
    optimizer: torch.optim.SGD, parameters: Mapping[str, nn.Parameter]
) -> dict[str, torch.Tensor]:
    """The optimizer's velocity of each parameter, by its name; made where there is none yet."""
    found = {}
    for name, parameter in parameters.items():
        state = optimizer.state[parameter]
        if state.get("momentum_buffer") is None:
            state["momentum_buffer"] = torch.zeros_like(
                parameter, memory_format=torch.preserve_format
            )
        found[name] = state["momentum_buffer"]
    return found
