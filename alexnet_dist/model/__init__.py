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
from alexnet_dist.model.normalization import allow_triton, triton_runs_on

__all__ = [
    "VARIANTS",
    "Network",
    "Variant",
    "allow_triton",
    "build_model",
    "draw_masks",
    "initial_weights",
    "outline",
    "triton_runs_on",
]
