"""What each layout sends: bytes a process and step, counted, beside the formula; and steps a second
on several hosts whose network is slow.

python -m benchmarks.communication [--bytes] [--speed] [--out FILE.json]

Hosts are network namespaces on this machine, joined by a bridge (iproute2; as root), each with a
link whose rate is set in both directions; gloo speaks between them. Bytes are counted twice: of
the collectives that really ran, in torch's dispatcher, by what a ring sends of each; and on the
wire, by the host's own link, which adds the headers of TCP and answers. Processes share the two
cores of one machine, so that the time of a step is mostly arithmetic; a cluster's is less so.
"""

import argparse
import json
import statistics
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from alexnet_dist.model import build_on_meta
from alexnet_dist.parallel.mesh import init_distributed
from alexnet_dist.parallel.precision import resolve_precision
from benchmarks.common import machine_info
from benchmarks.hosts import Hosts
from benchmarks.steps import RANK, Steps

COMPRESSED = ("", "+bf16", "+fp16", "+powersgd")
LAYOUTS = [f"{kind}{how}" for kind in ("ddp", "towers", "sharded") for how in COMPRESSED]
CLASSES = 1000
MIB = 2**20


class Counter(TorchDispatchMode):
    """Bytes that a process sends in the collectives that pass, by kind, as rings send them."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: dict[str, float] = {}
        self._all_reduce = dist.all_reduce

    def __enter__(self) -> "Counter":
        super().__enter__()
        dist.all_reduce = self._from_elsewhere
        return self

    def __exit__(self, *error: Any) -> None:
        dist.all_reduce = self._all_reduce
        super().__exit__(*error)

    def _from_elsewhere(self, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
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
            boxed = next(one for one in args if isinstance(one, torch.ScriptObject))
            # of what is reduced, or of all that is gathered
            self._count(kind, dist.ProcessGroup.unbox(boxed).size(), _bytes(args[0]))
        return func(*args, **(kwargs or {}))

    def _count(self, kind: str, n: int, size: int) -> None:
        share = {"allreduce": 2 * (n - 1) / n, "barrier": 0.0}.get(kind, (n - 1) / n)
        self.sent[kind] = self.sent.get(kind, 0.0) + share * size


def _bytes(thing: Any) -> int:
    if isinstance(thing, torch.Tensor):
        return thing.numel() * thing.element_size()
    return sum(_bytes(one) for one in thing) if isinstance(thing, (list, tuple)) else 0


def formula(layout: str, ranks: int, batch: int, width: int) -> float:
    """Bytes that a process sends in a step of ``paper``, activations in ``width`` bytes."""
    kind, _, compress = layout.partition("+")
    shapes = {
        name: parameter.shape
        for name, parameter in build_on_meta("paper", num_classes=CLASSES).named_parameters()
    }

    def reduced(some: Iterable[torch.Size], n: int) -> float:
        if compress == "powersgd":
            size = 4 * sum(_matrices(shape) for shape in some)
        else:
            size = (2 if compress else 4) * sum(shape.numel() for shape in some)
        return 2 * (n - 1) / n * size

    if kind == "towers":  # a pair exchanges four tensors, both ways; like towers reduce
        local = batch / (ranks // 2)
        exchanged = 2 * local * (128 * 13 * 13 + 128 * 6 * 6 + 2048 + 2048) * width
        halves = [torch.Size((shape[0] // 2, *shape[1:])) for shape in shapes.values()]
        return exchanged + reduced(halves, ranks // 2) + local * 4 * 4
    if kind == "sharded":
        share = (ranks - 1) / ranks
        activations = 2 * batch * (9216 + 4096 + 4096) * width  # there and, as gradients, back
        loss = batch * (ranks * 4 * 4 + 8)  # four numbers an image from each process; labels
        convolutions = [shape for name, shape in shapes.items() if name.startswith("conv")]
        return share * (activations + loss) + reduced(convolutions, ranks)
    return reduced(shapes.values(), ranks)


def _matrices(shape: torch.Size) -> int:
    """Values that PowerSGD sends of a parameter: two thin matrices, or all where that is little."""
    if len(shape) == 1:
        return shape.numel()
    rows, columns = shape[0], shape.numel() // shape[0]
    thin = min(rows, columns, RANK) * (rows + columns)
    return thin if 2 * thin < shape.numel() else shape.numel()


def work(words: argparse.Namespace) -> None:
    """One process: steps under a layout; prints what it sent and how long a step took."""
    mesh = init_distributed("cpu", 1)
    mesh = mesh.with_layout(2 if words.work.startswith("towers") else 1)
    steps = Steps(words.work, mesh, words.batch, classes=CLASSES)

    # steps that warm up may be small where only bytes are asked for
    small = mesh.dp_size if words.count else words.batch
    made = {batch: steps.inputs(batch) for batch in (small, words.batch)}
    for _ in range(words.warm):
        steps.take(made[small])
    seconds = []
    dist.barrier()
    before, counter = _on_the_wire(), Counter()
    for _ in range(words.steps):
        begin = time.perf_counter()
        if words.count:
            with counter:
                steps.take(made[words.batch])
        else:
            steps.take(made[words.batch])
        seconds.append(time.perf_counter() - begin)
    wire = (_on_the_wire() - before) / words.steps
    sent = sum(counter.sent.values()) / words.steps
    answers = mesh.all_gather_object((sent, wire, statistics.median(seconds)))
    if mesh.rank == 0:
        means = [statistics.mean(one) for one in zip(*answers, strict=True)]
        print(json.dumps({"sent": means[0], "wire": means[1], "seconds": means[2]} | counter.sent))


def _on_the_wire() -> int:
    return int(Path("/sys/class/net/eth0/statistics/tx_bytes").read_text())


def _run(hosts: Hosts, layout: str, batch: int, *options: str) -> dict[str, Any]:
    words = ["--work", layout, "--batch", str(batch), *options]
    return hosts.run("benchmarks.communication", *words)


def count_bytes(words: argparse.Namespace) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    width = 2 if resolve_precision("auto", torch.device("cpu")) == "bf16" else 4
    with Hosts(words.ranks, None) as hosts:
        for layout in words.layouts:
            # four steps first, because PowerSGD begins after two, and two of warm-up; data parallel
            # sends no activations, so that its batch does not matter
            warm = "4" if layout.endswith("powersgd") else "0"
            batch = words.ranks if layout.startswith("ddp") else words.batch
            options = ["--steps", "1", "--warm", warm, "--count"]
            answer = _run(hosts, layout, batch, *options)
            wanted = formula(layout, words.ranks, words.batch, width)
            row = {
                "layout": layout,
                "global_batch": batch,
                "formula_MiB": round(wanted / MIB, 2),
                "collectives_MiB": round(answer["sent"] / MIB, 2),
                "wire_MiB": round(answer["wire"] / MIB, 2),
            }
            row["of_ddp"] = round(row["collectives_MiB"] / (rows or [row])[0]["collectives_MiB"], 3)
            rows.append(row)
            print(row, flush=True)
    return rows


def measure_speed(words: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for rate in words.rates:
        with Hosts(words.hosts, rate) as hosts:
            seconds: dict[str, list[float]] = {layout: [] for layout in words.layouts}
            for _ in range(words.rounds):
                for layout in words.layouts:
                    options = ["--steps", "3", "--warm", "2"]
                    answer = _run(hosts, layout, words.speed_batch, *options)
                    seconds[layout].append(answer["seconds"])
                    print(rate, layout, f"{answer['seconds']:.2f} s a step", flush=True)
        base = words.layouts[0]
        for layout, each in seconds.items():
            ratios = [theirs / ours for theirs, ours in zip(seconds[base], each, strict=True)]
            row = {
                "rate": rate,
                "layout": layout,
                "seconds_a_step": [round(one, 3) for one in each],
                f"faster_than_{base}": round(statistics.median(ratios), 2),
            }
            rows.append(row)
            print(row, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bytes", action="store_true", help="count bytes")
    parser.add_argument("--speed", action="store_true", help="measure steps a second")
    parser.add_argument("--layouts", nargs="*", default=LAYOUTS)
    parser.add_argument("--ranks", type=int, default=8, help="processes, where bytes are counted")
    parser.add_argument("--batch", type=int, default=1024, help="the global batch there")
    parser.add_argument("--hosts", type=int, default=4, help="hosts, where time is measured")
    parser.add_argument("--speed-batch", type=int, default=64, help="the global batch there")
    parser.add_argument("--rates", nargs="*", default=["1gbit", "4gbit"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", help="for the script itself: a layout")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--warm", type=int, default=0)
    parser.add_argument("--count", action="store_true")
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    words = parser.parse_args()
    if words.work:
        work(words)
        return
    record: dict[str, Any] = {
        "what": "benchmarks/communication.py",
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine_info(),
        "variant": "paper, 1000 classes",
        "precision": resolve_precision("auto", torch.device("cpu")),
    }
    if words.bytes:
        record["bytes"] = {
            "ranks": words.ranks,
            "global_batch": words.batch,
            "a_process_and_step": count_bytes(words),
        }
    if words.speed:
        record["speed"] = {
            "hosts": words.hosts,
            "global_batch": words.speed_batch,
            "rows": measure_speed(words),
        }
    if words.out:
        words.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
