"""Data parallel: each replica computes its rows of the batch, and gradients are averaged.

A replica is a process with the whole network, or, under towers.py, a pair with a tower each.

Batch normalisation has the statistics of all rows: of each layer 2 C + 1 numbers for C features,
and as many gradients, are summed in a step, in float32. They travel in the group of the gradients,
one after another with these, since NCCL bears two groups at once only with care.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from alexnet_dist.model.batch_norm import BatchNorm
from alexnet_dist.parallel.collectives import all_reduce_autograd, upcast_to_fp32
from alexnet_dist.parallel.copies import WithCopies
from alexnet_dist.parallel.mesh import Mesh
from alexnet_dist.parallel.precision import Precision, SyncedGradScaler, autocast
from alexnet_dist.parallel.sharded_loss import ShardedClasses, to_counts
from alexnet_dist.parallel.sharding import Sharding, ShardSpec
from alexnet_dist.parallel.waits import WAITS, wait_from_last_gradient


@dataclass(frozen=True)
class GradCompression:
    """How gradients travel between replicas: as they are, in 16 bits, or as PowerSGD's matrices of
    ``rank`` (Vogels et al. 2019) after ``start`` steps and the two passes of the warm-up."""

    kind: Literal["none", "bf16", "fp16", "powersgd"] = "none"
    rank: int = 4
    start: int = 1000


PLAIN = GradCompression()
WARM_UP = 2
"""Backward passes before the first step, which change nothing.

After its first backward DDP sorts its buckets anew, by the order in which gradients came; from
then on sums run in another order. A resumed run that began with that first pass would differ from
an uninterrupted one in the last bits.
"""


class DDPLayout:
    """What the loop calls when every replica computes the whole network on its own rows.

    Args:
        model: the network, or this process's tower of it; one without memory gets its own here,
            and waits for ``sharding.fill``.
        batch: images in a global batch.
        accumulate: parts in which it is computed, one after another.
        classes: those whose scores ``model`` gives.
        sharding: None where each process has the whole network.
        weight_copies: in bf16, whether weights have copies that are not cast in each step.

    Attributes:
        parameters: by name, ordinary local tensors.
        scaler: leaves out updates that are not finite, in fp16 or where it is told to guard.
        description: a line for people.
        sharding: how the parameters lie on the mesh.
        dropout_rows: the positions of the global batch whose dropout masks it wants.
        copies: those of weights, by name, which an update may write; or none.
    """

    def __init__(
        self,
        model: nn.Module,
        mesh: Mesh,
        *,
        batch: int,
        accumulate: int = 1,
        precision: Precision = "fp32",
        compile_model: bool = False,
        compression: GradCompression = PLAIN,
        classes: ShardedClasses | None = None,
        sharding: Sharding | None = None,
        weight_copies: bool = False,
    ) -> None:
        self.mesh, self.batch, self.precision = mesh, batch, precision
        self.model = on_device(model, mesh.device)
        self.parameters: dict[str, nn.Parameter] = dict(model.named_parameters())
        self.sharding = sharding or Sharding(mesh, {}, "dp")
        self.dropout_rows = mesh.batch_slice
        self._parts = parts(batch, mesh.dp_size, accumulate)
        self._classes = classes
        group = mesh.group("mp") if mesh.split_size > 1 else None
        self.scaler = SyncedGradScaler(precision, mesh.device, group)
        self._lowered = WithCopies(self.model) if weight_copies else None
        self.copies = self._lowered.copies if self._lowered else {}
        network = self._lowered or self.model
        self._compute = compiled(network) if compile_model else network
        if mesh.dp_size > 1:
            self._compute = averaged(self._compute, mesh, compression)
        alone = (
            "the whole network in a process" if mesh.split_size == 1 else "a tower in each process"
        )
        self.description = f"{alone}, {mesh.dp_size} to share the images"
        if mesh.dp_size == 1:
            self.description = alone
        elif compression.kind != "none":
            self.description += f", gradients sent as {compression.kind}"

    def forward_backward(
        self, images: Tensor, labels: Tensor, masks: Iterable[Tensor] = ()
    ) -> Tensor:
        """Gradients of the global batch's mean loss, from this replica's rows of it.

        Returns:
            float64 [2], on the device: the summed (not mean) loss of this replica's images, and
            how many of them have the best label right; zeros on all but one of its processes.
            Both sum over the processes, and the sums do not depend on their order: float32
            values, added in float64.
        """
        self.model.train()
        if self._lowered:
            self._lowered.refresh()
        masks = tuple(masks)
        result = torch.zeros(2, dtype=torch.float64, device=images.device)
        for rows in self._parts:
            with summing(self._compute, last=rows is self._parts[-1]):
                result += self._pass(images[rows], labels[rows], [mask[rows] for mask in masks])
        return result * self.mesh.is_replica_leader

    def _pass(self, images: Tensor, labels: Tensor, masks: list[Tensor]) -> Tensor:
        with autocast(self.precision, self.mesh.device):
            scores = self._compute(images, tuple(masks))
        total, best = self.classes(scores).cross_entropy(scores, labels)
        # DDP takes the mean over replicas, which may have different numbers of images
        self.scaler.scale(total * (self.mesh.dp_size / self.batch)).backward()
        if self.mesh.dp_size > 1:
            WAITS.end()
        with torch.no_grad():
            right = (best == labels).sum()
            return torch.stack([total.detach().double(), right.double()])

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """float32 [b, classes], as evaluation computes them; all processes call it together."""
        scores = self._scores(images)
        return self.classes(scores).gather_logits(scores)

    @torch.no_grad()
    def eval_counts(self, images: Tensor, labels: Tensor) -> Tensor:
        """float64 [4], on the device: summed loss, images whose best label is right, those with
        the right one among the best five (of fewer classes: all), and images; they sum over the
        processes."""
        if len(images) == 0:
            return torch.zeros(4, dtype=torch.float64, device=labels.device)
        scores = self._scores(images)
        return (
            to_counts(*self.classes(scores).label_ranks(scores, labels))
            * self.mesh.is_replica_leader
        )

    def classes(self, scores: Tensor) -> ShardedClasses:
        return self._classes or ShardedClasses(ShardSpec(scores.shape[1], 1, 0))

    def _scores(self, images: Tensor) -> Tensor:
        self.model.eval()
        with autocast(self.precision, self.mesh.device):
            return upcast_to_fp32(self.model(images))


def on_device(model: nn.Module, device: torch.device) -> nn.Module:
    """``model`` on ``device``, channels last; with memory, if it had none, but no values yet."""
    if any(parameter.is_meta for parameter in model.parameters()):
        model = model.to_empty(device=device)
    return model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def compiled(module: nn.Module) -> nn.Module:
    """``module`` under torch.compile."""
    result = torch.compile(module)
    assert isinstance(result, nn.Module)
    return result


def parts(batch: int, replicas: int, count: int) -> list[slice]:
    """The rows of a replica in each of ``count`` parts of the global batch.

    Row i of replica r is image i * R + r, so that a part is a stretch of the batch. The last part
    is never smaller than another: there a replica may have a row less.
    """
    most = -(-batch // replicas)
    return [slice(*ends) for ends in pairwise(most * at // count for at in range(count + 1))]


def summing(module: nn.Module, *, last: bool) -> AbstractContextManager[None]:
    """Within it gradients of ``module`` add up in their process, to travel with those of the
    ``last`` part."""
    if last or not isinstance(module, DistributedDataParallel):
        return nullcontext()
    return module.no_sync()


def averaged(
    module: nn.Module, mesh: Mesh, compression: GradCompression = PLAIN
) -> DistributedDataParallel:
    """``module`` with gradients that are averaged over the replicas, and with batch normalisations
    that have the statistics of all rows."""
    group = dist.group.WORLD if mesh.split_size == 1 else mesh.group("dp")
    for layer in module.modules():
        if isinstance(layer, BatchNorm):
            layer.all_reduce = partial(all_reduce_autograd, group=group)
    wait_from_last_gradient(module, mesh.device)
    # views, because a second copy of 61 million gradients costs a pass over memory; the two large
    # layers fill a bucket each, whose sums run under the convolutions' backward
    parallel = DistributedDataParallel(
        module,
        device_ids=[mesh.device] if mesh.device.type == "cuda" else None,
        process_group=group,
        init_sync=False,  # all have drawn, or read, the same weights
        gradient_as_bucket_view=True,
        bucket_cap_mb=32,
    )
    if compression.kind == "bf16":
        parallel.register_comm_hook(group, default_hooks.bf16_compress_hook)
    elif compression.kind == "fp16":
        parallel.register_comm_hook(group, default_hooks.fp16_compress_hook)
    elif compression.kind == "powersgd":
        state = powerSGD_hook.PowerSGDState(
            process_group=group,
            matrix_approximation_rank=compression.rank,
            start_powerSGD_iter=compression.start + WARM_UP,
        )
        parallel.register_comm_hook(state, _power_sgd)
    return parallel


def _power_sgd(
    state: powerSGD_hook.PowerSGDState, bucket: dist.GradBucket
) -> torch.futures.Future[Tensor]:
    """torch's hook, one bucket after another.

    Its second all-reduce is started where the first one ends, under gloo a thread of gloo's, so
    that with two buckets under way processes start theirs in different orders.
    """
    future = powerSGD_hook.powerSGD_hook(state, bucket)
    if bucket.buffer().device.type == "cpu":
        WAITS.begin(bucket.buffer().device)
        future.wait()
        WAITS.end()
    return future
