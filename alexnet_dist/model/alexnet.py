"""AlexNet and its relatives: a table of numbers, and the one builder that reads it.

P is the paper (Krizhevsky, Sutskever, Hinton 2012), S the authors' own source of 2012, whose
numbers name the variants (layers-145.cfg and so on). Kernels are counted over both towers; a
layer that reads its "own" tower is a grouped convolution.
"""

import copy
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from alexnet_dist.model.dropout import Dropout, Form
from alexnet_dist.model.normalization import BatchNorm, LocalResponseNorm, WithinChannelLRN
from alexnet_dist.model.stem import PaddedConv2d, StemConv2d

Init = Literal["source", "paper", "torch"]


@dataclass(frozen=True)
class LayerSpec:
    """A row of the table: a layer with weights, and what follows it, in order.

    Attributes:
        out: outputs over all towers; 0 stands for the number of classes.
        reads: the towers whose outputs it reads.
        std: standard deviation of S's initial weights (P has 0.01 everywhere).
        bias: initial bias; None for none.
        then: names of the layers behind it: relu, tanh, lrn, spatial, batch, pool, average,
            dropout.
    """

    name: str
    out: int
    kernel: int = 0
    stride: int = 1
    pad: int = 0
    reads: Literal["own", "both"] = "both"
    std: float = 0.01
    bias: float | None = 0.0
    then: str = ""

    @property
    def number(self) -> str:
        """The layer's number in the paper, "1" of "conv1"."""
        return self.name.lstrip("abcdefghijklmnopqrstuvwxyz")


@dataclass(frozen=True)
class ModelSpec:
    """A network: its layers, and the constants they share.

    Attributes:
        towers: groups of kernels that meet only in layers that read both.
        lrn_alpha: alpha of the response normalisation in torch's meaning.
        pool: kernel and stride of the max pooling.
        pixels: what the network reads; "centred" is 0..255 less the training set's channel means,
            "imagenet" 0..1 less ImageNet's means and over its deviations.
        init, dropout: initialisation and form of dropout when none is asked for.
    """

    source: str
    layers: tuple[LayerSpec, ...]
    towers: int = 2
    lrn_alpha: float = 1e-4
    pool: tuple[int, int] = (3, 2)
    pixels: Literal["centred", "imagenet"] = "centred"
    init: Init = "source"
    dropout: Form = "2012"


def _with(layers: tuple[LayerSpec, ...], **changes: dict[str, object]) -> tuple[LayerSpec, ...]:
    """The table with some rows changed, as S describes a net by its difference from net 145."""
    return tuple(replace(row, **changes.get(row.name, {})) for row in layers)  # type: ignore[arg-type]


def _without(layers: tuple[LayerSpec, ...], *kinds: str) -> tuple[LayerSpec, ...]:
    def rest(then: str) -> str:
        return " ".join(kind for kind in then.split() if kind not in kinds)

    return tuple(replace(row, then=rest(row.then)) for row in layers)


def _replacing(layers: tuple[LayerSpec, ...], kind: str, other: str) -> tuple[LayerSpec, ...]:
    return tuple(replace(row, then=row.then.replace(kind, other)) for row in layers)


# fmt: off
_145 = (  # S, layers-145.cfg
    LayerSpec("conv1",   96, 11, 4, 0, "both", 0.01, 0, "lrn pool relu"),
    LayerSpec("conv2",  256,  5, 1, 2, "own",  0.01, 1, "relu lrn spatial pool"),
    LayerSpec("conv3",  384,  3, 1, 1, "both", 0.03, 0, "relu"),
    LayerSpec("conv4",  384,  3, 1, 1, "own",  0.03, 1, "relu"),
    LayerSpec("conv5",  256,  3, 1, 1, "own",  0.03, 1, "pool relu"),
    LayerSpec("fc6",   4096, reads="both", std=0.01, bias=1, then="relu dropout"),
    LayerSpec("fc7",   4096, reads="both", std=0.01, bias=1, then="relu dropout"),
    LayerSpec("fc8",      0, reads="both", std=0.01, bias=0),
)
_PAPER = _with(  # P puts ReLU first and knows no spatial normalisation
    _145,
    conv1={"then": "relu lrn pool"}, conv2={"then": "relu lrn pool"}, conv5={"then": "relu pool"},
)
_OWT = (  # cuda-convnet2, layers-imagenet-1gpu.cfg
    LayerSpec("conv1",   64, 11, 4, 0, std=0.01, bias=0, then="lrn pool relu"),
    LayerSpec("conv2",  192,  5, 1, 2, std=0.01, bias=1, then="relu lrn pool"),
    LayerSpec("conv3",  384,  3, 1, 1, std=0.03, bias=0, then="relu"),
    LayerSpec("conv4",  256,  3, 1, 1, std=0.03, bias=1, then="relu"),
    LayerSpec("conv5",  256,  3, 1, 1, std=0.03, bias=1, then="relu pool"),
    LayerSpec("fc6",   4096, std=0.01, bias=1, then="relu dropout"),
    LayerSpec("fc7",   4096, std=0.01, bias=1, then="relu dropout"),
    LayerSpec("fc8",      0, std=0.01, bias=-7),
)
_BN = (  # NVIDIA's Caffe, models/alexnet_bn/train_val.prototxt
    LayerSpec("conv1",   96, 11, 4, 0, "both", 0.01,  None, "batch relu pool"),
    LayerSpec("conv2",  256,  5, 1, 2, "own",  0.01,  None, "batch relu pool"),
    LayerSpec("conv3",  384,  3, 1, 1, "both", 0.01,  None, "batch relu"),
    LayerSpec("conv4",  384,  3, 1, 1, "own",  0.01,  None, "batch relu"),
    LayerSpec("conv5",  256,  3, 1, 1, "own",  0.01,  0.1, "batch relu pool"),
    LayerSpec("fc6",   4096, std=0.005, bias=0.1, then="relu dropout"),
    LayerSpec("fc7",   4096, std=0.005, bias=0.1, then="relu dropout"),
    LayerSpec("fc8",      0, std=0.01,  bias=0),
)
_CONV6 = LayerSpec("conv6", 256, 3, 1, 1, "both", 0.03, 1, "relu")
_FIGURE1 = (  # P gives four layers; theirs are those of cuda-convnet, layers-80sec.cfg, less fc64
    LayerSpec("conv1",   32,  5, 1, 2, std=0.0001, then="pool relu"),
    LayerSpec("conv2",   32,  5, 1, 2, std=0.01, then="pool relu"),
    LayerSpec("conv3",   64,  5, 1, 2, std=0.01, then="pool relu"),
    LayerSpec("fc4",      0, std=0.1),
)

MODEL_REGISTRY: dict[str, ModelSpec] = {
    "paper": ModelSpec("P, figure 2 and section 3", _PAPER, lrn_alpha=5e-4),
    "original145": ModelSpec("S, layers-145.cfg: the paper's '1 CNN'", _145),
    "original146": ModelSpec("S, layers-146.cfg: conv6 behind pool5",
                           (*_145[:5], _CONV6, *_145[5:])),
    "original147": ModelSpec("S, layers-147.cfg: pooling without overlap",
                           _with(_145, conv2={"pad": 1}), pool=(2, 2)),
    "original148": ModelSpec("S, layers-148.cfg: no normalisation",
                           _without(_145, "lrn", "spatial")),
    "original150": ModelSpec("S, layers-150.cfg: towers meet only in fc8",
                           _with(_145, conv2={"out": 320}, conv3={"reads": "own"},
                                 fc6={"out": 8192, "reads": "own"}, fc7={"reads": "own"})),
    "half_column": ModelSpec("S, layers-145-half.cfg: one of the towers, conv5 as wide as both",
                           _with(_145, conv1={"out": 48}, conv2={"out": 128}, conv3={"out": 192},
                                 conv4={"out": 192}), towers=1),
    "one_column": ModelSpec("a review's single column, with adaptive average pooling to 6 x 6",
                          _with(_PAPER, conv5={"then": "relu pool average"}), towers=1),
    "owt": ModelSpec("Krizhevsky 2014; cuda-convnet2, layers-imagenet-1gpu.cfg", _OWT, towers=1),
    "alexnet_bn": ModelSpec("You, Gitman, Ginsburg 2017; NVIDIA's Caffe, models/alexnet_bn", _BN,
                          dropout="torch"),
    "figure1_relu": ModelSpec("P, figure 1: four layers for images of 32 x 32", _FIGURE1, towers=1),
    "figure1_tanh": ModelSpec("P, figure 1: the same with tanh",
                            _replacing(_FIGURE1, "relu", "tanh"), towers=1),
    "torchvision": ModelSpec("torchvision.models.AlexNet", (), towers=1,
                           pixels="imagenet", init="torch", dropout="torch"),
}
# fmt: on


class AveragePool(nn.AdaptiveAvgPool2d):
    """Adaptive average pooling that passes maps of the size asked for as they are: the mean of one
    value is that value, and the gradient of the general case has no deterministic kernel on GPUs.
    """

    def forward(self, input: Tensor) -> Tensor:
        size = self.output_size
        return input if input.shape[-2:] == (size, size) else super().forward(input)


class GroupedLinear(nn.Module):
    """A fully connected layer of which each tower reads only its own half (net 150).

    Weight [out, in / towers], bias [out]; input [B, in], output [B, out].
    """

    def __init__(self, inputs: int, outputs: int, towers: int) -> None:
        super().__init__()
        self.towers = towers
        self.weight = nn.Parameter(torch.empty(outputs, inputs // towers))
        self.bias = nn.Parameter(torch.empty(outputs))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.Linear.reset_parameters(self)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        parts = zip(
            x.chunk(self.towers, 1),
            self.weight.chunk(self.towers),
            self.bias.chunk(self.towers),
            strict=True,
        )
        return torch.cat([F.linear(*part) for part in parts], 1)


class AlexNet(nn.Sequential):
    """A network of the table. Input [B, 3, H, W], the sides that it was built for, 224 or 227 in
    2012; output [B, classes]."""

    spec: ModelSpec

    def forward(self, input: Tensor, masks: Iterable[Tensor] = ()) -> Tensor:
        """``masks``: those of ``draw_masks(self.dropouts(), ...)``; see Dropout for none."""
        remaining = iter(masks)
        x = input
        for layer in self:
            x = layer(x, next(remaining, None)) if isinstance(layer, Dropout) else layer(x)
        return x

    def dropouts(self) -> list[Dropout]:
        """The layers that want a mask, in the order of ``masks``."""
        return [layer for layer in self if isinstance(layer, Dropout)]

    def parts(self) -> tuple[nn.Module, dict[str, nn.Module]]:
        """The convolutions, images to [B, features], and the layers behind them by name."""
        layers = list(self.named_children())
        behind = 1 + [name for name, _ in layers].index("flatten")
        return nn.Sequential(OrderedDict(layers[:behind])), dict(layers[behind:])


class TorchvisionAlexNet(torchvision.models.AlexNet):
    """torchvision's own class and parameters, fed with masks as the others are."""

    spec: ModelSpec
    features: nn.Sequential

    def __init__(self, num_classes: int, dropout: float, form: Form) -> None:
        super().__init__(num_classes=num_classes, dropout=dropout)
        self.avgpool = AveragePool(6)
        self.features[0] = PaddedConv2d(3, 64, 11, 4, 2)
        self.classifier[0] = Dropout(256 * 6 * 6, dropout, form)
        self.classifier[3] = Dropout(4096, dropout, form)

    def forward(self, x: Tensor, masks: Iterable[Tensor] = ()) -> Tensor:
        remaining = iter(masks)
        x = self.avgpool(self.features(x)).flatten(1)
        for layer in self.classifier:
            x = layer(x, next(remaining, None)) if isinstance(layer, Dropout) else layer(x)
        return x

    def dropouts(self) -> list[Dropout]:
        """The layers that want a mask, in the order of ``masks``."""
        return [layer for layer in self.classifier if isinstance(layer, Dropout)]

    def parts(self) -> tuple[nn.Module, dict[str, nn.Module]]:
        """The convolutions, images to [B, features], and the layers behind them by name."""
        layers = {"features": self.features, "avgpool": self.avgpool, "flatten": nn.Flatten()}
        behind = {f"classifier.{name}": layer for name, layer in self.classifier.named_children()}
        return nn.Sequential(OrderedDict(layers)), behind


Network = AlexNet | TorchvisionAlexNet


def build_model(
    variant: str,
    *,
    num_classes: int = 1000,
    dropout: float = 0.5,
    init: Init | None = None,
    image_size: int = 224,
) -> Network:
    """Build a network of the table with its initial weights, on torch's default device; see
    ``outline`` and ``initial_weights``."""
    model = build_on_meta(variant, num_classes=num_classes, dropout=dropout, image_size=image_size)
    weights = iter_initial_weights(model, init)
    parameters = dict(model.to_empty(device=torch.get_default_device()).named_parameters())
    with torch.no_grad():
        for name, value in weights:
            parameters[name].copy_(value)
    return model


def build_on_meta(
    variant: str, *, num_classes: int = 1000, dropout: float = 0.5, image_size: int = 224
) -> Network:
    """A network of the table without memory, on torch's meta device.

    Args:
        variant: a key of VARIANTS.
        num_classes: outputs of the last layer.
        dropout: probability with which a unit is dropped, 0 for none.
        image_size: side of the images in pixels, from which fc6 gets its inputs.

    Raises:
        ValueError: an unknown variant, or sides that leave nothing to pool.
    """
    if variant not in MODEL_REGISTRY:
        raise ValueError(f"there is no variant '{variant}'; there are {', '.join(MODEL_REGISTRY)}")
    spec = MODEL_REGISTRY[variant]
    with torch.device("meta"):
        if variant == "torchvision":
            net = TorchvisionAlexNet(num_classes, dropout, spec.dropout)
            net.spec = spec
            return net
        return _from_table(variant, spec, num_classes, dropout, image_size)


def iter_initial_weights(model: Network, init: Init | None = None) -> Iterator[tuple[str, Tensor]]:
    """The initial value of each parameter by name, on the CPU, drawn from torch's global generator
    one layer after another: whoever holds a part of the network takes part of each.

    Args:
        model: as ``outline`` gives it; it may get memory afterwards.
        init: "source" (S's deviations and biases), "paper" (P, section 5: 0.01 everywhere) or
            "torch"; the variant's own where None.

    Raises:
        ValueError: an initialisation that the variant does not have.
    """
    init = init or model.spec.init
    rows = {row.name: row for row in model.spec.layers}
    if init != "torch" and not rows:
        raise ValueError(f"torchvision's network has torch's initialisation, not '{init}'")
    layers = {
        name: copy.deepcopy(layer)  # now, while it has no memory and the plainest of strides
        for name, layer in model.named_modules()
        if isinstance(layer, (nn.Conv2d, nn.Linear, GroupedLinear, BatchNorm))
    }
    return _draw(layers, init, rows)


def _draw(
    layers: "dict[str, nn.Conv2d | nn.Linear | GroupedLinear | BatchNorm]",
    init: Init,
    rows: dict[str, LayerSpec],
) -> Iterator[tuple[str, Tensor]]:
    while layers:
        name = next(iter(layers))
        drawn = layers.pop(name).to_empty(device="cpu")
        if init == "torch" or isinstance(drawn, BatchNorm):
            drawn.reset_parameters()
        else:  # Gaussian weights and constant biases, as P (section 5) and S have them
            nn.init.normal_(drawn.weight, std=rows[name].std if init == "source" else 0.01)
            constant = rows[name].bias
            if constant is not None:
                nn.init.constant_(drawn.get_parameter("bias"), constant)
        for inner, value in drawn.named_parameters():
            yield f"{name}.{inner}", value.detach()


def _from_table(
    variant: str, spec: ModelSpec, num_classes: int, dropout: float, image_size: int
) -> AlexNet:
    model = AlexNet()
    model.spec = spec
    channels, side = 3, image_size
    for row in spec.layers:
        if row.kernel:
            side = _add_convolution(model, spec, row, channels, side)
            if side < 1:
                raise ValueError(
                    f"images of {image_size} pixels are too small for '{variant}': nothing is left "
                    f"behind {row.name}; take 224 or 227"
                )
            channels = row.out
        else:
            if not hasattr(model, "flatten"):
                model.add_module("flatten", nn.Flatten())
                channels = channels * side * side
            outputs = row.out or num_classes
            own = spec.towers if row.reads == "own" else 1
            linear = (
                nn.Linear(channels, outputs) if own == 1 else GroupedLinear(channels, outputs, own)
            )
            model.add_module(row.name, linear)
            channels = outputs
            for kind in row.then.split():
                layer: nn.Module
                if kind == "relu":
                    layer = nn.ReLU()
                elif kind == "batch":
                    layer = BatchNorm(outputs, eps=1e-4)
                else:
                    layer = Dropout(outputs, dropout, spec.dropout)
                model.add_module(f"{kind}{row.number}", layer)
    return model


def _add_convolution(
    model: AlexNet, spec: ModelSpec, row: LayerSpec, channels: int, side: int
) -> int:
    """Add a convolution and what follows it; the side of its maps in pixels."""
    groups = spec.towers if row.reads == "own" else 1
    kind = StemConv2d if row.stride > 1 else nn.Conv2d
    numbers = channels, row.out, row.kernel, row.stride, row.pad
    conv = kind(*numbers, groups=groups, bias=row.bias is not None)
    model.add_module(row.name, conv)
    side = -((row.kernel - side - 2 * row.pad) // row.stride) + 1
    for name in row.then.split():
        layer: nn.Module
        if name == "relu":
            layer = nn.ReLU()
        elif name == "tanh":
            layer = nn.Tanh()
        elif name == "lrn":
            layer = LocalResponseNorm(5, spec.lrn_alpha, 0.75, 2.0, groups=spec.towers)
        elif name == "spatial":
            layer = WithinChannelLRN()
        elif name == "batch":
            layer = BatchNorm(row.out, eps=1e-4)
        elif name == "average":
            layer, side = AveragePool(6), 6
        else:  # pool; S's program counts positions with ceil, as everywhere
            size, stride = spec.pool
            layer = nn.MaxPool2d(size, stride, ceil_mode=True)
            side = -((size - side) // stride) + 1
        model.add_module(f"{name}{row.number}", layer)
    return side
