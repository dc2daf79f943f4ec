"""The processes of a run: their ranks, their device, and the groups they communicate in."""

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
from typing import Literal, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from alexnet_dist.errors import UserError, refuse
from alexnet_dist.parallel.rendezvous import is_launched, open_store

T = TypeVar("T")

LONG_TIMEOUT = timedelta(days=7)
"""For waiting on work that rank 0 does alone: listing 1.28 million files may take hours. A rank
that dies is noticed by its closed connection, not by this timeout."""


@dataclass(frozen=True)
class Mesh:
    """This process among all processes of the run.

    A replica is the process, or the two neighboring processes (towers), that hold the whole
    network; all replicas together compute a global batch.

    Attributes:
        device: what this process computes on.
        threads: CPUs that this process may use.
        long_timeout_group: a gloo group for work that may take long.
        checkpoint_group: a gloo group for the thread that writes checkpoints, so that its messages
            are not mixed up with others.
        split_size: processes of a replica.
        device_mesh: all processes, with the dimensions "dp" (replicas) and "mp" (towers of a
            replica); None before ``with_layout``.
    """

    rank: int
    world_size: int
    device: torch.device
    threads: int
    long_timeout_group: dist.ProcessGroup
    checkpoint_group: dist.ProcessGroup
    split_size: int = 1
    device_mesh: DeviceMesh | None = None

    @property
    def dp_size(self) -> int:
        """How many replicas there are."""
        return self.world_size // self.split_size

    @property
    def dp_rank(self) -> int:
        """Which replica this process belongs to."""
        return self.rank // self.split_size

    @property
    def is_replica_leader(self) -> bool:
        """True on one process of each replica: what a replica counts is counted there."""
        return self.rank % self.split_size == 0

    def with_layout(self, split_size: int) -> "Mesh":
        """The same processes with ``split_size`` neighbors in a replica."""
        shape = (self.world_size // split_size, split_size)
        device_mesh = init_device_mesh(self.device.type, shape, mesh_dim_names=("dp", "mp"))
        return replace(self, split_size=split_size, device_mesh=device_mesh)

    def group(self, dim: Literal["dp", "mp"]) -> dist.ProcessGroup:
        """This process's group along a dimension of the mesh; after ``with_layout``, but for "dp"
        where each process is a replica."""
        if dim == "dp" and self.split_size == 1 and dist.group.WORLD is not None:
            return dist.group.WORLD
        assert self.device_mesh is not None
        return self.device_mesh.get_group(dim)

    @property
    def batch_slice(self) -> slice:
        """The positions of each global batch that this replica computes: r, r + R, r + 2 R, ..."""
        return slice(self.dp_rank, None, self.dp_size)

    def local_batch(self, batch: int) -> int:
        """How many images of a global batch of ``batch`` this replica computes."""
        return len(range(batch)[self.batch_slice])

    def broadcast_from_rank0(self, work: Callable[[], T]) -> T:
        """Call ``work`` on rank 0 and return its result on every process.

        Raises:
            UserError: ``work`` raised it; every process raises the same.
        """
        result: list[T | UserError | None] = [None]
        if self.rank == 0:
            try:
                result[0] = work()
            except UserError as error:
                result[0] = error
        dist.broadcast_object_list(result, group=self.long_timeout_group)
        if isinstance(result[0], UserError):
            raise UserError(str(result[0]), on_all_ranks=True)
        return result[0]  # type: ignore[return-value]

    def all_gather_object(self, thing: T) -> list[T]:
        """The ``thing`` of each process, by rank, on every process."""
        things: list[T | None] = [None] * self.world_size
        dist.all_gather_object(things, thing, group=self.long_timeout_group)
        return things  # type: ignore[return-value]


def init_distributed(
    device: Literal["auto", "cpu", "cuda"] = "auto", threads: int = 0, timeout: float = 600.0
) -> Mesh:
    """Join the processes that torchrun started, or be the only one.

    Args:
        threads: CPU threads of this process; 0 for its share of the machine's.
        timeout: seconds after which the hang detector ends the run (hang_detector.py); a
            collective waits three times as long, so that it is not the first to give up.

    Raises:
        UserError: GPUs are asked for and there are none, or fewer than local processes; or the
            processes do not know of each other, or do not come.
    """
    launched = is_launched()
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if launched:
        _die_with_parent()
    gpus = torch.cuda.device_count() if device != "cpu" else 0
    refuse(
        {
            "runtime.device is cuda, but torch sees no GPU here: take --runtime.device cpu": (
                device == "cuda" and gpus == 0
            ),
            f"{local_world_size} processes on this machine, and {gpus} GPUs: take "
            f"--nproc_per_node={gpus}, or --runtime.device cpu": 0 < gpus < local_world_size,
        }
    )
    torch_device = torch.device("cuda", local_rank) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(torch_device)
    else:
        tune_malloc()
    collective_timeout = timedelta(seconds=3 * timeout)
    store = open_store(rank, world_size, collective_timeout) if launched else dist.HashStore()
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if gpus else "gloo",
        timeout=collective_timeout,
        store=store,
        rank=rank,
        world_size=world_size,
    )
    atexit.register(destroy_distributed)
    threads = threads or max(available_cpus() // local_world_size, 1)
    torch.set_num_threads(threads)
    return Mesh(rank, world_size, torch_device, threads, _gloo_group(), _gloo_group())


def _gloo_group() -> dist.ProcessGroup:
    group = dist.new_group(backend="gloo", timeout=LONG_TIMEOUT)
    assert isinstance(group, dist.ProcessGroup)
    return group


def destroy_distributed() -> None:
    """Leave the process group, if this process is in one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def available_cpus() -> int:
    """CPUs that this process may use: its affinity, limited by a container's quota."""
    affinity = getattr(os, "sched_getaffinity", None)
    count = len(affinity(0)) if affinity else (os.cpu_count() or 1)
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            count = min(count, max(int(quota) // int(period), 1))
    except (OSError, ValueError):
        pass
    return count


def tune_malloc() -> None:
    """Let glibc keep freed memory.

    A step frees and allocates half a gigabyte of gradients and activations. By default glibc
    returns blocks of this size to the kernel, which then clears every page again: a fifth of a step
    on CPUs. Does nothing where the C library is another one.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    m_trim_threshold, m_mmap_max = -1, -4
    mallopt(m_mmap_max, 0)
    mallopt(m_trim_threshold, 2**31 - 1)


def _die_with_parent() -> None:
    """End this process once torchrun has died: a torchrun that gets SIGKILL leaves its workers
    behind, which would train on, or wait for each other, for ever."""
    launcher = os.getppid()

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="watch-launcher", daemon=True).start()
