"""What the hardware allows: the products, copies, sums and decoding that training is made of."""

from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from alexnet_dist.data.dali import Decoder, decoded
from alexnet_dist.data.plan import SampleParams
from alexnet_dist.measuring.turns import Work
from alexnet_dist.parallel.mesh import Mesh
from alexnet_dist.parallel.precision import Precision

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
COPIED = 2**28
"""Bytes that a copy moves: more than caches hold."""


def limits(mesh: Mesh, precision: Precision, gradients: int) -> dict[str, Work]:
    """Works whose units are those of each limit: floating-point operations of a square matrix
    product in ``precision``, bytes read and written by a copy, bytes sent to the device, and, of
    several processes, gradients' bytes averaged."""
    works = {
        "matrix_product": Work(_product(mesh, precision), warm=2),
        "memory": Work(_copy(mesh), warm=2),
    }
    if mesh.device.type == "cuda":
        works["host_to_device"] = Work(_upload(mesh), warm=2)
    if mesh.world_size > 1:
        works["all_reduce"] = Work(_sum(mesh, gradients), warm=1)
    return works


def _product(mesh: Mesh, precision: Precision) -> Callable[[], float]:
    side = 8192 if mesh.device.type == "cuda" else 2048
    dtype = _DTYPES.get(precision, torch.float32)
    a, b = (torch.randn(side, side, device=mesh.device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)

    def once() -> float:
        torch.mm(a, b, out=out)
        return mesh.world_size * 2.0 * side**3

    return once


def _copy(mesh: Mesh) -> Callable[[], float]:
    source = torch.zeros(COPIED // 4, device=mesh.device)
    target = torch.zeros_like(source)

    def once() -> float:
        target.copy_(source)
        return mesh.world_size * 2.0 * COPIED

    return once


def _upload(mesh: Mesh) -> Callable[[], float]:
    source = torch.zeros(COPIED // 4, pin_memory=True)
    target = torch.zeros(COPIED // 4, device=mesh.device)

    def once() -> float:
        target.copy_(source, non_blocking=True)
        return float(mesh.world_size * COPIED)

    return once


def _sum(mesh: Mesh, gradients: int) -> Callable[[], float]:
    tensor = torch.zeros(gradients // 4, device=mesh.device)

    def once() -> float:
        dist.all_reduce(tensor)
        return float(gradients)

    return once


def decoding(
    encoded: list[NDArray[np.uint8]],
    draws: SampleParams,
    decoder: Decoder,
    mesh: Mesh,
    threads: int,
) -> Work:
    """Images of which DALI decodes what ``draws`` ask for, from memory, and does nothing else."""
    from nvidia.dali import Pipeline, fn, types

    gpu = mesh.device.type == "cuda"
    pipeline = Pipeline(
        batch_size=len(encoded),
        num_threads=threads,
        device_id=(mesh.device.index or 0) if gpu else None,
        prefetch_queue_depth=1,
        exec_dynamic=True,
    )
    with pipeline:
        files = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1, no_copy=True)
        start = fn.external_source(name="start", dtype=types.INT32, ndim=1)
        shape = fn.external_source(name="shape", dtype=types.INT32, ndim=1)
        pipeline.set_outputs(decoded(files, start, shape, decoder, gpu))
    pipeline.build()
    boxes = np.ascontiguousarray(draws.boxes, np.int32)

    def once() -> float:
        pipeline.feed_input("encoded", encoded)
        pipeline.feed_input("start", np.ascontiguousarray(boxes[:, :2]))
        pipeline.feed_input("shape", np.ascontiguousarray(boxes[:, 2:]))
        pipeline.run()
        return float(mesh.world_size * len(encoded))

    return Work(once, warm=2)
