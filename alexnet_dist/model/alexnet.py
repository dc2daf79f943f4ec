"""AlexNet and its relatives as modules: the first convolution, and what passes through the layers.

Which layers a network has is said by networks.py, which builds them.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from alexnet_dist.model.dropout import Dropout, has_triton
from alexnet_dist.model.lrn import SIZE, LocalResponseNorm

try:
    from alexnet_dist.model import fused_block
except ImportError:  # Triton does not exist for every platform
    fused_block = None  # type: ignore[assignment]


class StemConv2d(nn.Conv2d):
    """A convolution of images, [B, 3, H, W] to [B, out_channels, H', W'], whose last position may
    hang over the right and the bottom edge.

    The authors' program puts 1 + ceil((size - kernel) / stride) positions along a side, 55 for 224
    pixels, the last of which reads zeros beyond the image (layer.py of the 2012 source). So zeros
    are added on the right and at the bottom until the stride divides: three for 224, none for 227.

    In bf16 on CPUs blocks of stride x stride pixels become channels first, the kernel's too: 11 x
    11 at stride 4 on 3 channels is 3 x 3 at stride 1 on 48. The weight's gradient then takes a
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

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What torch's ``forward`` calls."""
        padding = int(self.padding[0])
        height, width = (size + 2 * padding for size in input.shape[-2:])
        right, bottom = padding + self._overhang(width), padding + self._overhang(height)
        zeros = padding, right, padding, bottom
        device = input.device.type
        if device in ("cpu", "cuda") and torch.is_autocast_enabled(device):
            input = input.to(torch.get_autocast_dtype(device))  # before it gets larger
            if device == "cpu":
                return self._by_blocks(input, zeros, weight, bias)
        padded = F.pad(input, zeros) if any(zeros) else input
        return F.conv2d(padded, weight, bias, self.stride)

    def _overhang(self, size: int) -> int:
        """Zeros behind ``size`` pixels, so that a last kernel fits in."""
        return (self.kernel_size[0] - size) % self.stride[0] if self.ceil_mode else 0

    def _by_blocks(
        self, x: Tensor, zeros: tuple[int, int, int, int], weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        """The same behind ``zeros`` (left, right, top, bottom), with blocks as channels."""
        left, right, top, bottom = zeros
        stride = self.stride[0]
        more = -self.kernel_size[0] % stride  # zeros that fill the kernel up to full blocks
        x = F.pad(x, (left, right + more, top, bottom + more))
        weight = F.pad(weight, (0, more, 0, more))
        return F.conv2d(_space_to_depth(x, stride), _space_to_depth(weight, stride), bias)


def _space_to_depth(x: Tensor, block: int) -> Tensor:
    """[B, C, H, W] as [B, block * block * C, H / block, W / block], channels last; no kernel
    reaches the pixels that are left over."""
    batch, channels, height, width = x.shape
    rows, columns = height // block, width // block
    x = x[..., : rows * block, : columns * block].permute(0, 2, 3, 1)
    x = x.reshape(batch, rows, block, columns, block, channels).transpose(2, 3)
    return x.reshape(batch, rows, columns, block * block * channels).permute(0, 3, 1, 2)


def forward_layers(layers: Iterable[nn.Module], x: Tensor, masks: Iterable[Tensor]) -> Tensor:
    """``x`` through ``layers`` in order, each Dropout with the next of ``masks``.

    But ReLU goes behind a max pooling that follows it: they commute, and it has a quarter of the
    values to read there.
    """
    remaining, left = iter(masks), list(layers)
    while left:
        layer = left.pop(0)
        if isinstance(layer, nn.ReLU) and left and isinstance(left[0], nn.MaxPool2d):
            layer, left[0] = left[0], layer
        if fused := fused_layers(layer, left[:3], x.device):
            x, left = fused(x), left[3:]
        elif isinstance(layer, Dropout) and layer.p > 0:  # others have no mask
            x = layer(x, next(remaining, None))
        else:
            x = layer(x)
    return x


def fused_layers(
    layer: nn.Module, behind: list[nn.Module], device: torch.device
) -> Callable[[Tensor], Tensor] | None:
    """A convolution and the three layers behind it as one function, where ``device`` has
    fused_block.py's kernels and they compute these layers; else None."""
    kinds = tuple(map(type, behind))
    if kinds not in _FUSED or not isinstance(layer, nn.Conv2d) or not has_triton(device):
        return None
    lrn = behind[kinds.index(LocalResponseNorm)]
    pool, bias = behind[kinds.index(nn.MaxPool2d)], layer.bias
    assert isinstance(lrn, LocalResponseNorm)
    assert isinstance(pool, nn.MaxPool2d)
    if bias is None or (pool.kernel_size, pool.stride) != (3, 2) or len(bias) % (8 * lrn.groups):
        return None
    constants = lrn.k, lrn.alpha / SIZE, lrn.groups, kinds[0] is nn.ReLU

    def forward(x: Tensor) -> Tensor:
        z = layer._conv_forward(x, layer.weight, None)
        pooled, _ = fused_block.norm_pool(z, bias, *constants)
        return pooled

    return forward


_FUSED = (
    (nn.ReLU, LocalResponseNorm, nn.MaxPool2d),
    (LocalResponseNorm, nn.MaxPool2d, nn.ReLU),
)
"""What may stand behind the convolution."""


class AlexNet(nn.Sequential):
    """A network of the table. Input [B, 3, H, W] of the size that it was built for, 224 or 227 in
    2012; output: logits [B, classes]."""

    arch: str

    def forward(self, input: Tensor, masks: Iterable[Tensor] = ()) -> Tensor:
        """``masks``: from ``make_dropout_masks(dropout_layers(self), ...)``; Dropout says what
        happens without."""
        return forward_layers(self, input, masks)

    def split_features_classifier(self) -> tuple[nn.Sequential, dict[str, nn.Module]]:
        """The convolutions, [B, 3, H, W] to [B, features], and the layers behind them by name."""
        layers = list(self.named_children())
        end = 1 + [name for name, _ in layers].index("flatten")
        return AlexNet(OrderedDict(layers[:end])), dict(layers[end:])
