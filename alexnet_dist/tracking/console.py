"""Progress and events in a terminal: bars, or plain lines where there is no terminal."""

import math
import time
from pathlib import Path

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


class ConsoleSink:
    """Shows a run's events on standard output; a bar follows "train" events."""

    def __init__(self, run_dir: Path, total_steps: int, steps_per_epoch: int) -> None:
        self.bar = ProgressReporter(stderr=False)
        self._run_dir, self._total_steps = run_dir, total_steps
        self._epochs = -(-total_steps // steps_per_epoch)

    def log(self, event: Event) -> None:
        """Show an event, if it is one that is shown."""
        if event["event"] in ("preempted", "finished"):
            self.bar.stop()
        text = self._format_step(event) if event["event"] == "train" else self._format(event)
        if text:
            self.bar.print(text, markup=False, soft_wrap=True)

    def _format_step(self, event: Event) -> str | None:
        """A "train" event as a line; None where the bar shows it."""
        loss = "not finite" if event["loss"] is None else f"{event['loss']:.4f}"
        values = (
            f"loss {loss}  lr {event['lrs']['weights']:.2g}  "
            f"{event['images_per_second']:.0f} img/s  data {event['data_time_fraction']:.0%}"
        )
        if event["comm_time_fraction"]:
            values += f"  comm {event['comm_time_fraction']:.0%}"
        epoch = f"epoch {max(math.ceil(event['epoch'] - 1e-9), 1)}/{self._epochs}"
        if self.bar.disable:
            return f"{epoch}  step {event['step']}/{self._total_steps}  {values}"
        self.bar(epoch, event["step"], self._total_steps, values)
        return None

    def _format(self, event: Event) -> str | None:
        """An event as lines; None for those that the console does not show."""
        step = event.get("step")
        match event["event"]:
            case "start" | "resume" as kind:
                modes = ", compiled" * event["compiled"]
                modes += ", a step a CUDA graph" * event["cuda_graph"]
                return (
                    f"{event['arch']}: {event['parameters']:,} parameters, {event['num_classes']} "
                    f"classes, {event['train_images']:,} training and {event['val_images']:,} "
                    f"validation images\nworld size {event['world_size']} on {event['device']}, "
                    f"{event['threads']} threads each, {event['precision']}{modes}; "
                    f"{event['loader']}\n{event['layout']}\nthe run is in {self._run_dir}"
                ) + f"\nresuming from step {step}" * (kind == "resume")
            case "eval":
                return (
                    f"epoch {event['epoch']:g}  step {step}  validation: "
                    f"top-1 error {event['top1_error']:.2f} %  top-5 {event['top5_error']:.2f} %  "
                    f"loss {event['loss']:.4f}  ({event['images']} images, "
                    f"{event['seconds']:.1f} s)"
                )
            case "corrupt_image":
                substitute = event.get("substitute")
                action = f"replaced by {substitute}" if substitute else "skipped"
                return f"corrupt image {event['path']} ({event['reason']}): {action}"
            case "warning" | "checkpoint_failed":
                return f"warning: {event['message']}"
            case "nonfinite":
                skipped = ": its update is skipped" if event["skipped"] else ""
                return f"warning: {event['what']} at step {step}{skipped}"
            case "preempted":
                saved = "saved" if event["saved"] else "NOT saved, as said above"
                return (
                    f"stopped by {event['cause']} at step {step} of {self._total_steps}, {saved}; "
                    "the same command resumes"
                )
            case "finished":
                stopped = f"\nstopped at step {step} of {self._total_steps}; the same command "
                stopped += "resumes from here"
                return (
                    f"top-1 accuracy {100 - event['top1_error']:.2f} %  (error "
                    f"{event['top1_error']:.2f} %, top-5 {event['top5_error']:.2f} %) on "
                    f"{event['images']} validation images\n"
                    f"records, curves and kernels: {self._run_dir}"
                ) + stopped * (not event["ended"])
        return None
