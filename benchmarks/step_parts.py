"""What a step is made of, measured: computing without a network, and a network without computing.

Computing is that of the layouts themselves where nothing is sent: data parallel in a group of one,
split layers in torch's "fake" group, whose collectives return at once. All processes do it at the
same time, because where several share the cores of a machine each computes slower. Its stretches
end when the output of the convolutions is there, and when the gradient of it is.
"""

import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from alexnet_dist.parallel.collectives import AsyncAllGather
from alexnet_dist.parallel.mesh import Mesh, available_cpus, init_distributed, tune_malloc
from alexnet_dist.parallel.precision import device_name, resolve_precision
from benchmarks.step_model import FLOAT, LAYOUTS
from benchmarks.steps import Steps

COMPRESSIONS = ("none", "bf16", "powersgd")
KINDS = ("all_reduce", "all_reduce_bf16", "all_gather", "all_to_all")
SIZES = (2**16, 2**18, 2**20, 2**22, 2**24, 2**25)
"""Bytes of what is reduced, or of all that is gathered or dealt out."""

SMALL = 2**20  # bytes; what is small takes little time, and differs more
WARM, STEPS, REPEATS = 2, 5, 3

Stretches = dict[str, float]
Meet = Callable[[], None]


def observe(
    shape: dict[str, int],
    *,
    batches: Sequence[int] = (),
    threads: int = 0,
    with_computing: bool = True,
    batch: int = 0,
) -> dict[str, Any] | None:
    """What this process and those that were launched with it find together, on rank 0.

    Args:
        shape: classes and image_size of the network.
        batches: images of a process to compute with; some machine's own choice if there are none.
        threads: of a process; 0 for its share of the processors.
        batch: a global batch to take steps on, with a network; 0 for none.
    """
    rank, n = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local, node = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        tune_malloc()  # as in training
    threads = threads or max(available_cpus() // node, 1)
    torch.set_num_threads(threads)
    batches = batches or ([32, 128] if cuda else [4, 12])
    computed = computing(rank, n, batches, device, shape) if with_computing else {}

    mesh = init_distributed("auto", threads)
    lines, taken = _travel_by_group(mesh)
    found = {
        "name": device_name(device),
        "width": 4 if resolve_precision("auto", device) in ("fp32", "tf32") else 2,
        "processes": n,
        "node": node,
        "waits": not cuda,
        "batches": batches,
        "computing": _slowest(mesh.all_gather_object(computed)),
        "lines": lines,
        "taken": taken,
    }
    if batch:
        found["steps"] = {name: _seconds(name, mesh, batch, shape) for name in LAYOUTS}
    return found if mesh.rank == 0 else None


def _travel_by_group(mesh: Mesh) -> tuple[dict[str, Any], float]:
    """What ``travelling`` finds within this node and between nodes, and of how many processes."""
    node, nodes = mesh.local_world_size, mesh.world_size // mesh.local_world_size
    found: dict[str, Any] = {"inside": None, "between": None}
    taken = 0.0
    for name, groups in (
        ("inside", [list(range(k * node, (k + 1) * node)) for k in range(nodes)]),
        ("between", [list(range(k, mesh.world_size, node)) for k in range(node)]),
    ):
        if len(groups[0]) > 1:
            group, _ = dist.new_subgroups_by_enumeration(groups)
            assert isinstance(group, dist.ProcessGroup)
            seconds, taken = travelling(group, mesh.device)
            found[name] = {"processes": len(groups[0]), "seconds": seconds}
    return found, taken


def _slowest(things: Sequence[Any]) -> Any:
    """Of like structures, with the largest of each number: the slowest is waited for."""
    first = things[0]
    if isinstance(first, dict):
        return {key: _slowest([thing[key] for thing in things]) for key in first}
    if isinstance(first, list):
        return [_slowest(list(each)) for each in zip(*things, strict=True)]
    return max(things)


def _seconds(name: str, mesh: Mesh, batch: int, shape: dict[str, int]) -> list[float]:
    """Seconds of some steps on a global ``batch``, those that warm up left out."""
    steps = Steps(name, mesh.with_layout(1), batch, power_after=0, **shape)
    inputs = steps.inputs(batch)
    seconds = []
    for _ in range(_warm(name) + STEPS):
        begin = time.perf_counter()
        steps.take(inputs)
        seconds.append(time.perf_counter() - begin)
    del steps
    gc.collect()
    return [
        statistics.fmean(each)
        for each in zip(*mesh.all_gather_object(seconds[-STEPS:]), strict=True)
    ]


def computing(
    rank: int, n: int, batches: Sequence[int], device: torch.device, shape: dict[str, int]
) -> dict[str, Any]:
    """Seconds of the stretches of steps on so many images of this process, the median of some.

    Returns:
        "plain", without other processes: of each local batch; "split" over n processes: likewise;
        "none", "bf16" and "powersgd": data parallel of several at the least local batch.
    """
    meet = _meeting(rank, n)
    found: dict[str, Any] = {
        "plain": [_stretches("ddp", rank, 1, b, device, shape, meet) for b in batches]
    }
    for compress in COMPRESSIONS:
        name = "ddp" if compress == "none" else f"ddp+{compress}"
        found[compress] = _stretches(name, rank, max(n, 2), batches[0], device, shape, meet)
    if n > 1:
        found["split"] = [_stretches("whole", rank, n, b, device, shape, meet) for b in batches]
    return found


def _meeting(rank: int, n: int) -> Meet:
    """A barrier for processes that are in no group."""
    if n == 1:
        return lambda: None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]) + 1
    patience = timedelta(minutes=5)
    store = dist.TCPStore(address, port, n, is_master=rank == 0, timeout=patience)
    times = iter(range(10**6))

    def meet() -> None:
        name = f"met-{next(times)}"
        if store.add(name, 1) == n:
            store.set(f"{name}-all", "")
        store.wait([f"{name}-all"], patience)

    return meet


def _stretches(
    name: str,
    rank: int,
    n: int,
    local: int,
    device: torch.device,
    shape: dict[str, int],
    meet: Meet,
) -> Stretches:
    rank = rank if n > 1 else 0
    with _silence(name, rank, n, device) as mesh:
        steps = Steps(name, mesh, local * n, power_after=0, **shape)
        if name == "whole":  # whose convolutions DDP averages: torch's fake sums give nothing
            steps.layout._compute.register_comm_hook(None, _as_it_is)  # type: ignore[operator]
        clock = _Clock(steps, device)
        inputs = steps.inputs(local * n)
        each = []
        for _ in range(_warm(name) + STEPS):
            meet()
            each.append(clock.step(inputs))
        each = each[-STEPS:]
        del steps, clock
        gc.collect()  # DDP's memory, which refers to itself
    return {key: statistics.median(one[key] for one in each) for key in each[0]}


def _warm(name: str) -> int:
    """Steps before those that count; PowerSGD's first two are not compressed."""
    return WARM + 2 * name.endswith("powersgd")


@contextmanager
def _silence(name: str, rank: int, n: int, device: torch.device) -> Iterator[Mesh]:
    """A mesh of n processes of which none hears another."""
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if name == "whole":
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=n)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        group = dist.group.WORLD
        assert group is not None
        threads = torch.get_num_threads()
        mesh = Mesh(rank, n, device.index or 0, 1, device, threads, group, group)
        size = (dist.get_world_size(), 1)
        names = ("dp", "mp")
        yield replace(mesh, device_mesh=init_device_mesh(device.type, size, mesh_dim_names=names))
    finally:
        dist.destroy_process_group()


def _as_it_is(_: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    future: torch.futures.Future[Tensor] = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


class _Clock:
    """Reads the time within a step."""

    def __init__(self, steps: Steps, device: torch.device) -> None:
        self.steps, self.device = steps, device
        self.at: dict[str, float] = {}
        layer = steps.model.get_submodule
        layer("flatten").register_forward_hook(self._features)
        layer("fc8").register_forward_hook(lambda *_: self._note("scores"))

    def _note(self, name: str) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.at[name] = time.perf_counter()

    def _features(self, _: Any, __: Any, features: Tensor) -> None:
        self._note("features")
        features.register_hook(lambda _: self._note("gradient"))

    def step(self, inputs: tuple[Any, ...]) -> Stretches:
        """One step; seconds of the convolutions forward, of the fully connected layers, of their
        forward pass where they are whole (else 0), of the convolutions backward, of the update."""
        self._note("begin")
        self.at["scores"] = 0.0
        self.steps.compute(inputs)
        self._note("backward")
        self.steps.update()
        self._note("end")
        at = self.at
        return {
            "forward": at["features"] - at["begin"],
            "connected": at["gradient"] - at["features"],
            "connected_forward": max(at["scores"] - at["features"], 0.0),
            "backward": at["backward"] - at["gradient"],
            "update": at["end"] - at["backward"],
        }


def travelling(
    group: dist.ProcessGroup, device: torch.device
) -> tuple[dict[str, list[tuple[int, float]]], float]:
    """Seconds of each kind of collective by bytes, the median of some; and the part of the
    machine's processors that the largest sums took."""
    found: dict[str, list[tuple[int, float]]] = {kind: [] for kind in KINDS}
    taken: list[float] = []
    for kind in KINDS:
        for size in SIZES[: None if kind.startswith("all_reduce") else -1]:
            run = _collective(kind, size, group, device)
            run()
            seconds = []
            before = _processors()
            for _ in range(REPEATS if size > SMALL else 5 * REPEATS):
                dist.barrier(group)
                begin = time.perf_counter()
                run()
                seconds.append(time.perf_counter() - begin)
            busy, every = np.subtract(_processors(), before)
            if kind == "all_reduce" and size == SIZES[-1]:
                taken.append(busy / max(every, 1))
            found[kind].append((size, statistics.median(seconds)))
    return found, 0.0 if device.type == "cuda" else float(min(taken[0], 1.0))


def _collective(
    kind: str, size: int, group: dist.ProcessGroup, device: torch.device
) -> Callable[[], None]:
    n = dist.get_world_size(group)
    dtype = torch.bfloat16 if kind.endswith("bf16") else torch.float32
    count = size // (2 if kind.endswith("bf16") else FLOAT)
    x = torch.ones(n, count // n, dtype=dtype, device=device)
    received = torch.empty_like(x)

    def run() -> None:
        if kind.startswith("all_reduce"):
            dist.all_reduce(x, group=group)
        elif kind == "all_gather":
            AsyncAllGather(x[0], group).wait()
        else:
            dist.all_to_all_single(received, x, group=group)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return run


def _processors() -> tuple[int, int]:
    """Ticks of all processors: those spent on what is not niced, and all."""
    user, nice, system, idle, wait, irq, soft, steal = (
        int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    )
    busy = user + system + irq + soft
    return busy, busy + nice + idle + wait + steal


if __name__ == "__main__":  # on a host of benchmarks/scaling.py
    told = json.loads(sys.argv[1])
    if found := observe(**told):
        print(json.dumps(found))
