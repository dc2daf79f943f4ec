"""The processes of a run: who they are, what they compute on, and how they speak."""

import atexit
import ctypes
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from alexnet_dist.errors import UserError
from alexnet_dist.parallel.rendezvous import own_store

T = TypeVar("T")

PATIENCE = timedelta(days=7)
"""For waiting on work that only rank 0 does: listing 1.28 million files may take hours. A rank
that dies is noticed by its closed connection, not by this."""


@dataclass(frozen=True)
class Mesh:
    """This process among the others. A replica is the processes that hold the whole network
    between them, one or two neighbours; all replicas together compute a global batch.

    Attributes:
        threads: processors that this process may use.
        patient: a group over the host's network for work that may take long.
        saving: one for the thread that writes checkpoints, so that its words cross no others.
        towers: processes of a replica.
        devices: all processes, with the dimensions "dp" (replicas) and "mp" (towers of a replica);
            None until ``arrange``.
    """

    rank: int
    world: int
    local_rank: int
    local_world: int
    device: torch.device
    threads: int
    patient: dist.ProcessGroup
    saving: dist.ProcessGroup
    towers: int = 1
    devices: DeviceMesh | None = None

    @property
    def replica(self) -> int:
        return self.rank // self.towers

    @property
    def replicas(self) -> int:
        return self.world // self.towers

    @property
    def tower(self) -> int:
        return self.rank % self.towers

    @property
    def speaks(self) -> bool:
        """Whether this process answers for its replica, where each is to be counted once."""
        return self.tower == 0

    def arrange(self, towers: int) -> "Mesh":
        """The same processes, ``towers`` neighbours to a replica."""
        shape = (self.world // towers, towers)
        devices = init_device_mesh(self.device.type, shape, mesh_dim_names=("dp", "mp"))
        return replace(self, towers=towers, devices=devices)

    def group(self, dimension: Literal["dp", "mp"]) -> dist.ProcessGroup:
        """This process's group along a dimension of the mesh; after ``arrange``."""
        assert self.devices is not None
        return self.devices.get_group(dimension)

    @property
    def rows(self) -> slice:
        """The positions of each global batch that are this replica's."""
        return slice(self.replica, None, self.replicas)

    def local_batch(self, batch: int) -> int:
        """Images of a global batch that fall to this replica."""
        return len(range(batch)[self.rows])

    def from_first(self, work: Callable[[], T]) -> T:
        """What ``work`` gives on rank 0, in every process; its Failure, too, is everyone's."""
        answer: list[T | UserError | None] = [None]
        if self.rank == 0:
            try:
                answer[0] = work()
            except UserError as failure:
                answer[0] = failure
        dist.broadcast_object_list(answer, group=self.patient)
        if isinstance(answer[0], UserError):
            raise UserError(str(answer[0]), on_all_ranks=True)
        return answer[0]  # type: ignore[return-value]

    def gather(self, thing: T) -> list[T]:
        """The ``thing`` of each process, by rank, in every process."""
        things: list[T | None] = [None] * self.world
        dist.all_gather_object(things, thing, group=self.patient)
        return things  # type: ignore[return-value]


def start(
    device: Literal["auto", "cpu", "cuda"] = "auto", threads: int = 0, timeout: float = 600.0
) -> Mesh:
    """Join the processes that torchrun started, or be the only one.

    Args:
        timeout: seconds after which somebody else finds out who hangs (parallel/watch.py); a
            collective waits for three times as long.

    Raises:
        Failure: GPUs are asked for and there are none, or fewer than local processes.
    """
    launched = "RANK" in os.environ
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if launched:
        _end_with_launcher()
    gpus = torch.cuda.device_count() if device != "cpu" else 0
    if device == "cuda" and gpus == 0:
        raise UserError(
            "runtime.device is cuda, but torch sees no GPU here: take --runtime.device cpu",
            on_all_ranks=True,
        )
    if gpus and local_world > gpus:
        raise UserError(
            f"{local_world} processes on this machine, but {gpus} GPU{'s' if gpus > 1 else ''}: "
            f"take --nproc_per_node={gpus}, or --runtime.device cpu",
            on_all_ranks=True,
        )
    where = torch.device("cuda", local_rank) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(where)
    backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
    at_most = timedelta(seconds=3 * timeout)
    store = own_store(rank, world, at_most) if launched else dist.HashStore()
    where_to_meet: dict[str, Any] = (
        {} if store is None else {"store": store, "rank": rank, "world_size": world}
    )
    dist.init_process_group(backend, timeout=at_most, **where_to_meet)
    atexit.register(leave)
    if where.type == "cpu":
        keep_memory()
    threads = threads or max(usable_processors() // local_world, 1)
    torch.set_num_threads(threads)
    patient, saving = (dist.new_group(backend="gloo", timeout=PATIENCE) for _ in range(2))
    assert isinstance(patient, dist.ProcessGroup)
    assert isinstance(saving, dist.ProcessGroup)
    return Mesh(rank, world, local_rank, local_world, where, threads, patient, saving)


def leave() -> None:
    """Leave the group, if this process is in one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def usable_processors() -> int:
    """Processors that this process may use: those it is bound to, less a container's limit."""
    bound = getattr(os, "sched_getaffinity", None)
    count = len(bound(0)) if bound else (os.cpu_count() or 1)
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            count = min(count, max(int(quota) // int(period), 1))
    except (OSError, ValueError):
        pass
    return count


def keep_memory() -> None:
    """Let the C library keep what is freed.

    A step frees and takes again half a gigabyte of gradients and activations. glibc gives blocks
    of this size back to the kernel each time, which then clears every page anew: a fifth of a step
    on CPUs. Elsewhere than on glibc nothing is changed.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    m_trim_threshold, m_mmap_max = -1, -4
    mallopt(m_mmap_max, 0)
    mallopt(m_trim_threshold, 2**31 - 1)


def _end_with_launcher() -> None:
    """End this process once its launcher has died: a torchrun that is killed outright leaves its
    workers behind, which would train on, or wait for each other, for ever."""
    launcher = os.getppid()

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="watch-launcher", daemon=True).start()
