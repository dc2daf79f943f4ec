"""A step, and an evaluation: tensors and meters, no files."""

import hashlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torchmetrics import Metric

from alexnet_dist.errors import UserError
from alexnet_dist.training.schedules import Schedule


class SyncedGradScaler(Protocol):
    """A gradient scaler that can leave steps out; see parallel/arithmetic.py."""

    skip_nonfinite: bool

    @property
    def skipped(self) -> Tensor: ...

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None: ...

    def step(self, optimizer: torch.optim.Optimizer) -> float | None: ...

    def update(self) -> None: ...


class Layout(Protocol):
    """What a layout gives the loop; see parallel/ddp.py for the meaning of each."""

    parameters: dict[str, nn.Parameter]

    @property
    def scaler(self) -> SyncedGradScaler: ...

    def forward_backward(
        self, images: Tensor, labels: Tensor, masks: Iterable[Tensor] = ()
    ) -> Tensor: ...

    def eval_counts(self, images: Tensor, labels: Tensor) -> Tensor: ...


class Batch(Protocol):
    """What a step needs of an engine's batch."""

    @property
    def images(self) -> Tensor: ...

    @property
    def labels(self) -> Tensor: ...


def set_rates(
    optimizer: torch.optim.Optimizer, schedule: Schedule, passes: float
) -> dict[str, float]:
    """Give each group its rate for the step that begins after ``passes``; the rates by group."""
    rates = {"weights": schedule.rate("weights", passes)}
    for group in optimizer.param_groups:
        group["lr"] = schedule.rate(group["name"], passes, bias=group["bias"])
        rates[group["name"]] = group["lr"]
    return rates


def train_step(
    layout: Layout, optimizer: torch.optim.Optimizer, batch: Batch, masks: Iterable[Tensor]
) -> Tensor:
    """One update of the parameters.

    Returns:
        What ``layout.forward_backward`` does, and, while the scaler guards, whether it left the
        update out, since a gradient was not finite.
    """
    result = layout.forward_backward(batch.images, batch.labels, masks)
    layout.scaler.unscale_(optimizer)  # here, where processes with different gradients can agree
    layout.scaler.step(optimizer)
    layout.scaler.update()
    optimizer.zero_grad(set_to_none=True)
    if layout.scaler.skip_nonfinite:
        result = torch.cat([result, layout.scaler.skipped.to(result.dtype)[None]])
    return result


@dataclass(frozen=True)
class NonFiniteStep:
    """A step whose loss or gradient was not finite.

    Attributes:
        loss: of the global batch.
        numbers: its samples, in their global order.
    """

    step: int
    loss: float
    numbers: NDArray[np.int64]

    @property
    def what(self) -> str:
        finite = self.loss - self.loss == 0
        return "a gradient is not finite" if finite else f"the loss is {self.loss}"


@dataclass
class TrainMetrics:
    """What training has done so far: losses and hits by step, and the order of the images.

    Steps add tensors of the device and are not waited for; ``collect`` reads them, over all
    replicas. What it leaves behind is the same on every process, and plain numbers, so that a
    checkpoint can keep it, and its sums do not depend on when it was called: shares are float64,
    which sums a few float32 without rounding.

    Attributes:
        losses, hits: of the steps since the last record, the global batch's; bad steps left out.
        epoch_loss: summed over the epoch's steps, of which ``epoch_steps`` were good.
        epoch_hits, images: of the epoch so far.
        digest: of the samples' numbers of the epoch so far, in their global order.
        bad_in_a_row: steps since the last one that was good.
    """

    batch: int
    replicas: int
    losses: list[float] = field(default_factory=list)
    hits: list[float] = field(default_factory=list)
    epoch_loss: float = 0.0
    epoch_steps: int = 0
    epoch_hits: int = 0
    images: int = 0
    digest: str = ""
    bad_in_a_row: int = 0
    _steps: list[int] = field(default_factory=list)
    _results: list[Tensor] = field(default_factory=list)
    _numbers: list[NDArray[np.int64]] = field(default_factory=list)

    def add(self, step: int, result: Tensor, numbers: NDArray[np.int64]) -> None:
        """Note a step: what ``train_step`` gave, and the samples that this replica had in it."""
        self._steps.append(step)
        self._results.append(result)
        self._numbers.append(numbers)

    def collect(self) -> list[NonFiniteStep]:
        """Read what was added, and tell the bad steps; all processes call it together."""
        if not self._results:
            return []
        results = torch.stack(self._results)
        dist.all_reduce(results)
        bad = []
        rows = zip(self._steps, results.tolist(), self._in_global_order(), strict=True)
        for step, (total, hits, *left_out), numbers in rows:
            loss = total / self.batch
            self.digest = chain(self.digest, numbers)
            self.images += len(numbers)
            if any(left_out) or loss - loss != 0:
                bad.append(NonFiniteStep(step, loss, numbers))
                self.bad_in_a_row += 1
                continue
            self.bad_in_a_row = 0
            self.losses.append(loss)
            self.hits.append(hits)
            self.epoch_loss += loss
            self.epoch_hits += int(hits)
            self.epoch_steps += 1
        self._steps, self._results, self._numbers = [], [], []
        return bad

    def _in_global_order(self) -> Iterable[NDArray[np.int64]]:
        """Position p of a batch is image p // R of replica p mod R."""
        most = -(-self.batch // self.replicas)
        mine = torch.full((len(self._numbers), most), -1, dtype=torch.int64)
        for row, numbers in enumerate(self._numbers):
            mine[row, : len(numbers)] = torch.from_numpy(numbers)
        everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, mine)
        of_each = everyone[
            :: len(everyone) // self.replicas
        ]  # processes of a replica have the same
        together = torch.stack(of_each, 2).flatten(1).numpy()
        return (row[row >= 0] for row in together)

    def take(self) -> tuple[float | None, float | None]:
        """Mean loss and top-1 error in percent since the last call, None where all steps were
        bad; after ``collect``."""
        steps = len(self.losses)
        loss = sum(self.losses) / steps if steps else None
        error = 100.0 * (1.0 - sum(self.hits) / (steps * self.batch)) if steps else None
        self.losses, self.hits = [], []
        return loss, error

    def next_epoch(self) -> None:
        """Begin the counts of an epoch."""
        self.epoch_loss, self.epoch_steps, self.epoch_hits = 0.0, 0, 0
        self.images, self.digest = 0, ""

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps; after ``collect``."""
        return {k: v for k, v in vars(self).items() if not k.startswith("_") and k != "replicas"}

    def load(self, state: Mapping[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)


def chain(digest: str, numbers: NDArray[np.int64]) -> str:
    """The digest of an order of samples, one more batch long."""
    link = bytes.fromhex(digest) + np.ascontiguousarray(numbers, "<i8").tobytes()
    return hashlib.sha256(link).hexdigest()


class EvalMetrics(Metric):
    """Loss and classification errors over a data set, counted exactly.

    Whole numbers, summed over processes: no padding, no mean of means.
    """

    full_state_update = False
    loss: Tensor
    top1: Tensor
    top5: Tensor
    images: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.set_dtype(torch.float64)
        zero = torch.zeros((), dtype=torch.int64)
        self.add_state("loss", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        for name in ("top1", "top5", "images"):
            self.add_state(name, zero.clone(), dist_reduce_fx="sum")

    def update(self, hits: Tensor) -> None:
        """``hits``: what ``layout.eval_counts`` gives."""
        self.loss += hits[0]
        self.top1 += hits[1].long()
        self.top5 += hits[2].long()
        self.images += hits[3].long()

    def compute(self) -> dict[str, float]:
        """Errors in percent, mean loss, and images, over all processes."""
        images = int(self.images)
        return {
            "top1_error": 100.0 * (images - int(self.top1)) / max(images, 1),
            "top5_error": 100.0 * (images - int(self.top5)) / max(images, 1),
            "loss": float(self.loss) / max(images, 1),
            "images": images,
        }


def check_count(result: Mapping[str, float], left_out: int, images: int) -> None:
    """See that an evaluation has counted every image once.

    Raises:
        Failure: it has not.
    """
    if result["images"] + left_out != images:
        raise UserError(
            f"evaluation counted {result['images']} images and left out {left_out}, but there are "
            f"{images}: this is a defect, please report it",
            on_all_ranks=True,
        )


def evaluate(
    layout: Layout,
    batches: Iterable[Batch],
    device: torch.device,
    between: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Errors over all batches of all processes, each of which may have another number of images.

    ``between`` is called after each batch; what it raises ends the evaluation.
    """
    errors = EvalMetrics().to(device)
    for batch in batches:
        errors.update(layout.eval_counts(batch.images, batch.labels))
        between()
    result: dict[str, float] = errors.compute()
    return result


class StepThrottle:
    """Keeps the process at most ``AHEAD`` steps ahead of its device, and batches alive until their
    steps are done.

    A process that only launches work would take batch after batch: memory would fill with those
    that wait for their step, and a wait for the device would look like one for images.
    """

    AHEAD = 2

    def __init__(self, device: torch.device) -> None:
        self._under_way: deque[tuple[torch.cuda.Event, Batch]] | None = (
            deque() if device.type == "cuda" else None
        )

    def started(self, batch: Batch) -> None:
        """The device has been given all of a step on ``batch``: wait until another may begin."""
        if self._under_way is None:
            return
        done = torch.cuda.Event()
        done.record()
        self._under_way.append((done, batch))
        while len(self._under_way) > self.AHEAD:
            self._under_way.popleft()[0].synchronize()

    def finish(self) -> None:
        """Wait for all of them."""
        while self._under_way:
            self._under_way.popleft()[0].synchronize()


class StepTimer:
    """Where the time between two records went; evaluations and checkpoints do not count.

    Attributes:
        longest: seconds of the longest step of this life.
    """

    def __init__(self) -> None:
        self.seconds = self.wait = 0.0
        self.steps = self.steps_of_last = 0
        self.longest = self._waited = 0.0
        self._mark = time.perf_counter()

    def start(self) -> None:
        """Begin to count here; what lies between is left out."""
        self._mark = time.perf_counter()

    def waited(self) -> None:
        """The wait for images has ended."""
        self._waited = self._lap()
        self.wait += self._waited

    def stepped(self) -> None:
        """A step has ended."""
        self.longest = max(self.longest, self._waited + self._lap())
        self.steps += 1

    def take(self) -> tuple[float, float]:
        """Seconds, and those spent waiting for images, since the last call."""
        self._lap()
        taken = self.seconds, self.wait
        self.steps_of_last, self.steps = self.steps, 0
        self.seconds = self.wait = 0.0
        return taken

    def _lap(self) -> float:
        now = time.perf_counter()
        lap, self._mark = now - self._mark, now
        self.seconds += lap
        return lap
