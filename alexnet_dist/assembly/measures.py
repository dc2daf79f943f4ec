"""A recipe, measured part by part: computing, loading, both together, evaluating, saving."""

import itertools
import math
import os
import resource
import shutil
import time
from collections.abc import Generator, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from alexnet_dist.assembly.parts import Images, Learner, check_network
from alexnet_dist.config import Config, flatten, to_dict
from alexnet_dist.data import build_loader, dali
from alexnet_dist.data.corrupt_images import Batch
from alexnet_dist.data.gpu_cache import GpuCacheLoader
from alexnet_dist.data.sources import open_datasets
from alexnet_dist.data.torch_loader import TorchLoader
from alexnet_dist.errors import UserError
from alexnet_dist.measuring.limits import decoding, limits
from alexnet_dist.measuring.report import busy
from alexnet_dist.measuring.turns import Figure, Work, in_turns, rounded
from alexnet_dist.model.accounting import rows, training_operations
from alexnet_dist.parallel.mesh import Mesh
from alexnet_dist.parallel.precision import configure_backends
from alexnet_dist.parallel.waits import WAITS
from alexnet_dist.training.checkpoint import CheckpointManager
from alexnet_dist.training.cuda_graph import CAPTURE_WARMUP_STEPS
from alexnet_dist.training.saver import Saver
from alexnet_dist.training.step import StepThrottle, StepTimer

IMAGENET_VAL = 50_000
ENGINES: dict[Literal["dali", "torch", "gpu_cache"], type] = {
    "dali": dali.DaliLoader,
    "torch": TorchLoader,
    "gpu_cache": GpuCacheLoader,
}
OFF = {
    "runtime.precision": "fp32",
    "runtime.compile": False,
    "runtime.cuda_graph": False,
    "runtime.lrn": "torch",
    "runtime.stem": "plain",
    "runtime.pool_first": False,
}
"""What each way to compute faster is where it is off."""


class Measures:
    """A recipe, ready to be measured; weights stay as they are drawn.

    Args:
        rounds, seconds: turns of each thing that is measured, and how long one is, at least.
    """

    def __init__(self, config: Config, mesh: Mesh, *, rounds: int, seconds: float) -> None:
        self.config, self.mesh, self.seconds = config, mesh, seconds
        self.measure = partial(in_turns, rounds=rounds, seconds=seconds)
        self.images = Images(config, mesh)
        self.learner = _learner(config, mesh, self.images)
        self.batch = config.data.batch_size
        self.steps, self.pace = itertools.count(), StepThrottle(mesh.device)

    def parts(self, *, each: bool) -> dict[str, Any]:
        """All parts, as a record; ``each`` way to compute faster turned off, too, if asked for."""
        record: dict[str, Any] = {}
        measures = {
            "training": self.training,
            "peak_memory_bytes": self.peak_memory,  # before others take more
            "limits": self.limits,
            "compute": self.compute,
            "loading": self.loading,
            "evaluation": self.evaluation,
            "checkpoint": self.checkpoint,
            "layouts": self.layouts,
        }
        if each:
            measures["each"] = self.each
        for name, measure in measures.items():
            with busy(f"measuring {name}", self.mesh.rank == 0):
                record[name] = measure()
        return record

    def turn(self, name: str) -> float:
        """Images a second of one turn: "trainer", or its "engine" alone."""
        work = (self.end_to_end if name == "trainer" else self.engine_alone)(self.batches())
        return in_turns({name: work}, self.mesh, rounds=1, seconds=self.seconds)[name].median

    # the parts

    def limits(self) -> dict[str, Any]:
        """What the hardware allows, in units a second."""
        gradients = sum(p.numel() * 4 for p in self.learner.layout.parameters.values())
        found = self.measure(limits(self.mesh, self.learner.precision, gradients), self.mesh)
        record: dict[str, Any] = {name: figure.record() for name, figure in found.items()}
        works = {"decoder": self._decoder()} if dali.available() else {}
        for name, work in works.items():
            if work is not None:
                record[name] = self.measure({name: work}, self.mesh)[name].record()
        return record

    def _decoder(self) -> Work | None:
        source = open_datasets(self.images.catalogue)[0]
        if source.raw:
            return None
        draws = self.images.engine.bad.apply(
            next(self.images.plan.epoch(0, 0, self.mesh.batch_slice))
        )
        encoded = [source.read(number) for number in draws.numbers.tolist()]
        data = self.config.data
        chosen = (
            dali.choose_decoder(self.mesh.device)
            if data.dali_decoder == "auto"
            else data.dali_decoder
        )
        return decoding(encoded, draws, chosen, self.mesh, data.threads or self.mesh.threads)

    def compute(self) -> dict[str, Any]:
        """Steps on one batch again and again, whole and in their parts."""
        layout, optimizer = self.learner.layout, self.learner.optimizer
        batches = self.batches()
        batch = next(batches)
        batches.close()
        masks = self.learner.masks(0)

        def forward_backward() -> float:
            optimizer.zero_grad(set_to_none=True)
            layout.forward_backward(batch.images, batch.labels, masks)
            return 1.0

        def update() -> float:
            optimizer.step()
            return 1.0

        def draw() -> float:
            self.learner.masks(next(self.steps))
            return 1.0

        work = Work(partial(self.step, batch), self._warm)
        whole = self.measure({"step": work}, self.mesh)["step"]
        forward_backward()  # leaves gradients for the update
        works = {
            "masks": Work(draw),
            "forward_backward": Work(forward_backward),
            "update": Work(update),
        }
        inner = self.measure(works, self.mesh)
        optimizer.zero_grad(set_to_none=True)
        variant, side = self.config.model.arch, self.config.data.image_size
        layers = rows(variant, num_classes=self.learner.outputs, image_size=side)
        return {
            "images_per_second": whole.record(),
            "milliseconds": {n: rounded(1000 / figure.median) for n, figure in inner.items()},
            "operations_per_image": training_operations(layers),
        }

    def loading(self) -> dict[str, Any]:
        """Each engine that there is, on the plan's own crops."""
        config = self.config
        record: dict[str, Figure] = {}
        train, _ = open_datasets(self.images.catalogue)
        for name, kind in ENGINES.items():
            if isinstance(self.images.engine, kind):  # whose pixels may lie on the GPU already
                batches = self.batches()
                record[name] = self.measure({name: self.engine_alone(batches)}, self.mesh)[name]
                batches.close()
                continue
            try:
                engine = build_loader(
                    name,
                    train,
                    self.images.pixels,
                    plan=self.images.plan,
                    fraction=self.images.plan.fraction,
                    max_batch=self.mesh.local_batch(self.batch),
                    device=self.mesh.device,
                    decoder=config.data.dali_decoder,
                    threads=config.data.threads or self.mesh.threads,
                    ahead=config.data.prefetch,
                    policy="substitute",
                )
            except UserError:  # it is not for this machine, or these images
                continue
            batches = self._of_epochs(engine)
            work = self.engine_alone(batches)
            record[name] = self.measure({name: work}, self.mesh)[name]
            batches.close()
            engine.close()
        return {name: figure.record() for name, figure in record.items()}

    def training(self) -> dict[str, Any]:
        """End to end, in turns with computing alone."""
        batches = self.batches()
        works = {
            "compute": Work(partial(self.step, next(batches)), self._warm),
            "end_to_end": self.end_to_end(batches),
        }
        found = self.measure(works, self.mesh)
        count = self.seconds * found["end_to_end"].median / self.batch
        count = max(*self.mesh.all_gather_object(math.ceil(count)), 3)
        wait, communication = self._shares(batches, int(count))
        batches.close()
        return {
            "images_per_second": found["end_to_end"].record(),
            "of_compute": rounded(found["end_to_end"].over(found["compute"])),
            "data_time_fraction": rounded(wait),
            "comm_time_fraction": rounded(communication),
            "engine": self.images.engine.description,
        }

    def _shares(self, batches: Iterator[Batch], steps: int) -> tuple[float, float]:
        """Parts of the time of ``steps`` that they wait for images, and for other processes."""
        clock = StepTimer()
        for _ in range(self._filled):
            self.step(next(batches))
        self.pace.finish()
        WAITS.take()
        clock.start()
        for _ in range(steps):
            batch = next(batches)
            clock.waited()
            self.step(batch)
            clock.stepped()
        self.pace.finish()
        communication = WAITS.take()
        seconds, waited = clock.take()
        return waited / seconds, communication / seconds

    def evaluation(self) -> dict[str, Any]:
        """Images a second, and what they make of ImageNet's validation images."""
        layout, engine = self.learner.layout, self.images.val_engine
        plan, images = self.images.evaluation, len(self.images.catalogue.val)

        def endless() -> Generator[tuple[int, Batch], None, None]:
            while True:  # the last batch of each time through is smaller
                left = range(images, 0, -plan.batch)
                yield from zip(left, engine.batches(plan.draws(self.mesh.batch_slice)), strict=True)

        batches = endless()

        def once() -> float:
            left, batch = next(batches)
            layout.eval_counts(batch.images, batch.labels)
            return float(min(left, plan.batch))

        with WAITS.paused():
            figure = self.measure({"hits": Work(once, self._filled)}, self.mesh)["hits"]
        batches.close()
        seconds = rounded(IMAGENET_VAL / figure.median)
        return {"images_per_second": figure.record(), "seconds_for_50000_images": seconds}

    def checkpoint(self) -> dict[str, Any]:
        """What a save keeps training from, and how long it takes, below run.output_dir."""
        folder = self.mesh.broadcast_from_rank0(
            lambda: f"{self.config.run.output_dir}/.bench-{os.getpid()}"
        )
        events: list[dict[str, Any]] = []

        def hear(event: str, **values: Any) -> None:
            events.append({"event": event, **values})

        checkpoints = CheckpointManager(
            Path(folder),
            self.mesh.checkpoint_group,
            self.mesh.device,
            keep=1,
            asynchronous=self.config.checkpoint.async_save,
        )
        saver = Saver(checkpoints, self.learner.layout, self.learner.optimizer, hear)
        try:
            saver.save({"step": 1, "evaluated": -1})  # takes the memory that the second one finds
            saver.settle()
            saver.save({"step": 2, "evaluated": -1})
            time.sleep(2 * saver.longest + 1)  # training would go on meanwhile
            saver.settle()
        finally:
            if self.mesh.rank == 0:
                shutil.rmtree(folder, ignore_errors=True)
        last = events[-1]
        if last["event"] != "checkpoint":
            raise UserError(str(last["message"]), on_all_ranks=True)
        size = sum(t.numel() * t.element_size() for t in saver.tensors().values())
        return {
            "stall": rounded(last["stall"]),
            "seconds": rounded(last["seconds"]),
            "bytes": size,
        }

    def layouts(self) -> dict[str, Any]:
        """Where there are several processes: steps on made images under each layout."""
        record: dict[str, Any] = {}
        choices: dict[str, dict[str, Any]] = {
            "replicated": {"towers": 1, "fc": "replicated"},
            "towers": {"towers": 2, "fc": "replicated"},
            "sharded": {"towers": 1, "fc": "sharded"},
        }
        for name, choice in choices.items() if self.mesh.world_size > 1 else ():
            config = replace(self.config, parallel=replace(self.config.parallel, **choice))
            try:
                check_network(config, self.mesh)
            except UserError:  # it is not for this network, or so many processes
                continue
            mesh = self.mesh.with_layout(config.parallel.towers)
            learner = _learner(config, mesh, self.images)
            work = Work(partial(_step, learner, _made(config, mesh), self.steps), self._warm)
            WAITS.take()
            begin = time.perf_counter()
            figure = self.measure({name: work}, mesh)[name]
            share = WAITS.take() / (time.perf_counter() - begin)
            record[name] = {
                "images_per_second": figure.record(),
                "comm_time_fraction": rounded(share),
            }
        return record

    def each(self) -> dict[str, Any]:
        """Steps on one batch, in turns with the same where one way to compute faster is off."""
        batches = self.batches()
        batch = next(batches)
        batches.close()
        works = {"on": self._computed(self.learner, batch)}
        on = flatten(to_dict(self.config)) | {
            "runtime.precision": self.learner.precision,
            "runtime.compile": self.learner.compiles,
            "runtime.cuda_graph": self.learner.graphs,
        }
        for name, off in OFF.items():
            if on[name] == off:
                continue
            config = _with(self.config, name, off)
            try:
                check_network(config, self.mesh)
            except UserError:  # another option wants this one
                continue
            works[name] = self._computed(_learner(config, self.mesh, self.images), batch)
        found = self.measure(works, self.mesh)
        return {
            name: {
                "off": OFF[name],
                "images_per_second": figure.record(),
                "brings": rounded(found["on"].over(figure)),
            }
            for name, figure in found.items()
            if name != "on"
        }

    def _computed(self, learner: Learner, batch: Batch) -> Work:
        """Steps on a batch, in the arithmetic of this learner, which is the process's."""

        def once() -> float:
            configure_backends(learner.precision, self.config.runtime.deterministic)
            return _step(learner, batch, self.steps)

        return Work(once, self._warm)

    def peak_memory(self) -> int:
        """Bytes: of the device, or of this process where that is the processor."""
        if self.mesh.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.mesh.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    # what is done again and again

    def step(self, batch: Batch) -> float:
        """A training step; how many images it did."""
        images = _step(self.learner, batch, self.steps)
        self.pace.started(batch)
        return images

    def batches(self) -> Generator[Batch, None, None]:
        """The plan's batches, epoch after epoch."""
        return self._of_epochs(self.images.engine)

    def _of_epochs(self, engine: Any) -> Generator[Batch, None, None]:
        for epoch in itertools.count():
            yield from engine.batches(self.images.plan.epoch(epoch, 0, self.mesh.batch_slice))

    def end_to_end(self, batches: Iterator[Batch]) -> Work:
        """Steps on batch after batch."""
        return Work(lambda: self.step(next(batches)), max(self._filled, self._warm))

    def engine_alone(self, batches: Iterator[Batch]) -> Work:
        """Batch after batch, of which nothing is made."""

        def once() -> float:
            next(batches)
            return float(self.batch)

        return Work(once, self._filled)

    @property
    def _filled(self) -> int:
        """Batches that may have been made ready while nobody asked, and must not count."""
        data = self.config.data
        workers = data.threads or self.mesh.threads  # of which each keeps so many ahead
        plain = isinstance(self.images.engine, TorchLoader)
        return data.prefetch * (workers if plain else 1) + 2

    @property
    def _warm(self) -> int:
        """Steps that do not count: those before a capture, and it; PowerSGD's first two."""
        return (
            CAPTURE_WARMUP_STEPS + 2
            if self.learner.graphs
            else 3
            if self.mesh.world_size > 1
            else 1
        )


def _step(learner: Learner, batch: Batch, numbers: Iterator[int]) -> float:
    learner.take_step(batch, learner.masks(next(numbers)))
    return float(learner.config.data.batch_size)


def _learner(config: Config, mesh: Mesh, images: Images) -> Learner:
    """One whose steps do all that training's do, and change nothing."""
    soon = replace(config.parallel, powersgd_start=2)
    learner = Learner(replace(config, parallel=soon), mesh, images)
    learner.draw()
    if mesh.world_size > 1:
        learner.warm_up()
    for group in learner.optimizer.param_groups:
        group["lr"] = 0.0
    return learner


def _with(config: Config, name: str, value: Any) -> Config:
    """The config with one option changed."""
    section, field = name.split(".")
    changed = replace(getattr(config, section), **{field: value})
    return replace(config, **{section: changed})


def _made(config: Config, mesh: Mesh) -> Batch:
    """A batch of noise."""
    count, side = mesh.local_batch(config.data.batch_size), config.data.image_size
    images = torch.randn(count, 3, side, side, device=mesh.device)
    labels = torch.zeros(count, dtype=torch.int64, device=mesh.device)
    numbers = np.arange(count)
    return Batch(images.to(memory_format=torch.channels_last), labels, numbers)
