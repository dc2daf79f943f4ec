"""Seconds of a training step on n processes, from parts that were measured apart.

A step of ``ddp`` computes forward, then backward layer by layer; when the gradients of a bucket are
there, it leaves, one bucket after another, under the backward of the layers in front of it; when
all have arrived, parameters are updated. ``whole`` waits for its gathers and their gradients, which
nothing hides; the gradients of its convolutions leave as in ``ddp``.

What travels costs a latency for each hop and its bytes by a bandwidth; an all-reduce within a node
first, then between the processes of different nodes that have the same place in theirs, each
through its own line, then within the node again. Where travel takes processor time (gloo), the
rest computes the slower meanwhile.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from alexnet_dist.model import build_on_meta
from alexnet_dist.summary import rows

BUCKET = 32 * 2**20
RANK = 4  # of PowerSGD's matrices
POWER_REDUCES = 3  # of a bucket: what is not compressed, and both thin matrices
FLOAT, LABEL, LOSS_NUMBERS = 4, 8, 4

LAYOUTS = ("ddp", "ddp+bf16", "ddp+powersgd", "whole")

Law = tuple[float, float]
"""Seconds: at all, and for each unit more."""


@dataclass(frozen=True)
class LayerSpec:
    """A layer's weights as a matrix, and its bias.

    Attributes:
        reads: values that it reads of an image, where it is fully connected.
        work: its part of the convolutions' backward pass, else.
    """

    name: str
    rows: int
    columns: int
    reads: int = 0
    work: float = 0.0

    @property
    def parameters(self) -> int:
        return self.rows * self.columns + self.rows


@dataclass(frozen=True)
class Parts:
    """What was measured, or assumed; keys of the JSON file.

    Attributes:
        name: of the machine.
        assumed: what of it was not measured, in sentences.
        width: bytes of an activation in training.
        convolutions_forward, convolutions_backward: seconds, and seconds an image of the process,
            with the activations between them.
        connected: seconds a parameter that the process holds, and seconds a parameter and image,
            of fully connected layers, forward and backward.
        connected_backward: the part of it that is backward.
        update: seconds a parameter that the process holds.
        sending: processor's seconds a gradient value that is averaged, beside its travel, for
            "none", "bf16" and "powersgd".
        processes_a_node: that speak over ``inside``.
        inside, between: seconds a hop and bytes a second and process, of "all_reduce",
            "all_reduce_bf16", "all_gather" and "all_to_all", within a node and between nodes.
        hops: "ring": as many as there are others; "tree": their logarithm.
        taken: part of the processor that travel takes from what computes beside it.
        powersgd_waits: whether PowerSGD's buckets are waited for one by one (CPUs).
        loader: images a second and core, and cores a process; None where images come from
            nowhere.
    """

    name: str
    assumed: tuple[str, ...]
    width: int
    convolutions_forward: Law
    convolutions_backward: Law
    connected: Law
    connected_backward: float
    update: float
    sending: Mapping[str, float]
    processes_a_node: int
    inside: Mapping[str, Law] | None
    between: Mapping[str, Law] | None
    hops: Literal["ring", "tree"]
    taken: float
    powersgd_waits: bool
    loader: tuple[float, float] | None

    def reach(self, n: int) -> bool:
        """Whether there are lines for ``n`` processes."""
        near = min(n, self.processes_a_node)
        return (near == 1 or self.inside is not None) and (n == near or self.between is not None)

    def travel(self, kind: str, size: float, n: int) -> float:
        """Seconds of a collective of ``n`` processes.

        Args:
            size: bytes that are reduced, or all that are gathered, or that a process deals out.
        """
        near = min(n, self.processes_a_node)
        far = n // near
        there_and_back = ways(kind)
        if kind == "all_to_all":  # of which a node can put nothing together
            within, beyond = (near - 1) / n, (n - near) / n
        else:
            within, beyond = (near - 1) / near, (far - 1) / far / near
        seconds = 0.0
        for lines, group, share in ((self.inside, near, within), (self.between, far, beyond)):
            if group > 1:
                assert lines is not None
                latency, bandwidth = lines[kind]
                hops = count_hops(self.hops, group)
                seconds += there_and_back * (hops * latency + share * size / bandwidth)
        return seconds


def ways(kind: str) -> int:
    """How often the bytes of a collective travel: a sum goes there and comes back."""
    return 2 if kind.startswith("all_reduce") else 1


def count_hops(shape: str, group: int) -> int:
    return group - 1 if shape == "ring" else math.ceil(math.log2(group))


@dataclass(frozen=True)
class Step:
    """Seconds of a step: computing, waiting for others, and what loading its images takes beside
    both."""

    computing: float
    waiting: float
    loading: float

    @property
    def seconds(self) -> float:
        return max(self.computing + self.waiting, self.loading)

    @property
    def bound(self) -> str:
        """What takes the most of it."""
        if self.loading > self.computing + self.waiting:
            return "loader"
        return "compute" if self.computing >= self.waiting else "comm_time_fraction"


def predict(layers: Iterable[LayerSpec], parts: Parts, layout: str, n: int, batch: int) -> Step:
    """A step of a global ``batch`` under ``layout``: "ddp" or "whole", with "+bf16" or "+powersgd"
    behind it."""
    layers = list(layers)
    kind, _, compress = layout.partition("+")
    compress = compress or "none"
    local = -(-batch // n)
    convolutions = [layer for layer in layers if layer.work]
    connected = [layer for layer in layers if not layer.work]
    split = kind == "whole"
    images = batch if split else local  # that a fully connected layer sees
    held = 1 / n if split else 1.0

    def alone(layer: LayerSpec) -> float:
        if layer.work:
            return layer.work * line(parts.convolutions_backward, local)
        return held * layer.parameters * parts.connected_backward * line(parts.connected, images)

    connected_values = held * sum(layer.parameters for layer in connected)
    values = connected_values + sum(layer.parameters for layer in convolutions)
    forward = line(parts.convolutions_forward, local) + connected_values * (
        1 - parts.connected_backward
    ) * line(parts.connected, images)
    update = values * parts.update
    computing = forward + sum(alone(layer) for layer in layers) + update
    passing = 0.0 if not split or n == 1 else _activations(connected, parts, n, batch)

    averaged = [] if n == 1 else (convolutions if split else layers)
    computing += parts.sending[compress] * sum(layer.parameters for layer in averaged)
    pieces = [] if not split else [(sum(alone(layer) for layer in connected), 0.0)]
    for bucket in buckets(averaged):
        travelling = bucket_travel(bucket, parts, compress, n)
        for layer in bucket:
            sent = travelling if layer is bucket[-1] else 0.0
            pieces.append((alone(layer) + parts.sending[compress] * layer.parameters, sent))
    if compress == "powersgd" and parts.powersgd_waits:
        waiting = sum(sent for _, sent in pieces)
    else:
        waiting = overlapped(pieces, parts.taken) - sum(seconds for seconds, _ in pieces)
    loading = 0.0 if parts.loader is None else local / (parts.loader[0] * parts.loader[1])
    return Step(computing, passing + max(waiting, 0.0), loading)


def network(classes: int = 1000, image_size: int = 224) -> list[LayerSpec]:
    """The layers of ``paper``."""
    work = {row.name: row for row in rows("paper", num_classes=classes, image_size=image_size)}
    weights = {
        name.removesuffix(".weight"): parameter
        for name, parameter in build_on_meta(
            "paper", num_classes=classes, image_size=image_size
        ).named_parameters()
        if name.endswith("weight")
    }
    # nothing is computed for the gradient of the image
    backward = {
        name: (1 if name == "conv1" else 2) * work[name].multiply_adds
        for name in weights
        if name.startswith("conv")
    }
    every = sum(backward.values())
    return [
        LayerSpec(
            name,
            len(weight),
            weight[0].numel(),
            0 if name in backward else weight.shape[1],
            backward.get(name, 0) / every,
        )
        for name, weight in weights.items()
    ]


def line(law: Law, units: float) -> float:
    return law[0] + law[1] * units


def overlapped(pieces: Iterable[tuple[float, float]], taken: float) -> float:
    """Seconds until all is computed and all has arrived.

    Args:
        pieces: seconds that something is computed, and seconds that what then leaves travels; one
            travels after another.
        taken: the part by which computing is slower while something travels.
    """
    now = under_way = 0.0
    for computing, travelling in pieces:
        both = min(computing / (1 - taken), under_way) if taken < 1 else under_way
        passed = both + computing - both * (1 - taken)
        now += passed
        under_way = max(under_way - passed, 0.0) + travelling
    return now + under_way


def buckets(layers: Iterable[LayerSpec], least: int = BUCKET) -> list[list[LayerSpec]]:
    """Layers in the order of their gradients, last one first, as DDP puts them together: a bucket
    is closed by the gradient that fills it."""
    found: list[list[LayerSpec]] = []
    full = True
    for layer in reversed(list(layers)):
        if full:
            found.append([])
        found[-1].append(layer)
        full = sum(FLOAT * one.parameters for one in found[-1]) >= least
    return found


def bucket_travel(bucket: Iterable[LayerSpec], parts: Parts, compress: str, n: int) -> float:
    """Seconds in which the gradients of a bucket are averaged over ``n`` processes."""
    if compress == "powersgd":
        size = FLOAT * sum(power_values(layer) for layer in bucket)
        each = parts.travel("all_reduce", size / POWER_REDUCES, n)
        return POWER_REDUCES * each
    values = sum(layer.parameters for layer in bucket)
    if compress == "bf16":
        return parts.travel("all_reduce_bf16", 2 * values, n)
    return parts.travel("all_reduce", FLOAT * values, n)


def power_values(layer: LayerSpec) -> int:
    """Values that PowerSGD sends of a layer: two thin matrices, or all where that is little."""
    thin = min(layer.rows, layer.columns, RANK) * (layer.rows + layer.columns)
    whole = layer.rows * layer.columns
    return layer.rows + (thin if 2 * thin < whole else whole)


def _activations(connected: list[LayerSpec], parts: Parts, n: int, batch: int) -> float:
    """Seconds in which the inputs of fully connected layers are gathered, and their gradients go
    back; and labels and losses."""
    seconds = parts.travel("all_gather", batch * LABEL, n)
    seconds += parts.travel("all_gather", batch * n * LOSS_NUMBERS * FLOAT, n)
    for layer in connected:
        size = batch * layer.reads * parts.width
        seconds += parts.travel("all_gather", size, n) + parts.travel("all_to_all", size, n)
    return seconds
