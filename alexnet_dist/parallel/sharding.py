"""A tensor's first dimension dealt out to processes, and how a checkpoint is told of it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from alexnet_dist.model.dropout import Dropout, DropoutScaling
from alexnet_dist.parallel.mesh import Mesh


@dataclass(frozen=True)
class ShardSpec:
    """The outputs that one of ``num_shards`` processes has of a layer's ``full_size``.

    Dealt as DTensor deals them: ceil(full_size / num_shards) to each while there are any, so that
    the last ones get less, or none.
    """

    full_size: int
    num_shards: int
    shard_rank: int

    @property
    def max_shard_size(self) -> int:
        """The most that a process has."""
        return -(-self.full_size // self.num_shards)

    @property
    def slice(self) -> slice:
        first = min(self.shard_rank * self.max_shard_size, self.full_size)
        return slice(first, min(first + self.max_shard_size, self.full_size))

    def __len__(self) -> int:
        return self.slice.stop - self.slice.start


@dataclass(frozen=True)
class Sharding:
    """How the parameters of a layout lie on the mesh.

    Attributes:
        shapes: of the parameters that are dealt out, whole, by name; all others are replicated.
        mesh_dim: the dimension of the mesh that deals, "mp" (towers) or "dp" (replicas).
    """

    mesh: Mesh
    shapes: dict[str, torch.Size]
    mesh_dim: Literal["dp", "mp"]

    def local_shard(self, name: str, full: Tensor) -> Tensor:
        """What this process holds of a ``full`` parameter, or of a tensor shaped like it."""
        if name not in self.shapes:
            return full
        if self.mesh_dim == "mp":
            spec = ShardSpec(len(full), self.mesh.split_size, self.mesh.split_rank)
        else:
            spec = ShardSpec(len(full), self.mesh.dp_size, self.mesh.dp_rank)
        return full[spec.slice]

    @torch.no_grad()
    def load_full_weights(
        self, parameters: Mapping[str, nn.Parameter], weights: Iterable[tuple[str, Tensor]]
    ) -> None:
        """Take this process's part of each whole parameter in ``weights``, one after another."""
        for name, whole in weights:
            parameters[name].copy_(self.local_shard(name, whole))

    def all_reduce_partial_sums(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """Sums over this process's parts of parameters, by name and of one shape, as those over
        the whole parameters: one all-reduce, of those that are dealt out."""
        dealt = [name for name in sums if name in self.shapes]
        if not dealt:
            return sums
        total = torch.stack([sums[name] for name in dealt])
        dist.all_reduce(total, group=self.mesh.group(self.mesh_dim))
        return sums | dict(zip(dealt, total.unbind(), strict=True))

    def to_dtensor(self, name: str, local: Tensor) -> Tensor:
        """``local`` as a checkpoint knows it: a DTensor over the mesh where it is a part.

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


class ShardedDropout(Dropout):
    """Dropout of some of a layer's units: takes the whole layer's mask and uses its own columns,
    so that the units dropped are those of one device."""

    def __init__(self, share: ShardSpec, p: float, scaling: DropoutScaling) -> None:
        super().__init__(len(share), p, scaling)
        self.share = share

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x, None if mask is None else mask[:, self.share.slice])
