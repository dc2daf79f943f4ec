"""What each layout sends: bytes per process and step, counted and by formula; and seconds per step
on several hosts with a slow network.

python -m benchmarks.communication [--bytes] [--speed] [--out FILE.json]

Hosts are network namespaces on this machine (benchmarks/hosts.py, as root), with gloo between them.
Bytes are counted twice: of the collectives that ran, in torch's dispatcher, by what a ring sends of
each; and on the host's own link, which adds the headers of TCP. Processes share the cores of one
machine, so that the time of a step is mostly arithmetic; a cluster's is less so.
"""

import argparse
import json
import statistics
import threading
import time
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from alexnet_dist.model import build_on_meta
from alexnet_dist.parallel.mesh import init_distributed
from alexnet_dist.parallel.precision import resolve_precision
from benchmarks.common import save_record
from benchmarks.hosts import Hosts
from benchmarks.steps import RANK, Steps

COMPRESSED = ("", "+bf16", "+fp16", "+powersgd")
LAYOUTS = [f"{kind}{how}" for kind in ("ddp", "towers", "sharded") for how in COMPRESSED]
MIB = 2**20


class Counter(TorchDispatchMode):
    """Bytes that a process sends in the collectives that it starts, by kind, as rings send them."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: dict[str, float] = {}
        self._all_reduce = dist.all_reduce

    def __enter__(self) -> "Counter":
        super().__enter__()
        dist.all_reduce = self._from_threads
        return self

    def __exit__(self, *error: Any) -> None:
        dist.all_reduce = self._all_reduce
        super().__exit__(*error)

    def _from_threads(self, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """PowerSGD starts some from threads of gloo's, where torch's dispatcher has no mode."""
        if threading.current_thread() is not threading.main_thread():
            self._count("allreduce", dist.get_world_size(kwargs.get("group")), _bytes(tensor))
        return self._all_reduce(tensor, *args, **kwargs)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = str(func)
        if name.startswith("c10d."):
            kind = name.split(".")[1].strip("_").removesuffix("_base")
            group = next(arg for arg in args if isinstance(arg, torch.ScriptObject))
            # of what is reduced, or of all that is gathered
            self._count(kind, dist.ProcessGroup.unbox(group).size(), _bytes(args[0]))
        return func(*args, **(kwargs or {}))

    def _count(self, kind: str, n: int, size: int) -> None:
        fraction = {"allreduce": 2 * (n - 1) / n, "barrier": 0.0}.get(kind, (n - 1) / n)
        self.sent[kind] = self.sent.get(kind, 0.0) + fraction * size


def _bytes(thing: Any) -> int:
    if isinstance(thing, torch.Tensor):
        return thing.nbytes
    return sum(map(_bytes, thing)) if isinstance(thing, (list, tuple)) else 0


def formula(layout: str, ranks: int, batch: int, width: int) -> float:
    """Bytes that a process sends in a step of ``paper``, activations in ``width`` bytes."""
    kind, _, compression = layout.partition("+")
    shapes = {name: p.shape for name, p in build_on_meta("paper").named_parameters()}

    def all_reduced(some: Iterable[torch.Size], n: int) -> float:
        if compression == "powersgd":
            size = 4 * sum(_power_sgd_values(shape) for shape in some)
        else:
            size = (2 if compression else 4) * sum(shape.numel() for shape in some)
        return 2 * (n - 1) / n * size

    if kind == "towers":  # a pair exchanges four tensors, both ways; like towers reduce
        local = batch / (ranks // 2)
        exchanged = 2 * local * (128 * 13 * 13 + 128 * 6 * 6 + 2048 + 2048) * width
        halves = [torch.Size((shape[0] // 2, *shape[1:])) for shape in shapes.values()]
        return exchanged + all_reduced(halves, ranks // 2) + local * 4 * 4
    if kind == "sharded":
        activations = 2 * batch * (9216 + 4096 + 4096) * width  # there and, as gradients, back
        loss = batch * (ranks * 4 * 4 + 8)  # four values per image from each process; labels
        convolutions = [shape for name, shape in shapes.items() if name.startswith("conv")]
        return (ranks - 1) / ranks * (activations + loss) + all_reduced(convolutions, ranks)
    return all_reduced(shapes.values(), ranks)


def _power_sgd_values(shape: torch.Size) -> int:
    """Values that PowerSGD sends of a parameter: two thin matrices, or all where that is little."""
    if len(shape) == 1:
        return shape.numel()
    rows, columns = shape[0], shape.numel() // shape[0]
    thin = min(rows, columns, RANK) * (rows + columns)
    return thin if 2 * thin < shape.numel() else shape.numel()


def work(layout: str, batch: int, steps: int, warm_up: int, count: bool) -> None:
    """One process: steps under a layout; prints what it sent and how long a step took."""
    mesh = init_distributed("cpu", 1).with_layout(2 if layout.startswith("towers") else 1)
    trainer = Steps(layout, mesh, batch, classes=1000)
    small = trainer.inputs(mesh.dp_size if count else batch)  # where only bytes are asked for
    inputs = trainer.inputs(batch)
    for _ in range(warm_up):
        trainer.take(small)
    dist.barrier()
    seconds, before, counter = [], _on_the_wire(), Counter()
    for _ in range(steps):
        start = time.perf_counter()
        with counter if count else nullcontext():
            trainer.take(inputs)
        seconds.append(time.perf_counter() - start)
    wire, sent = (_on_the_wire() - before) / steps, sum(counter.sent.values()) / steps
    answers = mesh.all_gather_object((sent, wire, statistics.median(seconds)))
    means = [statistics.mean(each) for each in zip(*answers, strict=True)]
    print(json.dumps(dict(zip(("sent", "wire", "seconds"), means, strict=True)) | counter.sent))


def _on_the_wire() -> int:
    return int(Path("/sys/class/net/eth0/statistics/tx_bytes").read_text())


def _run(hosts: Hosts, **options: Any) -> dict[str, Any]:
    return hosts.run("benchmarks.communication", "--work", json.dumps(options))


def count_bytes(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each layout."""
    rows: list[dict[str, Any]] = []
    width = 2 if resolve_precision("auto", torch.device("cpu")) == "bf16" else 4
    with Hosts(args.ranks, None) as hosts:
        for layout in args.layouts:
            # PowerSGD starts after two steps and two of warm-up; data parallel sends no
            # activations, so that its batch does not matter
            warm_up = 4 * layout.endswith("powersgd")
            batch = args.ranks if layout.startswith("ddp") else args.batch
            answer = _run(hosts, layout=layout, batch=batch, steps=1, warm_up=warm_up, count=True)
            row = {
                "layout": layout,
                "global_batch": batch,
                "formula_MiB": round(formula(layout, args.ranks, args.batch, width) / MIB, 2),
                "collectives_MiB": round(answer["sent"] / MIB, 2),
                "wire_MiB": round(answer["wire"] / MIB, 2),
            }
            row["of_ddp"] = round(row["collectives_MiB"] / (rows or [row])[0]["collectives_MiB"], 3)
            rows.append(row)
    return rows


def measure_speed(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each rate and layout; the layouts take turns."""
    rows = []
    for rate in args.rates:
        seconds: dict[str, list[float]] = {layout: [] for layout in args.layouts}
        with Hosts(args.hosts, rate) as hosts:
            for layout in args.layouts * args.rounds:
                work = {"layout": layout, "batch": args.speed_batch, "count": False}
                seconds[layout].append(_run(hosts, **work, steps=3, warm_up=2)["seconds"])
        base = seconds[args.layouts[0]]
        for layout, each in seconds.items():
            ratios = [theirs / ours for theirs, ours in zip(base, each, strict=True)]
            row = {"rate": rate, "layout": layout, "step_seconds": [round(s, 3) for s in each]}
            row[f"faster_than_{args.layouts[0]}"] = round(statistics.median(ratios), 2)
            rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bytes", action="store_true", help="count bytes")
    parser.add_argument("--speed", action="store_true", help="measure seconds per step")
    parser.add_argument("--layouts", nargs="*", default=LAYOUTS)
    parser.add_argument("--ranks", type=int, default=8, help="processes, where bytes are counted")
    parser.add_argument("--batch", type=int, default=1024, help="the global batch there")
    parser.add_argument("--hosts", type=int, default=4, help="hosts, where time is measured")
    parser.add_argument("--speed-batch", type=int, default=64, help="the global batch there")
    parser.add_argument("--rates", nargs="*", default=["1gbit", "4gbit"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    parser.add_argument("--work", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(**args.work)
        return
    results: dict[str, Any] = {"arch": "paper, 1000 classes"}
    if args.bytes:
        results["bytes"] = {"ranks": args.ranks, "global_batch": args.batch}
        results["bytes"]["rows"] = count_bytes(args)
    if args.speed:
        results["speed"] = {"hosts": args.hosts, "global_batch": args.speed_batch}
        results["speed"]["rows"] = measure_speed(args)
    save_record("communication.py", results, args.out)


if __name__ == "__main__":
    main()
