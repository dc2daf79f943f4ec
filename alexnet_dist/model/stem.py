"""The first convolution: the zeros that it reads past the edge, and how CPUs compute it fastest."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from alexnet_dist.model.backends import autocast_enabled


class StemConv2d(nn.Conv2d):
    """A convolution of images, [B, 3, H, W] to [B, out_channels, H', W'], whose last position may
    hang over the right and the bottom edge.

    The authors' program puts 1 + ceil((size - kernel) / stride) positions along a side, 55 for 224
    pixels, the last of which reads zeros beyond the image (layer.py of the 2012 source). So zeros
    are added on the right and at the bottom until the stride divides: three for 224, none for 227.

    In bf16 on CPUs blocks of stride x stride pixels become channels first, the kernel's too: 11 x
    11 at stride 4 on 3 channels is 3 x 3 at stride 1 on 48. The gradient of that same sum takes a
    third of the time, because matrix units want more than 3 channels.

    Args:
        ceil_mode: as above; False for torch's own positions.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int,
        padding: int = 0,
        bias: bool = True,
        ceil_mode: bool = True,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, bias=bias)
        self.ceil_mode = ceil_mode

    def forward(self, input: Tensor) -> Tensor:
        padding = int(self.padding[0])
        height, width = (size + 2 * padding for size in input.shape[-2:])
        right, bottom = padding + self._overhang(width), padding + self._overhang(height)
        zeros = padding, right, padding, bottom
        if input.device.type == "cpu" and autocast_enabled(input.device):
            return self._by_blocks(input.to(torch.get_autocast_dtype("cpu")), zeros)
        padded = F.pad(input, zeros) if any(zeros) else input
        return F.conv2d(padded, self.weight, self.bias, self.stride)

    def _overhang(self, size: int) -> int:
        """Zeros behind ``size`` pixels, so that a last kernel fits in."""
        return (self.kernel_size[0] - size) % self.stride[0] if self.ceil_mode else 0

    def _by_blocks(self, x: Tensor, zeros: tuple[int, int, int, int]) -> Tensor:
        """The same behind ``zeros`` (left, right, top, bottom), with blocks as channels."""
        left, right, top, bottom = zeros
        stride = self.stride[0]
        more = -self.kernel_size[0] % stride  # zeros that fill the kernel up to full blocks
        x = F.pad(x, (left, right + more, top, bottom + more))
        weight = F.pad(self.weight, (0, more, 0, more))
        return F.conv2d(_space_to_depth(x, stride), _space_to_depth(weight, stride), self.bias)


def _space_to_depth(x: Tensor, block: int) -> Tensor:
    """[B, C, H, W] as [B, block * block * C, H / block, W / block], channels last; no kernel
    reaches the pixels that are left over."""
    batch, channels, height, width = x.shape
    rows, columns = height // block, width // block
    x = x[..., : rows * block, : columns * block].permute(0, 2, 3, 1)
    x = x.reshape(batch, rows, block, columns, block, channels).transpose(2, 3)
    return x.reshape(batch, rows, columns, block * block * channels).permute(0, 3, 1, 2)
