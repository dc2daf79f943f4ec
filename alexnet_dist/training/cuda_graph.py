"""A training step as one CUDA graph: a single launch in place of one for each operation.

``train_step`` is captured as it is, between static buffers: a batch and its dropout masks are
copied into them before each replay, and the result is copied out. Of the numbers that Python
computes only the learning rates change from step to step; the update reads them from tensors
(``sgd2012_update``).

The first steps run eagerly, and count: cuDNN chooses its kernels then, Triton and torch.compile
build theirs, none of which can happen during a capture.
"""

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor

from alexnet_dist.errors import UserError
from alexnet_dist.training.optim import KrizhevskySGD
from alexnet_dist.training.step import Batch, Layout, train_step

CAPTURE_WARMUP_STEPS = 3
"""Eager steps before the one that is captured."""


class CudaGraphStep:
    """``train_step`` of a layout and an optimizer, for batches of one shape."""

    def __init__(self, layout: Layout, optimizer: torch.optim.Optimizer) -> None:
        assert isinstance(optimizer, KrizhevskySGD)
        self._layout, self._optimizer = layout, optimizer
        self._warmup_left = CAPTURE_WARMUP_STEPS
        self._buffers: _StaticBatch | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._result: Tensor | None = None

    def __call__(self, batch: Batch, masks: Iterable[Tensor]) -> Tensor:
        """One update of the parameters.

        Returns:
            What ``train_step`` does.

        Raises:
            UserError: the step cannot be captured.
        """
        if self._buffers is None:
            self._buffers = _StaticBatch(batch, masks)
        else:
            self._buffers.copy_(batch, masks)
        step = partial(
            train_step, self._layout, self._optimizer, self._buffers, self._buffers.masks
        )
        if self._warmup_left:
            self._warmup_left -= 1
            return _run_on_side_stream(step).clone()
        self._optimizer.sync_lr()
        if self._graph is None:
            self._graph, self._result = _capture(step)
        self._graph.replay()
        assert self._result is not None
        return self._result.clone()  # the next replay overwrites it


class _StaticBatch:
    """The tensors that a captured step reads: images [B, 3, H, W], labels [B], and the dropout
    masks [B, units]."""

    def __init__(self, batch: Batch, masks: Iterable[Tensor]) -> None:
        self.images, self.labels = batch.images.clone(), batch.labels.clone()
        self.masks = tuple(mask.clone() for mask in masks)

    def copy_(self, batch: Batch, masks: Iterable[Tensor]) -> None:
        buffers = (self.images, self.labels, *self.masks)
        for buffer, new in zip(buffers, (batch.images, batch.labels, *masks), strict=True):
            assert buffer.shape == new.shape, "a graph is of one shape"
            buffer.copy_(new)


def _run_on_side_stream(step: Callable[[], Tensor]) -> Tensor:
    """As torch requires of what comes before a capture."""
    current, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):
        result = step()
    current.wait_stream(side)
    return result


def _capture(step: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """The graph of ``step``, and where a replay writes its result; nothing is computed yet."""
    graph = torch.cuda.CUDAGraph()
    try:
        # of this thread only: the loaders' threads allocate and synchronize meanwhile
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            result = step()
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise UserError(
            f"the step cannot be captured as a CUDA graph ({reason}): take "
            "--runtime.cuda_graph false"
        ) from error
    return graph, result


def why_not_capturable(
    *,
    device: torch.device,
    processes: int,
    fc: str,
    precision: str,
    optimizer: str,
    on_nonfinite: str,
) -> str:
    """Why a step under these options cannot be captured, and the fix; "" if it can."""
    if device.type != "cuda":
        return "needs an NVIDIA GPU: leave it out"
    if processes > 1:
        return (
            f"captures no sums over processes yet, and there are {processes}: leave it out, or "
            "take one process"
        )
    if fc == "sharded":
        return "captures no sharded layers: take --parallel.fc replicated"
    if precision == "fp16":
        return "cannot capture the scale of fp16: take --runtime.precision bf16"
    if optimizer == "sgd":
        return "needs an update that reads the lr from a tensor: take --optim.name sgd2012 or lars"
    if on_nonfinite != "stop":
        return f"cannot check gradients for train.on_nonfinite {on_nonfinite}: take stop"
    return ""
