"""The networks: a table of variants, one builder, and the layers that torch lacks."""

from alexnet_dist.model.alexnet import (
    MODEL_REGISTRY,
    ModelSpec,
    Network,
    build_model,
    build_on_meta,
    iter_initial_weights,
)
from alexnet_dist.model.dropout import make_dropout_masks
from alexnet_dist.model.kernels import choose_kernels
from alexnet_dist.model.lrn import is_triton_supported

__all__ = [
    "MODEL_REGISTRY",
    "ModelSpec",
    "Network",
    "build_model",
    "build_on_meta",
    "choose_kernels",
    "is_triton_supported",
    "iter_initial_weights",
    "make_dropout_masks",
]
