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
        self._seen = {
            name: (weight._version, self.copies[name]._version)
            for name, weight in model.named_parameters()
        }

    @torch.no_grad()
    def refresh(self) -> None:
        """Cast the weights, but for those whose copies were written with them since the last time.

        torch counts how often a tensor was written. Its fused updates do not tell, so that a weight
        that seems to be what it was is cast too.
        """
        for name, weight in self.model.named_parameters():
            copy, (weight_then, copy_then) = self.copies[name], self._seen[name]
            if not 0 < copy._version - copy_then == weight._version - weight_then:
                copy.copy_(weight)
            self._seen[name] = weight._version, copy._version

    def forward(self, images: Tensor, masks: Iterable[Tensor] = ()) -> Tensor:
        """After ``refresh``."""
        lowered = {
            name: _Copy.apply(weight, self.copies[name])
            for name, weight in self.model.named_parameters()
        }
        scores: Tensor = functional_call(self.model, lowered, (images, masks))
        return scores
