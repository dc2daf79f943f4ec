"""The collectives that layouts are made of, and a timer of the waits for them."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.14 gave it another name, and warns of the old one
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class CommTimer:
    """Adds up how long this process waits for others: communication that nothing hides.

    On a GPU the stream waits, not the process: there the time lies between two CUDA events, which
    are read by ``pop_seconds``, so that no step waits for its timer. In a CUDA graph nothing is
    timed.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._started: Any = None
        self._waits: list[tuple[Any, Any]] = []  # seconds or events, at the start and at the end

    def start(self) -> None:
        """A wait starts; one that was started before, and has not stopped, starts only now."""
        if not (self._cuda and torch.cuda.is_current_stream_capturing()):
            self._started = self._now()

    def stop(self) -> None:
        """What was waited for has arrived."""
        if self._started is not None:
            self._waits.append((self._started, self._now()))
        self._started = None

    def pop_seconds(self) -> float:
        """Seconds waited since the last call."""
        waits, self._waits = self._waits, []
        if not self._cuda:
            return float(sum(end - start for start, end in waits))
        if waits:
            waits[-1][1].synchronize()
        return sum(start.elapsed_time(end) for start, end in waits) / 1000

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


@dataclass(frozen=True)
class TimedGroup:
    """A process group, and the timer of the waits for its collectives."""

    group: dist.ProcessGroup
    timer: CommTimer

    @property
    def size(self) -> int:
        return self.group.size()

    @property
    def rank(self) -> int:
        return self.group.rank()


class AsyncAllGather:
    """An all-gather of ``x``, which has the same shape on every process, in flight.

    Attributes:
        output: [processes, *x.shape], which has its values only after ``wait``.
    """

    def __init__(self, x: Tensor, group: TimedGroup) -> None:
        self._timer = group.timer
        self._input = x.contiguous().view(-1)  # kept alive until it has been sent
        self.output = x.new_empty(group.size, *x.shape)
        self._work = _all_gather(
            self.output.view(-1), self._input, group=group.group, async_op=True
        )

    def wait(self) -> Tensor:
        self._timer.start()
        self._work.wait()
        self._timer.stop()
        return self.output


def all_gather(x: Tensor, group: TimedGroup) -> Tensor:
    """``x`` of every process, [processes, *x.shape]."""
    return AsyncAllGather(x, group).wait()


def all_gather_autograd(x: Tensor, group: TimedGroup, grad_scale: int = 1) -> Tensor:
    """As ``all_gather``; backward is a reduce-scatter of the gradient, times ``grad_scale``.

    The reduce-scatter is made of an all-to-all and a sum in float32 (or wider): its bytes, one
    rounding, and the same order of addition on every backend.
    """

    def reduce_scatter(grad: Tensor) -> Tensor:
        sent = grad.contiguous()
        received = torch.empty_like(sent)
        group.timer.start()
        dist.all_to_all_single(received, sent, group=group.group)
        group.timer.stop()
        total = received.to(torch.promote_types(sent.dtype, torch.float32)).sum(0)
        return (total * grad_scale).to(sent.dtype)

    return with_backward(x, lambda x: all_gather(x, group), reduce_scatter)


def all_reduce_autograd(x: Tensor, group: TimedGroup) -> Tensor:
    """``x`` summed over the processes, the same bits on each. The loss of every process depends on
    the sum: so its gradient is summed as well."""

    def all_reduce(x: Tensor) -> Tensor:
        total = x.clone()
        group.timer.start()
        dist.all_reduce(total, group=group.group)
        group.timer.stop()
        return total

    return with_backward(x, all_reduce, all_reduce)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def with_backward(
    x: Tensor, forward: Callable[[Tensor], Tensor], backward: Callable[[Tensor], Tensor]
) -> Tensor:
    """``forward(x)``, whose gradient ``backward`` makes that of ``x``."""
    y: Tensor = _WithBackward.apply(x, forward, backward)
    return y


class _WithBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: Any, backward: Any) -> Tensor:
        ctx.make_grad = backward
        return forward(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return ctx.make_grad(grads[0]), None, None
