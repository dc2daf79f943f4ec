"""All that a run tells people: records, terminal, W&B and pictures. One process speaks for all."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alexnet_dist.errors import stderr
from alexnet_dist.tracking import plots
from alexnet_dist.tracking.console import Console
from alexnet_dist.tracking.events import EventLog, JsonLines, LogSink, read, surviving
from alexnet_dist.tracking.run_dir import RunDir, Status
from alexnet_dist.tracking.wandb import Mode, Wandb


class Logger:
    """Speaks where there is a ``folder``, on rank 0, and is silent elsewhere, so that the training
    loop need not know which rank it runs on.

    Args:
        folder: the run's folder, taken, or None on ranks that are silent.
        config: the resolved options, kept there.
        images: whether W&B gets the pictures, too.
    """

    def __init__(
        self,
        folder: RunDir | None,
        config: dict[str, Any],
        *,
        steps: int,
        steps_per_epoch: int,
        wandb: Mode = "off",
        project: str = "",
        images: bool = True,
    ) -> None:
        self.folder, self.images = folder, images
        self.wandb_id: str | None = None
        self._console = Console(steps, steps_per_epoch)
        sinks: list[LogSink] = []
        if folder is not None:
            folder.keep_config(config)
            self.wandb_id = str(folder.set_status("running")["wandb_id"])
            sinks = [JsonLines(folder.path / "metrics.jsonl"), self._console]
            if wandb != "off":
                sinks.append(
                    Wandb(
                        folder.path,
                        self.wandb_id,
                        config,
                        mode=wandb,
                        project=project,
                        warn=stderr,
                    )
                )
        self._stream = EventLog(*sinks)

    @property
    def speaks(self) -> bool:
        """Whether anybody hears this process: what is costly to say need not be made otherwise."""
        return self.folder is not None

    def emit(self, event: str, **values: Any) -> None:
        """An event for the records and all who read along."""
        self._stream.emit(event, **values)

    def say(self, text: str) -> None:
        """Lines for the terminal alone."""
        if self.folder is not None:
            self._console.say(text)

    def sheet(
        self, name: str, step: int, pixels: NDArray[np.uint8], captions: Sequence[str], title: str
    ) -> None:
        """A picture of images [n, H, W, 3] with captions."""
        self._draw(name, step, lambda path: plots.images(path, pixels, captions, title))

    def kernels(self, step: int, weights: NDArray[np.float32], towers: int, title: str) -> None:
        """A picture of the first layer's kernels [n, 3, h, w]."""
        self._draw("kernels", step, lambda path: plots.kernels(path, weights, towers, title))

    def curves(self, step: int) -> None:
        """A picture of the run so far, from its records."""
        if self.folder is not None:
            run = self.folder.path
            events = surviving(read(run / "metrics.jsonl"))
            self._draw("curves", step, lambda path: plots.curves(path, {run.name: events}))

    def close(self, status: Status, step: int, patience: float | None = None) -> None:
        """The run's last word; what follows may still be said in the terminal.

        ``patience``: seconds that the records' readers may take to end, None for their own.
        """
        if self.folder is not None:
            self.folder.set_status(status, step=step)
        self._stream.close(patience)

    def abandon(self) -> None:
        """This life ends here, without a word or a wait: order in the terminal."""
        self._console.close()  # a terminal whose bar is left standing has no cursor

    def _draw(self, name: str, step: int, draw: Callable[[Path], None]) -> None:
        """Draw into the run folder; a disk that is full costs the picture, and not the run."""
        if self.folder is None:
            return
        path = self.folder.path / f"{name}.png"
        try:
            draw(path)
        except OSError as error:
            message = f"{path} could not be written ({error.strerror}): make room there"
            self.emit("warning", step=step, message=message)
            return
        if self.images:
            caption = self.folder.path.name
            self.emit("image", step=step, name=name, path=str(path), caption=caption)
