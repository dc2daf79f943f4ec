"""A training step as one CUDA graph: one launch, in place of one for each of its operations.

What is captured is ``train_step`` as it is, between buffers that stay where they are: images,
labels and masks are copied into the first, the result out of the last. Of the numbers that Python
computes only the rates change from step to step; they lie in the device's memory (sgd_triton.py).

The first steps run as ever, and count: cuDNN chooses its kernels then, Triton and torch.compile
make theirs, none of which can happen while a graph is captured.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from alexnet_dist.errors import UserError
from alexnet_dist.training.optim import KrizhevskySGD
from alexnet_dist.training.step import Batch, Layout, train_step

Work = Callable[[], Tensor]

WARM_UP = 3
"""Steps before the one that is captured."""


def aside(work: Work) -> Tensor:
    """``work`` on a stream of its own, as torch wants what comes before a capture."""
    here, there = torch.cuda.current_stream(), torch.cuda.Stream()
    there.wait_stream(here)
    with torch.cuda.stream(there):
        result = work()
    here.wait_stream(there)
    return result


def capture(work: Work) -> tuple[Callable[[], None], Tensor]:
    """What replays ``work``, and where its result will lie; nothing is computed yet."""
    graph = torch.cuda.CUDAGraph()
    # of this thread only: those of an engine go on to allocate and to wait meanwhile
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = work()
    return graph.replay, result


@dataclass(frozen=True)
class _Buffers:
    """What a captured step reads."""

    images: Tensor
    labels: Tensor
    masks: tuple[Tensor, ...]


class CudaGraphStep:
    """``train_step`` of a layout and an optimizer whose update is Triton's, for batches of one
    shape.

    Args:
        aside, capture: how the first steps run, and how one is captured.
    """

    def __init__(
        self,
        layout: Layout,
        optimizer: torch.optim.Optimizer,
        *,
        aside: Callable[[Work], Tensor] = aside,
        capture: Callable[[Work], tuple[Callable[[], None], Tensor]] = capture,
    ) -> None:
        assert isinstance(optimizer, KrizhevskySGD)
        assert optimizer.by_triton is not None
        self._step = partial(train_step, layout, optimizer)
        self._send_rates = optimizer.by_triton.send_rates
        self._aside, self._capture = aside, capture
        self._left = WARM_UP
        self._buffers: _Buffers | None = None
        self._captured: tuple[Callable[[], None], Tensor] | None = None

    def __call__(self, batch: Batch, masks: Iterable[Tensor]) -> Tensor:
        """One update of the parameters.

        Returns:
            What ``train_step`` does.

        Raises:
            Failure: the step cannot be captured.
        """
        buffers = self._receive(batch, tuple(masks))
        work = partial(self._step, buffers, buffers.masks)
        if self._left:
            self._left -= 1
            return self._aside(work).clone()
        self._send_rates()  # before a capture, which would keep them, and before each replay
        if self._captured is None:
            try:
                self._captured = self._capture(work)
            except RuntimeError as error:
                reason = str(error).strip().splitlines()[0].rstrip(".")
                raise UserError(
                    f"the step cannot be captured as a CUDA graph ({reason}): take "
                    "--runtime.cuda_graph false"
                ) from error
        replay, result = self._captured
        replay()
        return result.clone()  # the next replay writes over it

    def _receive(self, batch: Batch, masks: tuple[Tensor, ...]) -> _Buffers:
        """Copy a batch to where the step reads it."""
        if self._buffers is None:
            self._buffers = _Buffers(
                batch.images.clone(), batch.labels.clone(), tuple(mask.clone() for mask in masks)
            )
            return self._buffers
        mine = (self._buffers.images, self._buffers.labels, *self._buffers.masks)
        for buffer, given in zip(mine, (batch.images, batch.labels, *masks), strict=True):
            assert buffer.shape == given.shape, "a graph is of one shape"
            buffer.copy_(given)
        return self._buffers


def check_graph(*, processes: int, fc: str, precision: str, on_nan: str) -> None:
    """Refuse what cannot be captured, by its options' values, before anything is begun.

    Raises:
        Failure: in one sentence.
    """
    refusal = ""
    if processes > 1:
        refusal = (
            f"captures no sums over processes yet, and there are {processes}: leave it out, or "
            "take one process"
        )
    elif fc == "sharded":
        refusal = "captures no sharded layers: take --parallel.fc replicated"
    elif precision == "fp16":
        refusal = "cannot capture the scale of fp16: take --runtime.precision bf16"
    elif on_nan != "stop":
        refusal = (
            f"cannot look at gradients for train.on_nonfinite {on_nan}: "
            "take --train.on_nonfinite stop"
        )
    if refusal:
        raise UserError(f"runtime.cuda_graph {refusal}", on_all_ranks=True)
