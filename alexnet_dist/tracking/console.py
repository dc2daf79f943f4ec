"""Progress and events in a terminal: bars, or plain lines where there is no terminal."""

import math
import time
from pathlib import Path
from typing import Any

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


class ProgressReporter(Progress):
    """Progress of long work, with its speed and the time left; on standard error.

    Call it with what is being done, how much is done, and how much there is in all. The bar goes
    when all is done, or at the end of a ``with`` block.
    """

    def __init__(self, stderr: bool = True) -> None:
        console = Console(stderr=stderr, highlight=False)
        super().__init__(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None, complete_style="cyan", finished_style="green"),
            MofNCompleteColumn(),
            TextColumn("{task.fields[values]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            expand=True,
            transient=stderr,
            disable=not console.is_terminal,
        )
        self._task = self.add_task("", total=None, visible=False, values="")
        self._next_line = 0.0

    def __call__(self, description: str, done: int, total: int, values: str = "") -> None:
        """Show progress; ``values``: text beside the bar in the place of the speed."""
        (task,) = self.tasks
        if total != task.total or done < task.completed:  # progress of something else
            self.reset(self._task, total=total, visible=True, description=description)
            self.start()
            self._next_line = time.monotonic() + LINE_SECONDS
        speed = f"{task.speed or 0:,.0f}/s"
        self.update(self._task, completed=done, description=description, values=values or speed)
        if done >= total:
            self.stop()
        elif self.disable and time.monotonic() > self._next_line:
            self._next_line = time.monotonic() + LINE_SECONDS
            left = time.strftime("%H:%M:%S", time.gmtime(task.time_remaining or 0))
            line = f"{description}: {done:,} of {total:,}, {speed}, {left} left"
            self.print(line, markup=False, soft_wrap=True)


_START = (
    "{arch}: {parameters:,} parameters, {num_classes} classes, {train_images:,} training and "
    "{val_images:,} validation images\nworld size {world_size} on {device}, {threads} threads "
    "each, {precision}{modes}; {loader}\n{layout}\nthe run is in {run}"
)
_LINES = {
    "start": _START,
    "resume": _START + "\nresuming from step {step}",
    "train": "loss {loss:.4f}  lr {lrs[weights]:.2g}  {images_per_second:.0f} img/s  "
    "data {data_time_fraction:.0%}",
    "eval": "epoch {epoch:g}  step {step}  validation: top-1 error {top1_error:.2f} %  "
    "top-5 {top5_error:.2f} %  loss {loss:.4f}  ({images} images, {seconds:.1f} s)",
    "corrupt_image": "corrupt image {path} ({reason}): {action}",
    "nonfinite": "warning: {what} at step {step}{skipped}",
    "warning": "warning: {message}",
    "checkpoint_failed": "warning: {message}",
    "preempted": "stopped by {cause} at step {step} of {total}, {saved}; the same command resumes",
    "finished": "top-1 accuracy {accuracy:.2f} %  (error {top1_error:.2f} %, top-5 "
    "{top5_error:.2f} %) on {images} validation images\n"
    "records, curves and kernels: {run}{stopped}",
}
"""How events are shown; those of other kinds are not."""


class ConsoleSink:
    """Shows a run's events on standard output; a bar follows "train" events."""

    def __init__(self, run_dir: Path, total_steps: int, steps_per_epoch: int) -> None:
        self.bar = ProgressReporter(stderr=False)
        self._run_dir, self._total_steps = run_dir, total_steps
        self._epochs = -(-total_steps // steps_per_epoch)

    def log(self, event: Event) -> None:
        """Show an event, if it is one that is shown."""
        kind = event["event"]
        if kind in ("preempted", "finished"):
            self.bar.stop()
        if kind not in _LINES:
            return
        line = _LINES[kind].format(**event | self._words(event))
        if kind == "train":
            if event["comm_time_fraction"]:
                line += f"  comm {event['comm_time_fraction']:.0%}"
            epoch = f"epoch {max(math.ceil(event['epoch'] - 1e-9), 1)}/{self._epochs}"
            if not self.bar.disable:
                self.bar(epoch, event["step"], self._total_steps, line)
                return
            line = f"{epoch}  step {event['step']}/{self._total_steps}  {line}"
        self.bar.print(line, markup=False, soft_wrap=True)

    def _words(self, event: Event) -> dict[str, Any]:
        """What lines say besides an event's values."""
        compiled, graph = event.get("compiled", False), event.get("cuda_graph", False)
        substitute = event.get("substitute")
        stopped = f"\nstopped at step {event.get('step')} of {self._total_steps}; the same command "
        return {
            "run": self._run_dir,
            "total": self._total_steps,
            "loss": math.nan if event.get("loss") is None else event["loss"],
            "accuracy": 100 - (event.get("top1_error") or 0),  # None if no step was finite
            "modes": ", compiled" * compiled + ", a step a CUDA graph" * graph,
            "action": f"replaced by {substitute}" if substitute else "skipped",
            "skipped": ": its update is skipped" * event.get("skipped", False),
            "saved": "saved" if event.get("saved") else "NOT saved, as said above",
            "stopped": "" if event.get("ended") else stopped + "resumes from here",
        }
