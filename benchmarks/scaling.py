"""Images per second of ``paper`` on 1 to 1,024 GPUs by a model of a step's time, and the model
against steps on hosts of this machine.

python -m benchmarks.scaling [--check [--hosts 2 4 8] [--rates 1gbit 4gbit]] [--out FILE.json]
    [--png FILE.png]

The model is benchmarks/step_model.py. ``--check`` (as root, on a quiet machine) measures what
computing and collectives take on network namespaces whose links are slow, predicts steps from both,
and compares them with real steps. The table for H100 nodes stands on assumed costs. FILE.json keeps
an earlier check unless there is a new one.
"""

import argparse
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from alexnet_dist.parallel.precision import resolve_precision
from alexnet_dist.tracking.plots import save_figure
from benchmarks.common import CPU, save_record
from benchmarks.hosts import Hosts
from benchmarks.step_model import (
    KINDS,
    LAYOUTS,
    Layer,
    Links,
    Network,
    directions,
    hops,
    paper_layers,
    waiting,
)

COUNTS = [2**power for power in range(11)]
STRONG, WEAK = 1024, 128  # images of the global batch; per GPU
LOCAL_BATCH, CHECK_SHAPE = 8, {"classes": 1000, "image_size": 67}
MEMORY = 2.7e12  # bytes per second, of a memory of 3.35
HOST = {"ddp": 0.3e-3, "ddp+bf16": 0.3e-3, "ddp+powersgd": 6e-3, "sharded": 6e-3}
REDUCING = {"": 8, "bf16": 20, "powersgd": 40}  # bytes that DDP copies per gradient value
ASSUMPTIONS = """\
of nodes of 8 H100 (nothing of it measured):
- convolutions with norms and pools: 8 us per image forward, 15 us backward (a quarter of the peak
  in bf16), and 0.5 and 1 ms per step to launch them
- fully connected layers: 400 TFLOP/s, and 14 bytes per parameter of a memory of 2.7 TB/s
- update: 20 bytes per parameter; DDP copies 8 bytes per gradient value, 20 in bf16, 40 for PowerSGD
- NVLink: 360 GB/s per GPU and direction, 3 us per hop; hops by the logarithm of the group
- InfiniBand: 400 Gbit/s per GPU, of which 45 GB/s, 8 us per hop; no switch is oversubscribed
- the host launches a step in 0.3 ms as a CUDA graph, in 6 ms with PowerSGD or sharded layers
- collectives take a tenth of a GPU from what computes beside them
- loading is never the bottleneck
of the model:
- all ranks are equally fast, and nothing else is on the network
- an all-reduce takes as long beside computing as alone
- the backward pass is divided among the layers by their multiply-adds"""
H100 = Network(
    within=dict.fromkeys(KINDS, (3e-6, 360e9)),
    between=dict.fromkeys(KINDS, (8e-6, 45e9)),
    node_size=8,
    topology="tree",
    slowdown=0.1,
    powersgd_blocks=False,
)


def h100_computing(
    layers: Sequence[Layer], layout: str, n: int, batch: int
) -> tuple[float, list[float]]:
    """Assumed seconds of a step's computing, and of each layer's backward pass in it, with what
    DDP does to its gradient."""
    kind, _, compression = layout.partition("+")
    local, sharded = math.ceil(batch / n), kind == "sharded"
    held, images = (1 / n, batch) if sharded else (1.0, local)  # of fully connected layers
    conv_work = sum(layer.backward for layer in layers if layer.is_conv)
    backward, others = [], 0.5e-3 + 8e-6 * local
    for layer in layers:
        parameters = layer.parameters * (1.0 if layer.is_conv else held)
        others += 20 * parameters / MEMORY
        if layer.is_conv:
            seconds = (1e-3 + 15e-6 * local) * layer.backward / conv_work
        else:
            fc = parameters * (14 / MEMORY + images * 6 / 400e12)
            others += fc / 3
            seconds = fc * 2 / 3
        averaged = n > 1 and (layer.is_conv or not sharded)
        backward.append(seconds + averaged * REDUCING[compression] * layer.parameters / MEMORY)
    return others + sum(backward), backward


def table() -> list[dict[str, Any]]:
    """Each layout on 1 to 1,024 GPUs, with a fixed global ("strong") or local batch ("weak")."""
    layers, found = paper_layers(), []
    for scaling in ("strong", "weak"):
        for layout in LAYOUTS:
            alone = 0.0
            for n in COUNTS:
                batch = STRONG if scaling == "strong" else WEAK * n
                computing, backward = h100_computing(layers, layout, n, batch)
                waits = waiting(layers, backward, H100, layout, n, batch)
                launching = HOST[layout if n > 1 else "ddp"]
                speed = batch / max(computing + waits, launching)
                alone = alone or speed
                found.append(
                    {
                        "scaling": scaling,
                        "layout": layout,
                        "gpus": n,
                        "images_per_second": round(speed),
                        "efficiency_percent": round(100 * speed / (n * alone), 1),
                    }
                )
    return found


def check(counts: Sequence[int], rates: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Steps on hosts, predicted and measured."""
    layers = paper_layers(**CHECK_SHAPE)
    work = sum(layer.forward + layer.backward for layer in layers)
    width = 4 if resolve_precision("auto", CPU) == "fp32" else 2
    task = json.dumps({"shape": CHECK_SHAPE, "local_batch": LOCAL_BATCH})
    for n in counts:
        for rate in rates:
            with Hosts(n, rate) as hosts:
                found = hosts.run("benchmarks.step_times", task)
            links = fit_links(found["collectives"], n)
            network = Network(links, slowdown=found["slowdown"], activation_bytes=width)
            for layout in LAYOUTS:
                computing, measured = found["computing"][layout], found["step"][layout]
                backward = [computing * layer.backward / work for layer in layers]
                waits = waiting(layers, backward, network, layout, n, n * LOCAL_BATCH)
                predicted = computing + waits
                yield {
                    "hosts": n,
                    "rate": rate,
                    "layout": layout,
                    "predicted_s": round(predicted, 3),
                    "measured_s": round(measured, 3),
                    "error_percent": round(100 * (predicted / measured - 1), 1),
                    "waiting_s": round(waits, 3),
                }


def fit_links(found: dict[str, list[tuple[int, float]]], n: int) -> Links:
    """Seconds per hop and bytes per second of each collective, in a ring of n ranks."""
    links = {}
    for kind, points in found.items():
        sent = [(directions(kind) * (n - 1) / n * size, seconds) for size, seconds in points]
        constant, slope = fit(sent)
        links[kind] = (constant / (directions(kind) * hops("ring", n)), 1 / max(slope, 1e-15))
    return links


def fit(points: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """Seconds at all and per unit, neither below 0, by least squares in which an error counts by
    the root of what it is an error of: neither the small times nor the large ones alone decide."""
    x, seconds = np.array(sorted(points), float).T
    weights = seconds**-0.5
    terms = np.stack([np.ones_like(x), x], 1) * weights[:, None]
    constant, slope = np.linalg.lstsq(terms, seconds * weights, rcond=None)[0]
    if slope < 0:
        return float(len(x) / np.sum(1 / seconds)), 0.0
    if constant < 0:
        return 0.0, float(np.sum(x) / np.sum(x**2 / seconds))
    return float(constant), float(slope)


STYLES = dict(
    zip(LAYOUTS, (("#1f5a94", "o"), ("#3d8b5f", "s"), ("#c98a1b", "^"), ("#c44536", "D")))  # noqa: B905
)


def draw(record: dict[str, Any], path: Path) -> None:
    """The check, where there was one, and the table, as a figure."""
    checked = record.get("check", [])
    figure = Figure(figsize=(8, 3.1), layout="constrained")
    *first, weak, strong = figure.subplots(1, 2 + bool(checked))
    if first:
        _draw_check(first[0], checked)
    for axis, scaling, key, label in (
        (weak, "weak", "efficiency_percent", "efficiency (% of one alone)"),
        (strong, "strong", "images_per_second", "images per second"),
    ):
        for layout, (color, marker) in STYLES.items():
            rows = [r for r in record["table"] if (r["scaling"], r["layout"]) == (scaling, layout)]
            x, y = zip(*((row["gpus"], row[key]) for row in rows), strict=True)
            axis.plot(x, y, f"{marker}-", color=color, markersize=3, linewidth=1, label=layout)
        axis.set_xscale("log", base=2)
        axis.set(xlabel="GPUs", ylabel=label, ylim=(0, None))
        axis.set_xticks(COUNTS[::2], [str(n) for n in COUNTS[::2]])
        batch = f"{WEAK} images per GPU" if scaling == "weak" else f"global batch {STRONG:,}"
        axis.set_title(f"{batch}\nnodes of 8 H100\nassumed, not measured", fontsize=8)
    weak.legend(fontsize=8)
    save_figure(figure, path)


def _draw_check(axis: Axes, rows: Sequence[dict[str, Any]]) -> None:
    for row in rows:
        color, marker = STYLES[row["layout"]]
        axis.loglog(row["measured_s"], row["predicted_s"], marker, color=color, ms=4, mfc="none")
    every = [row[key] for row in rows for key in ("measured_s", "predicted_s")]
    ends = np.array([0.8 * min(every), 1.25 * max(every)])
    axis.plot(ends, ends, color="0.3", linewidth=0.8)
    axis.fill_between(ends, 0.85 * ends, 1.15 * ends, color="0.5", alpha=0.2, linewidth=0)
    ticks = [tick for tick in (0.06, 0.12, 0.25, 0.5, 1, 2, 4, 8) if ends[0] < tick < ends[1]]
    for side in (axis.xaxis, axis.yaxis):
        side.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
        side.set_ticks([], minor=True)
    axis.set(xlabel="measured (s per step)", ylabel="predicted (s per step)")
    hosts = ", ".join(str(n) for n in sorted({row["hosts"] for row in rows}))
    axis.set_title(f"a step on {hosts} hosts\nslow links\nband: ±15 %", fontsize=8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="predict and take steps on hosts")
    parser.add_argument("--hosts", nargs="*", type=int, default=[2, 4, 8])
    parser.add_argument("--rates", nargs="*", default=["1gbit", "4gbit"])
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    parser.add_argument("--png", type=Path, help="where the figure goes")
    words = parser.parse_args()
    record: dict[str, Any] = {}
    if words.out and words.out.exists():
        record = json.loads(words.out.read_text())
    if words.check:
        record["check"] = []
        for row in check(words.hosts, words.rates):
            print(row, flush=True)
            record["check"].append(row)
    record["table"] = table()
    save_record("scaling.py", record, words.out)
    print(ASSUMPTIONS)
    if words.png:
        draw(record, words.png)


if __name__ == "__main__":
    main()
