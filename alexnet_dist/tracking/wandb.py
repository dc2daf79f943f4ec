"""Weights & Biases: what of an event is sent there, and a sink that cannot stop training."""

import atexit
import contextlib
import os
import threading
from pathlib import Path
from queue import Queue
from typing import Any
from urllib.parse import SplitResult, urlsplit

from alexnet_dist.errors import print_error
from alexnet_dist.tracking import Event

INIT_TIMEOUT = 30
"""Seconds for a server to answer at the start."""

CLOSE_TIMEOUT = 60.0
"""Seconds for all that is queued to be sent at the end."""

_RATES = ("images_per_second", "data_time_fraction", "comm_time_fraction")
_CURVES = {
    "train": ("loss", "top1_error", *_RATES),
    "eval": ("loss", "top1_error", "top5_error"),
}


def resolve_mode(mode: str) -> str:
    """auto: WANDB_MODE if set; else online where there is an API key, and offline where not."""
    if mode != "auto":
        return mode
    return os.environ.get("WANDB_MODE") or ("online" if has_api_key() else "offline")


def has_api_key() -> bool:
    """Whether there is one, in WANDB_API_KEY or, from `wandb login`, in the netrc file."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    with contextlib.suppress(OSError):
        netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser().read_text()
        return "wandb" in netrc or f"{server_url().hostname}" in netrc
    return False


def server_url() -> SplitResult:
    """Where runs are sent."""
    return urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))


def init_run(folder: Path, run_id: str, **options: Any) -> Any:
    """A W&B run whose curves run over training steps; its files lie below ``folder``.

    Args:
        options: of wandb.init: mode, config, name, project, resume.

    Raises:
        Exception: of any kind, W&B's own.
    """
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    settings = wandb.Settings(init_timeout=INIT_TIMEOUT, console="off")
    run = wandb.init(dir=str(folder), id=run_id, settings=settings, **options)
    run.define_metric("global_step")
    run.define_metric("*", step_metric="global_step")
    return run


def log_event(run: Any, event: Event) -> None:
    """Send what W&B shows of an event to a run of ``init_run``; of most events that is nothing."""
    kind = event["event"]
    if kind in _CURVES:
        values = {f"{kind}/{n}": event[n] for n in _CURVES[kind] if event.get(n) is not None}
        values |= {f"lr/{group}": lr for group, lr in event.get("lrs", {}).items()}
        run.log({**values, "epoch": event["epoch"], "global_step": event["step"]})
    elif kind == "image":
        import wandb

        image = wandb.Image(event["path"], caption=event["caption"])
        run.log({event["name"]: image, "global_step": event["step"]})
    elif kind in ("best", "finished"):
        for name in ("top1_error", "top5_error", "step"):
            if event.get(name) is not None:
                run.summary[f"{kind}/{name}"] = event[name]


class WandbSink:
    """Sends events to one W&B run, which resumes when the training run does.

    Everything that touches W&B happens in one daemon thread, fed by a queue: where it fails or
    hangs, one warning is printed and training continues; the records are in metrics.jsonl.

    Args:
        folder: of the run.
        config: its resolved options.
    """

    def __init__(self, folder: Path, run_id: str, config: dict[str, Any]) -> None:
        self._folder, self._run_id, self._config = folder, run_id, config
        self._queue: Queue[Event | None] = Queue()
        self._failed = False
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def log(self, event: Event) -> None:
        if not self._failed:
            self._queue.put(event)

    def close(self, timeout: float) -> None:
        """Wait so many seconds until all is sent."""
        self._queue.put(None)
        self._thread.join(timeout)
        if self._thread.is_alive():
            if not self._failed:
                print_error("Weights & Biases does not answer; the records are in metrics.jsonl")
            # W&B's own exit handler would wait for its service forever; what is registered last
            # runs first, and everything of ours is written by now
            atexit.register(os._exit, 0)

    def _work(self) -> None:
        try:
            run = self._init()
            while (event := self._queue.get()) is not None:
                log_event(run, event)
            run.finish()
        except BaseException as error:
            self._failed = True
            print_error(
                f"Weights & Biases failed ({type(error).__name__}: {error}); training continues, "
                "the records are in metrics.jsonl"
            )
            with contextlib.suppress(BaseException):
                import wandb

                wandb.teardown()  # at exit it would fail again, with a traceback

    def _init(self) -> Any:
        options = {"config": self._config, "name": self._folder.name, "resume": "allow"}
        options["project"] = self._config["wandb"]["project"]
        mode = resolve_mode(self._config["wandb"]["mode"])
        try:
            return init_run(self._folder, self._run_id, mode=mode, **options)
        except Exception as error:  # without a network, curves are still kept for `wandb sync`
            if mode != "online":
                raise
            reason = " ".join(str(error).split())
            print_error(f"Weights & Biases: {reason}; tracking continues offline")
            import wandb

            wandb.teardown()  # its service still has a run of this id
            return init_run(self._folder, self._run_id, mode="offline", **options)
