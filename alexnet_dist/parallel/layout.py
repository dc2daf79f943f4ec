"""What every layout gives the training loop, and what all layouts share."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from alexnet_dist.parallel.collectives import CommTimer, TimedGroup, upcast_to_fp32
from alexnet_dist.parallel.mesh import Mesh
from alexnet_dist.parallel.precision import Precision, SyncedGradScaler, autocast
from alexnet_dist.parallel.sharded_loss import ShardedClasses, to_counts
from alexnet_dist.parallel.sharding import Sharding


@dataclass(frozen=True)
class LayoutConfig:
    """The options of a layout.

    Attributes:
        batch_size: images in a global batch.
        grad_accum_steps: microbatches in which it is computed, one after another.
        fc: "replicated", or "sharded" over all processes (sharded_fc.py).
        grad_compression: how gradients are sent between replicas: uncompressed, in 16 bits, or as
            PowerSGD's matrices of rank ``powersgd_rank`` (Vogels et al. 2019) after
            ``powersgd_start`` steps.
        compile: whether training steps run under torch.compile.
        skip_nonfinite: whether updates whose gradients are not finite are skipped.
    """

    batch_size: int
    grad_accum_steps: int = 1
    precision: Precision = "fp32"
    fc: Literal["replicated", "sharded"] = "replicated"
    grad_compression: Literal["none", "bf16", "fp16", "powersgd"] = "none"
    powersgd_rank: int = 4
    powersgd_start: int = 1000
    compile: bool = False
    skip_nonfinite: bool = False

    @property
    def gradients(self) -> str:
        """How they are sent, for people."""
        kind = self.grad_compression
        return "gradients in fp32" if kind == "none" else f"gradients compressed by {kind}"


class Layout(ABC):
    """A network on the processes of a mesh, as the training loop calls it.

    Attributes:
        parameters: by name, plain local tensors, without values until ``sharding`` or a checkpoint
            loads them.
        sharding: how the parameters lie on the mesh.
        scaler: skips updates that are not finite, in fp16 or where the config asks for it.
        dropout_rows: the positions of the global batch whose dropout masks it takes.
        comm_timer: how long this process has waited for others.
        description: one line for people.
    """

    parameters: dict[str, nn.Parameter]
    sharding: Sharding
    dropout_rows: slice
    description: str
    _model: nn.Module  # all modules of this process
    _ddp: nn.Module  # those that images pass first; in DDP where there are several replicas
    _loss_scale: int  # makes a sum of the gradients that DDP averages over the replicas

    def __init__(
        self, mesh: Mesh, config: LayoutConfig, num_classes: int, group: TimedGroup | None
    ) -> None:
        """``group``: processes that hold different shards of the same layers, if any do."""
        self.mesh, self.batch_size, self.precision = mesh, config.batch_size, config.precision
        self.comm_timer = group.timer if group else CommTimer(mesh.device)
        self.scaler = SyncedGradScaler(
            config.precision,
            mesh.device,
            group.group if group else None,
            skip_nonfinite=config.skip_nonfinite,
        )
        self._classes = ShardedClasses(num_classes, group)
        self._reports = group is None or group.rank == 0  # what all of the group have counted
        self._microbatches = microbatch_slices(
            config.batch_size, mesh.dp_size, config.grad_accum_steps
        )

    def forward_backward(
        self, images: Tensor, labels: Tensor, masks: Iterable[Tensor] = ()
    ) -> Tensor:
        """Compute the gradients of the global batch's mean loss, from this replica's slice of it.

        Args:
            images: [b, 3, H, W], those at ``mesh.batch_slice`` of the global batch.
            labels: int64 [b].
            masks: for each dropout layer bool [rows, units], the rows at ``dropout_rows``.

        Returns:
            float64 [2] on the device: the summed (not mean) loss, and how many images have their
            label as the highest logit. To be summed over all processes: float32 values added in
            float64, so that the sums do not depend on the order.
        """
        self._model.train()
        masks = tuple(masks)
        result = torch.zeros(2, dtype=torch.float64, device=images.device)
        for rows in self._microbatches:
            last = rows is self._microbatches[-1]  # with which the gradients of all are sent
            with nullcontext() if last else self._no_sync():
                with autocast(self.precision, self.mesh.device):
                    logits, targets = self._forward(images[rows], labels[rows], masks, rows)
                loss, best = self._classes.cross_entropy(logits, targets)
                self.scaler.scale(loss * (self._loss_scale / self.batch_size)).backward()
                self.comm_timer.stop()  # which the last gradient has started
            correct = (best == targets).sum()
            result += torch.stack([loss.detach().double(), correct.double()])
        return result * self._reports

    def _no_sync(self) -> AbstractContextManager[None]:
        ddp = self._ddp
        return ddp.no_sync() if isinstance(ddp, DistributedDataParallel) else nullcontext()

    @abstractmethod
    def _forward(
        self, images: Tensor, labels: Tensor, masks: tuple[Tensor, ...], rows: slice
    ) -> tuple[Tensor, Tensor]:
        """Logits [n, own classes] and labels [n] of a microbatch, this replica's ``rows``."""

    @abstractmethod
    def _forward_eval(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, slice]:
        """In evaluation: logits [n, own classes] and labels [n] of all images whose classes are
        counted together, and which of them are this process's."""

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """float32 [b, classes] of this process's images, in evaluation. All processes call it
        together; each may have another number of images, even none."""
        self._model.eval()
        with autocast(self.precision, self.mesh.device):
            none = torch.zeros(len(images), dtype=torch.int64, device=images.device)
            logits, _, rows = self._forward_eval(images, none)
        return self._classes.gather_logits(upcast_to_fp32(logits))[rows]

    @torch.no_grad()
    def eval_counts(self, images: Tensor, labels: Tensor) -> Tensor:
        """float64 [4] on the device, to be summed over all processes: summed loss, images with
        their label as the highest logit, those with it among the five highest, and images. Called
        as ``logits``."""
        self._model.eval()
        with autocast(self.precision, self.mesh.device):
            logits, targets, _ = self._forward_eval(images, labels)
        if len(logits) == 0:
            return torch.zeros(4, dtype=torch.float64, device=labels.device)
        loss, ranks = self._classes.label_ranks(upcast_to_fp32(logits), targets)
        return to_counts(loss, ranks) * self._reports


def materialize(model: nn.Module, device: torch.device) -> nn.Module:
    """``model`` on ``device``, channels last; from the meta device it gets memory there."""
    if any(parameter.is_meta for parameter in model.parameters()):
        model = model.to_empty(device=device)
    return model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def microbatch_slices(batch: int, replicas: int, count: int) -> list[slice]:
    """The rows of a replica in each of ``count`` microbatches of the global batch.

    Row i of replica r is image i * R + r, so that a microbatch is a contiguous piece of the batch.
    The last one is never smaller than another: there a replica may have one row less.
    """
    rows = -(-batch // replicas)
    return [slice(*ends) for ends in pairwise(rows * at // count for at in range(count + 1))]
