"""Dropout whose masks depend on the step and the image, not on who computes them.

A mask is a hash of (seed, step, layer, position in the global batch, unit). So the same units are
dropped on every device and however the batch is divided, a process computes the masks of its own
slice only, and a resumed run needs no RNG state.
"""

from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

DropoutScaling = Literal["2012", "inverted"]


class Dropout(nn.Module):
    """Dropout of activations [B, units] with probability ``p``.

    Scaling "2012" (Krizhevsky et al., section 4.2) multiplies by a 0/1 mask in training and by
    1 - p in evaluation; "inverted", torch's, divides by 1 - p in training instead. Both are the
    same family of functions, but the layers behind see activations that differ by 1 - p, so a
    learning rate that suits one is wrong for the other.

    Args:
        first_unit: index of the first of ``units`` in the full layer, where this is a shard of it.
    """

    def __init__(
        self, units: int, p: float = 0.5, scaling: DropoutScaling = "2012", first_unit: int = 0
    ) -> None:
        super().__init__()
        self.units, self.p, self.scaling, self.first_unit = units, p, scaling, first_unit

    def shard(self, units: slice) -> "Dropout":
        """The same for some units of the layer."""
        return Dropout(units.stop - units.start, self.p, self.scaling, units.start)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """``x`` and ``mask`` are [B, units], ``mask`` bool, True where a unit is kept. In training
        without a mask one is sampled from torch's global generator."""
        if self.p == 0:
            return x
        if not self.training:
            return x * (1 - self.p) if self.scaling == "2012" else x
        if mask is None:
            mask = torch.rand(x.shape, device=x.device) >= self.p
        return x * mask if self.scaling == "2012" else x * mask / (1 - self.p)


_TRITON_INSTALLED = find_spec("triton") is not None


def has_triton(device: torch.device) -> bool:
    """Whether Triton is installed and compiles for ``device``: an NVIDIA GPU, Ampere or newer."""
    on_gpu = _TRITON_INSTALLED and device.type == "cuda"
    return on_gpu and torch.cuda.get_device_capability(device) >= (8, 0)


def dropout_layers(model: nn.Module) -> list[Dropout]:
    """The dropout layers of ``model``, in the order of their masks."""
    return [layer for layer in model.modules() if isinstance(layer, Dropout)]


def make_dropout_masks(
    layers: Sequence[Dropout],
    *,
    seed: int,
    step: int,
    batch: int,
    rows: slice,
    device: torch.device,
) -> tuple[Tensor, ...]:
    """The masks of one step, one for each layer with dropout, in order: bool [rows, units].

    Args:
        batch: images in the global batch.
        rows: the positions in it whose masks are computed.
    """
    start, stop, stride = rows.indices(batch)
    masks = []
    for index, layer in enumerate(layers):
        if layer.p == 0:
            continue
        state = np.random.SeedSequence((seed, step, index)).generate_state(2)
        keys = torch.from_numpy(state.view(np.int32))
        compute = _kept
        if device.type == "cuda":  # no copy from pageable memory, for which the host would wait
            keys = keys.pin_memory().to(device, non_blocking=True)
            if has_triton(device):  # one kernel, where torch would launch forty
                compute = _compiled_kept()
        units = layer.first_unit, layer.first_unit + layer.units
        masks.append(compute(keys, (start, stop, stride), units, layer.p))
    return tuple(masks)


def _kept(keys: Tensor, images: tuple[int, int, int], units: tuple[int, int], p: float) -> Tensor:
    """A mask, bool [images, units], of one layer.

    Args:
        keys: int32 [2], random bits of the step and the layer.
        images, units: ranges.
    """
    unit_key, image_key = keys
    image_index = torch.arange(*images, dtype=torch.int32, device=keys.device)
    unit_index = torch.arange(*units, dtype=torch.int32, device=keys.device)
    image_bits, unit_bits = _hash(image_index ^ image_key), _hash(unit_index ^ unit_key)
    # uniform in [-2**31, 2**31)
    return _hash(image_bits[:, None] ^ unit_bits) >= round(p * 2**32) - 2**31


@cache
def _compiled_kept() -> Callable[..., Tensor]:
    return torch.compile(_kept, dynamic=False)  # imports the compiler: a second


def _hash(bits: Tensor) -> Tensor:
    """A bijection of int32 that flips each bit with probability 1/2 where any bit of ``bits``
    flips: lowbias32 (Wellons 2018), in place."""
    bits ^= (bits >> 16) & 0xFFFF  # the mask clears the copies of the sign, as uint32 would
    bits *= 0x7FEB352D
    bits ^= (bits >> 15) & 0x1FFFF
    bits *= 0x846CA68B - 2**32
    bits ^= (bits >> 16) & 0xFFFF
    return bits
