"""A training step as one CUDA graph: a single launch in place of one for each operation.

``train_step`` is captured as it is, between static tensors: a batch and its dropout masks are
copied into them before each replay, and the result is copied out. Of the numbers that Python
computes only the learning rates change from step to step; the update reads them from tensors.

The first steps run eagerly, and count: cuDNN chooses its kernels then, Triton and torch.compile
build theirs, DDP times its first ten passes, none of which can happen during a capture. Nor may any
thread synchronize the device then, as DALI does when it releases memory: so the loader is idle. The
layout is made on the stream of the capture, since autograd remembers where a gradient is summed.
"""

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from alexnet_dist.errors import UserError, print_error
from alexnet_dist.training.sgd2012 import KrizhevskySGD
from alexnet_dist.training.step import TrainableLayout, train_step

CAPTURE_WARMUP_STEPS = 11
"""Eager steps before the one that is captured."""

T = TypeVar("T")


class CudaGraphStep:
    """``train_step`` of a layout and an optimizer, for batches of one shape.

    Args:
        stream: on which the layout was made.
        before_capture: is called when nothing else may use the GPU from now on.
        on_all: whether the step was captured on every process, of whether it was on this one: a
            collective call, since one that is in a graph has to be in all (NCCL's manual).
        fall_back: where the step cannot be captured, say so and go on with eager steps.
    """

    def __init__(
        self,
        layout: TrainableLayout,
        optimizer: torch.optim.Optimizer,
        stream: torch.cuda.Stream,
        *,
        before_capture: Callable[[], None] = lambda: None,
        on_all: Callable[[bool], bool] = bool,
        fall_back: bool = False,
    ) -> None:
        assert isinstance(optimizer, KrizhevskySGD)
        self._layout, self._optimizer, self._stream = layout, optimizer, stream
        self._before_capture, self._on_all, self._fall_back = before_capture, on_all, fall_back
        self._eager_steps: float = CAPTURE_WARMUP_STEPS  # still to be taken
        self._inputs: list[Tensor] = []
        self._captured: tuple[torch.cuda.CUDAGraph, Tensor] | None = None

    def __call__(self, images: Tensor, labels: Tensor, masks: Iterable[Tensor]) -> Tensor:
        """One update of the parameters; returns what ``train_step`` does.

        Raises:
            UserError: the step cannot be captured.
        """
        inputs = [images, labels, *masks]
        if not self._inputs:
            self._inputs = [tensor.clone() for tensor in inputs]
        for static, tensor in zip(self._inputs, inputs, strict=True):
            assert static.shape == tensor.shape, "a graph is of one shape"
            static.copy_(tensor)
        images, labels, *masks = self._inputs
        step = partial(train_step, self._layout, self._optimizer, images, labels, masks)
        if self._eager_steps > 0:
            self._eager_steps -= 1
            return run_on(self._stream, step).clone()
        self._optimizer.sync_lr()
        if self._captured is None:
            self._before_capture()
            error = RuntimeError("another process cannot")
            try:
                self._captured = _capture(step, self._stream)
            except RuntimeError as mine:
                error = mine
            if not self._on_all(self._captured is not None):
                self._give_up(error)
                return step()
            assert self._captured is not None
        graph, result = self._captured
        graph.replay()
        return result.clone()  # the next replay overwrites it

    def _give_up(self, error: RuntimeError) -> None:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        message = f"the step cannot be captured as a CUDA graph ({reason})"
        if not self._fall_back:
            fix = "take --runtime.cuda_graph false"
            raise UserError(f"{message}: {fix}", on_all_ranks=True) from error
        print_error(f"{message}: steps go on without one")
        self._captured, self._eager_steps = None, math.inf
        self._optimizer.zero_grad(set_to_none=True)  # they lie in the memory of the graph


def run_on(stream: torch.cuda.Stream | None, work: Callable[[], T]) -> T:
    """Run ``work`` on ``stream``: after all that was launched before, before all that comes."""
    if stream is None:
        return work()
    current = torch.cuda.current_stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        result = work()
    current.wait_stream(stream)
    return result


def _capture(
    step: Callable[[], Tensor], stream: torch.cuda.Stream
) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """The graph of ``step``, and where a replay writes its result; nothing is computed yet."""
    graph = torch.cuda.CUDAGraph()
    # of this thread only: the loaders' threads may allocate memory meanwhile
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        return graph, step()
