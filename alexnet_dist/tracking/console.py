"""What a run says in a terminal: a progress bar, or plain lines where there is none."""

import math
import sys
from collections.abc import Iterable
from typing import Any, TypeVar

from rich.console import Console as RichConsole
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    track,
)

from alexnet_dist.tracking.events import Event

T = TypeVar("T")


def with_progress(things: Iterable[T], what: str, total: int) -> Iterable[T]:
    """The ``things``, handed on under a bar with the time left on standard error."""
    return track(things, what, total, console=RichConsole(stderr=True))


class Console:
    """Shows events to a person."""

    def __init__(self, steps: int, steps_per_epoch: int) -> None:
        self._rich = RichConsole(highlight=False)
        self._epochs = -(-steps // steps_per_epoch)
        self._total = steps
        self._bar: Progress | None = None
        self._task: Any = None
        if self._rich.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=None, complete_style="cyan", finished_style="green"),
                MofNCompleteColumn(),
                TextColumn("{task.fields[numbers]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self._rich,
                expand=True,
            )

    def say(self, line: str) -> None:
        """A line, above the bar."""
        self._rich.print(line, markup=False, soft_wrap=True)

    def take(self, event: Event) -> None:
        kind = event["event"]
        if kind == "train":
            self._train(event)
        elif kind == "eval":
            self.say(
                f"epoch {event['epoch']:g}  step {event['step']}  validation: "
                f"top-1 error {event['top1_error']:.2f} %  top-5 {event['top5_error']:.2f} %  "
                f"loss {event['loss']:.4f}  ({event['images']} images, {event['seconds']:.1f} s)"
            )
        elif kind == "corrupt_image":
            instead = event.get("substitute")
            self.say(
                f"bad image {event['path']} ({event['reason']}): "
                + (f"{instead} in its place" if instead else "left out")
            )
        elif kind in ("warning", "checkpoint_failed"):
            self.say(f"warning: {event['message']}")
        elif kind == "nonfinite":
            self.say(
                f"warning: {event['what']} at step {event['step']}"
                + (": its update is left out" if event["skipped"] else "")
            )
        elif kind == "rollback":
            self.say(f"going back from step {event['step']} to step {event['to']}")
        elif kind == "resume":
            self.say(f"going on from step {event['step']}")

    def _train(self, event: Event) -> None:
        loss = "not finite" if event["loss"] is None else f"{event['loss']:.4f}"
        numbers = (
            f"loss {loss}  lr {event['lr']:.2g}  "
            f"{event['images_per_second']:.0f} img/s  "
            f"wait {100 * event['data_time_fraction']:.0f} %"
        )
        if event.get("comm_time_fraction"):
            numbers += f"  comm {100 * event['comm_time_fraction']:.0f} %"
        epoch = max(math.ceil(event["epoch"] - 1e-9), 1)
        where = f"epoch {epoch}/{self._epochs}"
        if self._bar is None:
            self.say(f"{where}  step {event['step']}/{self._total}  {numbers}")
            return
        if self._task is None:
            self._bar.start()
            self._task = self._bar.add_task(where, total=self._total, numbers="")
        self._bar.update(self._task, completed=event["step"], description=where, numbers=numbers)

    def close(self, patience: float | None = None) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.stop()
            self._bar = None


class IndexProgress:
    """Progress of making an index, on standard error, for work that takes a while."""

    def __init__(self) -> None:
        self._last = ""

    def __call__(self, what: str, done: int, total: int) -> None:
        shown = f"{what}: {100 * done // total} % of {total:,} images"
        if shown == self._last or (total < 2000 and done < total):
            return
        self._last = shown
        terminal = sys.stderr.isatty()
        if terminal or done == total:
            end = "\n" if done == total or not terminal else ""
            start = "\r" if terminal else ""
            print(f"{start}{shown}", end=end, file=sys.stderr, flush=True)
