"""What a step is made of, measured: computing without a network, and a network without computing.

Computing is that of the layouts themselves where nothing is sent: data parallel in a group of one,
split layers in torch's "fake" group, whose collectives return at once. All processes do it at the
same time, because where several share the cores of a machine each computes slower. Its stretches
end when the output of the convolutions is there, and when the gradient of it is.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
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

from alexnet_dist.parallel.arithmetic import choose_precision, device_name
from alexnet_dist.parallel.collectives import Gathering
from alexnet_dist.parallel.mesh import Mesh, start, usable_processors
from benchmarks.sources import loading, some_images, speed
from benchmarks.step_model import FLOAT, LAYOUTS, Law, Layer, count_hops, network, ways
from benchmarks.steps import Steps

COMPRESSIONS = ("none", "bf16", "powersgd")
KINDS = ("all_reduce", "all_reduce_bf16", "all_gather", "all_to_all")
SIZES = (2**16, 2**18, 2**20, 2**22, 2**24, 2**25)
"""Bytes of what is reduced, or of all that is gathered or dealt out."""

WARM, STEPS, REPEATS = 3, 4, 4

Stretches = dict[str, float]
Meet = Callable[[], None]


def measure(words: argparse.Namespace) -> dict[str, Any] | None:
    """Parts of the machine that this process and the others run on, on rank 0."""
    rank, n = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local, node = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    threads = 1 if words.work else max(usable_processors() // node, 1)
    torch.set_num_threads(threads)
    shape = {"classes": words.classes, "image_size": words.image_size}
    batches = words.batches or ([32, 128] if cuda else [4, 12])
    found = computing(rank, n, batches, device, shape)

    mesh = start("auto", threads)
    lines, taken = _travel_by_group(mesh)
    record = {
        "name": device_name(device),
        "assumed": [],
        "width": 4 if choose_precision("auto", device) in ("fp32", "tf32") else 2,
        **fit_parts(network(**shape), n, batches, _mean(mesh.gather(found))),
        "processes_a_node": node,
        **{name: fit_lines(*one, "ring") if one else None for name, one in lines.items()},
        "hops": "ring",
        "taken": taken,
        "powersgd_waits": not cuda,
        "loader": None,
    }
    answer = {"parts": record, "computing": found, "lines": lines}
    if words.work:
        answer["steps"] = {
            name: _seconds(name, mesh, words.local_batch * n, shape) for name in LAYOUTS
        }
    return answer if mesh.rank == 0 else None


def _travel_by_group(mesh: Mesh) -> tuple[dict[str, Any], float]:
    """What ``travelling`` finds within this node and between nodes, and of how many processes."""
    node, nodes = mesh.local_world, mesh.world // mesh.local_world
    found: dict[str, Any] = {"inside": None, "between": None}
    taken = 0.0
    for name, groups in (
        ("inside", [list(range(k * node, (k + 1) * node)) for k in range(nodes)]),
        ("between", [list(range(k, mesh.world, node)) for k in range(node)]),
    ):
        if len(groups[0]) > 1:
            group, _ = dist.new_subgroups_by_enumeration(groups)
            assert group is not None
            seconds, taken = travelling(group, mesh.device)
            found[name] = (seconds, len(groups[0]))
    return found, taken


def _mean(things: Sequence[Any]) -> Any:
    """Of like structures, with the mean of each number."""
    first = things[0]
    if isinstance(first, dict):
        return {key: _mean([thing[key] for thing in things]) for key in first}
    if isinstance(first, list):
        return [_mean(list(each)) for each in zip(*things, strict=True)]
    return statistics.fmean(things)


def _seconds(name: str, mesh: Mesh, batch: int, shape: dict[str, int]) -> list[float]:
    """Seconds of some steps on a global ``batch``, those that warm up left out."""
    steps = Steps(name, mesh.arrange(1), batch, power_after=0, **shape)
    inputs = steps.inputs(batch)
    seconds = []
    for _ in range(WARM + STEPS):
        begin = time.perf_counter()
        steps.take(inputs)
        seconds.append(time.perf_counter() - begin)
    return [statistics.fmean(each) for each in zip(*mesh.gather(seconds[WARM:]), strict=True)]


def computing(
    rank: int, n: int, batches: Sequence[int], device: torch.device, shape: dict[str, int]
) -> dict[str, Any]:
    """Seconds of the stretches of steps on so many images of this process, the median of some.

    Returns:
        "plain", without other processes: of each local batch; "split" over n processes: likewise;
        "none", "bf16" and "powersgd": data parallel of n at the least local batch.
    """
    meet = _meeting(rank, n)
    found: dict[str, Any] = {
        "plain": [_stretches("ddp", rank, 1, b, device, shape, meet) for b in batches]
    }
    for compress in COMPRESSIONS if n > 1 else ():
        name = "ddp" if compress == "none" else f"ddp+{compress}"
        found[compress] = _stretches(name, rank, n, batches[0], device, shape, meet)
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
        meet()
        each = [clock.step(inputs) for _ in range(WARM + STEPS)][WARM:]
    return {key: statistics.median(one[key] for one in each) for key in each[0]}


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
        yield replace(mesh, devices=init_device_mesh(device.type, size, mesh_dim_names=names))
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
        steps.model.flatten.register_forward_hook(self._features)
        steps.model.fc8.register_forward_hook(lambda *_: self._note("scores"))

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
            for _ in range(REPEATS):
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
            Gathering(x[0], group).wait()
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


def images_a_core(data: Path, batch: int = 64) -> list[tuple[int, float]]:
    """Images a second of DALI on a folder's JPEGs, by cores."""
    before = os.sched_getaffinity(0)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        root = some_images(data, Path(folder), 1000)
        for cores in sorted({1, usable_processors()}):
            os.sched_setaffinity(0, sorted(before)[:cores])
            try:
                batches = loading(root, "dali", batch)
                found.append((cores, statistics.median(speed(batches, 10)[0] for _ in range(3))))
                batches.close()  # type: ignore[attr-defined]
            finally:
                os.sched_setaffinity(0, before)
    return found


def fit(points: Iterable[tuple[float, float]]) -> Law:
    """Seconds at all and a unit more, neither below 0, by least squares of relative errors."""
    x, seconds = np.array(sorted(points), float).T
    terms = np.stack([np.ones_like(x), x], 1) / seconds[:, None]
    first, more = np.linalg.lstsq(terms, np.ones_like(x), rcond=None)[0]
    if more < 0:
        return float(1 / np.mean(1 / seconds)), 0.0
    if first < 0:
        return 0.0, float(1 / np.mean(x / seconds))
    return float(first), float(more)


def fit_parts(
    layers: Sequence[Layer],
    n: int,
    batches: Sequence[int],
    found: dict[str, Any],
) -> dict[str, Any]:
    """The computing parts, as Parts has them, from what ``computing`` found on n processes."""
    connected = sum(layer.parameters for layer in layers if not layer.work)
    values = sum(layer.parameters for layer in layers)
    plain, split = found["plain"], found.get("split", [])
    points = [(b, one["connected"] / connected) for b, one in zip(batches, plain, strict=True)]
    if split:
        held = connected / n
        points += [(b * n, one["connected"] / held) for b, one in zip(batches, split, strict=True)]
    forward = [one["connected_forward"] / one["connected"] for one in plain]

    def whole(step: dict[str, float]) -> float:
        return sum(seconds for name, seconds in step.items() if name != "connected_forward")

    sending = {
        compress: max(whole(found[compress]) - whole(plain[0]), 0.0) / values
        for compress in COMPRESSIONS
        if compress in found
    }
    return {
        "convolutions_forward": fit(zip(batches, [one["forward"] for one in plain], strict=True)),
        "convolutions_backward": fit(zip(batches, [one["backward"] for one in plain], strict=True)),
        "connected": fit(points),
        "connected_backward": 1 - statistics.median(forward),
        "update": statistics.median(one["update"] for one in plain) / values,
        "sending": sending,
    }


def fit_lines(found: dict[str, list[tuple[int, float]]], n: int, hops: str) -> dict[str, Law]:
    """Seconds a hop and bytes a second of each collective, from what ``travelling`` found."""
    lines = {}
    for kind, points in found.items():
        sent = [(ways(kind) * (n - 1) / n * size, seconds) for size, seconds in points]
        seconds, more = fit(sent)
        lines[kind] = (seconds / (ways(kind) * count_hops(hops, n)), 1 / max(more, 1e-15))
    return lines
