"""How the first dimension of a tensor is sharded over processes, and how checkpoints see it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn import functional as F

from alexnet_dist.parallel.collectives import TimedGroup, all_gather_autograd
from alexnet_dist.parallel.mesh import Mesh


@dataclass(frozen=True)
class ShardSpec:
    """Which of the ``full_size`` outputs of a layer this process of ``group`` holds: all of them
    where that is None.

    Sharded as DTensor does: ceil(full_size / processes) to each while there are any left, so that
    the last ones get fewer, or none.
    """

    full_size: int
    group: TimedGroup | None = None

    @property
    def max_size(self) -> int:
        return -(-self.full_size // self.group.size) if self.group else self.full_size

    @property
    def slice(self) -> slice:
        start = min(self.group.rank * self.max_size, self.full_size) if self.group else 0
        return slice(start, min(start + self.max_size, self.full_size))

    def __len__(self) -> int:
        return self.slice.stop - self.slice.start

    def gather(self, x: Tensor) -> Tensor:
        """The outputs of all processes, [n, full], of this process's ``x`` [n, own]."""
        if self.group is None:
            return x
        # in blocks of equal width; the padding lies behind the last column of all
        gathered = all_gather_autograd(F.pad(x, (0, self.max_size - len(self))), self.group)
        return gathered.transpose(0, 1).flatten(1)[:, : self.full_size]


def shard_parameters(layer: nn.Module, group: TimedGroup) -> nn.Module:
    """``layer``, which is on the meta device, with a shard of each of its parameters."""
    for name, parameter in layer.named_parameters():
        shard = parameter.detach()[ShardSpec(len(parameter), group).slice]
        setattr(layer, name, nn.Parameter(shard, parameter.requires_grad))
    return layer


@dataclass(frozen=True)
class Sharding:
    """How the parameters of a layout lie on the mesh.

    Attributes:
        shapes: the full shapes of the parameters that are sharded, by name; all others are
            replicated.
        group: the processes that hold different shards; None where nothing is sharded.
        mesh_dim: their dimension of the mesh, "mp" (towers) or "dp" (replicas).
    """

    mesh: Mesh
    shapes: Mapping[str, torch.Size]
    group: TimedGroup | None = None
    mesh_dim: Literal["dp", "mp"] = "dp"

    def local_shard(self, name: str, full: Tensor) -> Tensor:
        """What this process holds of a ``full`` parameter, or of a tensor shaped like it."""
        return full[ShardSpec(len(full), self.group).slice] if name in self.shapes else full

    @torch.no_grad()
    def load_full_weights(
        self, parameters: Mapping[str, nn.Parameter], weights: Iterable[tuple[str, Tensor]]
    ) -> None:
        """Copy this process's shard of each full parameter in ``weights``, one after another."""
        for name, full in weights:
            parameters[name].copy_(self.local_shard(name, full))

    def all_reduce_partial_sums(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """Turn sums over local shards, by parameter name and all of one shape, into sums over full
        parameters: one all-reduce, of those that are sharded."""
        sharded = [name for name in sums if name in self.shapes]
        if self.group is None or not sharded:
            return sums
        total = torch.stack([sums[name] for name in sharded])
        dist.all_reduce(total, group=self.group.group)
        return sums | dict(zip(sharded, total.unbind(), strict=True))

    def to_dtensor(self, name: str, local: Tensor) -> Tensor:
        """``local`` as a checkpoint sees it: a DTensor over the mesh where it is a shard.

        It shares the memory of ``local``, so that reading a checkpoint into it fills that.
        """
        if name not in self.shapes:
            return local
        shape = self.shapes[name]
        return DTensor.from_local(
            local,
            self.mesh.device_mesh,
            [Shard(0) if dim == self.mesh_dim else Replicate() for dim in ("dp", "mp")],
            run_check=False,
            shape=shape,
            stride=torch.empty(shape, device="meta").stride(),
        )
