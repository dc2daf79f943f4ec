"""Images a second of ``paper`` on 1 to 1,024 GPUs, from a model of a step's time; and the model
held against steps on hosts of this machine.

python -m benchmarks.scaling [--parts FILE.json] [--out FILE.json] [--png FILE.png]
python -m benchmarks.scaling --check [--hosts 2 4 8] [--rates 1gbit 4gbit] [--out FILE.json]
torchrun --nproc_per_node=8 -m benchmarks.scaling --measure FILE.json [--data DIR]

The model is benchmarks/step_model.py. Its parts, which benchmarks/step_parts.py measures, are read
from a JSON file (the keys are those of Parts there), which ``--measure`` writes for the machine
that it runs on; without one they are those of nodes of eight H100s, and assumed. ``--check``
measures parts on network namespaces whose links are slow (as root), predicts steps from them, and
then takes these steps. It wants the machine to itself. FILE.json keeps what is not made anew.
"""

import argparse
import json
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from alexnet_dist.parallel.mesh import available_cpus
from alexnet_dist.tracking.plots import save_figure
from benchmarks.common import machine_info
from benchmarks.hosts import Hosts
from benchmarks.sources import loading, some_images, speed
from benchmarks.step_fit import fit_parts
from benchmarks.step_model import LAYOUTS, Parts, network, predict
from benchmarks.step_parts import KINDS, observe

COUNTS = [2**power for power in range(11)]
STRONG, WEAK = 1024, 128

_TERABYTES = 2.7e12  # a second, of a memory of 3.35
ASSUMED: dict[str, Any] = {
    "name": "nodes of 8 H100",
    "assumed": [
        "convolutions, with norms and pools: 8 us an image forward, 15 us backward (a quarter of "
        "the peak in bf16), and 0.5 and 1 ms a step to launch them",
        "fully connected layers: 400 TFLOP/s, and 14 bytes a parameter of a memory of 2.7 TB/s",
        "update: 20 bytes a parameter; what DDP copies of a gradient value: 8 bytes, 20 where it "
        "goes as bf16, 40 for PowerSGD's products",
        "NVLink: 360 GB/s a GPU and direction, 3 us a hop; hops by the logarithm of the group",
        "InfiniBand: 400 Gbit/s a GPU, of which 45 GB/s, 8 us a hop; no switch is oversubscribed",
        "collectives take a tenth of a GPU from what computes beside them",
        "loader: 14 cores a GPU, 4,000 images a second and core, which raw pixels may give and "
        "JPEGs do not",
    ],
    "width": 2,
    "convolutions_forward": [0.5e-3, 8e-6],
    "convolutions_backward": [1e-3, 15e-6],
    "connected": [14 / _TERABYTES, 6 / 400e12],
    "connected_backward": 2 / 3,
    "update": 20 / _TERABYTES,
    "sending": {
        "none": 8 / _TERABYTES,
        "bf16": 20 / _TERABYTES,
        "powersgd": 40 / _TERABYTES,
    },
    "processes_a_node": 8,
    "inside": {kind: [3e-6, 360e9] for kind in KINDS},
    "between": {kind: [8e-6, 45e9] for kind in KINDS},
    "hops": "tree",
    "taken": 0.1,
    "powersgd_waits": False,
    "loader": [4000, 14],
}

ASSUMPTIONS = (
    "all processes are as fast as each other, and nothing else is on the network",
    "buckets of 32 MB leave one after another, each when its last gradient is there; an all-reduce "
    "is as long beside computing as alone, and takes a fixed part of the processor from it",
    "the backward pass of the convolutions is dealt out over their layers by multiply-adds",
    "whole: gathers and their gradients are waited for, gradients of convolutions are not",
    "across nodes, sums and gathers are put together within a node first; an all-to-all is not",
    "loading is beside all else, and bounds a step only where it is longer",
)


def check(words: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """Steps on hosts, predicted and measured; those of one network after another."""
    layers = network(words.classes, words.image_size)
    for n in words.hosts:
        computed: dict[str, Any] = {}  # once, because links have no part in it
        for rate in words.rates:
            before = _load()
            with Hosts(n, rate) as hosts:
                told = {
                    "shape": {"classes": words.classes, "image_size": words.image_size},
                    "threads": 1,
                    "with_computing": not computed,
                    "batch": words.local_batch * n,
                }
                found = hosts.run("benchmarks.step_parts", json.dumps(told))
            ticks, idle, mine = _load() - before
            others = round(float((ticks - idle - mine) / ticks), 2)
            computed = found["computing"] = computed or found["computing"]
            parts = Parts(**fit_parts(layers, found))
            rows: list[dict[str, Any]] = []
            for layout, seconds in found["steps"].items():
                step = predict(layers, parts, layout, n, n * words.local_batch)
                measured = statistics.median(seconds)
                row = {
                    "hosts": n,
                    "rate": rate,
                    "layout": layout,
                    "predicted_s": round(step.seconds, 3),
                    "measured_s": round(measured, 3),
                    "error_percent": round(100 * (step.seconds / measured - 1), 1),
                    "waiting_s": round(step.waiting, 3),
                    "each_s": [round(one, 3) for one in seconds],
                    "others_took": others,  # of the processors, meanwhile
                }
                rows.append(row)
                print(row, flush=True)
            rows[-1]["found"] = found
            yield rows


def _load() -> np.ndarray:
    """Ticks of all processors, those in which they had nothing to do, and those that children of
    this process took."""
    ticks = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    own = resource.getrusage(resource.RUSAGE_CHILDREN)
    mine = (own.ru_utime + own.ru_stime) * os.sysconf("SC_CLK_TCK")
    return np.array([sum(ticks), ticks[3] + ticks[4], mine])


def scale(parts: Parts) -> list[dict[str, Any]]:
    """The table: each layout on 1 to 1,024 processes, with a fixed global or local batch."""
    layers = network()
    found = []
    for scaling in ("strong", "weak"):
        for layout in LAYOUTS:
            alone = 0.0
            for n in filter(parts.reach, COUNTS):
                batch = STRONG if scaling == "strong" else WEAK * n
                step = predict(layers, parts, layout, n, batch)
                speed = batch / step.seconds
                alone = alone or speed
                found.append(
                    {
                        "scaling": scaling,
                        "layout": layout,
                        "processes": n,
                        "global_batch": batch,
                        "images_per_second": round(speed),
                        "efficiency_percent": round(100 * speed / (n * alone), 1),
                        "bound": step.bound,
                    }
                )
    return found


def show(parts: Parts, table: Sequence[dict[str, Any]]) -> None:
    """Print the table, and what it assumes."""
    letters = {"compute": "", "comm_time_fraction": "c", "loader": "l"}
    for scaling, title in (
        ("strong", f"global batch {STRONG:,}"),
        ("weak", f"{WEAK} images a process"),
    ):
        print(f"\n{parts.name}, {title}: images a second, efficiency in %, what bounds it")
        print(f"{'processes':>9}" + "".join(f"{layout:>26}" for layout in LAYOUTS))
        for n in filter(parts.reach, COUNTS):
            cells = [r for r in table if r["scaling"] == scaling and r["processes"] == n]
            texts = [
                f"{one['images_per_second']:>12,} {one['efficiency_percent']:>5} "
                f"{letters[one['bound']]:<1}".rjust(26)
                for one in cells
            ]
            print(f"{n:>9}" + "".join(texts))
    print("\nc: communication bounds it, l: the loader; else compute. Of the model:")
    print("\n".join(f"- {one}" for one in ASSUMPTIONS))
    if parts.assumed:
        print("Assumed, not measured:")
        print("\n".join(f"- {one}" for one in parts.assumed))


def draw(record: dict[str, Any], parts: Parts, path: Path) -> None:
    """The check, where there was one, and the table, as a figure."""
    styles = dict(
        zip(
            LAYOUTS,
            (("#1f5a94", "o"), ("#3d8b5f", "s"), ("#c98a1b", "^"), ("#c44536", "D")),
            strict=True,
        )
    )
    checked = record.get("check", [])
    figure = Figure(figsize=(8, 3.1), layout="constrained")
    axes = list(figure.subplots(1, 2 + bool(checked)))
    if checked:
        axis = axes.pop(0)
        for layout, (colour, sign) in styles.items():
            rows = [row for row in checked if row["layout"] == layout]
            axis.plot(
                [row["measured_s"] for row in rows],
                [row["predicted_s"] for row in rows],
                sign,
                color=colour,
                markersize=4,
                markerfacecolor="none",
            )
        every = [row[key] for row in checked for key in ("measured_s", "predicted_s")]
        ends = [0.8 * min(every), 1.25 * max(every)]
        axis.plot(ends, ends, color="0.3", linewidth=0.8)
        axis.fill_between(
            ends,
            [0.85 * x for x in ends],
            [1.15 * x for x in ends],
            color="0.5",
            alpha=0.2,
            linewidth=0,
        )
        axis.set(
            xscale="log",
            yscale="log",
            xlim=ends,
            ylim=ends,
            xlabel="measured (s a step)",
            ylabel="predicted (s a step)",
        )
        ticks = [0.06, 0.12, 0.25, 0.5, 1, 2, 4, 8]
        shown = [tick for tick in ticks if ends[0] < tick < ends[1]]
        for side in (axis.xaxis, axis.yaxis):
            side.set_ticks(shown, [f"{tick:g}" for tick in shown])
            side.set_ticks([], minor=True)
        *some, most = (str(n) for n in sorted({row["hosts"] for row in checked}))
        hosts = f"{', '.join(some)} and {most}" if some else most
        axis.set_title(f"a step on {hosts} hosts\nlinks of 1 and 4 Gbit/s\nband: ±15 %", fontsize=8)
    what = "assumed, not measured" if parts.assumed else "measured"
    panels = (
        ("weak", "efficiency_percent", 1, "efficiency (% of one alone)"),
        ("strong", "images_per_second", 1000, "images a second (thousands)"),
    )
    for axis, (scaling, key, unit, label) in zip(axes, panels, strict=True):
        for layout, (colour, sign) in styles.items():
            rows = [r for r in record["table"] if (r["scaling"], r["layout"]) == (scaling, layout)]
            axis.plot(
                [row["processes"] for row in rows],
                [row[key] / unit for row in rows],
                sign + "-",
                color=colour,
                markersize=3,
                linewidth=1,
                label=layout,
            )
        axis.set_xscale("log", base=2)
        axis.set(xlabel="processes, a GPU each" if "H100" in parts.name else "processes")
        axis.set(ylabel=label, ylim=(0, None))
        axis.set_xticks([1, 4, 16, 64, 256, 1024], ["1", "4", "16", "64", "256", "1024"])
        batch = f"{WEAK} images a process" if scaling == "weak" else f"global batch {STRONG:,}"
        axis.set_title(f"{batch}\n{parts.name}\n{what}", fontsize=8)
    axes[0].legend(fontsize=8)
    save_figure(figure, path)


def images_a_core(data: Path, batch: int = 64) -> list[tuple[int, float]]:
    """Images a second of DALI on a folder's JPEGs, by cores."""
    before = os.sched_getaffinity(0)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        root = some_images(data, Path(folder), 1000)
        for cores in sorted({1, available_cpus()}):
            os.sched_setaffinity(0, sorted(before)[:cores])
            try:
                batches = loading(root, "dali", batch)
                found.append((cores, statistics.median(speed(batches, 10)[0] for _ in range(3))))
                batches.close()
            finally:
                os.sched_setaffinity(0, before)
    return found


def write_parts(words: argparse.Namespace) -> None:
    """Measure the parts of the machine that this process runs on, alone or under torchrun."""
    shape = {"classes": 1000, "image_size": 224}
    found = observe(shape, batches=words.batches)
    if found is None:
        return
    parts = fit_parts(network(**shape), found)
    if words.data:
        a_core = [each / cores for cores, each in images_a_core(words.data)]
        cores = max(available_cpus() // found["node"], 1)
        parts["loader"] = [round(statistics.median(a_core)), cores]
    words.measure.write_text(json.dumps(parts, indent=1) + "\n")


def write(record: dict[str, Any], path: Path | None) -> None:
    if path:
        path.write_text(json.dumps(record, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", type=Path, help="a JSON file with the keys of Parts")
    parser.add_argument("--check", action="store_true", help="predict and take steps on hosts")
    parser.add_argument("--hosts", nargs="*", type=int, default=[2, 4, 8])
    parser.add_argument("--rates", nargs="*", default=["1gbit", "4gbit"])
    parser.add_argument("--local-batch", type=int, default=8, help="images a host there")
    parser.add_argument("--classes", type=int, default=1000, help="of the network there")
    parser.add_argument("--image-size", type=int, default=67, help="of the network there")
    parser.add_argument("--measure", type=Path, help="where parts of this machine go")
    parser.add_argument("--batches", nargs="*", type=int, default=[], help="images a process there")
    parser.add_argument("--data", type=Path, help="a folder with train/CLASS/, for the loader")
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    parser.add_argument("--png", type=Path, help="where the figure goes")
    words = parser.parse_args()
    if words.measure:
        write_parts(words)
        return
    record: dict[str, Any] = {}
    if words.out and words.out.exists():
        record = json.loads(words.out.read_text())
    record |= {"what": "benchmarks/scaling.py"}
    for rows in check(words) if words.check else ():
        this = rows[0]["hosts"], rows[0]["rate"]
        others = [row for row in record.get("check", []) if (row["hosts"], row["rate"]) != this]
        every = sorted(others + rows, key=lambda row: (row["hosts"], row["rate"]))
        record |= {"date": time.strftime("%Y-%m-%d"), "machine": machine_info()}
        record["network"] = f"paper, {words.classes} classes, {words.image_size} pixels"
        record["images_a_host"], record["check"] = words.local_batch, every
        write(record, words.out)
    parts = Parts(**(json.loads(words.parts.read_text()) if words.parts else ASSUMED))
    record["table"] = scale(parts)
    show(parts, record["table"])
    write(record, words.out)
    if words.png:
        draw(record, parts, words.png)


if __name__ == "__main__":
    main()
