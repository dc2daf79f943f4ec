"""The networks: a table of their layers, one builder, and the layers that torch lacks."""

from alexnet_dist.model.dropout import dropout_layers, make_dropout_masks
from alexnet_dist.model.networks import (
    MODEL_REGISTRY,
    ModelSpec,
    Network,
    build_model,
    build_on_meta,
    iter_initial_weights,
)

__all__ = [
    "MODEL_REGISTRY",
    "ModelSpec",
    "Network",
    "build_model",
    "build_on_meta",
    "dropout_layers",
    "iter_initial_weights",
    "make_dropout_masks",
]
