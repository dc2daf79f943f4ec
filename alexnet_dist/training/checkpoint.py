"""Checkpoints: written whole or not at all, and read without running anything from them.

A checkpoint is a folder: tensors as safetensors files, written by all processes through
torch.distributed.checkpoint, and all else in state.json. It is written under another name, synced
to the disk and then renamed, so that a folder of that name is a whole checkpoint.

    RUN/checkpoints/step-00001234/   state.json, *.safetensors
    RUN/checkpoints/last, best       links to two of them
"""

import json
import logging
import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from alexnet_dist.errors import Failure

FORMAT = 1
_STATE = "state.json"
_PARTIAL = ".partial-"


class SaveFailed(Exception):  # noqa: N818 (training goes on)
    """A checkpoint could not be written; those before it are untouched."""


def save(
    folder: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], *, best: bool
) -> Path:
    """Write checkpoint ``step`` below ``folder``; all processes call it together.

    Args:
        tensors: the same on all processes, or DTensors of which each holds a part.
        best: let the link "best" point to it.

    Raises:
        SaveFailed: it could not be written, on any process; raised on all.
    """
    final, partial = folder / f"step-{step:08d}", folder / f"{_PARTIAL}{step:08d}"
    rank = dist.get_rank()
    if rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
    _together(lambda: partial.mkdir(parents=True) if rank == 0 else None)

    packed = {name: _packed(tensor) for name, tensor in tensors.items()}

    def write() -> None:
        with warnings.catch_warnings(), _quiet():
            warnings.simplefilter("ignore")  # about torch's own internals
            writer = HuggingFaceStorageWriter(str(partial), save_distributed=True)
            dcp.save(packed, storage_writer=writer)

    def finish() -> None:
        if rank != 0:
            return
        shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
        record = {"format": FORMAT, "step": step, **state, "tensors": shapes}
        (partial / _STATE).write_text(json.dumps(record))
        for file in partial.iterdir():
            _sync(file)
        _sync(partial)
        if final.exists():  # the same step again, after a resume
            shutil.rmtree(final)
        partial.rename(final)
        _link(folder / "last", final.name)
        if best:
            _link(folder / "best", final.name)
        _sync(folder)

    try:
        _together(write)
        _together(finish)
    except SaveFailed:
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return final


def remove_old(folder: Path, keep: int) -> None:
    """Remove all but the ``keep`` newest checkpoints, the best, and the last."""
    linked = {os.path.realpath(folder / name) for name in ("last", "best")}
    for old in sorted(folder.glob("step-*"))[:-keep]:
        if os.path.realpath(old) not in linked:
            shutil.rmtree(old, ignore_errors=True)
    for partial in folder.glob(f"{_PARTIAL}*"):
        shutil.rmtree(partial, ignore_errors=True)


def find(path: str, prefer: str = "best") -> Path:
    """The checkpoint that ``path`` means: one, or a run's folder, whose ``prefer`` it is.

    Raises:
        Failure: there is none.
    """
    folder = Path(path)
    if (folder / _STATE).is_file():
        return folder
    for name in (prefer, "last"):
        if (folder / "checkpoints" / name / _STATE).is_file():
            return (folder / "checkpoints" / name).resolve()
    raise Failure(
        f"there is no checkpoint at {path}: give a run's folder, or one of its checkpoints"
    )


def read_state(checkpoint: Path) -> dict[str, Any]:
    """A checkpoint's state, without its tensors.

    Raises:
        Failure: it cannot be read, or another version wrote it.
    """
    try:
        state: dict[str, Any] = json.loads((checkpoint / _STATE).read_text())
    except (OSError, ValueError) as error:
        raise Failure(
            f"the checkpoint {checkpoint} cannot be read ({error}): take another one"
        ) from None
    if state.get("format") != FORMAT:
        raise Failure(
            f"the checkpoint {checkpoint} is of format {state.get('format')}, this version reads "
            f"{FORMAT}: take the version of alexnet_dist that wrote it"
        )
    return state


def load(checkpoint: Path, tensors: Mapping[str, Tensor]) -> None:
    """Read tensors by name into those given; all processes call it together.

    Raises:
        Failure: the checkpoint has others, or it is damaged.
    """
    state = read_state(checkpoint)
    for name, tensor in tensors.items():
        shape = state["tensors"].get(name)
        if shape != list(tensor.shape):
            has = "no such tensor" if shape is None else f"one of {shape}"
            raise Failure(
                f"the checkpoint {checkpoint} is of another network: {name} should be "
                f"{list(tensor.shape)}, and it has {has}; give the model options it was trained "
                "with, or start from its weights alone by --model.weights",
                everywhere=True,
            )
    try:
        with warnings.catch_warnings(), _quiet(), torch.no_grad():
            warnings.simplefilter("ignore")
            dcp.load(dict(tensors), storage_reader=HuggingFaceStorageReader(str(checkpoint)))
    except (Exception, CheckpointException) as error:  # torch wraps what went wrong anywhere
        _stop_if_interrupted(error)
        raise Failure(
            f"the checkpoint {checkpoint} is damaged ({_cause(error)}): take another one",
            everywhere=True,
        ) from None


def _packed(tensor: Tensor) -> Tensor:
    """With rows packed as they are numbered, as safetensors wants them and channels-last kernels
    are not."""
    if not isinstance(tensor, DTensor):
        return tensor.contiguous()
    return DTensor.from_local(
        tensor.to_local().contiguous(),
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )


def _together(work: Any) -> None:
    """Do ``work`` in every process; where it fails in one, raise SaveFailed in all."""
    cause = ""
    try:
        work()
    except (Exception, CheckpointException) as error:  # a full disk has many names
        _stop_if_interrupted(error)
        cause = _cause(error) or type(error).__name__
    causes: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(causes, cause)
    if any(causes):
        raise SaveFailed(next(cause for cause in causes if cause))


def _stop_if_interrupted(error: BaseException) -> None:
    """Ctrl-C in the middle of a save comes out of torch as one more thing that went wrong."""
    causes = [wrapped[0] for wrapped in getattr(error, "failures", {}).values()]
    if any(isinstance(cause, KeyboardInterrupt) for cause in causes):
        raise KeyboardInterrupt from error


def _cause(error: BaseException) -> str:
    """The innermost reason, in a line."""
    failures = getattr(error, "failures", None)
    if failures:
        error = next(iter(failures.values()))[0]
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _link(link: Path, target: str) -> None:
    partial = link.with_name(f"{_PARTIAL}{link.name}")
    partial.unlink(missing_ok=True)
    partial.symlink_to(target)
    os.replace(partial, link)


class _quiet:  # noqa: N801 (a context manager, used as a word)
    """Without the notes that torch.distributed.checkpoint logs at every call."""

    def __enter__(self) -> None:
        self.before = logging.root.manager.disable
        logging.disable(logging.WARNING)

    def __exit__(self, *_: object) -> None:
        logging.disable(self.before)
