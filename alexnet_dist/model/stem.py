"""The first convolution: the zeros that it reads past the edge, and how processors like it best."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class PaddedConv2d(nn.Conv2d):
    """torchvision's first convolution, padded on every side, computed as ``stem_convolution``."""

    stem: Literal["auto", "folded", "plain"] = "auto"

    def forward(self, input: Tensor) -> Tensor:
        side = int(self.padding[0])
        return stem_convolution(input, self, (side, side, side, side), self.stem)


class StemConv2d(nn.Conv2d):
    """A convolution whose last position may hang over the right and the bottom edge.

    The authors' program places 1 + ceil((side - kernel) / stride) kernels along a side, 55 for 224
    pixels, the last of which reads zeros beyond the image (layer.py of the 2012 source). So zeros
    are added on the right and at the bottom until the stride divides: three for 224, none for 227.
    """

    stem: Literal["auto", "folded", "plain"] = "auto"

    def forward(self, input: Tensor) -> Tensor:
        height, width = input.shape[-2:]
        kernel, stride = self.kernel_size[0], self.stride[0]
        zeros = (0, (kernel - width) % stride, 0, (kernel - height) % stride)
        return stem_convolution(input, self, zeros, self.stem)


def stem_convolution(
    x: Tensor,
    conv: nn.Conv2d,
    zeros: tuple[int, int, int, int],
    stem: Literal["auto", "folded", "plain"] = "auto",
) -> Tensor:
    """``conv`` on ``x`` [B, 3, H, W] behind ``zeros`` (left, right, top, bottom).

    Folded, stride by stride pixels of the image go into channels, and the kernel's with them: 11 x
    11 by 4 on 3 channels is 3 x 3 by 1 on 48. The same sums, whose gradient takes a third of the
    time in bf16 on a CPU, because matrix units want more than 3 channels: there "auto" folds.
    """
    lowered = torch.is_autocast_enabled(x.device.type) if not x.is_meta else False
    if stem == "plain" or (stem == "auto" and not (lowered and x.device.type == "cpu")):
        padded = F.pad(x, zeros) if any(zeros) else x
        return F.conv2d(padded, conv.weight, conv.bias, conv.stride)
    left, right, top, bottom = zeros
    fold, kernel = conv.stride[0], conv.kernel_size[0]
    more = -kernel % fold  # zeros that fill the kernel up to whole folds, and the image with it
    dtype = torch.get_autocast_dtype(x.device.type) if lowered else x.dtype
    padded = F.pad(x.to(dtype), (left, right + more, top, bottom + more))
    weight = F.pad(conv.weight, (0, more, 0, more))
    return F.conv2d(_folded(padded, fold), _folded(weight, fold), conv.bias)


def _folded(x: Tensor, fold: int) -> Tensor:
    """[B, C, H, W] as [B, fold * fold * C, H / fold, W / fold], channels last; what is left of a
    side that ``fold`` does not divide, no kernel reaches."""
    batch, channels, height, width = x.shape
    rows, columns = height // fold, width // fold
    x = x[..., : rows * fold, : columns * fold].permute(0, 2, 3, 1)
    x = x.reshape(batch, rows, fold, columns, fold, channels).transpose(2, 3)
    return x.reshape(batch, rows, columns, fold * fold * channels).permute(0, 3, 1, 2)
