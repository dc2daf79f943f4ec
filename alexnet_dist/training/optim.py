"""The optimizers by name, and the parameter groups whose learning rates move together."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from alexnet_dist.errors import UserError
from alexnet_dist.training.lars import Lars, TensorDict
from alexnet_dist.training.sgd2012 import KrizhevskySGD


def build_optimizer(
    name: Literal["sgd2012", "sgd", "lars"],
    parameters: Mapping[str, nn.Parameter],
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    separate_groups: Iterable[str] = (),
    all_reduce_norms: Callable[[TensorDict], TensorDict] = dict,
) -> torch.optim.SGD:
    """An optimizer of the trainable ``parameters``, with the groups "weights" and "biases" (all
    vectors, so a batch norm's scale too; without weight decay), and one group for each parameter
    named in ``separate_groups``.

    Args:
        all_reduce_norms: that of Lars.

    Raises:
        UserError: ``separate_groups`` names a parameter that does not exist.
    """
    parameters = {name: p for name, p in parameters.items() if p.requires_grad}
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
        options = {"name": group_name, "bias": bias, "weight_decay": decay}
        group = groups.setdefault(group_name, options | {"params": []})
        group["params"].append((full_name, parameter))
    kind: Any = {
        "sgd2012": KrizhevskySGD,
        "sgd": partial(torch.optim.SGD, fused=True),
        "lars": partial(Lars, all_reduce_norms=all_reduce_norms),
    }[name]
    optimizer: torch.optim.SGD = kind(list(groups.values()), lr=lr, momentum=momentum)
    if name == "sgd":  # torch's may leave them uninitialized in fp16
        for parameter in parameters.values():
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def momentum_buffers(
    optimizer: torch.optim.SGD, parameters: Mapping[str, nn.Parameter]
) -> dict[str, torch.Tensor]:
    """The optimizer's momentum buffer of each parameter that it updates, by name; running averages
    have none."""
    updated = {name: p for name, p in parameters.items() if p.requires_grad}
    return {name: optimizer.state[p]["momentum_buffer"] for name, p in updated.items()}
