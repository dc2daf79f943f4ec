"""A run's folder: its name, who may write in it, and how the run stands.

RUN/config.yaml      the resolved options
RUN/status.json      {"status": ..., "step": ..., "wandb_id": ...}
RUN/metrics.jsonl    the records
RUN/checkpoints/     the checkpoints
RUN/*.png            what the network sees, its curves and kernels
"""

import fcntl
import json
import os
import socket
import time
import uuid
from pathlib import Path
from typing import Any, Literal

import yaml

from alexnet_dist.errors import UserError

Status = Literal["running", "preempted", "stopped", "ended", "failed"]
"""preempted: saved, and wants to be started again by itself; stopped: saved, for a person to go on
with; failed: for a person to mend. One that was killed stays running."""


class RunDir:
    """The folder of a run that this process leads (rank 0)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: Any = None

    def take(self) -> None:
        """Create the folder, and keep other live runs out of it.

        Raises:
            Failure: another run is at work in it, or it cannot be written.
        """
        try:
            (self.path / "checkpoints").mkdir(parents=True, exist_ok=True)
            lock = (self.path / ".lock").open("a")
        except OSError as error:
            raise UserError(
                f"the run folder {self.path} cannot be written ({error.strerror}): give another "
                "--run.output_dir"
            ) from None
        for attempt in range(20):  # under a restart the run before may still be dying
            try:
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if attempt == 19:
                    raise UserError(
                        f"the run folder {self.path} is in use by another run that is alive: give "
                        "this one another --run.name"
                    ) from None
                time.sleep(0.25)
        self._lock = lock

    def status(self) -> dict[str, Any]:
        return read_status(self.path)

    def set_status(self, status: Status, **more: Any) -> dict[str, Any]:
        """Note how the run stands; what is noted, be the disk full or not."""
        record = read_status(self.path) | {"status": status, "launch": _launch(), **more}
        record.setdefault("wandb_id", uuid.uuid4().hex[:8])
        _write(self.path / "status.json", json.dumps(record) + "\n")
        return record

    def keep_config(self, config: dict[str, Any]) -> None:
        _write(self.path / "config.yaml", yaml.safe_dump(config, sort_keys=False))


def _launch() -> str:
    """What stays the same while one launcher, or one SLURM job, starts a run again and again."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is not None:
        return f"slurm job {job}"
    return f"{socket.gethostname()} {os.getppid()}" if "TORCHELASTIC_RUN_ID" in os.environ else ""


def read_status(path: Path) -> dict[str, Any]:
    """How the run in ``path`` stands; {} where there is none."""
    try:
        status: dict[str, Any] = json.loads((path / "status.json").read_text())
        return status
    except (OSError, ValueError):
        return {}


def read_config(path: Path) -> dict[str, Any]:
    """The resolved options of the run in ``path``; {} where there are none."""
    try:
        config: dict[str, Any] = yaml.safe_load((path / "config.yaml").read_text())
        return config
    except (OSError, yaml.YAMLError):
        return {}


def resolve_run_dir(root: str, name: str, resume: str) -> tuple[Path, bool]:
    """Where a run of this name belongs, and whether it goes on there.

    An unfinished run goes on under "auto"; a new one takes the name, or name-2, name-3, ...
    where runs of it have ended (or under "never", but for the run that this very launcher began:
    started again after a fault, it goes on). Any other ``resume`` is a run's folder.

    Raises:
        Failure: ``resume`` names a folder without a run.
    """
    if resume not in ("auto", "never"):
        path = Path(resume)
        if not (path / "config.yaml").is_file():
            raise UserError(f"there is no run at {resume}: give --run.resume a run's folder")
        return path, True
    number = 1
    while True:
        path = Path(root) / (name if number == 1 else f"{name}-{number}")
        if not read_config(path):
            return path, False
        status = read_status(path)
        ours = status.get("launch") and status["launch"] == _launch()
        if (resume == "auto" or ours) and status.get("status") != "ended":
            return path, True
        number += 1


def _write(path: Path, text: str) -> None:
    """Write a small file whole or not at all; a full disk leaves the old one."""
    partial = path.with_name(f".partial-{path.name}")
    try:
        partial.write_text(text)
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
