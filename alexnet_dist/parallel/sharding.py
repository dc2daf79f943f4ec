"""How the first dimension of a tensor is sharded over processes, and how checkpoints see it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.nn import functional as F

from alexnet_dist.parallel.collectives import TimedGroup, all_gather_autograd
from alexnet_dist.parallel.mesh import Mesh


@dataclass(frozen=True)
class ShardSpec:
    """The outputs of a layer of ``full_size`` that one of ``num_shards`` processes holds.

    Sharded as DTensor does: ceil(full_size / num_shards) to each process while there are any left,
    so that the last ones get fewer, or none.
    """

    full_size: int
    num_shards: int
    shard_rank: int

    @property
    def max_shard_size(self) -> int:
        return -(-self.full_size // self.num_shards)

    @property
    def slice(self) -> slice:
        start = min(self.shard_rank * self.max_shard_size, self.full_size)
        return slice(start, min(start + self.max_shard_size, self.full_size))

    def __len__(self) -> int:
        return self.slice.stop - self.slice.start


def gather_columns(x: Tensor, spec: ShardSpec, group: TimedGroup) -> Tensor:
    """The outputs of all processes of a sharded layer: [n, own] to [n, full]."""
    # in blocks of equal width; the padding lies behind the last column of all
    padded = F.pad(x, (0, spec.max_shard_size - len(spec)))
    gathered = all_gather_autograd(padded, group)
    return gathered.transpose(0, 1).flatten(1)[:, : spec.full_size]


def shard_parameters(layer: nn.Module, num_shards: int, shard_rank: int) -> nn.Module:
    """``layer``, which is on the meta device, with a shard of each of its parameters."""
    for name, parameter in layer.named_parameters():
        shard = parameter.detach()[ShardSpec(len(parameter), num_shards, shard_rank).slice]
        setattr(layer, name, nn.Parameter(shard, parameter.requires_grad))
    return layer


@dataclass(frozen=True)
class Sharding:
    """How the parameters of a layout lie on the mesh.

    Attributes:
        shapes: the full shapes of the parameters that are sharded, by name; all others are
            replicated.
        mesh_dim: the dimension of the mesh over which they are, "mp" (towers) or "dp" (replicas).
    """

    mesh: Mesh
    shapes: Mapping[str, torch.Size]
    mesh_dim: Literal["dp", "mp"]

    def local_shard(self, name: str, full: Tensor) -> Tensor:
        """What this process holds of a ``full`` parameter, or of a tensor shaped like it."""
        if name not in self.shapes:
            return full
        group = self.mesh.group(self.mesh_dim)
        return full[ShardSpec(len(full), group.size(), group.rank()).slice]

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
        if not sharded:
            return sums
        total = torch.stack([sums[name] for name in sharded])
        dist.all_reduce(total, group=self.mesh.group(self.mesh_dim))
        return sums | dict(zip(sharded, total.unbind(), strict=True))

    def to_dtensor(self, name: str, local: Tensor) -> Tensor:
        """``local`` as a checkpoint sees it: a DTensor over the mesh where it is a shard.

        It shares the memory of ``local``, so that reading a checkpoint into it fills that.
        """
        if name not in self.shapes:
            return local
        shape = self.shapes[name]
        placements: dict[str, Placement] = {"dp": Replicate(), "mp": Replicate()}
        placements[self.mesh_dim] = Shard(0)
        return DTensor.from_local(
            local,
            self.mesh.device_mesh,
            list(placements.values()),
            run_check=False,
            shape=shape,
            stride=torch.empty(shape, device="meta").stride(),
        )
