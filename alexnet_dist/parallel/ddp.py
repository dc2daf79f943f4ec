"""Data parallel: each replica computes its slice of the batch, and gradients are averaged.

A replica is a process with the full network or, with towers.py, two processes with a tower each.

torch's DistributedDataParallel sends gradients in buckets of 32 MB, each when its last gradient is
there, under the backward pass of the layers before: for R replicas 2 (R - 1) / R times the bytes of
all gradients. Batch normalization has the statistics of the global batch: of each layer of C
features 2 C + 1 values, and as many gradients, are summed over the replicas in float32. They are
sent in the group of the gradients, one after another with these, since NCCL handles two groups at
once only with care.
"""

import math
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from alexnet_dist.model import Network, dropout_layers, make_dropout_masks
from alexnet_dist.model.batch_norm import BatchNorm
from alexnet_dist.parallel.collectives import CommTimer, TimedGroup, all_reduce_autograd
from alexnet_dist.parallel.mesh import Mesh
from alexnet_dist.parallel.precision import (
    Precision,
    SyncedGradScaler,
    autocast,
    compile_module,
)
from alexnet_dist.parallel.sharded_loss import cross_entropy, eval_counts
from alexnet_dist.parallel.sharding import Sharding, ShardSpec

DDP_WARMUP_PASSES = 2
"""Backward passes before the first step, which change nothing.

After its first backward DDP sorts its buckets by the order in which gradients came; from then on
sums are added in another order. A resumed run that started with that first pass would differ from
an uninterrupted one in the last bits.
"""


@dataclass(frozen=True)
class LayoutConfig:
    """The options of a layout; see config.py."""

    batch_size: int  # images in a global batch
    grad_accum_steps: int = 1  # microbatches in which it is computed, one after another
    precision: Precision = "fp32"
    towers: int = 1  # processes of a replica, as in the mesh (towers.py)
    fc: Literal["replicated", "sharded"] = "replicated"  # over all processes (sharded_fc.py)
    # how gradients are sent: as they are, in 16 bits, or as PowerSGD's matrices of rank
    # ``powersgd_rank`` (Vogels et al. 2019) after ``powersgd_start`` steps
    grad_compression: Literal["none", "bf16", "fp16", "powersgd"] = "none"
    powersgd_rank: int = 4
    powersgd_start: int = 1000
    compile: bool = False  # whether training steps run under torch.compile
    skip_nonfinite: bool = False  # whether updates whose gradients are not finite are skipped


class DDPLayout:
    """A network on the processes of a mesh, as the training loop calls it: every replica computes
    it on its own slice of the batch.

    Args:
        model: this process's part of the network, on the meta device.
        sharding: how the parameters lie on the mesh.

    Attributes:
        parameters: by name, plain local tensors, without values until ``sharding`` or a checkpoint
            loads them.
        scaler: skips updates that are not finite, in fp16 or where the config asks for it; else
            None.
        comm_timer: how long this process has waited for others.
        num_parameters: of the full network, all that are trained.
        description: one line for people.
    """

    def __init__(
        self, model: Network, mesh: Mesh, config: LayoutConfig, sharding: Sharding, timer: CommTimer
    ) -> None:
        self.mesh, self.batch_size, self.precision = mesh, config.batch_size, config.precision
        self.sharding, self.comm_timer = sharding, timer
        self._model = model.to_empty(device=mesh.device).to(memory_format=torch.channels_last)
        self.parameters = dict(self._model.named_parameters())
        trained = [name for name, p in self.parameters.items() if p.requires_grad]
        shapes = [sharding.shapes.get(name, self.parameters[name].shape) for name in trained]
        self.num_parameters = sum(map(math.prod, shapes))
        self._classes = ShardSpec(shapes[-1][0], sharding.group)  # the last layer's bias
        self._data_parallel = wrap_ddp(self._replicated_part(), mesh, config, timer)
        ddp = self._data_parallel
        self._no_sync = ddp.no_sync if isinstance(ddp, DistributedDataParallel) else nullcontext
        self.scaler: SyncedGradScaler | None = None
        if config.precision == "fp16" or config.skip_nonfinite:
            self.scaler = SyncedGradScaler(
                mesh.device,
                sharding.group,
                fp16=config.precision == "fp16",
                skip=config.skip_nonfinite,
            )
        self._autocast = autocast(config.precision, mesh.device)
        # processes of a group count the same images: one of them reports, so that sums are right
        self._counts = sharding.group is None or sharding.group.rank == 0
        self._microbatches = microbatch_slices(
            config.batch_size, mesh.dp_size, config.grad_accum_steps
        )
        self._dropout_rows = mesh.batch_slice
        # DDP averages; the loss is divided by the global batch, so that gradients have to be summed
        self._undo_mean = mesh.dp_size
        part = "a tower" if config.towers > 1 else "the full network"
        if config.fc == "sharded":
            part = "a shard of the fully connected layers"
        self.description = (
            f"{part} in each process, {mesh.dp_size} replicas, gradient compression "
            f"{config.grad_compression}"
        )

    def dropout_masks(self, seed: int, step: int) -> tuple[Tensor, ...]:
        """The masks that ``forward_backward`` takes in the step that comes after ``step`` others:
        for each dropout layer bool [rows, units], as far as this process computes them."""
        return make_dropout_masks(
            dropout_layers(self._model),
            seed=seed,
            step=step,
            batch=self.batch_size,
            rows=self._dropout_rows,
            device=self.mesh.device,
        )

    def forward_backward(
        self, images: Tensor, labels: Tensor, masks: Iterable[Tensor] = ()
    ) -> Tensor:
        """Compute the gradients of the global batch's mean loss, from this replica's slice of it.

        Args:
            images: [b, 3, H, W], those at ``mesh.batch_slice`` of the global batch.
            labels: int64 [b].
            masks: from ``dropout_masks``.

        Returns:
            float64 [2] on the device: the summed (not mean) loss, and how many images have their
            label as the highest logit. To be summed over all processes: float32 values added in
            float64, so that the sums do not depend on the order.
        """
        self._model.train()
        masks = tuple(masks)
        result = torch.zeros(2, dtype=torch.float64, device=images.device)
        for rows in self._microbatches:
            last = rows is self._microbatches[-1]  # DDP sends gradients in the last one only
            with nullcontext() if last else self._no_sync():
                with self._autocast:
                    logits, targets = self._forward(images[rows], labels[rows], masks, rows)
                loss, best = self._loss(logits, targets)
                scaled = loss * (self._undo_mean / self.batch_size)
                if self.scaler:
                    scaled = self.scaler.scale(scaled)
                scaled.backward()
            if self.mesh.world_size > 1:
                self.comm_timer.stop()  # which the last gradient has started
            correct = (best == targets).sum()
            result += torch.stack([loss.detach().double(), correct.double()])
        return result * self._counts

    def _forward(
        self, images: Tensor, labels: Tensor, masks: tuple[Tensor, ...], rows: slice
    ) -> tuple[Tensor, Tensor]:
        """Logits [n, own classes] and labels [n] of a microbatch, this replica's ``rows``."""
        return self._data_parallel(images, tuple(mask[rows] for mask in masks)), labels

    def _loss(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Summed loss, and the class of each image's highest logit [n]."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self._classes.group is not None:
            return cross_entropy(logits, labels, self._classes)
        return F.cross_entropy(logits, labels, reduction="sum"), logits.argmax(1)

    def _forward_eval(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, slice]:
        """In evaluation: logits [n, own classes] and labels [n] of all images whose classes are
        counted together, and which of them are this process's."""
        if len(images) == 0:
            return images.new_zeros(0, len(self._classes)), labels, slice(None)
        return self._model(images), labels, slice(None)

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """float32 [b, classes] of this process's images, in evaluation. All processes call it
        together; each may have another number of images, even none."""
        self._model.eval()
        with self._autocast:
            none = torch.zeros(len(images), dtype=torch.int64, device=images.device)
            logits, _, rows = self._forward_eval(images, none)
        return self._classes.gather(logits.float())[rows]

    @torch.no_grad()
    def eval_counts(self, images: Tensor, labels: Tensor) -> Tensor:
        """``sharded_loss.eval_counts``, float64 [4] on the device, to be summed over all processes.
        Called as ``logits``."""
        self._model.eval()
        with self._autocast:
            logits, targets, _ = self._forward_eval(images, labels)
        if len(logits) == 0:
            return torch.zeros(4, dtype=torch.float64, device=labels.device)
        return eval_counts(logits.float(), targets, self._classes) * self._counts

    def warm_up(self, image_size: int) -> None:
        """DDP_WARMUP_PASSES on images of zeros, where there are several processes; parameters do
        not change, and no time is counted."""
        if self.mesh.world_size == 1:
            return
        count, device = self.mesh.local_batch(self.batch_size), self.mesh.device
        images = torch.zeros(count, 3, image_size, image_size, device=device)
        images = images.to(memory_format=torch.channels_last)
        labels = torch.zeros(count, dtype=torch.int64, device=device)
        averages = [p for p in self.parameters.values() if not p.requires_grad]  # batch norm's
        before = [average.detach().clone() for average in averages]
        for _ in range(DDP_WARMUP_PASSES):
            self.forward_backward(images, labels, self.dropout_masks(0, 0))
        self.comm_timer.pop_seconds()
        with torch.no_grad():
            for average, value in zip(averages, before, strict=True):
                average.copy_(value)
        for parameter in self.parameters.values():
            parameter.grad = None

    def _replicated_part(self) -> nn.Module:
        """The part inside DDP; a layout may leave layers out that replicas do not have alike."""
        return self._model


def microbatch_slices(batch: int, replicas: int, count: int) -> list[slice]:
    """The rows of a replica in each of ``count`` microbatches of the global batch.

    Row i of replica r is image i * R + r, so that a microbatch is a contiguous piece of the batch.
    The last one is never smaller than another: there a replica may have one row less.
    """
    rows = -(-batch // replicas)
    return [slice(*ends) for ends in pairwise(rows * at // count for at in range(count + 1))]


def sync_batch_norms(model: nn.Module, mesh: Mesh, timer: CommTimer) -> None:
    """Where there are several replicas, give each BatchNorm in ``model`` the statistics of all, as
    torch's SyncBatchNorm.convert_sync_batchnorm does."""
    for layer in model.modules() if mesh.dp_size > 1 else ():
        if isinstance(layer, BatchNorm):
            group = TimedGroup(mesh.group("dp"), timer)
            layer.all_reduce = partial(all_reduce_autograd, group=group)


def wrap_ddp(module: nn.Module, mesh: Mesh, config: LayoutConfig, timer: CommTimer) -> nn.Module:
    """``module`` as training calls it: compiled if asked for, and in DDP where there are several
    replicas."""
    called = compile_module(module) if config.compile else module
    if mesh.dp_size == 1:
        return called
    for parameter in module.parameters():
        if parameter.requires_grad:  # the last of these calls starts the wait for DDP's sums
            parameter.register_post_accumulate_grad_hook(lambda _: timer.start())
    # views, because a second copy of 61 million gradients costs a pass over memory; the two large
    # layers fill a bucket each, whose sums run under the convolutions' backward
    wrapped = DistributedDataParallel(
        called,
        device_ids=[mesh.device] if mesh.device.type == "cuda" else None,
        process_group=mesh.group("dp"),
        init_sync=False,  # all have sampled, or read, the same weights
        gradient_as_bucket_view=True,
        bucket_cap_mb=32,
    )
    half = {"bf16": default_hooks.bf16_compress_hook, "fp16": default_hooks.fp16_compress_hook}
    if hook := half.get(config.grad_compression):
        wrapped.register_comm_hook(mesh.group("dp"), hook)
    elif config.grad_compression == "powersgd":
        state = powerSGD_hook.PowerSGDState(
            process_group=mesh.group("dp"),
            matrix_approximation_rank=config.powersgd_rank,
            start_powerSGD_iter=config.powersgd_start + DDP_WARMUP_PASSES,
        )
        wrapped.register_comm_hook((state, timer), _power_sgd_hook)
    return wrapped


def _power_sgd_hook(
    state: tuple[powerSGD_hook.PowerSGDState, CommTimer], bucket: dist.GradBucket
) -> torch.futures.Future[Tensor]:
    """torch's hook, on CPUs one bucket after another.

    Its second all-reduce is started where the first one ends, under gloo by a thread of gloo's, so
    that with two buckets in flight processes would start theirs in different orders.
    """
    power_sgd, timer = state
    future = powerSGD_hook.powerSGD_hook(power_sgd, bucket)
    if bucket.buffer().device.type == "cpu":
        timer.start()
        future.wait()
        timer.stop()
    return future
