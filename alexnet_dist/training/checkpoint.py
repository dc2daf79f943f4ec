"""Checkpoints: written beside training, whole or not at all, checked when read, and never run.

A checkpoint is a folder: tensors as safetensors files, written by all processes through
torch.distributed.checkpoint, all else in state.json, and the digests of these files in
manifest.json. It is written under another name, synced to the disk and then renamed, so that a
folder of that name is a whole checkpoint; the digests tell what has happened to it since.

    RUN/checkpoints/step-00001234/          manifest.json, state.json, *.safetensors
    RUN/checkpoints/last, best              links to two of them
    RUN/checkpoints/damaged-step-00001000/  one that has changed since it was written

Training waits only while the tensors are copied. The rest happens in a thread, whose processes
speak in a group of their own.
"""

import dataclasses
import hashlib
import json
import logging
import os
import shutil
import time
import warnings
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.tensor import DTensor

from alexnet_dist.errors import UserError

FORMAT = 2
_MANIFEST, _STATE = "manifest.json", "state.json"
_PARTIAL, _DAMAGED = ".partial-", "damaged-"

warnings.filterwarnings("ignore", module=r"torch\.distributed\.checkpoint")  # of its own internals
for _name in ("torch.distributed.checkpoint", "torch.distributed._dist_checkpoint", "dcp_logger"):
    logging.getLogger(_name).setLevel(logging.CRITICAL)


@dataclass(frozen=True)
class Saved:
    """How a save has ended, the same on all processes.

    Attributes:
        failure: what went wrong, or "".
        seconds: from its beginning until it was on the disk.
    """

    step: int
    path: Path
    best: bool
    failure: str
    seconds: float


class CheckpointManager:
    """The checkpoints of one run; all processes call each method together.

    Args:
        group: the processes of the run, for the thread that writes, and for nothing else.
        keep: how many of the newest are kept, besides the best.
        keep_every: those of every so many steps are kept for good.
        asynchronous: whether training goes on while a checkpoint is written.
    """

    def __init__(
        self,
        folder: Path,
        group: dist.ProcessGroup,
        device: torch.device,
        *,
        keep: int = 2,
        keep_every: int | None = None,
        asynchronous: bool = True,
    ) -> None:
        self.folder, self.keep, self.keep_every = folder, keep, keep_every
        self.asynchronous = asynchronous
        self._group = group
        gpu = device.type == "cuda"
        options = StagingOptions(
            use_pinned_memory=gpu,
            use_shared_memory=False,
            use_async_staging=False,  # the next update would race with it
            use_non_blocking_copy=gpu,
        )
        self._stager = DefaultStager(options)
        self._under_way: _UnderWay | None = None
        if dist.get_rank() == 0:
            for partial in folder.glob(f"{_PARTIAL}*"):  # of a life that was cut off
                shutil.rmtree(partial, ignore_errors=True)

    def begin(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor], *, best: bool) -> None:
        """Copy the tensors, and begin to write them; after ``settle``.

        Args:
            state: anything else, as JSON knows it; its "step" is the checkpoint's number.
            tensors: the same on all processes, or DTensors of which each holds a part.
            best: let the link "best" point to it.
        """
        assert self._under_way is None, "one save at a time"
        started, step = time.perf_counter(), state["step"]
        final = self.folder / f"step-{step:08d}"
        writer = _Writer(self, final, state, tensors, best)
        mine = _share(tensors, dist.get_rank(), dist.get_world_size())
        future = dcp.async_save(
            {name: _packed(tensor) for name, tensor in mine.items()},
            storage_writer=writer,
            process_group=self._group,
            async_stager=self._stager,
        )
        assert isinstance(future, Future)
        self._under_way = _UnderWay(step, final, best, future, started)
        future.add_done_callback(self._under_way.ended)

    def settle(self, *, wait: bool = True) -> Saved | None:
        """How the save under way has ended; None where there is none, or it still is and ``wait``
        is False."""
        save = self._under_way
        if save is None or not (wait or save.future.done()):
            return None
        failure = ""
        try:
            save.future.result()
        except (Exception, CheckpointException) as error:  # a full disk has many names
            failure = _cause(error) or type(error).__name__
            if dist.get_rank() == 0:
                shutil.rmtree(save.partial, ignore_errors=True)
        self._under_way = None
        return Saved(save.step, save.path, save.best, failure, save.took)

    def newest(self) -> tuple[Path | None, list[str]]:
        """The newest checkpoint that is whole, and what was found on the way: damaged ones, which
        are set aside under another name."""
        found: list[str] = []
        while True:
            names: list[str | None] = [None]
            if dist.get_rank() == 0:
                names = [path.name for path in _oldest_first(self.folder)[-1:]] or [None]
            dist.broadcast_object_list(names)
            if names[0] is None:
                return None, found
            checkpoint = self.folder / names[0]
            damage = find_damage(checkpoint)
            if not damage:
                return checkpoint, found
            found.append(
                f"the checkpoint {checkpoint} is damaged ({damage}): it is set aside as "
                f"{_DAMAGED}{checkpoint.name}, and the one before it is used"
            )
            if dist.get_rank() == 0:
                self._set_aside(checkpoint)
            dist.barrier()

    def _set_aside(self, checkpoint: Path) -> None:
        aside = self.folder / f"{_DAMAGED}{checkpoint.name}"
        shutil.rmtree(aside, ignore_errors=True)
        checkpoint.rename(aside)
        for name in ("last", "best"):
            if not (self.folder / name).exists():
                (self.folder / name).unlink(missing_ok=True)
        for newest in _oldest_first(self.folder)[-1:]:
            _link(self.folder / "last", newest.name)

    def _remove_old(self) -> None:
        linked = {os.path.realpath(self.folder / name) for name in ("last", "best")}
        for old in _oldest_first(self.folder)[: -self.keep]:
            for_good = self.keep_every and _step(old) % self.keep_every == 0
            if not for_good and os.path.realpath(old) not in linked:
                shutil.rmtree(old, ignore_errors=True)


class _UnderWay:
    """A save that a thread is at."""

    def __init__(
        self, step: int, path: Path, best: bool, future: "Future[Any]", started: float
    ) -> None:
        self.step, self.path, self.best, self.future = step, path, best, future
        self.started, self.took = started, 0.0

    @property
    def partial(self) -> Path:
        return _partial(self.path)

    def ended(self, _: "Future[Any]") -> None:
        self.took = time.perf_counter() - self.started


class _Writer(HuggingFaceStorageWriter):
    """Writes each process's file, syncs and digests it there, and lets the first process make a
    checkpoint of them once all have done so."""

    def __init__(
        self,
        checkpoints: CheckpointManager,
        final: Path,
        state: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        best: bool,
    ) -> None:
        super().__init__(str(_partial(final)), save_distributed=True)
        self.checkpoints, self.final, self.best = checkpoints, final, best
        shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
        self.state = json.dumps({**state, "tensors": shapes})  # as it is now

    def write_data(self, plan: Any, planner: Any) -> Any:
        written = super().write_data(plan, planner).value()
        digests = {}
        for name in {result.storage_data.relative_path for result in written}:
            _sync(Path(self.path) / name)
            digests[name] = _digest(Path(self.path) / name)
        done: torch.futures.Future[list[Any]] = torch.futures.Future()
        done.set_result(
            [
                dataclasses.replace(result, storage_data=(name, digests[name]))
                for result in written
                for name in [result.storage_data.relative_path]
            ]
        )
        return done

    def finish(self, metadata: Any, results: list[list[Any]]) -> None:
        partial, folder = Path(self.path), self.checkpoints.folder
        (partial / _STATE).write_text(self.state)
        files = dict(result.storage_data for each in results for result in each)
        files[_STATE] = _digest(partial / _STATE)
        manifest = {"format": FORMAT, "files": dict(sorted(files.items()))}
        (partial / _MANIFEST).write_text(json.dumps(manifest, indent=1))
        for name in (_STATE, _MANIFEST):
            _sync(partial / name)
        _sync(partial)
        before = folder / f"{_PARTIAL}before-{self.final.name}"
        if self.final.exists():  # the same step again, now with its evaluation
            self.final.rename(before)
        partial.rename(self.final)
        shutil.rmtree(before, ignore_errors=True)
        _link(folder / "last", self.final.name)
        if self.best:
            _link(folder / "best", self.final.name)
        _sync(folder)
        self.checkpoints._remove_old()


def find(path: str, prefer: str = "best") -> Path:
    """The checkpoint that ``path`` means: one, or a run's folder, whose ``prefer`` it is.

    Raises:
        Failure: there is none.
    """
    folder = Path(path)
    if (folder / _MANIFEST).is_file():
        return folder
    for name in (prefer, "last"):
        if (folder / "checkpoints" / name / _MANIFEST).is_file():
            return (folder / "checkpoints" / name).resolve()
    raise UserError(
        f"there is no checkpoint at {path}: give a run's folder, or one of its checkpoints"
    )


def find_damage(checkpoint: Path) -> str:
    """What is wrong with a checkpoint's files, or ""; all processes call it together, and each
    reads a part of them.

    Raises:
        Failure: another version of this package wrote it.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    damages: list[str | None] = [None] * world
    dist.all_gather_object(damages, _damage(checkpoint, rank, world))
    return next((damage for damage in damages if damage), "")


def _damage(checkpoint: Path, rank: int, world: int) -> str:
    try:
        manifest = json.loads((checkpoint / _MANIFEST).read_text())
        files = sorted(manifest["files"].items())
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        return f"{_MANIFEST}: {_cause(error)}"
    if manifest.get("format") != FORMAT:
        raise UserError(
            f"the checkpoint {checkpoint} is of format {manifest.get('format')}, this version "
            f"reads {FORMAT}: take the version of alexnet_dist that wrote it",
            on_all_ranks=True,
        )
    for name, digest in files[rank::world]:
        try:
            if _digest(checkpoint / name) != digest:
                return f"{name} has changed since it was written"
        except OSError as error:
            return f"{name}: {error.strerror}"
    return ""


def read_state(checkpoint: Path) -> dict[str, Any]:
    """A checkpoint's state, without its tensors.

    Raises:
        Failure: it cannot be read.
    """
    try:
        state: dict[str, Any] = json.loads((checkpoint / _STATE).read_text())
        return state
    except (OSError, ValueError) as error:
        raise UserError(
            f"the checkpoint {checkpoint} cannot be read ({error}): take another one"
        ) from None


def load(checkpoint: Path, tensors: Mapping[str, Tensor]) -> None:
    """Read tensors by name into those given; all processes call it together.

    Raises:
        Failure: the checkpoint has others, or it is damaged.
    """
    damage = find_damage(checkpoint)
    if damage:
        raise UserError(
            f"the checkpoint {checkpoint} is damaged ({damage}): take another one",
            on_all_ranks=True,
        )
    check_shapes(checkpoint, read_state(checkpoint)["tensors"], tensors)
    try:
        with torch.no_grad():
            dcp.load(dict(tensors), storage_reader=HuggingFaceStorageReader(str(checkpoint)))
    except (Exception, CheckpointException) as error:  # torch wraps what went wrong anywhere
        _stop_if_interrupted(error)
        raise UserError(
            f"the checkpoint {checkpoint} cannot be read ({_cause(error)}): take another one",
            on_all_ranks=True,
        ) from None


def check_shapes(
    where: Path, shapes: Mapping[str, list[int]], tensors: Mapping[str, Tensor]
) -> None:
    """Hold what is asked for to the ``shapes`` that there are.

    Raises:
        Failure: they are of another network.
    """
    for name, tensor in tensors.items():
        shape = shapes.get(name)
        if shape != list(tensor.shape):
            has = "no such tensor" if shape is None else f"one of {shape}"
            raise UserError(
                f"the checkpoint {where} is of another network: {name} should be "
                f"{list(tensor.shape)}, and it has {has}; give the model options it was trained "
                "with, or start from its weights alone by --model.pretrained",
                on_all_ranks=True,
            )


def _share(tensors: Mapping[str, Tensor], rank: int, world: int) -> dict[str, Tensor]:
    """What a process copies and writes: its parts of what is split, and its share, by bytes, of
    what all have."""
    whole = {name: tensor for name, tensor in tensors.items() if not isinstance(tensor, DTensor)}
    mine = {name: tensor for name, tensor in tensors.items() if name not in whole}
    loads = [0] * world
    for name in sorted(whole, key=lambda name: (-whole[name].nbytes, name)):
        least = loads.index(min(loads))
        loads[least] += whole[name].nbytes
        if least == rank:
            mine[name] = whole[name]
    return mine


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


def _oldest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"), key=_step)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def _partial(final: Path) -> Path:
    return final.with_name(f"{_PARTIAL}{final.name}")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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


def _stop_if_interrupted(error: BaseException) -> None:
    """Ctrl-C in the middle of a load comes out of torch as one more thing that went wrong."""
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
