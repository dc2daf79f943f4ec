"""One stream of events: RUN/metrics.jsonl is the record, console and W&B read along."""

import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from alexnet_dist.errors import UserError
from alexnet_dist.tracking import Event, plots
from alexnet_dist.tracking.console import ConsoleSink
from alexnet_dist.tracking.run_dir import Status, save_config, set_status
from alexnet_dist.tracking.wandb import CLOSE_TIMEOUT, WandbSink


class JsonlSink:
    """Appends a line per event at once; what a full disk refuses is kept, and written later."""

    def __init__(self, path: Path) -> None:
        truncated = path.is_file() and path.stat().st_size and path.read_bytes()[-1:] != b"\n"
        self._file = path.open("ab", buffering=0)
        self._pending = b"\n" if truncated else b""  # the process before was killed in a line

    def log(self, event: Event) -> None:
        self._pending += json.dumps(event).encode() + b"\n"
        with contextlib.suppress(OSError):
            while self._pending:
                self._pending = self._pending[self._file.write(self._pending) :]


class Logger:
    """All that a run reports: records, console, W&B and plots.

    Args:
        run_dir: the locked run folder, on rank 0. Elsewhere None: the methods do nothing, so that
            the training loop need not ask for its rank.
        config: the resolved options, saved in the folder.
    """

    def __init__(
        self, run_dir: Path | None, config: dict[str, Any], total_steps: int, steps_per_epoch: int
    ) -> None:
        self._run_dir, self._steps_per_epoch = run_dir, steps_per_epoch
        self._sinks: list[JsonlSink | ConsoleSink | WandbSink] = []
        if run_dir is not None:
            save_config(run_dir, config)
            wandb_id = set_status(run_dir, "running")["wandb_id"]
            self._console = ConsoleSink(run_dir, total_steps, steps_per_epoch)
            self._sinks = [JsonlSink(run_dir / "metrics.jsonl"), self._console]
            if config["wandb"]["mode"] != "off":
                self._sinks.append(WandbSink(run_dir, wandb_id, config))

    def emit(self, event: str, step: int, **values: Any) -> None:
        """Log an event after ``step`` steps."""
        now, epoch = round(time.time(), 3), step / self._steps_per_epoch
        record = {"event": event, "time": now, "step": step, "epoch": epoch, **values}
        for sink in self._sinks:
            sink.log(record)

    def plot(self, name: str, step: int, plot: Callable[..., None], *args: Any) -> None:
        """Call ``plot`` of plots.py with the path RUN/name.png and ``args``; a full disk costs the
        plot, and not the run."""
        if self._run_dir is None:
            return
        path = self._run_dir / f"{name}.png"
        try:
            plot(path, *args)
        except OSError as error:
            message = f"{path} could not be written ({error.strerror}): make room there"
            self.emit("warning", step=step, message=message)
            return
        self.emit("image", step=step, name=name, path=str(path), caption=self._run_dir.name)

    def plot_curves(self, step: int) -> None:
        """Plot the run so far, from its records, as RUN/curves.png."""
        if self._run_dir is not None:
            runs = {self._run_dir.name: read_events(self._run_dir)}
            self.plot("curves", step, plots.plot_curves, runs)

    def close(self, status: Status, step: int, wandb_timeout: float = CLOSE_TIMEOUT) -> None:
        """Note the run's status and end all that is open; W&B may take ``wandb_timeout`` seconds
        to send what is queued."""
        if self._run_dir is not None:
            set_status(self._run_dir, status, step=step)
        self.stop_progress_bar()
        for sink in self._sinks:
            if isinstance(sink, WandbSink):
                sink.close(wandb_timeout)

    def stop_progress_bar(self) -> None:
        """Leave the terminal in order where the process ends without ``close``."""
        if self._run_dir is not None:
            self._console.stop()


def read_events(run_dir: Path, *, superseded: bool = False) -> list[Event]:
    """The events of a run that count, in order; without truncated lines.

    Args:
        superseded: also those that do not: where a run resumed from a checkpoint, or started again
            without one, steps were repeated.

    Raises:
        UserError: there are no records.
    """
    path = run_dir / "metrics.jsonl"
    try:
        lines = path.read_text().splitlines()
    except OSError:
        raise UserError(f"there are no records at {path}: give a run's folder") from None
    events: list[Event] = []
    for line in lines:
        with contextlib.suppress(ValueError):
            event = json.loads(line)
            if event["event"] in ("start", "resume") and not superseded:
                first = event["step"] if event["event"] == "resume" else -1
                events = [old for old in events if old.get("step", 0) <= first]
            events.append(event)
    return events
