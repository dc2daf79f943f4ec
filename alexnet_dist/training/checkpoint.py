"""Checkpoints: written asynchronously, complete or absent, verified when read, never unpickled.

A checkpoint is a folder: tensors as safetensors files, written by all processes through
torch.distributed.checkpoint (DCP), all else in state.json, and the SHA-256 of these files in
manifest.json. It is written under another name, synced to disk and then renamed, so that a folder
of that name is complete; the checksums tell what has happened to it since. Where the same step is
saved again, the older one is moved away before, and back by a resume if the new one has not come.

    RUN/checkpoints/step-00001234/          manifest.json, state.json, *.safetensors
    RUN/checkpoints/last, best              links to two of them
    RUN/checkpoints/corrupt-step-00001000/  quarantined: it has changed since it was written

Training waits only while the tensors are copied. A thread does the rest; its collectives have a
process group of their own.

Weights alone are also read from one file: see weight_files.py.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.tensor import DTensor, distribute_tensor

from alexnet_dist.errors import UserError
from alexnet_dist.training.optim import momentum_buffers
from alexnet_dist.training.step import TrainableLayout
from alexnet_dist.training.weight_files import FORMAT, READABLE, read_file

_MANIFEST, _STATE = "manifest.json", "state.json"
_PARTIAL, _REPLACED, _CORRUPT = ".partial-", ".replaced-", "corrupt-"

warnings.filterwarnings("ignore", module=r"torch\.distributed\.checkpoint")  # of its own internals
for _name in ("torch.distributed.checkpoint", "torch.distributed._dist_checkpoint", "dcp_logger"):
    logging.getLogger(_name).setLevel(logging.CRITICAL)


class CheckpointManager:
    """Saves and restores one run; all processes call each method together.

    Args:
        folder: of the run's checkpoints.
        group: the processes of the run, for the writing thread and nothing else.
        layout, optimizer: whose parameters and momentum buffers a checkpoint holds.
        emit: takes events: "checkpoint", "checkpoint_failed", "best".
        keep_last: how many of the newest are kept, besides the best.
        keep_every: checkpoints of every so many steps are kept for good.

    Attributes:
        best: the best evaluation so far whose checkpoint has been written.
        last_saved: (step, last_eval_step) of the last checkpoint that this process has written.
        longest_save: seconds from the start of a save until it was on disk, the longest so far.
    """

    def __init__(
        self,
        folder: Path,
        group: dist.ProcessGroup | None,
        layout: TrainableLayout,
        optimizer: torch.optim.SGD,
        emit: Callable[..., None],
        *,
        keep_last: int = 2,
        keep_every: int | None = None,
    ) -> None:
        self.folder, self.keep_last, self.keep_every = folder, keep_last, keep_every
        self.best: dict[str, Any] | None = None
        self.last_saved: tuple[int, int] | None = None
        self.longest_save = 0.0
        self._group, self._layout, self._optimizer = group, layout, optimizer
        self._emit = emit
        self._device = next(iter(layout.parameters.values())).device
        self._pending: _Writer | None = None

    def state_tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds: parameters and momentum buffers, which are DTensors where a
        process has only a shard of them."""
        to_dtensor, parameters = self._layout.sharding.to_dtensor, self._layout.parameters
        buffers = momentum_buffers(self._optimizer, parameters)
        return {f"model.{name}": to_dtensor(name, p.detach()) for name, p in parameters.items()} | {
            f"velocity.{name}": to_dtensor(name, buffer) for name, buffer in buffers.items()
        }

    def weights_finite(self) -> bool:
        """Whether all weights are: the last losses were, but maybe not the update after them."""
        with torch.no_grad():
            total = torch.stack([p.sum().float() for p in self._layout.parameters.values()]).sum()
        dist.all_reduce(total)  # processes may hold different weights, and stop together
        return bool(total.isfinite())

    def save(self, state: Mapping[str, Any], best: dict[str, Any] | None = None) -> None:
        """Copy the tensors and start to write a checkpoint, after the one before is written.

        Args:
            state: all else, as JSON knows it, with "step" and "last_eval_step".
            best: the evaluation of this very step, where it is the best one so far.
        """
        begun = time.perf_counter()
        self.wait()
        tensors = self.state_tensors()
        shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
        state = {**state, "format": FORMAT, "best": best or self.best, "tensors": shapes}
        writer = _Writer(self, state, best)
        mine = _balance_replicated(tensors, dist.get_rank(), dist.get_world_size())
        on_gpu = self._device.type == "cuda"
        # a new one for each save: one that is kept raises KeyError at its second save in torch 2.11
        stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=on_gpu,
                use_shared_memory=False,
                use_async_staging=False,  # the next update would race with it
                use_non_blocking_copy=on_gpu,
            )
        )
        future = dcp.async_save(  # returns once the tensors are copied
            # row-major, as safetensors requires, and channels-last convolutions are not
            {
                name: t.clone(memory_format=torch.contiguous_format) if t.dim() == 4 else t
                for name, t in mine.items()
            },
            storage_writer=writer,
            process_group=self._group,
            async_stager=stager,
        )
        stager.close()  # the copies live until they are written
        assert isinstance(future, Future)
        writer.future, writer.stall = future, time.perf_counter() - begun
        self._pending = writer

    def wait(self, *, block: bool = True) -> None:
        """Log how the pending save has ended, if it has; a failed one does not end the run.

        Args:
            block: wait for its end.
        """
        save = self._pending
        if save is None or not (block or save.future.done()):
            return
        begun, self._pending = time.perf_counter(), None
        step, path = save.steps[0], save.final
        try:
            save.future.result()
        except (Exception, CheckpointException) as error:  # a full disk has many names
            if dist.get_rank() == 0:
                shutil.rmtree(save.path, ignore_errors=True)
            message = (
                f"the checkpoint of step {step} could not be written ({_reason(error)}); training "
                f"continues, the one before it is intact: make room below {path.parent}"
            )
            self._emit("checkpoint_failed", step=step, message=message)
            return
        self.last_saved = save.steps
        seconds = save.finished - save.started
        self.longest_save = max(self.longest_save, seconds)
        stall = save.stall + time.perf_counter() - begun
        self._emit("checkpoint", step=step, path=path.name, seconds=seconds, stall=stall)
        if save.best:
            self.best = save.best
            self._emit("best", **save.best)

    def restore(self, check: Callable[[dict[str, Any]], None]) -> tuple[Any, list[str]]:
        """Read the newest intact checkpoint.

        Args:
            check: takes its state before any tensor is touched, and may raise.

        Returns:
            Its state, None where there is none; and a warning for each corrupt one.
        """
        found: list[Any] = [None, []]
        if dist.get_rank() == 0:
            found = [*self._recover_newest()]
        dist.broadcast_object_list(found)
        checkpoint, warnings = found
        state = None
        if checkpoint is not None:
            state = read_state(checkpoint)
            check(state)
            _copy_tensors(checkpoint, state, self.state_tensors())
            self.best = state["best"]
        if dist.get_rank() == 0:
            self._link_best()
        return state, warnings

    def load_pretrained(
        self, path: str, same_classes: Callable[[dict[str, Any]], bool] = lambda state: True
    ) -> list[str]:
        """Read the weights of another run, or of a file.

        A last layer for other classes keeps its initial weights, and so do layers that the other
        network does not have: net 146 began with those of net 145.

        Args:
            same_classes: takes its state, and says whether its outputs are this network's.

        Returns:
            The parameters that keep their initial weights.
        """
        found = find_checkpoint(path)
        state = read_state(found)
        shapes, same = state["tensors"], same_classes(state)
        mine = {n: t for n, t in self.state_tensors().items() if n.startswith("model.")}
        final = list(mine)[-2:]
        missing = [
            n for n in final if n in shapes and not (same and shapes[n] == list(mine[n].shape))
        ]
        if set(shapes) & (set(mine) - set(final)):
            missing += [n for n in mine if n not in shapes]
        load_tensors(found, {n: t for n, t in mine.items() if n not in missing})
        return [name.removeprefix("model.") for name in missing]

    def _recover_newest(self) -> tuple[Path | None, list[str]]:
        """The newest checkpoint that is intact, and a warning for each corrupt one; these are
        quarantined. Partial folders of a killed process are removed, and a replaced checkpoint is
        restored if its successor is missing."""
        for replaced in self.folder.glob(f"{_REPLACED}*"):
            with suppress(OSError):  # where the new one is there
                replaced.rename(self.folder / replaced.name.removeprefix(_REPLACED))
        for left in [*self.folder.glob(f"{_PARTIAL}*"), *self.folder.glob(f"{_REPLACED}*")]:
            shutil.rmtree(left, ignore_errors=True)
        warnings: list[str] = []
        for checkpoint in _newest_first(self.folder):
            problem = _find_corruption(checkpoint)
            if not problem:
                _link(self.folder / "last", checkpoint.name)
                return checkpoint, warnings
            quarantined = self.folder / f"{_CORRUPT}{checkpoint.name}"
            shutil.rmtree(quarantined, ignore_errors=True)
            checkpoint.rename(quarantined)
            warnings.append(
                f"the checkpoint {checkpoint} is corrupt ({problem}): it is quarantined as "
                f"{quarantined.name}, and the one before it is used"
            )
        return None, warnings

    def _link_best(self) -> None:
        """Have the link name the best checkpoint again, where a kill came between the two, or a
        better one is quarantined."""
        name = f"step-{self.best['step']:08d}" if self.best else "step-"
        if (self.folder / name).exists():
            _link(self.folder / "best", name)
        else:
            (self.folder / "best").unlink(missing_ok=True)

    def _remove_old(self) -> None:
        best = os.path.realpath(self.folder / "best")
        for old in _newest_first(self.folder)[self.keep_last :]:
            for_good = self.keep_every and int(old.name[5:]) % self.keep_every == 0
            if not for_good and os.path.realpath(old) != best:
                shutil.rmtree(old, ignore_errors=True)


class _Writer(HuggingFaceStorageWriter):
    """A save in flight: writes, syncs and hashes each process's file; the first process then
    renames the folder.

    Attributes:
        started, finished: when the save began, and (on the first process) was on disk.
        stall: seconds that training has waited for it.
    """

    future: "Future[Any]"

    def __init__(
        self, manager: CheckpointManager, state: dict[str, Any], best: dict[str, Any] | None
    ) -> None:
        self.manager, self.state, self.best = manager, json.dumps(state), best
        self.steps = (state["step"], state["last_eval_step"])
        self.final = manager.folder / f"step-{state['step']:08d}"
        self.started, self.finished, self.stall = time.perf_counter(), 0.0, 0.0
        partial = manager.folder / f"{_PARTIAL}{self.final.name}"
        super().__init__(str(partial), save_distributed=True)

    def reset(self, checkpoint_id: Any = None) -> None:
        """The first call in the writing thread."""
        super().reset(checkpoint_id)
        if self.manager._device.type == "cuda":  # threads begin on device 0
            torch.cuda.set_device(self.manager._device)

    def write_data(self, plan: Any, planner: Any) -> Any:
        written = super().write_data(plan, planner).value()
        checksums = []
        for name in {result.storage_data.relative_path for result in written}:
            _sync(Path(self.path) / name)
            checksums.append((name, _sha256(Path(self.path) / name)))
        done: torch.futures.Future[list[Any]] = torch.futures.Future()
        done.set_result(checksums)
        return done

    def finish(self, metadata: Any, results: list[list[Any]]) -> None:
        """Overrides DCP's, which calls it on the first process once all have written: make the
        folder a checkpoint."""
        partial, folder = Path(self.path), self.manager.folder
        (partial / _STATE).write_text(self.state)
        files = dict(checksum for each in results for checksum in each)
        files[_STATE] = _sha256(partial / _STATE)
        (partial / _MANIFEST).write_text(json.dumps({"files": files}, indent=1, sort_keys=True))
        for name in (_STATE, _MANIFEST):
            _sync(partial / name)
        _sync(partial)
        replaced = folder / f"{_REPLACED}{self.final.name}"
        if self.final.exists():  # the same step again, now with its evaluation
            self.final.rename(replaced)
        partial.rename(self.final)  # from here on it is a checkpoint
        shutil.rmtree(replaced, ignore_errors=True)
        _link(folder / "last", self.final.name)
        if self.best:
            _link(folder / "best", self.final.name)
        _sync(folder)
        self.finished = time.perf_counter()
        self.manager._remove_old()


def find_checkpoint(path: str) -> Path:
    """The checkpoint or file of weights that ``path`` names; of a run, its best checkpoint.

    Raises:
        UserError: there is none.
    """
    given = Path(path)
    if given.is_file() or (given / _MANIFEST).is_file():
        return given
    for name in ("best", "last"):
        if (given / "checkpoints" / name / _MANIFEST).is_file():
            return (given / "checkpoints" / name).resolve()
    raise UserError(f"there is no checkpoint at {path}: {READABLE}", on_all_ranks=True)


def read_state(found: Path) -> dict[str, Any]:
    """All that a checkpoint, or a file of weights, holds besides tensors; "tensors" are their
    shapes, by name.

    Raises:
        UserError: it cannot be read, or another version has written it.
    """
    with _reading(found):
        if found.is_file():
            _, state = read_file(found)
        else:
            state = json.loads((found / _STATE).read_text())
    format_ = state.get("format", 0)
    if format_ != FORMAT:
        older = "alexnet_dist 0.1.0" if format_ < 3 else "an unreleased alexnet_dist 0.2.0"
        version = older if format_ < FORMAT else "a newer alexnet_dist"
        raise UserError(
            f"{found} was written by {version}, which keeps other things under other names: use it "
            "with that version",
            on_all_ranks=True,
        )
    return state


def load_tensors(found: Path, tensors: Mapping[str, Tensor]) -> None:
    """Read tensors by name into those given, which may be DTensors; all processes call it together.

    Raises:
        UserError: they are of another network, or corrupt.
    """
    with _reading(found):
        problems = [""] * dist.get_world_size()
        dist.all_gather_object(problems, _find_corruption(found) if found.is_dir() else "")
        if any(problems):
            raise ValueError(next(filter(None, problems)))
    _copy_tensors(found, read_state(found), tensors)


def _copy_tensors(found: Path, state: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        shape = state["tensors"].get(name)
        if shape != list(tensor.shape):
            has = "no such tensor" if shape is None else f"one of {shape}"
            raise UserError(
                f"the checkpoint {found} is of another network: {name} should be "
                f"{list(tensor.shape)}, and it has {has}; give the model options it was trained "
                "with, or start from its weights alone by --model.pretrained",
                on_all_ranks=True,
            )
    with _reading(found), torch.no_grad():
        if found.is_dir():
            dcp.load(dict(tensors), storage_reader=HuggingFaceStorageReader(str(found)))
            return
        full, _ = read_file(found)
        for name, tensor in tensors.items():
            value = full[name]
            if isinstance(tensor, DTensor):
                mesh, placements = tensor.device_mesh, tensor.placements
                value = distribute_tensor(value, mesh, placements, src_data_rank=None)
            tensor.copy_(value)


def _find_corruption(checkpoint: Path) -> str:
    """What has changed in a checkpoint's files since it was written, or ""."""
    name = _MANIFEST
    try:
        for name, checksum in json.loads((checkpoint / _MANIFEST).read_text())["files"].items():
            if _sha256(checkpoint / name) != checksum:
                return f"{name} has changed since it was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{name}: {_reason(error)}"
    return ""


def _balance_replicated(
    tensors: Mapping[str, Tensor], rank: int, world_size: int
) -> dict[str, Tensor]:
    """What a process copies and writes: its shards of what is sharded, and of the replicated
    tensors as many as balance the bytes over processes."""
    replicated = {n: tensor for n, tensor in tensors.items() if not isinstance(tensor, DTensor)}
    mine = {name: tensor for name, tensor in tensors.items() if name not in replicated}
    loads = [0] * world_size
    for name in sorted(replicated, key=lambda name: (-replicated[name].nbytes, name)):
        least = loads.index(min(loads))
        loads[least] += replicated[name].nbytes
        if least == rank:
            mine[name] = replicated[name]
    return mine


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"), reverse=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _link(link: Path, target: str) -> None:
    """Point a symbolic link to ``target``, atomically."""
    partial = link.with_name(f"{_PARTIAL}{link.name}")
    partial.unlink(missing_ok=True)
    partial.symlink_to(target)
    os.replace(partial, link)


@contextmanager
def _reading(found: Path) -> Iterator[None]:
    """Whatever goes wrong in it, and a corrupt or forbidden pickle raises anything, is a UserError
    that names what could not be read."""
    try:
        yield
    except UserError:
        raise
    except (Exception, CheckpointException) as error:
        cause = _cause(error)
        if isinstance(cause, KeyboardInterrupt):
            raise cause from None
        message = f"{found} is corrupt, or cannot be read ({_reason(error)})"
        raise UserError(f"{message}: {READABLE}", on_all_ranks=True) from None


def _cause(error: BaseException) -> BaseException:
    """What went wrong on the first process where anything did; DCP wraps it."""
    return next((cause for cause, _ in getattr(error, "failures", {}).values()), error)


def _reason(error: BaseException) -> str:
    """The cause of an error, in a line."""
    error = _cause(error)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    plain = re.sub(r"\x1b\[[\d;]*m", "", str(error))  # of colors
    return (plain.strip().splitlines() or [type(error).__name__])[-1].strip()
