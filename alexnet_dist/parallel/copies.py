"""Copies of a network's weights in bf16, so that no step has to cast them.

Autocast reads each weight in fp32 and writes it in bf16, 6 bytes, in each step. Here the copy
stays, and whoever updates the weights writes it in the same pass (training/sgd_triton.py), for 2.
The gradient of a copy is its weight's, in fp32, so that all that waits for gradients of weights,
DDP among it, hears of them as before; and a checkpoint knows of no copy.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call


class _Copy(torch.autograd.Function):
    """``copy``, as if it were cast from ``weight`` here; autograd casts the gradient back."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, copy: Tensor) -> Tensor:
        return copy.view_as(copy)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], None


class WithCopies(nn.Module):
    """``model`` computed with copies of its parameters in bf16, to the same bits as under autocast.

    Attributes:
        copies: by the parameter's name, as it lies in memory.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.copies = {
            name: torch.empty_like(parameter, dtype=torch.bfloat16, requires_grad=False)
            for name, parameter in model.named_parameters()
        }
        self._apart: dict[str, int | None] = dict.fromkeys(self.copies)

    @torch.no_grad()
    def refresh(self) -> None:
        """Cast the weights that were written without their copies, as a checkpoint's are.

        torch counts how often a tensor was written: an update that writes both leaves the two
        counts as far apart as they were.
        """
        for name, weight in self.model.named_parameters():
            copy = self.copies[name]
            if weight._version - copy._version != self._apart[name]:
                copy.copy_(weight)
                self._apart[name] = weight._version - copy._version

    def forward(self, images: Tensor, masks: Iterable[Tensor] = ()) -> Tensor:
        """After ``refresh``."""
        lowered = {
            name: _Copy.apply(weight, self.copies[name])
            for name, weight in self.model.named_parameters()
        }
        scores: Tensor = functional_call(self.model, lowered, (images, masks))
        return scores
