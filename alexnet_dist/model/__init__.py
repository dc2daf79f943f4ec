"""The networks: a table of variants, one builder, and the layers that torch lacks."""

from alexnet_dist.model.alexnet import (
    VARIANTS,
    Network,
    Variant,
    build_model,
    initial_weights,
    outline,
)
from alexnet_dist.model.dropout import draw_masks
from alexnet_dist.model.kernels import choose_kernels
from alexnet_dist.model.normalization import triton_runs_on

__all__ = [
    "VARIANTS",
    "Network",
    "Variant",
    "build_model",
    "choose_kernels",
    "draw_masks",
    "initial_weights",
    "outline",
    "triton_runs_on",
]
