"""Data parallel: each replica computes its slice of the batch, and gradients are averaged.

A replica is a process with the full network or, with towers.py, two processes with a tower each.

torch's DistributedDataParallel sends gradients in buckets of 32 MB, each when its last gradient is
there, under the backward pass of the layers before: for R replicas 2 (R - 1) / R times the bytes of
all gradients. Batch normalization has the statistics of the global batch: of each layer of C
features 2 C + 1 values, and as many gradients, are summed over the replicas in float32. They are
sent in the group of the gradients, one after another with these, since NCCL handles two groups at
once only with care.
"""

from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from alexnet_dist.model.alexnet import AlexNet, Network
from alexnet_dist.model.batch_norm import BatchNorm
from alexnet_dist.parallel.collectives import (
    CommTimer,
    TimedGroup,
    all_reduce_autograd,
)
from alexnet_dist.parallel.layout import Layout, LayoutConfig, materialize
from alexnet_dist.parallel.mesh import Mesh
from alexnet_dist.parallel.sharding import Sharding
from alexnet_dist.parallel.towers import split_model

DDP_WARMUP_PASSES = 2
"""Backward passes before the first step, which change nothing.

After its first backward DDP sorts its buckets by the order in which gradients came; from then on
sums are added in another order. A resumed run that started with that first pass would differ from
an uninterrupted one in the last bits.
"""


class DDPLayout(Layout):
    """Every replica computes the full network on its own slice of the batch.

    Args:
        model: the full network on the meta device, which becomes this process's own, or, where
            ``mesh.split_size`` is 2, its tower.
    """

    def __init__(self, model: Network, mesh: Mesh, config: LayoutConfig) -> None:
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        towers = mesh.split_size > 1
        pair = TimedGroup(mesh.group("mp"), CommTimer(mesh.device)) if towers else None
        super().__init__(mesh, config, list(shapes.values())[-1][0], pair)
        if pair:
            assert isinstance(model, AlexNet)
            split_model(model, pair)
        sync_batch_norms(model, mesh, self.comm_timer)
        self._model = materialize(model, mesh.device)
        self._ddp = wrap_ddp(self._model, mesh, config, self.comm_timer)
        self._loss_scale = mesh.dp_size
        self.parameters = dict(self._model.named_parameters())
        self.sharding = Sharding(mesh, shapes if towers else {}, "mp")
        self.dropout_rows = mesh.batch_slice
        self.description = f"{'a tower' if towers else 'the full network'} in each process"
        if mesh.dp_size > 1:
            self.description += f", {mesh.dp_size} replicas, {config.gradients}"

    def _forward(
        self, images: Tensor, labels: Tensor, masks: tuple[Tensor, ...], rows: slice
    ) -> tuple[Tensor, Tensor]:
        return self._ddp(images, tuple(mask[rows] for mask in masks)), labels

    def _forward_eval(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, slice]:
        if len(images) == 0:
            return images.new_zeros(0, len(self._classes.spec)), labels, slice(None)
        return self._model(images), labels, slice(None)


def sync_batch_norms(model: nn.Module, mesh: Mesh, timer: CommTimer) -> None:
    """Where there are several replicas, replace each BatchNorm in ``model`` by one with the
    statistics of all, as torch's SyncBatchNorm.convert_sync_batchnorm does."""
    if mesh.dp_size == 1:
        return
    all_reduce = partial(all_reduce_autograd, group=TimedGroup(mesh.group("dp"), timer))
    for parent in list(model.modules()):
        for name, layer in parent.named_children():
            if isinstance(layer, BatchNorm):
                synced = BatchNorm(layer.features, layer.eps, layer.momentum, all_reduce)
                for key, parameter in layer.named_parameters():
                    setattr(synced, key, parameter)
                setattr(parent, name, synced)


def wrap_ddp(module: nn.Module, mesh: Mesh, config: LayoutConfig, timer: CommTimer) -> nn.Module:
    """``module`` as training calls it: compiled if asked for, and in DDP where there are several
    replicas."""
    called = torch.compile(module) if config.compile else module
    assert isinstance(called, nn.Module)
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
    if config.grad_compression == "bf16":
        wrapped.register_comm_hook(mesh.group("dp"), default_hooks.bf16_compress_hook)
    elif config.grad_compression == "fp16":
        wrapped.register_comm_hook(mesh.group("dp"), default_hooks.fp16_compress_hook)
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


def ddp_warmup(
    layout: Layout, images: Tensor, labels: Tensor, masks: tuple[Tensor, ...] = ()
) -> None:
    """DDP_WARMUP_PASSES on any images; parameters do not change, and no time is counted."""
    averages = [p for p in layout.parameters.values() if not p.requires_grad]  # batch norm's
    before = [average.detach().clone() for average in averages]
    with layout.comm_timer.paused():
        for _ in range(DDP_WARMUP_PASSES):
            layout.forward_backward(images, labels, masks)
    with torch.no_grad():
        for average, value in zip(averages, before, strict=True):
            average.copy_(value)
    for parameter in layout.parameters.values():
        parameter.grad = None
