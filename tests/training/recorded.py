"""A graph on a CPU, as a CUDA graph is on a GPU: operations with what they were given.

Numbers that Python passed stay what they were, tensors are read where they lie, and whoever wants
a number of the device while it is recorded is refused. Memory alone is not used twice.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Recording(TorchDispatchMode):
    """What was computed within it: operations, their arguments, and what they gave."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def reading(self, tensors: Mapping[str, Tensor]) -> list[tuple[Any, Any, Any, Any]]:
        """The calls that were given one of ``tensors``."""
        places = {tensor.data_ptr() for tensor in tensors.values()}
        return [
            call
            for call in self.calls
            if any(isinstance(x, Tensor) and x.data_ptr() in places for x in tree_leaves(call[1]))
        ]

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, result in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)  # else a view, or written in place


class Recorder:
    """``capture`` for GraphedStep.

    Args:
        written: tensors that the work changes, which only a replay is to do.
    """

    def __init__(self, written: Iterable[Tensor]) -> None:
        self.written = list(written)
        self.recordings: list[Recording] = []

    def __call__(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        before = [tensor.clone() for tensor in self.written]
        recording = Recording()
        with recording:
            result = work()
        with torch.no_grad():
            for tensor, old in zip(self.written, before, strict=True):
                tensor.copy_(old)
            result.fill_(torch.nan)
        self.recordings.append(recording)
        return recording.replay, result
