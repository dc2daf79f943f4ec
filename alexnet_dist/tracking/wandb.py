"""Weights & Biases: what of an event it is told, and a sink that tells it at arm's length."""

import atexit
import contextlib
import os
import threading
from pathlib import Path
from queue import Queue
from typing import Any, Literal

from alexnet_dist.tracking.events import Event

Mode = Literal["auto", "online", "offline", "off"]

INIT_SECONDS = 30
CLOSE_SECONDS = 60

_CURVES = {
    "train": (
        "loss",
        "top1_error",
        "lr",
        "images_per_second",
        "data_time_fraction",
        "comm_time_fraction",
    ),
    "eval": ("loss", "top1_error", "top5_error"),
}


def begin(folder: Path, run_id: str, **options: Any) -> Any:
    """A W&B run whose curves run over the steps of training; its files lie below ``folder``.

    Args:
        options: of wandb.init: mode, config, name, project, resume.

    Raises:
        Exception: of any kind, W&B's own.
    """
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    settings = wandb.Settings(init_timeout=INIT_SECONDS, console="off")
    run = wandb.init(dir=str(folder), id=run_id, settings=settings, **options)
    run.define_metric("global_step")
    run.define_metric("*", step_metric="global_step")
    return run


def send(run: Any, event: Event) -> None:
    """Tell a run of ``begin`` what W&B shows of an event; of most it shows nothing."""
    kind = event["event"]
    if kind in _CURVES:
        values = {f"{kind}/{n}": event[n] for n in _CURVES[kind] if event.get(n) is not None}
        values |= {f"lr/{group}": rate for group, rate in event.get("lrs", {}).items()}
        run.log({**values, "epoch": event["epoch"], "global_step": event["step"]})
    elif kind == "image":
        import wandb

        image = wandb.Image(event["path"], caption=event["caption"])
        run.log({event["name"]: image, "global_step": event["step"]})
    elif kind in ("best", "finished"):
        for name in ("top1_error", "top5_error", "step"):
            if event.get(name) is not None:
                run.summary[f"{kind}/{name}"] = event[name]


def resolve(mode: Mode) -> str:
    """auto: online where there is a key, else offline."""
    if mode != "auto":
        return mode
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        key = bool(os.environ.get("WANDB_API_KEY")) or "wandb" in netrc.read_text()
    except OSError:
        key = bool(os.environ.get("WANDB_API_KEY"))
    return os.environ.get("WANDB_MODE") or ("online" if key else "offline")


class Wandb:
    """Sends events to one W&B run, which goes on when the training run does.

    Everything that touches W&B happens in one daemon thread, fed by a queue: what fails there, or
    hangs, ends the tracking and is told to ``warn``; the run's records are in metrics.jsonl.
    """

    def __init__(
        self,
        folder: Path,
        run_id: str,
        config: dict[str, Any],
        *,
        mode: Mode,
        project: str,
        warn: Any,
    ) -> None:
        self._mode = resolve(mode)
        self._options: dict[str, Any] = {
            "folder": folder,
            "run_id": run_id,
            "config": config,
            "name": folder.name,
            "project": project,
            "resume": "allow",
        }
        self._warn = warn
        self._queue: Queue[Event | None] = Queue()
        self._failed = False
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def take(self, event: Event) -> None:
        if not self._failed:
            self._queue.put(event)

    def close(self, patience: float | None = None) -> None:
        self._queue.put(None)
        self._thread.join(CLOSE_SECONDS if patience is None else patience)
        if self._thread.is_alive():
            if not self._failed:
                self._warn("Weights & Biases does not answer; the records are in metrics.jsonl")
            # its own farewell at the end of the process would wait for it for ever; what is
            # registered last runs first, and everything of ours is written by now
            atexit.register(os._exit, 0)

    def _work(self) -> None:
        try:
            run = self._begin()
            while (event := self._queue.get()) is not None:
                send(run, event)
            run.finish()
        except BaseException as error:
            self._failed = True
            self._warn(
                f"Weights & Biases failed ({type(error).__name__}: {error}); training goes on, "
                "the records are in metrics.jsonl"
            )
            with contextlib.suppress(BaseException):
                import wandb

                wandb.teardown()  # now, for at the end of the process it would fail again, aloud

    def _begin(self) -> Any:
        try:
            return begin(mode=self._mode, **self._options)
        except Exception as error:  # no network is no reason to lose the run's curves
            if self._mode != "online":
                raise
            self._warn(f"Weights & Biases: {error}; tracking goes on offline")
            return begin(mode="offline", **self._options)
