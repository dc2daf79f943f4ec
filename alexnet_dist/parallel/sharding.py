"""A tensor's first dimension dealt out to processes, and how a checkpoint is told of it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from alexnet_dist.model.dropout import Dropout, Form
from alexnet_dist.parallel.mesh import Mesh


@dataclass(frozen=True)
class ShardSpec:
    """The outputs that one of ``parts`` processes has of a layer's ``whole``.

    Dealt as DTensor deals them: ceil(whole / parts) to each while there are any, so that the last
    ones get less, or none.
    """

    whole: int
    parts: int
    part: int

    @property
    def width(self) -> int:
        """The most that a process has."""
        return -(-self.whole // self.parts)

    @property
    def slice(self) -> slice:
        first = min(self.part * self.width, self.whole)
        return slice(first, min(first + self.width, self.whole))

    def __len__(self) -> int:
        return self.slice.stop - self.slice.start


@dataclass(frozen=True)
class Sharding:
    """How the parameters of a layout lie on the mesh.

    Attributes:
        shapes: of the parameters that are dealt out, whole, by name; all others are replicated.
        over: the dimension of the mesh that deals, "mp" (towers) or "dp" (replicas).
    """

    mesh: Mesh
    shapes: dict[str, torch.Size]
    over: Literal["dp", "mp"]

    def part(self, name: str, whole: Tensor) -> Tensor:
        """What this process holds of a ``whole`` parameter, or of what is shaped like it."""
        if name not in self.shapes:
            return whole
        parts, part = (
            (self.mesh.towers, self.mesh.tower)
            if self.over == "mp"
            else (self.mesh.replicas, self.mesh.replica)
        )
        return whole[ShardSpec(len(whole), parts, part).slice]

    @torch.no_grad()
    def fill(
        self, parameters: Mapping[str, nn.Parameter], weights: Iterable[tuple[str, Tensor]]
    ) -> None:
        """Take this process's part of each whole parameter in ``weights``, one after another."""
        for name, whole in weights:
            parameters[name].copy_(self.part(name, whole))

    def whole_sums(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """Sums over this process's parts of parameters, by name and of one shape, as those over
        the whole parameters: one all-reduce, of those that are dealt out."""
        dealt = [name for name in sums if name in self.shapes]
        if not dealt:
            return sums
        total = torch.stack([sums[name] for name in dealt])
        dist.all_reduce(total, group=self.mesh.group(self.over))
        return sums | dict(zip(dealt, total.unbind(), strict=True))

    def stored(self, name: str, local: Tensor) -> Tensor:
        """``local`` as a checkpoint knows it: a DTensor over the mesh where it is a part.

        It shares the memory of ``local``, so that reading a checkpoint into it fills that.
        """
        if name not in self.shapes:
            return local
        shape = self.shapes[name]
        placements: dict[str, Placement] = {"dp": Replicate(), "mp": Replicate()}
        placements[self.over] = Shard(0)
        return DTensor.from_local(
            local,
            self.mesh.devices,
            list(placements.values()),
            run_check=False,
            shape=shape,
            stride=torch.empty(shape, device="meta").stride(),
        )


class ShardedDropout(Dropout):
    """Dropout of some of a layer's units: takes the whole layer's mask and uses its own columns,
    so that the units dropped are those of one device."""

    def __init__(self, share: ShardSpec, p: float, form: Form) -> None:
        super().__init__(len(share), p, form)
        self.share = share

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x, None if mask is None else mask[:, self.share.slice])
