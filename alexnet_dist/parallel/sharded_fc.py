"""One weird trick: data-parallel convolutions, fully connected layers sharded over the replicas.

Krizhevsky 2014, scheme a of its section 4. Convolutions are 90 % of the arithmetic and 5 % of the
parameters; fully connected layers the other way round. So each of R processes has all convolutions
and computes its slice of the batch with them, but holds 1 / R of the outputs of fc6, fc7 and fc8,
which it computes for the full batch. For a global batch of B images a process sends in a step,
(R - 1) / R of

    features          B x 9216, all-gathered; their gradient, B x 9216, reduce-scattered
    fc6, fc7 outputs  B x 4096 each, likewise both ways
    loss              B x 4 R numbers in float32, and B labels
    convolutions      twice their gradients (2.3 million values for ``paper``), in float32

the first two in the precision of training, where plain data parallel sends twice the gradients
of all 61 million. Gradients of the fully connected layers are never sent.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from alexnet_dist.model import Network
from alexnet_dist.model.alexnet import forward_layers
from alexnet_dist.model.batch_norm import BatchNorm
from alexnet_dist.model.dropout import Dropout
from alexnet_dist.model.layers import GroupedLinear
from alexnet_dist.parallel.collectives import (
    CommTimer,
    TimedGroup,
    all_gather,
    all_gather_autograd,
)
from alexnet_dist.parallel.ddp import DDPLayout, LayoutConfig
from alexnet_dist.parallel.mesh import Mesh
from alexnet_dist.parallel.sharding import Sharding, ShardSpec, shard_parameters


class ShardedFCLayout(DDPLayout):
    """Data-parallel convolutions, and a shard of the fully connected layers on each process; the
    model has been through ``shard_classifier``."""

    _features: nn.Sequential
    _classifier: dict[str, nn.Module]

    def __init__(
        self, model: Network, mesh: Mesh, config: LayoutConfig, sharding: Sharding, timer: CommTimer
    ) -> None:
        super().__init__(model, mesh, config, sharding, timer)
        assert sharding.group is not None
        self._group = sharding.group
        self._undo_mean = 1  # ``_forward`` sums the gradients of all images
        self._dropout_rows = slice(None)  # all images pass the layers that have dropout

    def _replicated_part(self) -> nn.Module:
        self._features, self._classifier = self._model.split_features_classifier()
        return self._features

    def _forward(
        self, images: Tensor, labels: Tensor, masks: tuple[Tensor, ...], rows: slice
    ) -> tuple[Tensor, Tensor]:
        # row i of process r is image i * R + r: a microbatch is a contiguous piece of the batch
        count, size = rows.stop - rows.start, self._group.size
        start, stop = rows.start * size, min(rows.stop * size, self.batch_size)
        targets = self._gather_labels(labels, count).t().flatten()
        features = _pad_rows(self._data_parallel(images), count)
        # DDP will average over all processes what is a sum over all images already
        features = all_gather_autograd(features, self._group, grad_scale=size)
        features = features.transpose(0, 1).flatten(0, 1)[: stop - start]
        masks = tuple(mask[start:stop] for mask in masks)
        logits = forward_layers(self._classifier.values(), features, masks)
        return logits, targets[: stop - start]

    def _forward_eval(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, slice]:
        local = torch.tensor([len(images)], device=images.device)
        counts: list[int] = all_gather(local, self._group)[:, 0].tolist()
        some = images if len(images) else images.new_zeros(1, *images.shape[1:])
        features = _pad_rows(self._features(some)[: len(images)], max(counts))
        gathered = zip(all_gather(features, self._group), counts, strict=True)
        features = torch.cat([rows[:n] for rows, n in gathered])
        logits = forward_layers(self._classifier.values(), features, ())
        padded = zip(self._gather_labels(labels, max(counts)), counts, strict=True)
        start = sum(counts[: self._group.rank])
        own = slice(start, start + len(images))
        return logits, torch.cat([rows[:n] for rows, n in padded]), own

    def _gather_labels(self, labels: Tensor, rows: int) -> Tensor:
        """The labels of all processes [R, rows], padded with -1."""
        return all_gather(F.pad(labels, (0, rows - len(labels)), value=-1), self._group)


def shard_classifier(model: Network, group: TimedGroup) -> dict[str, torch.Size]:
    """Replace the fully connected layers of ``model``, and those between them that know their
    width, by this process's shards; the full shapes of their parameters, by name."""
    shapes: dict[str, torch.Size] = {}
    spec: ShardSpec | None = None  # of the outputs of the last fully connected layer
    for name, layer in model.split_features_classifier()[1].items():
        shapes |= {f"{name}.{inner}": p.shape for inner, p in layer.named_parameters()}
        if isinstance(layer, (nn.Linear, GroupedLinear)):
            inputs, spec = spec, ShardSpec(len(layer.weight), group)
            model.set_submodule(name, _ShardedLinear(layer, inputs, spec))
        elif isinstance(layer, Dropout) and spec is not None:
            model.set_submodule(name, layer.shard(spec.slice))
        elif isinstance(layer, BatchNorm):
            shard_parameters(layer, group)
            layer.all_reduce = None  # it sees the images of all already
    return shapes


class _ShardedLinear(nn.Module):
    """A shard of the outputs of a fully connected layer. Output: [n, own outputs].

    Args:
        inputs: how the layer's inputs are sharded: [n, own inputs] come in, and are gathered;
            None where [n, all inputs] come in.
    """

    def __init__(
        self, full: nn.Linear | GroupedLinear, inputs: ShardSpec | None, outputs: ShardSpec
    ) -> None:
        super().__init__()
        self.inputs = inputs
        self.weight = nn.Parameter(full.weight.detach()[outputs.slice])
        self.bias = nn.Parameter(full.bias.detach()[outputs.slice])
        groups = full.groups if isinstance(full, GroupedLinear) else 1
        size, own = len(full.weight) // groups, outputs.slice
        # of the outputs of each group of the full layer, those that are in this shard
        self.sizes = [
            max(0, min(own.stop, (g + 1) * size) - max(own.start, g * size)) for g in range(groups)
        ]

    def forward(self, x: Tensor) -> Tensor:
        if self.inputs is not None:
            x = self.inputs.gather(x)
        if len(self.sizes) == 1:
            return F.linear(x, self.weight, self.bias)
        weights, biases = self.weight.split(self.sizes), self.bias.split(self.sizes)
        groups = zip(x.chunk(len(self.sizes), 1), weights, biases, strict=True)
        return torch.cat([F.linear(*each) for each in groups], 1)


def _pad_rows(x: Tensor, rows: int) -> Tensor:
    """``x`` [n, features] with zeros below, [rows, features]."""
    return F.pad(x, (0, 0, 0, rows - len(x)))
