"""One stream of events: RUN/metrics.jsonl is the record, console and W&B read along."""

import contextlib
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from alexnet_dist.errors import UserError
from alexnet_dist.tracking import Event, plots
from alexnet_dist.tracking.console import ConsoleSink
from alexnet_dist.tracking.run_dir import RunDir, Status
from alexnet_dist.tracking.wandb import Mode, WandbSink

QUICKSTART_HINT = """
next: Imagenette  --config configs/imagenette.yaml --data.root DIR
      CIFAR-10    --data.root DIR (its own files, or folders of images)
      ImageNet    --config configs/paper2012.yaml --data.root IMAGENET"""
"""What to try after the embedded digits."""


class LogSink(Protocol):
    """Something that receives events."""

    def log(self, event: Event) -> None: ...

    def close(self, timeout: float | None = None) -> None: ...


class EventLog:
    """Sends each event to all sinks, in order."""

    def __init__(self, *sinks: LogSink) -> None:
        self.sinks = list(sinks)

    def emit(self, event: str, **values: Any) -> None:
        record = {"event": event, "time": round(time.time(), 3), **values}
        for sink in self.sinks:
            sink.log(record)

    def close(self, timeout: float | None = None) -> None:
        """Close all sinks; ``timeout``: seconds that W&B may take, None for its default."""
        for sink in self.sinks:
            sink.close(timeout)


class JsonlSink:
    """Appends a line per event at once; what a full disk refuses is kept, and written later."""

    def __init__(self, path: Path) -> None:
        truncated = path.is_file() and path.stat().st_size and path.read_bytes()[-1:] != b"\n"
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        self._pending = b"\n" if truncated else b""  # the process before was killed in a line

    def log(self, event: Event) -> None:
        self._pending += json.dumps(event).encode() + b"\n"
        with contextlib.suppress(OSError):
            while self._pending:
                written = os.write(self._file, self._pending)
                self._pending = self._pending[written:]

    def close(self, timeout: float | None = None) -> None:
        os.close(self._file)


class Logger:
    """All that a run reports: records, console, W&B and plots. Active on rank 0 alone.

    Elsewhere its methods do nothing, so that the training loop need not ask for its rank.

    Args:
        run_dir: the locked run folder; None on the other ranks.
        config: the resolved options, saved in the folder.
        log_images: whether W&B gets the plots, too.

    Attributes:
        wandb_id: the run's id in W&B, on rank 0.
    """

    def __init__(
        self,
        run_dir: RunDir | None,
        config: dict[str, Any],
        *,
        total_steps: int,
        steps_per_epoch: int,
        wandb_mode: Mode = "off",
        wandb_project: str = "",
        log_images: bool = True,
    ) -> None:
        self._run_dir, self._log_images = run_dir, log_images
        self._console = ConsoleSink(total_steps, steps_per_epoch)
        self.wandb_id: str | None = None
        sinks: list[LogSink] = []
        if run_dir is not None:
            run_dir.save_config(config)
            self.wandb_id = str(run_dir.set_status("running")["wandb_id"])
            sinks = [JsonlSink(run_dir.path / "metrics.jsonl"), self._console]
            if wandb_mode != "off":
                wandb_id, project = self.wandb_id, wandb_project
                sinks.append(WandbSink(run_dir.path, wandb_id, config, wandb_mode, project))
        self._events = EventLog(*sinks)

    @property
    def is_active(self) -> bool:
        """Whether this process logs: what is costly to make is made where this is true."""
        return self._run_dir is not None

    def emit(self, event: str, **values: Any) -> None:
        """Log an event to all sinks."""
        self._events.emit(event, **values)

    def print(self, text: str) -> None:
        """Print lines to the console alone."""
        if self._run_dir is not None:
            self._console.print(text)

    def log_image_grid(
        self, name: str, step: int, pixels: NDArray[np.uint8], captions: Sequence[str], title: str
    ) -> None:
        """Plot images [n, H, W, 3] with captions as RUN/name.png."""
        self._plot(name, step, lambda path: plots.plot_image_grid(path, pixels, captions, title))

    def log_labeled_images(
        self, images: NDArray[np.uint8], labels: Tensor, names: Sequence[str]
    ) -> None:
        """Plot the first training images [n, H, W, 3] as RUN/first_batch.png; ``labels`` [n]."""
        captions = [names[label] for label in labels.tolist()]
        title = "the first training batch, as the network sees it"
        self.log_image_grid("first_batch", 0, images, captions, title)

    def log_predictions(
        self,
        step: int,
        images: NDArray[np.uint8],
        labels: Tensor,
        probs: Tensor,
        names: Sequence[str],
    ) -> None:
        """Plot validation images [n, H, W, 3] of ``labels`` [n] with their best labels by ``probs``
        [n, classes] as RUN/predictions.png."""
        captions, best = [names[n] for n in labels.tolist()], plots.top_labels(probs, names)
        self._plot(
            "predictions",
            step,
            lambda path: plots.plot_predictions(path, images, captions, best, columns=8),
        )

    def log_kernels(self, step: int, weights: NDArray[np.float32], towers: int) -> None:
        """Plot the first layer's kernels [n, 3, h, w] as RUN/kernels.png."""
        title = f"first-layer kernels after {step} steps"
        self._plot("kernels", step, lambda path: plots.plot_kernels(path, weights, towers, title))

    def plot_curves(self, step: int) -> None:
        """Plot the run so far, from its records, as RUN/curves.png."""
        if self._run_dir is not None:
            run = self._run_dir.path
            events = drop_superseded(read_events(run / "metrics.jsonl"))
            self._plot("curves", step, lambda path: plots.plot_curves(path, {run.name: events}))

    def close(self, status: Status, step: int, timeout: float | None = None) -> None:
        """Note the run's status and close the sinks; ``print`` still works.

        Args:
            timeout: seconds that W&B may take to finish, None for its default.
        """
        if self._run_dir is not None:
            self._run_dir.set_status(status, step=step)
        self._events.close(timeout)

    def stop_progress_bar(self) -> None:
        """Restore the terminal where the process ends without ``close``."""
        self._console.close()

    def _plot(self, name: str, step: int, plot: Callable[[Path], None]) -> None:
        """Plot into the run folder; a full disk costs the plot, and not the run."""
        if self._run_dir is None:
            return
        path = self._run_dir.path / f"{name}.png"
        try:
            plot(path)
        except OSError as error:
            message = f"{path} could not be written ({error.strerror}): make room there"
            self.emit("warning", step=step, message=message)
            return
        if self._log_images:
            caption = self._run_dir.path.name
            self.emit("image", step=step, name=name, path=str(path), caption=caption)


def read_events(path: Path) -> list[Event]:
    """The events of a metrics.jsonl, without truncated lines.

    Raises:
        UserError: there is no such file.
    """
    try:
        lines = path.read_text().splitlines()
    except OSError:
        raise UserError(f"there are no records at {path}: give a run's folder") from None
    events = []
    for line in lines:
        with contextlib.suppress(ValueError):
            events.append(json.loads(line))
    return events


def drop_superseded(events: Sequence[Event]) -> list[Event]:
    """The events that count: where a run resumed from a checkpoint, later steps were repeated."""
    kept: list[Event] = []
    for event in events:
        if event["event"] == "start":  # after an attempt that ended before its first checkpoint
            kept = []
        elif event["event"] == "resume":
            kept = [old for old in kept if old.get("step", 0) <= event["step"]]
        kept.append(event)
    return kept


def start_message(arch: str, values: Event, run_dir: Path) -> str:
    """What is about to be trained, for the console; ``values``: those of the start event."""
    modes = ", compiled" * values["compiled"] + ", a step a CUDA graph" * values["cuda_graph"]
    return (
        f"{arch}: {values['parameters']:,} parameters, {values['num_classes']} classes, "
        f"{values['train_images']:,} training and {values['val_images']:,} validation images\n"
        f"world size {values['world_size']} on {values['device']}, {values['threads']} threads "
        f"each, {values['precision']}{modes}; {values['loader']}\n{values['layout']}\n"
        f"the run is in {run_dir}"
    )


def end_message(
    result: dict[str, float], run_dir: Path, *, stopped_at: str = "", hint: str = ""
) -> str:
    """The result, for the console; ``stopped_at`` says where, if before the run's end."""
    stopped = f"\nstopped at {stopped_at}; the same command resumes from here" * bool(stopped_at)
    return (
        f"top-1 accuracy {100 - result['top1_error']:.2f} %  (error {result['top1_error']:.2f} "
        f"%, top-5 {result['top5_error']:.2f} %) on {result['images']} validation images\n"
        f"records, curves and kernels: {run_dir}{stopped}{hint}"
    )
