"""Progress and events in a terminal: bars, or plain lines where there is no terminal."""

import math
import time
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from alexnet_dist.tracking import Event

LINE_SECONDS = 10.0
"""Where there is no terminal, long work prints a line this often."""


class ProgressReporter:
    """Progress of long work, with its speed and the time left; on standard error.

    Call it with what is being done, how much is done, and how much there is in all. The bar goes
    when all is done, or at the end of a ``with`` block.
    """

    def __init__(self, stderr: bool = True) -> None:
        self.console = Console(stderr=stderr, highlight=False)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None, complete_style="cyan", finished_style="green"),
            MofNCompleteColumn(),
            TextColumn("{task.fields[values]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            expand=True,
            transient=stderr,
        )
        self._next_line = 0.0

    def __call__(self, description: str, done: int, total: int, values: str = "") -> None:
        """Show progress; ``values``: text beside the bar in the place of the speed."""
        tasks = self._bar.tasks
        if not tasks or total != tasks[0].total or done < tasks[0].completed:  # of something else
            self.stop()
            self._bar.add_task(description, total=total, values="")
            self._next_line = time.monotonic() + LINE_SECONDS
            if self.console.is_terminal:
                self._bar.start()
        task = self._bar.tasks[0]
        self._bar.update(task.id, description=description, completed=done)
        speed = f"{task.speed or 0:,.0f}/s"
        self._bar.update(task.id, values=values or speed)
        if done >= total:
            self.stop()
        elif not self.console.is_terminal and time.monotonic() > self._next_line:
            self._next_line = time.monotonic() + LINE_SECONDS
            left = time.strftime("%H:%M:%S", time.gmtime(task.time_remaining or 0))
            self.print(f"{description}: {done:,} of {total:,}, {speed}, {left} left")

    def print(self, text: str) -> None:
        """Print lines, above the bar."""
        self.console.print(text, markup=False, soft_wrap=True)

    def stop(self) -> None:
        if self._bar.tasks:
            if self.console.is_terminal:
                self._bar.stop()
            self._bar.remove_task(self._bar.tasks[0].id)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class ConsoleSink:
    """Shows events to a person on standard output; a bar follows "train" events."""

    def __init__(self, total_steps: int, steps_per_epoch: int) -> None:
        self._bar = ProgressReporter(stderr=False)
        self._total_steps, self._epochs = total_steps, -(-total_steps // steps_per_epoch)
        self.print = self._bar.print

    def log(self, event: Event) -> None:
        if event["event"] == "train":
            self._log_step(event)
        elif text := format_event(event):
            self.print(text)

    def close(self, timeout: float | None = None) -> None:
        self._bar.stop()

    def _log_step(self, event: Event) -> None:
        loss = "not finite" if event["loss"] is None else f"{event['loss']:.4f}"
        values = (
            f"loss {loss}  lr {event['lr']:.2g}  {event['images_per_second']:.0f} img/s  "
            f"data {event['data_time_fraction']:.0%}"
        )
        if event.get("comm_time_fraction"):
            values += f"  comm {event['comm_time_fraction']:.0%}"
        epoch = f"epoch {max(math.ceil(event['epoch'] - 1e-9), 1)}/{self._epochs}"
        if self._bar.console.is_terminal:
            self._bar(epoch, event["step"], self._total_steps, values)
        else:
            self.print(f"{epoch}  step {event['step']}/{self._total_steps}  {values}")


def format_event(event: Event) -> str | None:
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
