"""Progress and events in a terminal: bars, or plain lines where there is no terminal."""

import math
import time
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from alexnet_dist.tracking import Event

LINE_SECONDS = 10.0
"""Where there is no terminal, long work prints a line this often."""


class ConsoleSink:
    """Shows events to a person on standard output; the training bar follows "train" events."""

    def __init__(self, total_steps: int, steps_per_epoch: int) -> None:
        self._console = Console(highlight=False)
        self._total_steps = total_steps
        self._epochs = -(-total_steps // steps_per_epoch)
        self._bar = _bar(self._console, TimeElapsedColumn(), TextColumn("left"))
        self._task: TaskID | None = None

    def print(self, text: str) -> None:
        """Lines, above the bar."""
        self._console.print(text, markup=False, soft_wrap=True)

    def log(self, event: Event) -> None:
        if event["event"] == "train":
            self._log_step(event)
        elif text := _format(event):
            self.print(text)

    def _log_step(self, event: Event) -> None:
        loss = "not finite" if event["loss"] is None else f"{event['loss']:.4f}"
        values = (
            f"loss {loss}  lr {event['lr']:.2g}  {event['images_per_second']:.0f} img/s  "
            f"data {100 * event['data_time_fraction']:.0f} %"
        )
        if event.get("comm_time_fraction"):
            values += f"  comm {100 * event['comm_time_fraction']:.0f} %"
        epoch = f"epoch {max(math.ceil(event['epoch'] - 1e-9), 1)}/{self._epochs}"
        if not self._console.is_terminal:
            self.print(f"{epoch}  step {event['step']}/{self._total_steps}  {values}")
            return
        if self._task is None:
            self._task = self._bar.add_task(epoch, total=self._total_steps, values="")
            self._bar.start()
        self._bar.update(self._task, completed=event["step"], description=epoch, values=values)

    def close(self, timeout: float | None = None) -> None:
        if self._task is not None:
            self._bar.stop()


def _format(event: Event) -> str | None:
    """An event as a line; None for those that the console does not show."""
    match event["event"]:
        case "eval":
            return (
                f"epoch {event['epoch']:g}  step {event['step']}  validation: "
                f"top-1 error {event['top1_error']:.2f} %  top-5 {event['top5_error']:.2f} %  "
                f"loss {event['loss']:.4f}  ({event['images']} images, {event['seconds']:.1f} s)"
            )
        case "corrupt_image":
            substitute = event.get("substitute")
            action = f"replaced by {substitute}" if substitute else "skipped"
            return f"corrupt image {event['path']} ({event['reason']}): {action}"
        case "warning" | "checkpoint_failed":
            return f"warning: {event['message']}"
        case "nonfinite":
            skipped = ": its update is skipped" if event["skipped"] else ""
            return f"warning: {event['what']} at step {event['step']}{skipped}"
        case "resume":
            return f"resuming from step {event['step']}"
    return None


class ProgressReporter:
    """Progress of long work on standard error, with its speed and the time left.

    Call it with what is being done, how much is done, and how much there is in all. The bar goes
    when all is done, or at the end of a ``with`` block.
    """

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._bar = _bar(self._console, TextColumn("left"), transient=True)
        self._task: TaskID | None = None
        self._description = ""
        self._start, self._done_at_start, self._printed = 0.0, 0, 0.0

    def __enter__(self) -> "ProgressReporter":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def print(self, text: str) -> None:
        """Lines, above the bar."""
        self._console.print(text, markup=False, soft_wrap=True)

    def __call__(self, description: str, done: int, total: int) -> None:
        now = time.monotonic()
        if description != self._description:
            self._stop()
            self._description, self._done_at_start = description, done
            self._start = self._printed = now
        speed = (done - self._done_at_start) / max(now - self._start, 1e-9)
        if self._console.is_terminal:
            self._show(done, total, f"{speed:,.0f}/s")
        elif now - self._printed >= LINE_SECONDS and speed > 0:
            self._printed = now
            left = time.strftime("%H:%M:%S", time.gmtime((total - done) / speed))
            self.print(f"{description}: {done:,} of {total:,}, {speed:,.0f}/s, {left} left")

    def _show(self, done: int, total: int, values: str) -> None:
        if self._task is None:
            self._task = self._bar.add_task(self._description, total=total, values=values)
            self._bar.start()
        self._bar.update(self._task, completed=done, total=total, values=values)
        if done >= total:
            self._stop()

    def _stop(self) -> None:
        if self._task is not None:
            self._bar.stop()
            self._bar.remove_task(self._task)
            self._task = None


def _bar(console: Console, *columns: ProgressColumn, **options: Any) -> Progress:
    """A bar of the full width, whose tasks have a field ``values`` of text."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None, complete_style="cyan", finished_style="green"),
        MofNCompleteColumn(),
        TextColumn("{task.fields[values]}"),
        *columns,
        TimeRemainingColumn(),
        console=console,
        expand=True,
        **options,
    )
