"""Which of several ways computes a layer: the same function by each, to rounding.

A way is chosen before a layout takes the network, and can be turned off, so that it can be
measured what it brings, and one that is in doubt is not in the way.
"""

from typing import Literal

from torch import nn

from alexnet_dist.model.lrn import LocalResponseNorm
from alexnet_dist.model.stem import PaddedConv2d, StemConv2d

Lrn = Literal["auto", "triton", "band", "torch"]
Stem = Literal["auto", "folded", "plain"]


def choose_kernels(model: nn.Module, *, lrn: Lrn, stem: Stem, pool_first: bool) -> None:
    """Have the layers of ``model`` computed so.

    Args:
        lrn: response normalisation by Triton's kernels where they can ("auto", "triton"), as a
            product with a band, or by torch's own function.
        stem: the first convolution folded, stride by stride pixels into channels, or not; "auto"
            where that is known to be faster.
        pool_first: ReLU behind the max pooling that follows it. They commute, and a quarter of the
            values are left.
    """
    for layer in model.modules():
        if isinstance(layer, LocalResponseNorm):
            layer.kernel = "triton" if lrn == "auto" else lrn
        elif isinstance(layer, (PaddedConv2d, StemConv2d)):
            layer.stem = stem
    if pool_first:
        for sequence in model.modules():
            if isinstance(sequence, nn.Sequential):
                _pool_first(sequence)


def _pool_first(layers: nn.Sequential) -> None:
    """Exchange each ReLU with the max pooling behind it, under the names they have."""
    order = list(layers.named_children())
    for at in range(len(order) - 1):
        if isinstance(order[at][1], nn.ReLU) and isinstance(order[at + 1][1], nn.MaxPool2d):
            order[at], order[at + 1] = order[at + 1], order[at]
    for name, _ in order:
        del layers._modules[name]
    layers._modules.update(order)
