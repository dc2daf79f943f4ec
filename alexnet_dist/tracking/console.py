"""Progress and events in a terminal; plain lines where there is none."""

import math
import sys
import time
from pathlib import Path
from textwrap import TextWrapper
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from alexnet_dist.tracking import Event

LINE_SECONDS = 10.0
"""Where there is no terminal, long work prints a line this often."""


def _console(*, stderr: bool) -> Console:
    """A stream as rich sees it; whatever FORCE_COLOR says, a file gets no control characters."""
    terminal = (sys.stderr if stderr else sys.stdout).isatty()
    return Console(stderr=stderr, force_terminal=terminal, highlight=False)


class ProgressReporter(Progress):
    """Progress of long work, with its speed and the time left; on standard error.

    Call it with what is being done, how much is done, and how much there is in all. The bar goes
    when all is done, or at the end of a ``with`` block.
    """

    def __init__(self) -> None:
        console = _console(stderr=True)
        super().__init__(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None, complete_style="cyan", finished_style="green"),
            TextColumn("{task.completed:,}/{task.total:,}  {task.fields[pace]}"),
            console=console,
            expand=True,
            transient=True,
            disable=not console.is_interactive,
        )
        self._task = self.add_task("", total=None, visible=False, pace="")
        self._next_line = 0.0

    def __call__(self, description: str, done: int, total: int) -> None:
        """Show progress."""
        (task,) = self.tasks
        if total != task.total or done < task.completed:  # progress of something else
            self.reset(self._task, total=total, visible=True, description=description)
            self.start()
            self._next_line = time.monotonic() + LINE_SECONDS
        left = "?" if task.time_remaining is None else format_seconds(task.time_remaining)
        pace = f"{task.speed or 0:,.0f}/s  {left} left"
        self.update(self._task, completed=done, description=description, pace=pace)
        if done >= total:
            self.stop()
        elif self.disable and time.monotonic() > self._next_line:
            self._next_line = time.monotonic() + LINE_SECONDS
            line = f"{description}: {done:,} of {total:,}, {pace}"
            self.print(line, markup=False, soft_wrap=True)


_START = (
    "{arch}: {parameters:,} parameters, {num_classes} classes\n{train_images:,} training and "
    "{val_images:,} validation images\nworld size {world_size} on {device}, {threads} threads "
    "each, {precision}{modes}\n{loader}\n{layout}\nthe run is in {run}"
)
_LINES = {
    "start": _START,
    "resume": _START + "\nresuming from step {step}",
    "eval": "epoch {epoch:.4g}  validation top-1 {accuracy:.2f} %  (errors: top-1 "
    "{top1_error:.2f} %, top-5 {top5_error:.2f} %)  loss {loss:.4f}",
    "corrupt_image": "corrupt image {path} ({reason}): {action}",
    "nonfinite": "warning: {what} at step {step}{skipped}",
    "warning": "warning: {message}",
    "checkpoint_failed": "warning: {message}",
    "preempted": "stopped by {cause} at step {step} of {total}, {saved}; the same command resumes",
    "finished": "top-1 accuracy {accuracy:.2f} %  (errors: top-1 {top1_error:.2f} %, "
    "top-5 {top5_error:.2f} %) on {images} validation images\n"
    "records, curves and kernels: {run}{stopped}",
}
"""How events are shown; those of other kinds are not, but for "train"."""

_PROGRESS = (
    "epoch {epoch}/{epochs} step {step}/{total} loss {loss:.4f} top-1 {accuracy:.1f}% lr "
    "{lrs[weights]:.2g} {images_per_second:.0f} img/s data {data_time_fraction:.0%}{comm} left "
    "{epoch_left} of the epoch, {run_left} of the run",
    "epoch {epoch}/{epochs} step {step}/{total} loss {loss:.4f} top-1 {accuracy:.1f}% "
    "{images_per_second:.0f} img/s data {data_time_fraction:.0%}{comm} left {epoch_left}, "
    "{run_left}",
    "ep {epoch}/{epochs} step {step}/{total} loss {loss:.2f} top-1 {accuracy:.0f}% "
    "{images_per_second:.0f}/s data {data_time_fraction:.0%}{comm} left {epoch_left}, {run_left}",
    "ep {epoch}/{epochs} step {step} loss {loss:.2f} top-1 {accuracy:.0f}% "
    "{images_per_second:.0f}/s data {data_time_fraction:.0%}{comm} {epoch_left}, {run_left}",
)
"""The progress line, from the longest to the shortest, which fits into about 80 columns."""


def progress_line(values: dict[str, Any], width: int) -> str:
    """A "train" event as the longest line that fits into ``width`` columns."""
    lines = [form.format(**values) for form in _PROGRESS]
    return next((line for line in lines if len(line) <= width), lines[-1])


def format_seconds(seconds: float) -> str:
    """As 45s, 8m20s, 1h05m or 3d07h."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours:02}h"
    if hours:
        return f"{hours}h{minutes:02}m"
    return f"{minutes}m{seconds:02}s" if minutes else f"{seconds}s"


class ConsoleSink:
    """Shows a run's events on standard output; in a terminal the last line shows the progress, in a
    file each "train" event has a line."""

    def __init__(
        self,
        run_dir: Path,
        total_steps: int,
        steps_per_epoch: int,
        console: Console | None = None,
    ) -> None:
        self._console = console or _console(stderr=False)
        self._live = Live(console=self._console, auto_refresh=False)
        self._run_dir, self._total_steps = run_dir, total_steps
        self._steps_per_epoch = steps_per_epoch
        self._step, self._eval_seconds = 0, 0.0

    def log(self, event: Event) -> None:
        """Show an event, if it is one that is shown."""
        kind = event["event"]
        if kind in ("start", "resume"):
            self._step = event["step"]
        if kind == "eval":
            self._step, self._eval_seconds = event["step"], event["seconds"]
        if kind in ("preempted", "finished"):
            self.stop()
        if kind == "train":
            self._show_progress(event | self._words(event) | self._progress(event))
        elif kind in _LINES:
            self._print(_LINES[kind].format(**event | self._words(event)))

    def _show_progress(self, values: dict[str, Any]) -> None:
        if self._console.is_interactive:
            line = progress_line(values, self._console.width)
            self._live.start()
            self._live.update(Text(line, no_wrap=True, overflow="crop"), refresh=True)
        else:
            self._print(progress_line(values, width=1000))

    def _print(self, text: str) -> None:
        """In a terminal, lines are broken between words; a file has them as they are."""
        width = self._console.width if self._console.is_interactive else sys.maxsize
        wrapper = TextWrapper(width, break_long_words=False, break_on_hyphens=False)
        for line in text.splitlines():
            self._console.print(wrapper.fill(line), markup=False, soft_wrap=True)

    def stop(self) -> None:
        """Leave the terminal in order."""
        self._live.stop()

    def _progress(self, event: Event) -> dict[str, Any]:
        """How far the run is after a "train" event, and the time left at the pace of its steps."""
        step, total, steps_per_epoch = event["step"], self._total_steps, self._steps_per_epoch
        epoch, epochs = -(-step // steps_per_epoch), -(-total // steps_per_epoch)
        epoch_end = min(epoch * steps_per_epoch, total)
        step_seconds = event["seconds"] / max(step - self._step, 1)
        run_left = (total - step) * step_seconds + (epochs - epoch + 1) * self._eval_seconds
        self._step = step
        comm = event["comm_time_fraction"]  # 0 without other processes
        return {
            "epoch": epoch,
            "epochs": epochs,
            "comm": f" comm {comm:.0%}" if comm else "",
            "epoch_left": format_seconds((epoch_end - step) * step_seconds),
            "run_left": format_seconds(run_left),
        }

    def _words(self, event: Event) -> dict[str, Any]:
        """What lines say besides an event's values."""
        compiled, graph = event.get("compiled", False), event.get("cuda_graph", False)
        substitute, error = event.get("substitute"), event.get("top1_error")
        stopped = f"\nstopped at step {event.get('step')} of {self._total_steps}; the same command "
        return {
            "run": self._run_dir,
            "total": self._total_steps,
            "loss": math.nan if event.get("loss") is None else event["loss"],
            "accuracy": math.nan if error is None else 100 - error,  # None: no step was finite
            "modes": ", compiled" * compiled + ", a step a CUDA graph" * graph,
            "action": f"replaced by {substitute}" if substitute else "skipped",
            "skipped": ": its update is skipped" * event.get("skipped", False),
            "saved": "saved" if event.get("saved") else "NOT saved, as said above",
            "stopped": "" if event.get("ended") else stopped + "resumes from here",
        }
