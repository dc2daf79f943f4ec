"""A training step: what it computes, what is counted of it, and how long it takes."""

import hashlib
import math
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from alexnet_dist.training.schedules import Schedule


class TrainableLayout(Protocol):
    """What training needs of a layout; see parallel/ddp.py for the meaning of each."""

    parameters: dict[str, nn.Parameter]
    scaler: Any
    sharding: Any

    def forward_backward(
        self, images: Tensor, labels: Tensor, masks: Iterable[Tensor] = ()
    ) -> Tensor: ...


def set_lr(optimizer: torch.optim.Optimizer, schedule: Schedule, epoch: float) -> None:
    """Set each parameter group's lr for the step that begins at ``epoch``."""
    for group in optimizer.param_groups:
        group["lr"] = schedule.lr_at(group["name"], epoch)


def lrs_at(optimizer: torch.optim.Optimizer, schedule: Schedule, epoch: float) -> dict[str, float]:
    """The lr of each parameter group, and of weights in general, at ``epoch``."""
    names = ["weights", *(group["name"] for group in optimizer.param_groups)]
    return {name: schedule.lr_at(name, epoch) for name in names}


def train_step(
    layout: TrainableLayout,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    masks: Iterable[Tensor],
) -> Tensor:
    """One update of the parameters.

    Args:
        images, labels, masks: this process's, see ``layout.forward_backward``.

    Returns:
        float64 [2]: summed loss and number of correct predictions, see
        ``layout.forward_backward``; [3] where the scaler skips steps with a gradient that is not
        finite: and whether it has skipped this one.
    """
    result, scaler = layout.forward_backward(images, labels, masks), layout.scaler
    if scaler is None:
        optimizer.step()
    else:
        scaler.unscale_(optimizer)  # here, where processes with different gradients can agree
        scaler.step(optimizer)
        scaler.update()
        if scaler.skip:
            result = torch.cat([result, scaler.skipped.to(result.dtype)[None]])
    optimizer.zero_grad(set_to_none=True)
    return result


@dataclass(frozen=True)
class NonFiniteStep:
    """A step whose loss (of the global batch) or gradient was not finite, which of them, and the
    indices of its samples in their global order."""

    step: int
    problem: str
    indices: NDArray[np.int64]


@dataclass
class Totals:
    """Sums over the finite steps of some time, of the global batch."""

    steps: int = 0
    loss: float = 0.0
    num_correct: int = 0

    def averages(self, batch_size: int) -> dict[str, float | None]:
        """Mean loss and top-1 error in percent; None if no step was finite."""
        if self.steps == 0:
            return {"loss": None, "top1_error": None}
        accuracy = self.num_correct / (self.steps * batch_size)
        return {"loss": self.loss / self.steps, "top1_error": 100.0 * (1.0 - accuracy)}


@dataclass
class TrainMetrics:
    """Losses and correct predictions, and the order of the samples.

    Steps add tensors that stay on the device; ``reduce`` reads them, over all replicas. The
    attributes are then the same on every process, and plain numbers that a checkpoint can hold.
    They do not depend on how often ``reduce`` was called.

    Attributes:
        interval, epoch: of the steps since the last ``pop_interval``, and of those of the epoch.
        epoch_images: of all steps of the epoch, also those that were not finite.
        sample_order_hash: of the samples' indices of the epoch so far, in their global order.
        consecutive_nonfinite: steps since the last finite one.
    """

    batch_size: int
    dp_size: int
    interval: Totals = field(default_factory=Totals)
    epoch: Totals = field(default_factory=Totals)
    epoch_images: int = 0
    sample_order_hash: str = ""
    consecutive_nonfinite: int = 0
    _added: list[tuple[int, Tensor, NDArray[np.int64]]] = field(default_factory=list)

    def add(self, step: int, result: Tensor, indices: NDArray[np.int64]) -> None:
        """Add a step: what ``train_step`` returned, and this process's samples [b]."""
        self._added.append((step, result, indices))

    @property
    def has_unlogged_steps(self) -> bool:
        """Whether there are steps since the last ``pop_interval``."""
        return bool(self._added or self.interval.steps)

    def reduce(self) -> list[NonFiniteStep]:
        """Read what was added, and return the steps that were not finite; a collective call."""
        if not self._added:
            return []
        results = torch.stack([result for _, result, _ in self._added])
        dist.all_reduce(results)
        nonfinite = []
        for (step, _, _), (total, correct, *skipped), indices in zip(
            self._added, results.tolist(), self._gather_indices(), strict=True
        ):
            chain = hashlib.sha256(bytes.fromhex(self.sample_order_hash))
            chain.update(np.ascontiguousarray(indices, "<i8").tobytes())
            self.sample_order_hash = chain.hexdigest()
            self.epoch_images += len(indices)
            loss = total / self.batch_size
            if any(skipped) or not math.isfinite(loss):
                finite = math.isfinite(loss)
                problem = "a gradient is not finite" if finite else f"the loss is {loss}"
                nonfinite.append(NonFiniteStep(step, problem, indices))
                self.consecutive_nonfinite += 1
                continue
            self.consecutive_nonfinite = 0
            for totals in (self.interval, self.epoch):
                totals.steps += 1
                totals.loss += loss
                totals.num_correct += int(correct)
        self._added = []
        return nonfinite

    def _gather_indices(self) -> Iterator[NDArray[np.int64]]:
        """Of each step those of the global batch, whose position p is sample p // R of replica
        p mod R."""
        most = -(-self.batch_size // self.dp_size)
        mine = torch.full((len(self._added), most), -1, dtype=torch.int64)
        for row, (_, _, indices) in enumerate(self._added):
            mine[row, : len(indices)] = torch.from_numpy(indices)
        gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, mine)
        by_replica = gathered[:: len(gathered) // self.dp_size]  # its processes have the same
        for row in torch.stack(by_replica, 2).flatten(1).numpy():
            yield row[row >= 0]

    def pop_interval(self) -> Totals:
        """The steps since the last call."""
        interval, self.interval = self.interval, Totals()
        return interval

    def next_epoch(self) -> None:
        self.epoch, self.epoch_images, self.sample_order_hash = Totals(), 0, ""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds; after ``reduce``."""
        hidden = ("batch_size", "dp_size", "_added")
        return {name: value for name, value in asdict(self).items() if name not in hidden}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        totals = {name: Totals(**state[name]) for name in ("interval", "epoch")}
        vars(self).update({**state, **totals})


class StepThrottle:
    """Keeps the host at most ``MAX_STEPS_AHEAD`` steps ahead of its GPU, and batches alive until
    their steps are done.

    Else memory would fill with batches that wait for their step, and waiting for the GPU would
    look like waiting for data.
    """

    MAX_STEPS_AHEAD = 2

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._in_flight: deque[tuple[torch.cuda.Event, object]] = deque()

    def step_launched(self, batch: object) -> None:
        """Wait until another step may be launched."""
        if self._on_gpu:
            done = torch.cuda.Event()
            done.record()
            self._in_flight.append((done, batch))
            while len(self._in_flight) > self.MAX_STEPS_AHEAD:
                self._in_flight.popleft()[0].synchronize()


class StepTimer:
    """Where the time between two log records went; evaluations and checkpoints do not count.

    Attributes:
        longest_step: seconds of the longest step so far, with the wait for its batch.
    """

    def __init__(self) -> None:
        self.longest_step = self._seconds = self._data_seconds = 0.0
        self._steps = 0
        self.start()

    def start(self) -> None:
        """Count from here; what lies before does not count."""
        self._mark = self._step_start = time.perf_counter()

    def mark_data_ready(self) -> None:
        """The wait for a batch has ended."""
        self._data_seconds += self._lap()

    def mark_step_done(self) -> None:
        self._lap()
        self.longest_step = max(self.longest_step, self._mark - self._step_start)
        self._step_start = self._mark
        self._steps += 1

    def pop_times(self) -> tuple[float, float, int]:
        """Seconds, those spent waiting for data, and steps, since the last call."""
        self._lap()
        times = self._seconds, self._data_seconds, self._steps
        self._seconds, self._data_seconds, self._steps = 0.0, 0.0, 0
        return times

    def _lap(self) -> float:
        now = time.perf_counter()
        lap, self._mark = now - self._mark, now
        self._seconds += lap
        return lap
