"""How long a training step waits for other ranks, from what it computes and from the network.

Under ``ddp`` the gradients of a bucket are all-reduced when they are there, one bucket after
another, while the layers before it compute backward. ``sharded`` (fully connected layers split over
all ranks) waits for its all-gathers and their gradients, which nothing hides; the gradients of its
convolutions are averaged as in ``ddp``.

A collective costs a latency per hop, and its bytes by a bandwidth: within a node first, then
between the ranks of different nodes that have the same local rank, then within the node again.
Where communication takes processor time (gloo), computing is slower meanwhile.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from alexnet_dist.model import build_on_meta
from alexnet_dist.model.layer_stats import layer_stats

KINDS = ("all_reduce", "all_reduce_bf16", "all_gather", "all_to_all")
LAYOUTS = ("ddp", "ddp+bf16", "ddp+powersgd", "sharded")
BUCKET_BYTES = 32 * 2**20
POWERSGD_RANK = 4
POWERSGD_REDUCES = 3  # of a bucket: what is not compressed, and both thin matrices
FLOAT_BYTES, LABEL_BYTES, LOSS_VALUES = 4, 8, 4


@dataclass(frozen=True)
class Layer:
    """A layer with weights; the weight is a matrix [rows, columns], and there is a bias [rows].

    Attributes:
        forward, backward: multiply-adds per image.
    """

    name: str
    rows: int
    columns: int
    forward: int
    backward: int

    @property
    def is_conv(self) -> bool:
        return self.name.startswith("conv")

    @property
    def parameters(self) -> int:
        return self.rows * self.columns + self.rows

    @property
    def powersgd_values(self) -> int:
        """Values that PowerSGD sends: two thin matrices, or all where that is little."""
        thin = min(self.rows, self.columns, POWERSGD_RANK) * (self.rows + self.columns)
        full = self.rows * self.columns
        return self.rows + (thin if 2 * thin < full else full)


def paper_layers(classes: int = 1000, image_size: int = 224) -> list[Layer]:
    """The layers of ``paper`` that have weights."""
    shape: dict[str, Any] = {"num_classes": classes, "image_size": image_size}
    products = {row.name: row.multiply_adds for row in layer_stats("paper", **shape)}
    weights = {
        name.removesuffix(".weight"): weight
        for name, weight in build_on_meta("paper", **shape).named_parameters()
        if name.endswith(".weight")
    }
    return [
        # nothing is computed for the gradient of the image
        Layer(
            name,
            len(weight),
            weight[0].numel(),
            products[name],
            products[name] * (1 if name == "conv1" else 2),
        )
        for name, weight in weights.items()
    ]


Links = Mapping[str, tuple[float, float]]
"""Seconds per hop, and bytes per second and rank, of each of ``KINDS``."""


@dataclass(frozen=True)
class Network:
    """What communication costs.

    Attributes:
        between: links between nodes.
        within: links within a node of ``node_size`` ranks.
        topology: "ring": as many hops as there are others; "tree": their logarithm.
        slowdown: fraction of the processor that communication takes from computing.
        powersgd_blocks: whether PowerSGD's buckets are waited for one by one (CPUs).
        activation_bytes: of a value, in training.
    """

    between: Links
    within: Links | None = None
    node_size: int = 1
    topology: Literal["ring", "tree"] = "ring"
    slowdown: float = 0.0
    powersgd_blocks: bool = True
    activation_bytes: int = 2

    def collective(self, kind: str, size: float, n: int) -> float:
        """Seconds of a collective of ``n`` ranks.

        Args:
            size: bytes that are reduced, or all that are gathered, or that a rank deals out.
        """
        near = min(n, self.node_size)
        far = n // near
        if kind == "all_to_all":  # a node cannot put anything together
            fractions = (near - 1) / n, (n - near) / n
        else:
            fractions = (near - 1) / near, (far - 1) / far / near
        seconds = 0.0
        for links, group, fraction in zip(
            (self.within, self.between), (near, far), fractions, strict=True
        ):
            if group > 1 and links is not None:
                latency, bandwidth = links[kind]
                one_way = hops(self.topology, group) * latency + fraction * size / bandwidth
                seconds += directions(kind) * one_way
        return seconds

    def average(self, layers: Iterable[Layer], compression: str, n: int) -> float:
        """Seconds in which the gradients of a bucket of ``layers`` are averaged."""
        if compression == "powersgd":
            size = FLOAT_BYTES * sum(layer.powersgd_values for layer in layers)
            return POWERSGD_REDUCES * self.collective("all_reduce", size / POWERSGD_REDUCES, n)
        values = sum(layer.parameters for layer in layers)
        if compression == "bf16":
            return self.collective("all_reduce_bf16", 2 * values, n)
        return self.collective("all_reduce", FLOAT_BYTES * values, n)

    def exchange_activations(self, fc_layers: Iterable[Layer], n: int, batch: int) -> float:
        """Seconds in which sharded layers gather labels, losses and inputs, and return the inputs'
        gradients."""
        seconds = self.collective("all_gather", batch * LABEL_BYTES, n)
        seconds += self.collective("all_gather", batch * n * LOSS_VALUES * FLOAT_BYTES, n)
        for layer in fc_layers:
            size = batch * layer.columns * self.activation_bytes
            seconds += self.collective("all_gather", size, n)
            seconds += self.collective("all_to_all", size, n)
        return seconds


def directions(kind: str) -> int:
    """How often the bytes of a collective travel: a sum goes there and comes back."""
    return 2 if kind.startswith("all_reduce") else 1


def hops(topology: str, group: int) -> int:
    return group - 1 if topology == "ring" else math.ceil(math.log2(group))


def waiting(
    layers: Sequence[Layer],
    backward: Sequence[float],
    network: Network,
    layout: str,
    n: int,
    batch: int,
) -> float:
    """Seconds of a step in which ``n`` ranks wait for each other.

    Args:
        backward: seconds of the backward pass of each layer on a rank.
        layout: one of ``LAYOUTS``.
        batch: images of the global batch.
    """
    if n == 1:
        return 0.0
    kind, _, compression = layout.partition("+")
    seconds = dict(zip(layers, backward, strict=True))
    fc_layers = [layer for layer in layers if not layer.is_conv]
    pieces, exposed, averaged = [], 0.0, list(layers)
    if kind == "sharded":
        exposed = network.exchange_activations(fc_layers, n, batch)
        pieces = [(sum(seconds[layer] for layer in fc_layers), 0.0)]
        averaged = [layer for layer in layers if layer.is_conv]
    for bucket in buckets(averaged):
        pieces += [(seconds[layer], 0.0) for layer in bucket[:-1]]
        pieces.append((seconds[bucket[-1]], network.average(bucket, compression, n)))
    if compression == "powersgd" and network.powersgd_blocks:
        return exposed + sum(communicating for _, communicating in pieces)
    computing = sum(computing for computing, _ in pieces)
    return exposed + max(overlapped(pieces, network.slowdown) - computing, 0.0)


def buckets(layers: Iterable[Layer]) -> list[list[Layer]]:
    """Layers in the order of their gradients, last one first, as DDP puts them together: the
    gradient that fills a bucket closes it."""
    found: list[list[Layer]] = []
    full = True
    for layer in reversed(list(layers)):
        if full:
            found.append([])
        found[-1].append(layer)
        full = sum(FLOAT_BYTES * one.parameters for one in found[-1]) >= BUCKET_BYTES
    return found


def overlapped(pieces: Iterable[tuple[float, float]], slowdown: float) -> float:
    """Seconds until all is computed and all has arrived.

    Args:
        pieces: seconds of computing, and seconds for which its result is then communicated; one
            communication follows another.
        slowdown: the fraction by which computing is slower while something is communicated.
    """
    now = pending = 0.0
    for computing, communicating in pieces:
        both = min(computing / (1 - slowdown), pending) if slowdown < 1 else pending
        passed = both + computing - both * (1 - slowdown)
        now += passed
        pending = max(pending - passed, 0.0) + communicating
    return now + pending
