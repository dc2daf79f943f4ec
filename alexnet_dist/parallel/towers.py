"""The paper's two GPUs: each process of a pair holds one tower and never the other's kernels.

Krizhevsky et al. 2012, section 3.5 and figure 2. A tower is half of the kernels of every layer.
Layers that are grouped convolutions on one device read their own tower only, and here become
plain ones; layers that read both towers exchange halves with the other process first:

    layer      a process holds   reads      sends, for each of its b images
    conv1      48 of 96          the image  -
    conv2      128 of 256        its own    -
    conv3      192 of 384        both       128 x 13 x 13 maps (behind pool2), and their gradient
    conv4, 5   192, 128          its own    -
    fc6        2048 of 4096      both       128 x 6 x 6 maps (behind pool5), and their gradient
    fc7        2048 of 4096      both       2048 activations, and their gradient
    fc8        half the classes  both       2048 activations, and their gradient
    loss       -                 both       four numbers

All of it within the pair (dimension "mp" of the mesh), in the precision of training: 121 KB an
image in bf16 for ``paper``, forward and backward together. Gradients are averaged over the
replicas (dimension "dp") by DistributedDataParallel, each tower among its like.

An exchange is an all-gather of two; its backward, a reduce-scatter of two, is an exchange again
and one addition, which is the one that autograd makes of a tensor used twice. While the other
half travels, the product with one's own half is computed, forward and backward.

S keeps fc8 on one GPU, since its layers are placed as a whole and a softmax wants all classes at
once. Here it is split like the others: the loss needs four numbers of each side, no process has
more to do than the other, and its weights are halved as well.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from alexnet_dist.model.alexnet import AlexNet, GroupedLinear
from alexnet_dist.model.batch_norm import BatchNorm
from alexnet_dist.model.dropout import Dropout
from alexnet_dist.model.lrn import LocalResponseNorm
from alexnet_dist.model.stem import StemConv2d
from alexnet_dist.parallel.collectives import AsyncAllGather
from alexnet_dist.parallel.mesh import Mesh
from alexnet_dist.parallel.sharding import ShardedDropout, ShardSpec


def tower_of(model: AlexNet, mesh: Mesh) -> AlexNet:
    """This process's tower of ``model``, under the same names.

    Args:
        model: a network of two towers as ``outline`` gives it, without memory; the tower has none
            yet either.
    """
    tower = AlexNet()
    tower.spec = model.spec
    with torch.device("meta"):
        for name, layer in model.named_children():
            tower.add_module(name, _half(layer, mesh))
    return tower


def _half(layer: nn.Module, mesh: Mesh) -> nn.Module:
    """What a tower has of a layer; layers without kernels of their own serve as they are."""
    if isinstance(layer, nn.Conv2d):
        inputs, outputs = layer.in_channels // layer.groups, layer.out_channels // 2
        numbers = inputs, outputs, layer.kernel_size[0], layer.stride[0], int(layer.padding[0])
        # what reads its own tower only, and the first layer: the image is there on both sides
        bias = layer.bias is not None
        if isinstance(layer, StemConv2d):
            return StemConv2d(*numbers, bias=bias)
        alone = layer.groups == 2
        return nn.Conv2d(*numbers, bias=bias) if alone else _ConvOfBoth(mesh, numbers, bias)
    if isinstance(layer, GroupedLinear):
        out, inputs = layer.weight.shape
        return nn.Linear(inputs, out // 2)
    if isinstance(layer, nn.Linear):
        share = ShardSpec(layer.out_features, 2, mesh.split_rank)
        return _LinearOfBoth(mesh, layer.in_features, len(share))
    if isinstance(layer, LocalResponseNorm):
        return LocalResponseNorm(layer.size, layer.alpha, layer.beta, layer.k)
    if isinstance(layer, BatchNorm):
        return BatchNorm(layer.features // 2, layer.eps, layer.momentum)
    if isinstance(layer, Dropout):
        return ShardedDropout(ShardSpec(layer.units, 2, mesh.split_rank), layer.p, layer.scaling)
    return layer


class _ConvOfBoth(nn.Conv2d):
    """A convolution that reads both towers. Input: this tower's maps."""

    def __init__(self, mesh: Mesh, numbers: tuple[int, int, int, int, int], bias: bool) -> None:
        super().__init__(*numbers, bias=bias)
        self.mesh = mesh

    def forward(self, input: Tensor) -> Tensor:
        def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return F.conv2d(x, weight, bias, self.stride, self.padding)

        return _read_both(input, self, product, self.mesh)


class _LinearOfBoth(nn.Linear):
    """A fully connected layer that reads both towers. Input: this tower's activations."""

    def __init__(self, mesh: Mesh, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.mesh = mesh

    def forward(self, input: Tensor) -> Tensor:
        return _read_both(input, self, F.linear, self.mesh)


def _read_both(
    x: Tensor, layer: _ConvOfBoth | _LinearOfBoth, product: Callable[..., Tensor], mesh: Mesh
) -> Tensor:
    """A layer on the inputs of both towers, this one's ``x`` first.

    The order of these lines is what overlaps: forward, the other half travels under the product
    with one's own; backward, autograd goes through them from the last to the first, and the
    gradient that the other tower waits for travels under that same product's backward.
    """
    halves = layer.weight.split(layer.weight.shape[1] // 2, 1)
    line = _Line(mesh)
    coming = _Leave.apply(x, line)
    own = product(x, halves[mesh.split_rank], layer.bias)
    theirs = _Arrive.apply(coming, line)
    return own + product(theirs, halves[1 - mesh.split_rank], None)


class _Line:
    """The way between two towers, for one tensor and, later, the gradient that comes back."""

    def __init__(self, mesh: Mesh) -> None:
        self.group, self.other = mesh.group("mp"), 1 - mesh.split_rank
        self.coming: Tensor | None = None
        self._under_way: AsyncAllGather | None = None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def send(self, x: Tensor) -> Tensor:
        """Begin to exchange ``x``; what is returned is the other's once ``wait`` has been."""
        # maps as they lie in memory, channels last, so that nothing is copied to be sent
        packed = x.permute(0, 2, 3, 1) if x.dim() == 4 else x
        self._under_way = AsyncAllGather(packed, self.group)
        theirs = self._under_way.output()[self.other]
        return theirs.permute(0, 3, 1, 2) if x.dim() == 4 else theirs

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def wait(self) -> None:
        assert self._under_way is not None
        self._under_way.wait()
        self._under_way = None


class _Leave(torch.autograd.Function):
    """Forward: send one's own. Backward: the gradient of it has arrived from the other tower."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, line: _Line) -> Tensor:
        ctx.line = line
        line.coming = line.send(x)
        return x.new_empty(()).expand_as(x)  # stands for what is coming, and takes no memory

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        ctx.line.wait()
        return grads[0], None


class _Arrive(torch.autograd.Function):
    """Forward: the other's has arrived. Backward: send the gradient of it, and promise one's own,
    which is there when ``_Leave`` hands it on."""

    @staticmethod
    def forward(ctx: Any, _: Tensor, line: _Line) -> Tensor:
        ctx.line = line
        line.wait()
        theirs, line.coming = line.coming, None
        assert theirs is not None
        return theirs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return ctx.line.send(grads[0]), None
