"""One weird trick: convolutions data-parallel, fully connected layers split over the replicas.

Krizhevsky 2014. Convolutions are 90 % of the arithmetic and 5 % of the parameters; fully
connected layers the other way round. So each of R processes has all convolutions and computes its
rows of the batch with them, but holds 1 / R of the outputs of fc6, fc7 and fc8, which it computes
for the rows of all. For a global batch of B images a process sends in a step, (R - 1) / R of

    features          B x 9216, all-gathered; their gradient, B x 9216, summed back (reduce-scatter)
    fc6, fc7 outputs  B x 4096 each, likewise both ways
    loss              B x 4 R numbers in float32, and B labels
    convolutions      twice their gradients (2.3 million values for ``paper``), in float32

the first two in the precision of training, where plain data parallel sends twice the gradients
of all 61 million. Gradients of the fully connected layers never travel.

A reduce-scatter is an all-to-all and a sum in float32: the same bytes, one rounding, and the same
order on every backend.

``whole`` computes the global batch at once (scheme a of the report), ``pipelined`` in R turns, for
each of which every process sends an R-th of its rows (scheme c); the features of a turn travel
under the products of the one before, and their gradient under those of the next. Gradients add up
and are applied once, so that both are the same function.
"""

import warnings
from collections.abc import Iterable
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from alexnet_dist.model.alexnet import AlexNet, GroupedLinear, TorchvisionAlexNet
from alexnet_dist.model.batch_norm import BatchNorm
from alexnet_dist.model.dropout import Dropout
from alexnet_dist.parallel.collectives import (
    AsyncAllGather,
    AsyncReduceScatter,
    all_gather,
    upcast_to_fp32,
)
from alexnet_dist.parallel.ddp import (
    PLAIN,
    GradCompression,
    averaged,
    compiled,
    on_device,
    parts,
    summing,
)
from alexnet_dist.parallel.mesh import Mesh
from alexnet_dist.parallel.precision import Precision, SyncedGradScaler, autocast
from alexnet_dist.parallel.sharded_loss import ShardedClasses, to_counts
from alexnet_dist.parallel.sharding import ShardedDropout, Sharding, ShardSpec
from alexnet_dist.parallel.waits import WAITS


class ShardedFCLayout:
    """What the loop calls when fully connected layers are split; see DataParallel for what its
    methods give.

    Args:
        model: the whole network as ``outline`` gives it, without memory.
        batch: images in a global batch.
        accumulate: parts in which it is computed, one after another.
        schedule: "whole" or "pipelined", as above.
    """

    def __init__(
        self,
        model: AlexNet | TorchvisionAlexNet,
        mesh: Mesh,
        *,
        batch: int,
        accumulate: int = 1,
        precision: Precision = "fp32",
        schedule: Literal["whole", "pipelined"] = "whole",
        compile_model: bool = False,
        compression: GradCompression = PLAIN,
    ) -> None:
        self.mesh, self.batch, self.precision = mesh, batch, precision
        self.turns = mesh.dp_size if schedule == "pipelined" else 1
        self._parts = parts(batch, mesh.dp_size, accumulate)
        self._group = mesh.group("dp")
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        convolutions, connected = model.split_features_classifier()
        self._convolutions = on_device(convolutions, mesh.device)
        self._connected = _Connected(connected, mesh).to_empty(device=mesh.device)
        held = dict(self._convolutions.named_parameters()) | self._connected.named()
        self.parameters: dict[str, nn.Parameter] = {name: held[name] for name in shapes}
        dealt = {name: shapes[name] for name in self._connected.named()}
        self.sharding = Sharding(mesh, dealt, "dp")
        self.copies: dict[str, Tensor] = {}  # none, where DataParallel may have some
        self.dropout_rows = slice(None)
        self.scaler = SyncedGradScaler(precision, mesh.device, self._group)
        self._classes = ShardedClasses(self._connected.classes, self._group)
        self._compute = compiled(self._convolutions) if compile_model else self._convolutions
        if mesh.dp_size > 1:
            self._compute = averaged(self._compute, mesh, compression)
        self.description = (
            f"fully connected layers split over {mesh.dp_size} processes, the global batch "
            + ("at once" if self.turns == 1 else f"in {self.turns} turns")
            + (f", gradients sent as {compression.kind}" if compression.kind != "none" else "")
        )

    def forward_backward(
        self, images: Tensor, labels: Tensor, masks: Iterable[Tensor] = ()
    ) -> Tensor:
        self._compute.train()
        self._connected.train()
        replicas, masks = self.mesh.dp_size, tuple(masks)
        result = torch.zeros(2, dtype=torch.float64, device=images.device)
        for rows in self._parts:
            stretch = slice(rows.start * replicas, min(rows.stop * replicas, self.batch))
            count, some = stretch.stop - stretch.start, [mask[stretch] for mask in masks]
            with summing(self._compute, last=rows is self._parts[-1]):
                result += self._pass(images[rows], labels[rows], some, count)
        return result * (self.mesh.rank == 0)

    def _pass(self, images: Tensor, labels: Tensor, masks: list[Tensor], count: int) -> Tensor:
        """``masks`` are those of all ``count`` images of the part, whose rows of this process the
        others are."""
        replicas = self.mesh.dp_size
        with autocast(self.precision, self.mesh.device):
            features = self._compute(images)
        most = -(-count // replicas)
        turn = -(-most // self.turns)  # rows of each process
        sent, labels = features.detach(), self._labels(labels, most)[:count]
        result = torch.zeros(2, dtype=torch.float64, device=images.device)

        gradients = []
        with autocast(self.precision, self.mesh.device):  # one, so that weights are cast once
            coming = _rows(sent[:turn], min(turn, most), self._group)
            for first in range(0, most, turn):
                # row i of process r is image i * R + r: a turn is a stretch of the part
                stretch = slice(first * replicas, min((first + turn) * replicas, count))
                x = coming.wait().transpose(0, 1).flatten(0, 1)
                x = x[: stretch.stop - stretch.start].requires_grad_()
                after = first + turn
                if after < most:
                    next_turn = min(turn, most - after)
                    coming = _rows(sent[after : after + next_turn], next_turn, self._group)
                scores = self._connected(x, [mask[stretch] for mask in masks])
                total, best = self._classes.cross_entropy(scores, labels[stretch])
                self.scaler.scale(total / self.batch).backward()
                assert x.grad is not None
                gradients.append(_sums(x.grad, min(turn, most - first), self._group))
                right = (best == labels[stretch]).sum()
                result += torch.stack([total.detach().double(), right.double()])
        gradient = torch.cat([part.wait() for part in gradients])[: len(features)]
        # the sum over all images' losses has arrived, of which DDP will take the mean
        features.backward((gradient * replicas).to(features.dtype))
        if replicas > 1:
            WAITS.end()
        return result

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        features, counts = self._features(images)
        scores = self._classes.gather_logits(self._scores(features))
        return scores.split(counts)[self.mesh.dp_rank]

    @torch.no_grad()
    def eval_counts(self, images: Tensor, labels: Tensor) -> Tensor:
        features, counts = self._features(images)
        padded = self._labels(labels, max(counts), ordered=False)
        everyone = torch.cat([row[:n] for row, n in zip(padded, counts, strict=True)])
        if len(everyone) == 0:
            return torch.zeros(4, dtype=torch.float64, device=labels.device)
        found = self._classes.label_ranks(self._scores(features), everyone)
        return to_counts(*found) * (self.mesh.rank == 0)

    def _labels(self, labels: Tensor, most: int, ordered: bool = True) -> Tensor:
        """The labels of all processes with padding: in the global batch's order, or [R, most]."""
        padded = labels.new_full((most,), -1)
        padded[: len(labels)] = labels
        everyone = all_gather(padded, self._group)
        return everyone.t().flatten() if ordered else everyone

    def _features(self, images: Tensor) -> tuple[Tensor, list[int]]:
        """In evaluation: the features of all processes' images, and how many each has."""
        mine = torch.tensor([len(images)], device=images.device)
        counts: list[int] = all_gather(mine, self._group)[:, 0].tolist()
        self._convolutions.eval()
        some = images if len(images) else images.new_zeros(1, *images.shape[1:])
        with autocast(self.precision, self.mesh.device):
            features = self._convolutions(some)[: len(images)]
        padded = features.new_zeros(max(counts), features.shape[1])
        padded[: len(features)] = features
        everyone = all_gather(padded, self._group)
        return torch.cat([rows[:n] for rows, n in zip(everyone, counts, strict=True)]), counts

    def _scores(self, features: Tensor) -> Tensor:
        self._connected.eval()
        with autocast(self.precision, self.mesh.device):
            return upcast_to_fp32(self._connected(features, ()))


class _Connected(nn.Module):
    """This process's outputs of the fully connected layers.

    Input: [n, features], whole. Output: [n, own classes].
    """

    def __init__(self, layers: dict[str, nn.Module], mesh: Mesh) -> None:
        super().__init__()
        self.names: list[str] = []
        self.layers = nn.ModuleList()
        split: ShardSpec | None = None  # how the activations lie between the layers
        for name, layer in layers.items():
            if isinstance(layer, (nn.Linear, GroupedLinear)):
                if split is not None:
                    self._add("", _Whole(split, mesh.group("dp")))
                split = ShardSpec(len(layer.weight), mesh.dp_size, mesh.dp_rank)
                self._add(name, _share_of(layer, split))
            elif isinstance(layer, Dropout) and split is not None:
                self._add("", ShardedDropout(split, layer.p, layer.scaling))
            elif isinstance(layer, BatchNorm) and split is not None:  # sees the images of all
                self._add(name, BatchNorm(len(split), layer.eps, layer.momentum))
            else:
                self._add("", layer)
        assert split is not None
        self.classes = split

    def _add(self, name: str, layer: nn.Module) -> None:
        self.names.append(name)
        self.layers.append(layer)

    def named(self) -> dict[str, nn.Parameter]:
        """Its parameters, by the names that they have in the network."""
        return {
            f"{name}.{inner}": parameter
            for name, layer in zip(self.names, self.layers, strict=True)
            for inner, parameter in layer.named_parameters()
        }

    def forward(self, x: Tensor, masks: Iterable[Tensor]) -> Tensor:
        remaining = iter(masks)
        for layer in self.layers:
            x = layer(x, next(remaining, None)) if isinstance(layer, Dropout) else layer(x)
        return x


def _share_of(layer: nn.Linear | GroupedLinear, share: ShardSpec) -> nn.Module:
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about a layer without outputs
        if isinstance(layer, GroupedLinear):
            return _TowerLinearShare(layer, share)
        return nn.Linear(layer.in_features, len(share))


class _TowerLinearShare(nn.Module):
    """Some outputs of a layer of which each tower reads only its own half (net 150)."""

    def __init__(self, layer: GroupedLinear, share: ShardSpec) -> None:
        super().__init__()
        outputs, inputs = layer.weight.shape
        self.weight = nn.Parameter(torch.empty(len(share), inputs))
        self.bias = nn.Parameter(torch.empty(len(share)))
        one = outputs // layer.groups
        bounds = [(t * one, (t + 1) * one) for t in range(layer.groups)]
        span = share.slice
        self.sizes = [max(0, min(span.stop, b) - max(span.start, a)) for a, b in bounds]

    def forward(self, x: Tensor) -> Tensor:
        inputs = x.chunk(len(self.sizes), 1)
        weights, biases = self.weight.split(self.sizes), self.bias.split(self.sizes)
        return torch.cat([F.linear(*part) for part in zip(inputs, weights, biases, strict=True)], 1)


def _rows(rows: Tensor, count: int, group: dist.ProcessGroup) -> AsyncAllGather:
    """Send ``count`` rows to all; the last one is of nothing where R does not divide the batch."""
    missing = count - len(rows)
    return AsyncAllGather(F.pad(rows, (0, 0, 0, missing)) if missing else rows, group)


def _sums(gradient: Tensor, count: int, group: dist.ProcessGroup) -> AsyncReduceScatter:
    """Send the gradients of features, image i * R + r, to be summed as row i of process r."""
    missing = count * group.size() - len(gradient)
    padded = F.pad(gradient, (0, 0, 0, missing)) if missing else gradient
    return AsyncReduceScatter(padded.unflatten(0, (count, group.size())).transpose(0, 1), group)


class _Whole(nn.Module):
    """The outputs of all processes, of a layer that is split: [n, own] to [n, whole]."""

    def __init__(self, share: ShardSpec, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.share, self.group = share, group

    def forward(self, x: Tensor) -> Tensor:
        whole: Tensor = _Columns.apply(x, self.share, self.group)
        return whole


class _Columns(torch.autograd.Function):
    """Columns of all, forward; sums of their gradients, each to its own process, backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, share: ShardSpec, group: dist.ProcessGroup) -> Tensor:
        ctx.share, ctx.group = share, group
        # in blocks of equal width; what is added lies behind the last column of all
        padded = F.pad(x, (0, share.max_shard_size - len(share)))
        return all_gather(padded, group).transpose(0, 1).flatten(1)[:, : share.full_size]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        share, (grad,) = ctx.share, grads
        blocks = F.pad(grad, (0, share.max_shard_size * share.num_shards - share.full_size))
        sent = blocks.unflatten(1, (share.num_shards, share.max_shard_size)).transpose(0, 1)
        own = AsyncReduceScatter(sent, ctx.group).wait()[:, : len(share)]
        return own.to(grad.dtype), None, None
