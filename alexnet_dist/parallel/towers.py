"""The paper's two GPUs: each of two processes holds one tower and never the other's kernels.

Krizhevsky et al. 2012, section 3.5 and figure 2. A tower is half of the kernels of every layer.
Layers that are grouped convolutions on one device read their own tower only, and become plain ones
here; layers that read both towers first exchange activations with the other process:

    layer      a process holds   reads      sends, for each of its b images
    conv1      48 of 96          the image  -
    conv2      128 of 256        its own    -
    conv3      192 of 384        both       128 x 13 x 13 maps (behind pool2), and their gradient
    conv4, 5   192, 128          its own    -
    fc6        2048 of 4096      both       128 x 6 x 6 maps (behind pool5), and their gradient
    fc7        2048 of 4096      both       2048 activations, and their gradient
    fc8        half the classes  both       2048 activations, and their gradient
    loss       -                 both       four numbers

All of it is sent between the two (dimension "mp" of the mesh) in the precision of training: 121 KB
an image in bf16 for ``paper``, forward and backward together. Gradients are averaged over the
replicas (dimension "dp") by DistributedDataParallel, each tower with its like.

An exchange is an all-gather of two. Backward, the gradients are exchanged the same way, and
autograd adds the one that arrives to one's own. While the other tower's half is in flight, the
product with one's own half is computed, forward and backward.

The authors' source keeps fc8 on one GPU, since its layers are placed as a whole and a softmax wants
all classes at once. Here it is split like the others: the loss needs four numbers of each side, no
process has more to do than the other, and its weights are halved as well.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from alexnet_dist.model import Network
from alexnet_dist.model.dropout import Dropout
from alexnet_dist.model.layers import GroupedLinear
from alexnet_dist.model.lrn import LocalResponseNorm
from alexnet_dist.parallel.collectives import AsyncAllGather, TimedGroup, with_backward
from alexnet_dist.parallel.sharding import ShardSpec, shard_parameters


def split_model(model: Network, group: TimedGroup) -> dict[str, torch.Size]:
    """Replace each layer of ``model``, a network of two towers on the meta device, by the tower of
    it of this process of two; the full shapes of the parameters, by name."""
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    for name, layer in list(model.named_children()):
        half = shard_parameters(layer, group)
        split = _SPLIT.get(type(layer))
        setattr(model, name, split(half, group) if split else half)
    return shapes


class _ExchangeLayer(nn.Module):
    """A layer that reads both towers. Input: this tower's activations [b, C / 2, ...].

    Args:
        half: the layer with this tower's outputs.
    """

    def __init__(self, half: nn.Conv2d | nn.Linear, group: TimedGroup) -> None:
        super().__init__()
        self.weight, self.bias, self.group = half.weight, half.bias, group
        self.product: Callable[..., Tensor] = F.linear
        if isinstance(half, nn.Conv2d):
            self.product = partial(F.conv2d, stride=half.stride, padding=half.padding)

    def forward(self, x: Tensor) -> Tensor:
        """The order of these lines is what overlaps: forward, the other half is in flight under the
        product with one's own; backward, autograd goes through them from the last to the first, and
        the gradient that the other tower waits for is in flight under that product's backward."""
        halves, rank = self.weight.split(self.weight.shape[1] // 2, 1), self.group.rank
        exchange = _PeerExchange(self.group)
        in_flight = exchange.start(x)
        own = self.product(x, halves[rank], self.bias)
        theirs = exchange.finish(in_flight)
        return own + self.product(theirs, halves[1 - rank], None)


class _PeerExchange:
    """The exchange of one tensor between two towers: ``start``, then ``finish``.

    The backward pass comes in reverse: that of ``finish`` sends the gradient, and that of ``start``
    waits for the other tower's.
    """

    def __init__(self, group: TimedGroup) -> None:
        self._group = group

    def start(self, x: Tensor) -> Tensor:
        """What the other tower's ``x`` will be received in."""
        return with_backward(x, self._send, self._wait)

    def finish(self, in_flight: Tensor) -> Tensor:
        """The other tower's values, of what ``start`` returned."""
        return with_backward(in_flight, self._wait, self._send)

    def _send(self, x: Tensor) -> Tensor:
        # maps as they lie in memory, channels last, so that nothing is copied to be sent
        packed = x.permute(0, 2, 3, 1) if x.dim() == 4 else x
        self._pending = AsyncAllGather(packed, self._group)
        theirs = self._pending.output[1 - self._group.rank]
        # .data, since autograd would take what arrives for a change of a view in place
        return (theirs.permute(0, 3, 1, 2) if x.dim() == 4 else theirs).data

    def _wait(self, received: Tensor) -> Tensor:
        self._pending.wait()
        del self._pending
        return received


def _ungroup(half: Any, _: TimedGroup) -> nn.Module:
    """What was grouped by towers is one group in a tower."""
    half.groups = 1
    return half


_SPLIT: dict[type[nn.Module], Callable[[Any, TimedGroup], nn.Module]] = {
    nn.Conv2d: lambda half, group: (_ungroup if half.groups == 2 else _ExchangeLayer)(half, group),
    nn.Linear: _ExchangeLayer,
    GroupedLinear: _ungroup,
    LocalResponseNorm: _ungroup,
    Dropout: lambda layer, group: layer.shard(ShardSpec(layer.units, group).slice),
}
"""What a tower has of a layer besides its half of the parameters, by the layer's type. Others serve
as they are: the first convolution reads the image, which both processes have."""
