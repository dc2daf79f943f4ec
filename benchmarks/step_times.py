"""On a host of benchmarks/scaling.py: seconds of steps, with and without communication, and of
collectives.

Without communication, data parallel computes in a group of one, and sharded layers in torch's
"fake" group, whose collectives return at once. All hosts do it at the same time, because processes
that share the cores of a machine slow each other.
"""

import gc
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from alexnet_dist.parallel.collectives import CommTimer, TimedGroup, all_gather
from alexnet_dist.parallel.mesh import Mesh, init_distributed, tune_malloc
from benchmarks.step_model import KINDS, LAYOUTS
from benchmarks.steps import Steps

SIZES = (2**16, 2**18, 2**20, 2**22, 2**24, 2**25)  # bytes reduced, or all that are gathered
WARMUP, STEPS, REPEATS = 2, 5, 3
CPU = torch.device("cpu")


def measure(shape: dict[str, int], local_batch: int) -> dict[str, Any]:
    """Times of this host together with the others, by layout: "computing", and "step"; by kind and
    bytes: "collectives"; and the "slowdown" that they are to computing.

    Args:
        shape: classes and image_size of the network.
    """
    rank, n = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    tune_malloc()
    torch.set_num_threads(1)
    store_address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]) + 1
    store = dist.TCPStore(*store_address, n, rank == 0, timeout=timedelta(minutes=5))
    computing = {}
    for name in LAYOUTS:
        with _silent_mesh(name, rank, n) as mesh:
            computing[name] = _step_seconds(name, mesh, local_batch * n, shape, store)
    mesh = init_distributed("cpu", 1).with_layout(1)
    collectives, slowdown = _collectives(n)
    steps = {name: _step_seconds(name, mesh, local_batch * n, shape, store) for name in LAYOUTS}
    every = mesh.all_gather_object((computing, steps))
    return {
        "hosts": n,
        # all wait for the slowest
        "computing": {name: max(statistics.median(c[name]) for c, _ in every) for name in LAYOUTS},
        "step": {name: statistics.median(steps[name]) for name in LAYOUTS},
        "collectives": collectives,
        "slowdown": slowdown,
    }


def _step_seconds(
    name: str, mesh: Mesh, batch: int, shape: dict[str, int], store: dist.Store
) -> list[float]:
    """Seconds of some steps, which all hosts begin together."""
    steps = Steps(name, mesh, batch, power_after=0, **shape)
    if name == "sharded" and dist.get_backend() == "fake":  # whose sums have no result for DDP
        steps.layout._data_parallel.register_comm_hook(None, _no_reduce)  # type: ignore[operator]
    inputs, seconds = steps.inputs(batch), []
    for _ in range(WARMUP + 2 * name.endswith("powersgd") + STEPS):  # its first two are plain
        count = store.add("arrived", 1)  # a barrier that needs no group
        while store.add("arrived", 0) < math.ceil(count / mesh.world_size) * mesh.world_size:
            time.sleep(0.001)
        begin = time.perf_counter()
        steps.take(inputs)
        seconds.append(time.perf_counter() - begin)
    del steps
    gc.collect()  # DDP's memory, which refers to itself
    return seconds[-STEPS:]


@contextmanager
def _silent_mesh(name: str, rank: int, n: int) -> Iterator[Mesh]:
    """A mesh of n ranks that do not communicate."""
    if name == "sharded":
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=n)
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        group = dist.group.WORLD
        assert group is not None
        mesh = Mesh(rank, n, CPU, 1, group, group)
        size = (dist.get_world_size(), 1)
        yield replace(mesh, device_mesh=init_device_mesh("cpu", size, mesh_dim_names=("dp", "mp")))
    finally:
        dist.destroy_process_group()


def _no_reduce(_: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


def _collectives(n: int) -> tuple[dict[str, list[tuple[int, float]]], float]:
    """Median seconds of each collective by bytes; and the fraction of the machine's processors that
    the largest sums take."""
    found: dict[str, list[tuple[int, float]]] = {}
    slowdown = 0.0
    for kind in KINDS:
        found[kind] = []
        for size in SIZES if kind.startswith("all_reduce") else SIZES[:-1]:
            run, seconds = _collective(kind, size, n), []
            run()
            before = _cpu_ticks()
            for _ in range(REPEATS if size > 2**20 else 5 * REPEATS):  # small ones vary more
                dist.barrier()
                begin = time.perf_counter()
                run()
                seconds.append(time.perf_counter() - begin)
            busy, every = np.subtract(_cpu_ticks(), before)
            if kind == "all_reduce":
                slowdown = min(float(busy / max(every, 1)), 1.0)
            found[kind].append((size, statistics.median(seconds)))
    return found, slowdown


def _collective(kind: str, size: int, n: int) -> Callable[[], Any]:
    dtype = torch.bfloat16 if kind.endswith("bf16") else torch.float32
    x = torch.ones(n, size // n // dtype.itemsize, dtype=dtype)
    received, group = torch.empty_like(x), dist.group.WORLD
    assert group is not None
    if kind == "all_gather":
        return lambda: all_gather(x[0], TimedGroup(group, CommTimer(x.device)))
    if kind == "all_to_all":
        return lambda: dist.all_to_all_single(received, x)
    return lambda: dist.all_reduce(x)


def _cpu_ticks() -> tuple[int, int]:
    """Of all processors: those spent on what is not niced, and all."""
    ticks = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    user, _, system, _, _, irq, softirq, _ = ticks
    return user + system + irq + softirq, sum(ticks)


if __name__ == "__main__":
    print(json.dumps(measure(**json.loads(sys.argv[1]))))
