"""What was measured as people read it: a table, a sentence, a picture."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from alexnet_dist.tracking.plots import save

Record = Mapping[str, Any]

_LIMITS = {
    "matrix_product": ("matrix product", 1e9, "GFLOP/s"),
    "memory": ("memory, read and written", 1e9, "GB/s"),
    "host_to_device": ("host to device", 1e9, "GB/s"),
    "all_reduce": ("gradients averaged", 1e9, "GB/s"),
    "decoder": ("decoding alone", 1, "images/s"),
}
_THEIRS = {
    "example": "PyTorch's ImageNet example",
    "dataloader": "its DataLoader",
    "dali": "NVIDIA's DALI example",
    "trainer": "this trainer",
    "engine": "this trainer's engine",
}
WAITING = 0.05
"""The part of the time from which on waiting is worth a word."""


def busy(what: str, speaks: bool) -> AbstractContextManager[Any]:
    """Says in a terminal what is under way."""
    return Console(stderr=True).status(what) if speaks else nullcontext()


def limit_in_images(record: Record) -> float:
    """Images a second, if a step were its matrix products and they ran at the limit."""
    return record["limits"]["matrix_product"]["median"] / record["compute"]["operations_per_image"]


def verdict(record: Record) -> str:
    """Where the time goes, and what to do about it, in one sentence."""
    training, wait, others = record["training"], *_waits(record)
    speed = training["images_per_second"]["median"]
    if max(wait, others) < WAITING:
        share = 100 * speed / limit_in_images(record)
        return (
            f"computing {100 * (1 - wait - others):.0f} % of the time, at {share:.0f} % of the "
            "images that matrix products alone would allow"
        )
    if others > wait:
        return (
            f"waiting for other processes {100 * others:.0f} %: take a larger data.batch_size, "
            "--parallel.fc sharded, or --parallel.grad_compression bf16"
        )
    return f"waiting for images {100 * wait:.0f} %: {_remedy(record)}"


def _waits(record: Record) -> tuple[float, float]:
    training = record["training"]
    return training["data_time_fraction"], training["comm_time_fraction"]


def _remedy(record: Record) -> str:
    """What gives images sooner."""
    engine, kind = record["training"]["engine"], record["images"]["kind"]
    if engine.startswith("DataLoader") and "dali" not in record["loading"]:
        return "install DALI (pip install nvidia-dali-cuda130)"
    if kind != "pixels":
        gpu = "gpu" in record["machine"]
        decode = (
            "decode on the GPU (--data.dali_decoder auto), or " if gpu and "CPU" in engine else ""
        )
        return f"{decode}prepare raw pixels (python -m alexnet_dist.prepare ... --format pixels)"
    if "gpu_cache" in record["loading"] and "gpu_cache" not in engine:
        return "take --data.loader gpu_cache"
    return "take more --data.threads, or a larger --data.prefetch"


def show(record: Record) -> None:
    """Print the table and the verdict."""
    console = Console(highlight=False)
    console.width = max(console.width, 110)  # a table that is cut is read by nobody
    name = record["machine"].get("gpu") or record["machine"]["processor"]
    console.print(
        f"{record['recipe']}: {record['variant']}, {record['classes']} classes, batch "
        f"{record['batch']}, {record['precision']}; {record['processes']} x {name}, "
        f"{record['threads']} threads each; {record['images']['count']:,} images "
        f"({record['images']['kind']})",
        soft_wrap=True,
    )
    table = Table(box=None, pad_edge=False)
    for title in ("", "median", "lowest", "highest", "", ""):
        table.add_column(title, justify="left" if not title else "right")
    for row in _rows(record):
        table.add_row(*row)
    console.print(table)
    console.print(f"verdict: {record['verdict']}", soft_wrap=True)


def _rows(record: Record) -> list[tuple[str, ...]]:
    limits, compute, training = record["limits"], record["compute"], record["training"]
    rows = [
        _row(title, limits[name], unit, over=over)
        for name, (title, over, unit) in _LIMITS.items()
        if name in limits
    ]
    share = 100 * compute["images_per_second"]["median"] / limit_in_images(record)
    note = f"{share:.0f} % of the matrix products' {limit_in_images(record):,.0f}"
    rows.append(_row("computing alone", compute["images_per_second"], note=note))
    for part, milliseconds in compute["milliseconds"].items():
        rows.append((f"  {part.replace('_', ', ')}", f"{milliseconds:,.4g}", "", "", "ms", ""))
    decoder = limits.get("decoder", {}).get("median")
    for engine, figure in record["loading"].items():
        note = f"{100 * figure['median'] / decoder:.0f} % of decoding alone" if decoder else ""
        rows.append(_row(f"loading alone, {engine}", figure, note=note))
    wait, others = _waits(record)
    note = f"{100 * training['of_compute']:.0f} % of computing alone; waits {100 * wait:.0f} %"
    if record["processes"] > 1:
        note += f" for images, {100 * others:.0f} % for other processes"
    rows.append(_row("end to end", training["images_per_second"], note=note))
    for name, layout in record["layouts"].items():
        note = f"waits {100 * layout['comm_time_fraction']:.0f} % for other processes"
        rows.append(_row(f"computing alone, {name}", layout["images_per_second"], note=note))
    for name, one in record.get("each", {}).items():
        title, note = (
            f"  {name} {one['off']}".lower(),
            f"with it {one['brings']:.2f} times the speed",
        )
        rows.append(_row(title, one["images_per_second"], note=note))
    evaluation, checkpoint = record["evaluation"], record["checkpoint"]
    note = f"50,000 images take {evaluation['seconds_for_50000_images']:,.0f} s"
    rows.append(_row("evaluating", evaluation["images_per_second"], note=note))
    note = f"of {checkpoint['seconds']:.3g} s until {checkpoint['bytes'] / 2**20:,.0f} MiB are kept"
    stall = f"{1000 * checkpoint['stall']:,.4g}"
    rows.append(("waiting for a checkpoint", stall, "", "", "ms", note))
    memory = f"{record['peak_memory_bytes'] / 2**30:.2f}"
    rows.append(("memory at most", memory, "", "", "GiB", ""))
    for name, group in record.get("baseline", {}).items():
        for one, figure in group.items():
            if one.startswith("over_"):
                continue
            ratio = group.get(f"over_{one}")
            note = f"we are {ratio:.2f} times as fast" if ratio else ""
            rows.append(_row(f"{name}: {_THEIRS[one]}", figure, note=note))
    return rows


def _row(
    title: str, figure: Record, unit: str = "images/s", over: float = 1, note: str = ""
) -> tuple[str, ...]:
    median, low, high = (f"{figure[key] / over:,.4g}" for key in ("median", "low", "high"))
    return title, median, low, high, unit, note


def draw(record: Record, path: Path) -> None:
    """Images a second of each part as bars, and the limits of what they are made of."""
    bars = {"computing alone": record["compute"]["images_per_second"]}
    bars |= {f"loading alone, {name}": figure for name, figure in record["loading"].items()}
    bars |= {
        "end to end": record["training"]["images_per_second"],
        "evaluating": record["evaluation"]["images_per_second"],
    }
    for name, group in record.get("baseline", {}).items():
        bars |= {f"{name}: {_THEIRS[k]}": v for k, v in group.items() if not k.startswith("over_")}
    limits = {"computing alone": limit_in_images(record)}
    if "decoder" in record["limits"]:
        decoder = record["limits"]["decoder"]["median"]
        limits |= {name: decoder for name in bars if name.startswith("loading alone")}
    figure = Figure(figsize=(7, 0.34 * len(bars) + 1.1), layout="constrained")
    axis = figure.subplots()
    for place, (name, speed) in enumerate(bars.items()):
        value, theirs = speed["median"], "example" in name or "DataLoader" in name
        axis.barh(place, value, color="#c9c9c9" if theirs else "#1f5a94", height=0.6)
        axis.hlines(place, speed["low"], speed["high"], color="black", lw=1)
        limit = limits.get(name, 0.0)
        far = max(speed["high"], limit * (limit < 2 * value))  # behind a limit that is near
        beside = (far, place)
        paper = {"fc": "white", "ec": "none", "pad": 0.5, "alpha": 0.8}
        axis.annotate(f" {value:,.4g}", beside, va="center", fontsize=8, bbox=paper)
        if name in limits:
            axis.plot([limits[name]] * 2, [place - 0.38, place + 0.38], color="#c44536", lw=2)
    axis.set_yticks(range(len(bars)), list(bars))
    axis.set(xscale="log", xlabel="images a second; red: what the hardware allows of it")
    axis.invert_yaxis()
    axis.grid(False, axis="y")
    axis.margins(x=0.12)
    name = record["machine"].get("gpu") or record["machine"]["processor"]
    axis.set_title(
        f"{record['variant']}, {record['precision']}, batch {record['batch']}; "
        f"{record['processes']} x {name}",
        fontsize=9,
    )
    save(figure, path)
