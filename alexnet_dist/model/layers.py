"""Layers that torch lacks, of some relatives of AlexNet."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class AdaptiveAvgPool(nn.AdaptiveAvgPool2d):
    """Adaptive average pooling of [B, C, H, W] to [B, C, size, size], which returns maps of that
    size unchanged: the general case has no deterministic backward on GPUs."""

    def forward(self, input: Tensor) -> Tensor:
        size = self.output_size
        return input if input.shape[-2:] == (size, size) else super().forward(input)


class GroupedLinear(nn.Module):
    """A fully connected layer in groups, each of which reads its own slice of the inputs only
    (net 150); grouped as torch.nn.Conv2d.

    Weight [out, in / groups], bias [out]; input [B, in], output [B, out].
    """

    def __init__(self, in_features: int, out_features: int, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(torch.empty(out_features, in_features // groups))
        self.bias = nn.Parameter(torch.empty(out_features))
        self.reset_parameters()

    reset_parameters: Callable[..., None] = nn.Linear.reset_parameters

    def forward(self, x: Tensor) -> Tensor:
        weights, biases = self.weight.chunk(self.groups), self.bias.chunk(self.groups)
        return torch.cat(list(map(F.linear, x.chunk(self.groups, 1), weights, biases)), 1)
