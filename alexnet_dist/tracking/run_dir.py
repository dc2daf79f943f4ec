"""A run's folder: its name, who may write in it, and its status. Rank 0 alone writes.

RUN/config.yaml      the resolved options
RUN/status.json      {"format": 2, "status": ..., "step": ..., "wandb_id": ...}
RUN/metrics.jsonl    the records
RUN/checkpoints/     the checkpoints
RUN/*.png            what the network sees, its curves and kernels
"""

import contextlib
import fcntl
import json
import os
import socket
import time
import uuid
from itertools import count
from pathlib import Path
from typing import Any, Literal

import yaml

from alexnet_dist.errors import UserError

FORMAT = 2
"""Of run folders; those of alexnet_dist 0.1.0, whose options have other names, have none."""

Status = Literal["running", "preempted", "stopped", "ended", "failed"]
"""preempted: saved, to be restarted automatically; stopped: saved, to be resumed by a person;
failed: a person has to fix something first. One that was killed stays running."""


def lock(path: Path) -> None:
    """Create a run's folder, and keep other runs out of it until this process ends; it is running.

    Raises:
        UserError: another run is at work in it, or it cannot be written; or torchrun restarts a run
            that a person has to fix, as on each host whose processes have merely lost another.
    """
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    if restarted and read_status(path).get("status") == "failed":
        raise UserError(
            f"the run in {path} is not restarted after an error that one of its processes has "
            "named: fix that, and give the same command again"
        )
    try:
        (path / "checkpoints").mkdir(parents=True, exist_ok=True)
        file = os.open(path / ".lock", os.O_WRONLY | os.O_CREAT, 0o666)
    except OSError as error:
        raise UserError(
            f"the run folder {path} cannot be written ({error.strerror}): give another "
            "--run.output_dir"
        ) from None
    for _ in range(20):  # for 5 s: a process of the attempt before may still be ending
        with contextlib.suppress(OSError):
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            set_status(path, "running")
            return
        time.sleep(0.25)
    raise UserError(
        f"the run folder {path} is in use by another run that is alive: give this one another "
        "--run.name"
    )


def set_status(path: Path, status: Status, **more: Any) -> dict[str, Any]:
    """Write the status of the run in ``path``; what is written, even where the disk is full."""
    record = read_status(path) | {"status": status, "launch": _launch_id(), **more}
    record = {"format": FORMAT, "wandb_id": uuid.uuid4().hex[:8]} | record
    _write(path / "status.json", json.dumps(record) + "\n")
    return record


def read_status(path: Path) -> dict[str, Any]:
    """The status of the run in ``path``; {} where there is none."""
    try:
        status: dict[str, Any] = json.loads((path / "status.json").read_text())
        return status
    except (OSError, ValueError):
        return {}


def save_config(path: Path, config: dict[str, Any]) -> None:
    """Write the resolved options of the run in ``path``."""
    _write(path / "config.yaml", yaml.safe_dump(config, sort_keys=False))


def read_config(path: Path) -> dict[str, Any]:
    """The resolved options of the run in ``path``; {} where there are none.

    Raises:
        UserError: it was written by another version.
    """
    try:
        config: dict[str, Any] = yaml.safe_load((path / "config.yaml").read_text())
    except (OSError, yaml.YAMLError):
        return {}
    status = read_status(path)
    if status and status.get("format") != FORMAT:
        version = "alexnet_dist 0.1.0" if "format" not in status else "a newer alexnet_dist"
        raise UserError(
            f"the run in {path} was written by {version}, whose options and records have other "
            "names: use it with that version, or begin another one by --run.name",
            on_all_ranks=True,
        )
    return config


def resolve_run_dir(
    output_dir: str, name: str | None, default_name: str, resume: str
) -> tuple[Path, dict[str, Any]]:
    """The folder of a run of this name, and the options that it keeps if the run resumes there.

    Under "auto" an unfinished run resumes; a new one takes the name. Where a run of it has ended, a
    new one of the default name takes name-2, name-3, ..., and one that was named is refused. Under
    "never" a run is new, unless this very launcher began it and restarts it after a fault. Any
    other ``resume`` is a run's folder.

    Raises:
        UserError: ``resume`` names a folder without a run, or the run is of another version, or the
            run ``name`` has ended.
    """
    if resume not in ("auto", "never"):
        path = Path(resume)
        if config := read_config(path):
            return path, config
        message = f"there is no run at {resume}: give --run.resume a run's folder"
        raise UserError(message, on_all_ranks=True)
    for number in count(1):
        path = Path(output_dir, (name or default_name) + f"-{number}" * (number > 1))
        if not (path / "config.yaml").is_file():
            break
        status = read_status(path)
        ours = status.get("launch") and status["launch"] == _launch_id()
        if (resume == "auto" or ours) and status.get("status") != "ended":
            return path, read_config(path)
        if name and resume == "auto":
            raise UserError(
                f"the run {path} has ended: give another --run.name, --run.resume never to train "
                f"from scratch beside it, or --run.resume {path} with more --train.epochs",
                on_all_ranks=True,
            )
    return path, {}


def restart_info() -> dict[str, str]:
    """Which attempt of the run this is, as launcher and cluster count them."""
    counts = {"torchrun_restarts": "TORCHELASTIC_RESTART_COUNT"}
    counts |= {"slurm_job": "SLURM_JOB_ID", "slurm_restarts": "SLURM_RESTART_COUNT"}
    return {name: os.environ[word] for name, word in counts.items() if word in os.environ}


def _launch_id() -> str:
    """What stays the same while one launcher, or one SLURM job, restarts a run."""
    if "SLURM_JOB_ID" in os.environ:
        return f"slurm job {os.environ['SLURM_JOB_ID']}"
    return f"{socket.gethostname()} {os.getppid()}" if "TORCHELASTIC_RUN_ID" in os.environ else ""


def _write(path: Path, text: str) -> None:
    """Write a small file completely or not at all; a full disk leaves the old one."""
    partial = path.with_name(f".partial-{path.name}")
    try:
        partial.write_text(text)
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
