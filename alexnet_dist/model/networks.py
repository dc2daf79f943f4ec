"""The networks: a table of their layers with its sources, and the one builder that reads it.

P is the paper (Krizhevsky, Sutskever, Hinton 2012), S the authors' own source code of 2012, whose
file names (layers-145.cfg and so on) name the networks. A network of two towers is the paper's: the
halves of a layer's output channels that the authors put on two GPUs. Channels are counted over
both; a layer of two groups reads its own tower only.
"""

import copy
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from alexnet_dist.model.alexnet import AlexNet, StemConv2d
from alexnet_dist.model.batch_norm import BatchNorm
from alexnet_dist.model.dropout import Dropout, DropoutScaling
from alexnet_dist.model.layers import AdaptiveAvgPool, GroupedLinear
from alexnet_dist.model.lrn import LocalResponseNorm, WithinChannelLRN
from alexnet_dist.model.torchvision_alexnet import TorchvisionAlexNet

Init = Literal["source", "paper", "torch"]


@dataclass(frozen=True)
class LayerSpec:
    """A row of the table: a convolution or a fully connected layer, and what follows it.

    Attributes:
        name: "conv1", "fc6".
        out_channels: over all towers; 0 stands for the number of classes.
        kernel: size of the convolution's kernel in pixels; 0 for a fully connected layer.
        stride, padding, groups: as in torch.nn.Conv2d.
        std: standard deviation of S's initial weights (P has 0.01 everywhere).
        bias: initial bias; None for no bias.
        post_ops: what follows, in order: relu, tanh, lrn, cnorm (S's name for LRN within a
            channel), bn, pool, avgpool, dropout.
    """

    name: str
    out_channels: int
    kernel: int = 0
    stride: int = 1
    padding: int = 0
    groups: int = 1
    std: float = 0.01
    bias: float | None = 0.0
    post_ops: str = ""


@dataclass(frozen=True)
class ModelSpec:
    """A network: its layers, and the constants they share.

    Attributes:
        source: where it is described.
        towers: 2 where ``parallel.towers 2`` can put halves of it on two processes; the windows of
            local response normalization never cross from one tower to the other.
        lrn_alpha: alpha of local response normalization, in torch's meaning.
        pool: kernel and stride of max pooling.
        input_norm: what the network reads. "centered": pixels of 0..255 minus the training set's
            channel means; "imagenet": pixels of 0..1, standardized by ImageNet's mean and std.
        init, dropout: initialization and dropout scaling unless others are asked for.
    """

    source: str
    layers: tuple[LayerSpec, ...]
    towers: int = 2
    lrn_alpha: float = 1e-4
    pool: tuple[int, int] = (3, 2)
    input_norm: Literal["centered", "imagenet"] = "centered"
    init: Init = "source"
    dropout: DropoutScaling = "2012"


_Layers = tuple[LayerSpec, ...]


def _with(layers: _Layers, **changes: dict[str, Any]) -> _Layers:
    """The table with some rows changed, as S describes a net by its difference from net 145."""
    return tuple(replace(row, **changes.get(row.name, {})) for row in layers)


def _ungrouped(layers: _Layers) -> _Layers:
    return tuple(replace(row, groups=1) for row in layers)


def _replace_ops(layers: _Layers, **new: str) -> _Layers:
    """Each operation behind a layer by another, or "" by none."""

    def replaced(post_ops: str) -> str:
        return " ".join(filter(None, (new.get(op, op) for op in post_ops.split())))

    return tuple(replace(row, post_ops=replaced(row.post_ops)) for row in layers)


# fmt: off
_145 = (  # S, layers-145.cfg
    LayerSpec("conv1",   96, 11, 4, 0, 1, std=0.01, bias=0, post_ops="lrn pool relu"),
    LayerSpec("conv2",  256,  5, 1, 2, 2, std=0.01, bias=1, post_ops="relu lrn cnorm pool"),
    LayerSpec("conv3",  384,  3, 1, 1, 1, std=0.03, bias=0, post_ops="relu"),
    LayerSpec("conv4",  384,  3, 1, 1, 2, std=0.03, bias=1, post_ops="relu"),
    LayerSpec("conv5",  256,  3, 1, 1, 2, std=0.03, bias=1, post_ops="pool relu"),
    LayerSpec("fc6",   4096, std=0.01, bias=1, post_ops="relu dropout"),
    LayerSpec("fc7",   4096, std=0.01, bias=1, post_ops="relu dropout"),
    LayerSpec("fc8",      0, std=0.01, bias=0),
)
_PAPER = _with(  # P puts ReLU first, and does not mention cnorm
    _145, conv1={"post_ops": "relu lrn pool"}, conv2={"post_ops": "relu lrn pool"},
    conv5={"post_ops": "relu pool"},
)
_CONV6 = LayerSpec("conv6", 256, 3, 1, 1, 1, std=0.03, bias=1, post_ops="relu")
_150 = _with(
    _145, conv2={"out_channels": 320}, conv3={"groups": 2},
    fc6={"out_channels": 8192, "groups": 2}, fc7={"groups": 2},
)
_HALF = _with(
    _ungrouped(_145), conv1={"out_channels": 48}, conv2={"out_channels": 128},
    conv3={"out_channels": 192}, conv4={"out_channels": 192},
)
_OWT = (  # cuda-convnet2, layers-imagenet-1gpu.cfg
    LayerSpec("conv1",   64, 11, 4, 0, std=0.01, bias=0, post_ops="lrn pool relu"),
    LayerSpec("conv2",  192,  5, 1, 2, std=0.01, bias=1, post_ops="relu lrn pool"),
    LayerSpec("conv3",  384,  3, 1, 1, std=0.03, bias=0, post_ops="relu"),
    LayerSpec("conv4",  256,  3, 1, 1, std=0.03, bias=1, post_ops="relu"),
    LayerSpec("conv5",  256,  3, 1, 1, std=0.03, bias=1, post_ops="relu pool"),
    *_with(_145[5:], fc8={"bias": -7}),
)
_BN = (  # NVIDIA's Caffe, models/alexnet_bn/train_val.prototxt
    LayerSpec("conv1",   96, 11, 4, 0, 1, std=0.01,  bias=None, post_ops="bn relu pool"),
    LayerSpec("conv2",  256,  5, 1, 2, 2, std=0.01,  bias=None, post_ops="bn relu pool"),
    LayerSpec("conv3",  384,  3, 1, 1, 1, std=0.01,  bias=None, post_ops="bn relu"),
    LayerSpec("conv4",  384,  3, 1, 1, 2, std=0.01,  bias=None, post_ops="bn relu"),
    LayerSpec("conv5",  256,  3, 1, 1, 2, std=0.01,  bias=0.1, post_ops="bn relu pool"),
    LayerSpec("fc6",   4096, std=0.005, bias=0.1, post_ops="relu dropout"),
    LayerSpec("fc7",   4096, std=0.005, bias=0.1, post_ops="relu dropout"),
    LayerSpec("fc8",      0, std=0.01,  bias=0),
)
_FIGURE1 = (  # P gives four layers; these are cuda-convnet's, layers-80sec.cfg, without its fc64
    LayerSpec("conv1",   32,  5, 1, 2, std=0.0001, post_ops="pool relu"),
    LayerSpec("conv2",   32,  5, 1, 2, std=0.01, post_ops="pool relu"),
    LayerSpec("conv3",   64,  5, 1, 2, std=0.01, post_ops="pool relu"),
    LayerSpec("fc4",      0, std=0.1),
)

MODEL_REGISTRY: dict[str, ModelSpec] = {
    "paper": ModelSpec("P, figure 2 and section 3", _PAPER, lrn_alpha=5e-4),
    "original145": ModelSpec("S, layers-145.cfg: the paper's '1 CNN'", _145),
    "original146": ModelSpec("S, layers-146.cfg: conv6 behind pool5",
                             (*_145[:5], _CONV6, *_145[5:])),
    "original147": ModelSpec("S, layers-147.cfg: pooling without overlap",
                             _with(_145, conv2={"padding": 1}), pool=(2, 2)),
    "original148": ModelSpec("S, layers-148.cfg: no normalization",
                             _replace_ops(_145, lrn="", cnorm="")),
    "original150": ModelSpec("S, layers-150.cfg: towers meet only in fc8", _150),
    "half_column": ModelSpec("S, layers-145-half.cfg: one of the towers, conv5 as wide as both",
                             _HALF, towers=1),
    "one_column": ModelSpec("a review's single column, with adaptive average pooling to 6 x 6",
                            _with(_ungrouped(_PAPER), conv5={"post_ops": "relu pool avgpool"}),
                            towers=1),
    "owt": ModelSpec("Krizhevsky 2014; cuda-convnet2, layers-imagenet-1gpu.cfg", _OWT, towers=1),
    "alexnet_bn": ModelSpec("You, Gitman, Ginsburg 2017; NVIDIA's Caffe, models/alexnet_bn",
                            _BN, dropout="inverted"),
    "figure1_relu": ModelSpec("P, figure 1: four layers for images of 32 x 32", _FIGURE1, towers=1),
    "figure1_tanh": ModelSpec("P, figure 1: the same with tanh",
                              _replace_ops(_FIGURE1, relu="tanh"), towers=1),
    "torchvision": ModelSpec("torchvision.models.AlexNet", (), towers=1, input_norm="imagenet",
                             init="torch", dropout="inverted"),
}
# fmt: on

Network = AlexNet | TorchvisionAlexNet


def build_model(arch: str, *, init: Init | None = None, **options: Any) -> Network:
    """Build a network with its initial weights, on torch's default device; see ``build_on_meta``
    for the options, and ``iter_initial_weights``."""
    model = build_on_meta(arch, **options)
    weights = iter_initial_weights(model, init)
    model = model.to_empty(device=torch.get_default_device())
    model.load_state_dict(dict(weights))
    return model


def build_on_meta(
    arch: str,
    *,
    num_classes: int = 1000,
    dropout: float = 0.5,
    image_size: int = 224,
) -> Network:
    """Build a network on torch's meta device, without memory.

    Args:
        arch: a key of MODEL_REGISTRY.
        num_classes: outputs of the last layer.
        dropout: probability of dropping a unit, 0 for no dropout.
        image_size: height and width of the images in pixels, from which fc6 gets its inputs.

    Raises:
        ValueError: an unknown arch, or images that leave no pixels to pool.
    """
    if arch not in MODEL_REGISTRY:
        raise ValueError(f"there is no arch '{arch}'; there are {', '.join(MODEL_REGISTRY)}")
    spec = MODEL_REGISTRY[arch]
    model: Network
    with torch.device("meta"):
        if arch == "torchvision":
            model = TorchvisionAlexNet(num_classes, dropout, spec.dropout)
        else:
            model = _build(arch, spec, num_classes, dropout, image_size)
    model.arch = arch
    return model


def _build(
    arch: str, spec: ModelSpec, num_classes: int, dropout: float, image_size: int
) -> AlexNet:
    model = AlexNet()
    channels, size = 3, image_size
    for row in spec.layers:
        out, groups = row.out_channels or num_classes, row.groups
        layer: nn.Module
        if row.kernel:
            shape, bias = (channels, out, row.kernel, row.stride, row.padding), row.bias is not None
            stem = row.stride > 1
            layer = StemConv2d(*shape, bias) if stem else nn.Conv2d(*shape, 1, groups, bias)
            size = _out_size(size + 2 * row.padding, row.kernel, row.stride)
        else:
            if not hasattr(model, "flatten"):
                model.add_module("flatten", nn.Flatten())
                channels *= size * size
            args = channels, out
            layer = nn.Linear(*args) if groups == 1 else GroupedLinear(*args, groups)
        model.add_module(row.name, layer)
        channels = out
        number = row.name.lstrip(string.ascii_lowercase)  # "1" of "conv1"
        for op in row.post_ops.split():
            model.add_module(f"{op}{number}", _post_op(op, spec, channels, dropout))
            if op == "pool":
                size = _out_size(size, *spec.pool)
            elif op == "avgpool":
                size = 6
        if size < 1:
            raise ValueError(
                f"images of {image_size} pixels are too small for '{arch}': nothing is left "
                f"behind {row.name}; take 224 or 227"
            )
    return model


def _out_size(size: int, kernel: int, stride: int) -> int:
    """Positions of a kernel along ``size`` pixels, of which the last may hang over the edge: S
    rounds up everywhere."""
    return -((kernel - size) // stride) + 1


def _post_op(op: str, spec: ModelSpec, channels: int, dropout: float) -> nn.Module:
    make: dict[str, Callable[[], nn.Module]] = {
        "relu": nn.ReLU,
        "tanh": nn.Tanh,
        "lrn": lambda: LocalResponseNorm(spec.lrn_alpha, groups=spec.towers),
        "cnorm": WithinChannelLRN,
        "bn": lambda: BatchNorm(channels, eps=1e-4),
        "pool": lambda: nn.MaxPool2d(*spec.pool, ceil_mode=True),
        "avgpool": lambda: AdaptiveAvgPool(6),
        "dropout": lambda: Dropout(channels, dropout, spec.dropout),
    }
    return make[op]()


def iter_initial_weights(model: Network, init: Init | None = None) -> Iterator[tuple[str, Tensor]]:
    """The initial value of each parameter by name, full and on the CPU, sampled from torch's global
    generator one layer after another: whoever holds a shard takes its slice of each.

    Args:
        model: from ``build_on_meta``, still without memory; it may get memory afterwards.
        init: "source" (S's deviations and biases), "paper" (P, section 5: std 0.01 everywhere) or
            "torch"; by default the network's own.

    Raises:
        ValueError: an initialization that the network does not have.
    """
    spec = MODEL_REGISTRY[model.arch]
    init = init or spec.init
    if init != "torch" and not spec.layers:
        raise ValueError(f"torchvision's network has torch's initialization, not '{init}'")
    rows = {row.name: row for row in spec.layers}
    layers = {
        name: copy.deepcopy(layer)  # now, while it has no memory and contiguous strides
        for name, layer in model.named_modules()
        if isinstance(layer, (nn.Conv2d, nn.Linear, GroupedLinear, BatchNorm))
    }

    def sample() -> Iterator[tuple[str, Tensor]]:
        for name in list(layers):
            layer = layers.pop(name).to_empty(device="cpu")  # one at a time has memory
            if init == "torch" or isinstance(layer, BatchNorm):
                layer.reset_parameters()
            else:  # Gaussian weights and constant biases (P, section 5; S)
                row = rows[name]
                nn.init.normal_(layer.weight, std=row.std if init == "source" else 0.01)
                if row.bias is not None:
                    nn.init.constant_(layer.get_parameter("bias"), row.bias)
            for inner, value in layer.named_parameters():
                yield f"{name}.{inner}", value.detach()

    return sample()
