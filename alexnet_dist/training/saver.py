"""Saves a run while it trains, hears how each save has ended, and finds the way back."""

import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from alexnet_dist.training import checkpoint, weights
from alexnet_dist.training.checkpoint import CheckpointManager
from alexnet_dist.training.optim import momentum_buffers

Result = dict[str, Any]


class Layout(Protocol):
    """What a save needs of a layout; see parallel/ddp.py."""

    parameters: dict[str, nn.Parameter]
    sharding: Any


class Saver:
    """The tensors of a run, and its checkpoints; all processes call each method together.

    Args:
        emit: takes events: "checkpoint", "checkpoint_failed", "best".

    Attributes:
        best: the best evaluation so far. Its checkpoint can be loaded, or is being written.
        saved: step and evaluation of the last checkpoint that was written in this life.
        longest: seconds that the longest save of this life took until it was on the disk.
    """

    def __init__(
        self,
        checkpoints: CheckpointManager,
        layout: Layout,
        optimizer: torch.optim.SGD,
        emit: Callable[..., None],
    ) -> None:
        self.checkpoints, self.layout, self.optimizer = checkpoints, layout, optimizer
        self.best: Result | None = None
        self.saved: tuple[int, int] | None = None
        self.longest = 0.0
        self._emit = emit
        self._before: Result | None = None
        self._stall = 0.0

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds: tensors of one device, whoever has which part of them."""
        stored, parameters = self.layout.sharding.to_dtensor, self.layout.parameters
        moving = momentum_buffers(self.optimizer, parameters)
        return {f"model.{name}": stored(name, p.detach()) for name, p in parameters.items()} | {
            f"velocity.{name}": stored(name, velocity) for name, velocity in moving.items()
        }

    def finite(self) -> bool:
        """Whether all weights are: the last losses were, but the update after them?"""
        with torch.no_grad():
            sums = torch.stack([p.sum().float() for p in self.layout.parameters.values()])
            total = sums.sum()
        dist.all_reduce(total)  # processes may hold different weights, and end together
        return bool(total.isfinite())

    def save(self, standing: Mapping[str, Any], best: Result | None = None) -> None:
        """Begin to write a checkpoint, once the one before it is written.

        Args:
            standing: where the run stands, with its "step" and the last one that was "evaluated".
            best: the evaluation of this very step, where it is the best one so far.
        """
        began = time.perf_counter()
        self.settle()
        self._before, self.best = self.best, best or self.best
        self._of = standing["step"], standing["evaluated"]
        self.checkpoints.begin(
            {**standing, "best": self.best}, self.tensors(), best=best is not None
        )
        self._stall = time.perf_counter() - began
        if not self.checkpoints.asynchronous:
            self.settle()

    def settle(self, *, wait: bool = True) -> None:
        """Hear how the save under way has ended; one that failed costs itself, and not the run."""
        began = time.perf_counter()
        saved = self.checkpoints.settle(wait=wait)
        if saved is None:
            return
        self.longest = max(self.longest, saved.seconds)
        if saved.failure:
            if saved.best:
                self.best = self._before
            self._emit(
                "checkpoint_failed",
                step=saved.step,
                message=f"the checkpoint of step {saved.step} could not be written "
                f"({saved.failure}); training goes on, the one before it is intact: make room "
                f"below {saved.path.parent}",
            )
            return
        self.saved = self._of
        self._emit(
            "checkpoint",
            step=saved.step,
            path=saved.path.name,
            seconds=saved.seconds,
            stall=self._stall + time.perf_counter() - began,
        )
        if saved.best:
            self._emit("best", **(self.best or {}))

    def restore(self, check: Callable[[dict[str, Any]], None]) -> tuple[Any, list[str]]:
        """Read the newest checkpoint that is whole.

        Args:
            check: looks at its state before any tensor is touched.

        Returns:
            Its state, None where there is none; and a sentence for each that was damaged.
        """
        found, damaged = self.checkpoints.newest()
        if found is None:
            return None, damaged
        state = checkpoint.read_state(found)
        check(state)
        checkpoint.load(found, self.tensors())
        self.best = state["best"]
        return state, damaged

    def start_from(self, path: str) -> list[str]:
        """Read the weights of another run, or of a file.

        A last layer for other classes stays as it is, and so do layers that the other network
        does not have: net 146 began with those of net 145.

        Returns:
            The parameters that stay as they are.
        """
        found = weights.find(path)
        shapes = weights.read_state(found)["tensors"]
        mine = {n: t for n, t in self.tensors().items() if n.startswith("model.")}
        final = list(mine)[-2:]
        anew = [n for n in final if n in shapes and shapes[n] != list(mine[n].shape)]
        if set(shapes) & (set(mine) - set(final)):
            anew += [n for n in mine if n not in shapes]
        weights.load(found, {n: t for n, t in mine.items() if n not in anew})
        return [name.removeprefix("model.") for name in anew]
