"""Dropout whose masks depend on the step and the image, not on who computes them.

A mask is a function of (seed, step, layer, position in the global batch, unit). Whoever computes a
part of the batch draws the mask of all of it and takes the rows wanted, so that the same units are
dropped however it is divided, and a resumed run needs no generator's state.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

DropoutScaling = Literal["2012", "inverted"]


class Dropout(nn.Module):
    """Dropout of ``units`` outputs with probability ``p``.

    The form of 2012 (Krizhevsky et al., section 4.2) multiplies by a 0/1 mask in training and by
    1 - p in evaluation; torch's divides by 1 - p in training instead. The same family of
    functions, but the layers behind see twice the activations of each other, so a learning rate
    that suits one is wrong for the other.
    """

    def __init__(self, units: int, p: float = 0.5, scaling: DropoutScaling = "2012") -> None:
        super().__init__()
        self.units, self.p, self.scaling = units, p, scaling

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """``x`` and ``mask`` are [B, units], ``mask`` bool, True where a unit stays. In training
        without a mask one is drawn from torch's global generator."""
        if self.p == 0:
            return x
        if not self.training:
            return x * (1 - self.p) if self.scaling == "2012" else x
        if mask is None:
            mask = torch.rand(x.shape, device=x.device) >= self.p
        return x * mask if self.scaling == "2012" else x * mask / (1 - self.p)

    def extra_repr(self) -> str:
        return f"p={self.p}, scaling={self.scaling}"


def make_dropout_masks(
    layers: Sequence[Dropout],
    *,
    seed: int,
    step: int,
    batch: int,
    rows: slice,
    device: torch.device,
) -> tuple[Tensor, ...]:
    """The masks of one step, one for each layer in order: bool, [rows, units].

    Args:
        batch: images in the global batch.
        rows: the positions of it that are wanted.
    """
    masks = []
    for number, layer in enumerate(layers):
        if layer.p == 0:
            continue
        key = int(np.random.SeedSequence((seed, step, number)).generate_state(1, np.uint64)[0])
        generator = torch.Generator(device).manual_seed(key >> 1)
        draw = torch.rand(batch, layer.units, generator=generator, device=device)
        masks.append(draw[rows] >= layer.p)
    return tuple(masks)
