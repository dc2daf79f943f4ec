"""What a recipe makes of this machine, part by part, beside what the hardware allows.

python -m alexnet_dist.bench [--config configs/fast.yaml] [--data.root DIR] [--baseline [DIR]]
Computing alone, loading alone by each engine, both together, evaluating, saving; under torchrun the
layouts, too, and what each waits for. --baseline takes turns with the loop of PyTorch's ImageNet
example, its DataLoader, and NVIDIA's DALI example, on the JPEGs of a folder with train/CLASS/
(data.root, unless another is named); --each turns off, one at a time, what makes computing faster.
Nothing is trained. Dotted options are those of the trainer.
"""

import itertools
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import time
from argparse import SUPPRESS, Namespace
from collections.abc import Generator, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from alexnet_dist.assembly.parts import Images, Learner, check_network
from alexnet_dist.config import Config, OwnOptions, Parsed, flatten, parse, to_dict
from alexnet_dist.data import build_engine, dali
from alexnet_dist.data.dataloader import DataLoaderEngine
from alexnet_dist.data.engine import Batch
from alexnet_dist.data.resident import ResidentEngine
from alexnet_dist.data.sources import make_catalogue, open_sources
from alexnet_dist.errors import Failure, run_command
from alexnet_dist.measuring import baseline, report
from alexnet_dist.measuring.limits import decoding, limits
from alexnet_dist.measuring.machine import machine
from alexnet_dist.measuring.turns import Figure, Work, in_turns, rounded
from alexnet_dist.model.accounting import rows, training_operations
from alexnet_dist.parallel.arithmetic import set_arithmetic
from alexnet_dist.parallel.mesh import Mesh, start, usable_processors
from alexnet_dist.parallel.waits import WAITS
from alexnet_dist.training.checkpoint import Checkpoints
from alexnet_dist.training.graph import WARM_UP
from alexnet_dist.training.loop import Clock, Pace
from alexnet_dist.training.saver import Saver

PROGRAM = "python -m alexnet_dist.bench"
IMAGENET_VAL = 50_000
ENGINES = {"dali": dali.DaliEngine, "dataloader": DataLoaderEngine, "resident": ResidentEngine}
CROPS = ["--data.crop=random_resized", "--data.colour=none"]
"""The options with which our engine makes the crops of PyTorch's ImageNet example."""
OFF = {
    "runtime.precision": "fp32",
    "runtime.compile": False,
    "runtime.cuda_graph": False,
    "runtime.weight_copies": False,
    "runtime.update": "foreach",
    "runtime.lrn": "torch",
    "runtime.stem": "plain",
    "runtime.pool_first": False,
}
"""What each way to compute faster is where it is off."""
PLAIN = {"example": baseline.training, "dataloader": baseline.dataloader, "dali": baseline.dali}


def main(arguments: list[str]) -> None:
    """Measure as the command line says."""
    words, dotted = _understand(arguments)
    parsed = parse(dotted, program=PROGRAM, description=__doc__)
    config = parsed.config
    if words.turn in PLAIN:
        print(_plain_turn(words, config.data.batch_size))
        return
    mesh = start(config.runtime.device, config.runtime.threads, config.runtime.timeout)
    check_network(config, mesh)
    if words.baseline is not None and mesh.world > 1:
        raise Failure("--baseline is for one process: start it without torchrun", everywhere=True)
    folder = None if words.baseline is None or words.turn else _folder(words, config)
    bench = Bench(config, mesh.arrange(config.parallel.towers), words)
    if words.turn:
        print(bench.turn(words.turn))
        return
    record = _about(parsed, bench) | bench.parts()
    if folder is not None:
        record["baseline"] = _baseline(words, dotted, folder)
    record["verdict"] = report.verdict(record)
    if mesh.rank == 0:
        report.show(record)
        if words.out:
            Path(words.out).write_text(json.dumps(record, indent=1) + "\n")
            report.draw(record, Path(words.out).with_suffix(".png"))


class Bench:
    """A recipe's parts, ready to be measured; weights stay as they are drawn."""

    def __init__(self, config: Config, mesh: Mesh, words: Namespace) -> None:
        self.config, self.mesh = config, mesh
        self.measure = partial(in_turns, rounds=words.rounds, seconds=words.seconds)
        self.rounds, self.seconds, self.turn_off_each = words.rounds, words.seconds, words.each
        self.images = Images(config, mesh)
        self.learner = _learner(config, mesh, self.images)
        self.batch = config.data.batch_size
        self.steps, self.pace = itertools.count(), Pace(mesh.device)

    def parts(self) -> dict[str, Any]:
        """All that is measured, as a record."""
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
        if self.turn_off_each:
            measures["each"] = self.each
        for name, measure in measures.items():
            with report.busy(f"measuring {name}", self.mesh.rank == 0):
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
        source = open_sources(self.images.catalogue)[0]
        if source.raw:
            return None
        draws = self.images.engine.bad.apply(next(self.images.plan.epoch(0, 0, self.mesh.rows)))
        encoded = [source.read(number) for number in draws.numbers.tolist()]
        data = self.config.data
        chosen = dali.choose_decoder(self.mesh.device) if data.decoder == "auto" else data.decoder
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
        variant, side = self.config.model.variant, self.config.data.image_size
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
        train, _ = open_sources(self.images.catalogue)
        for name, kind in ENGINES.items():
            if isinstance(self.images.engine, kind):  # whose pixels may lie on the GPU already
                batches = self.batches()
                record[name] = self.measure({name: self.engine_alone(batches)}, self.mesh)[name]
                batches.close()
                continue
            try:
                engine = build_engine(
                    name,  # type: ignore[arg-type]
                    train,
                    self.images.pixels,
                    plan=self.images.plan,
                    fraction=self.images.plan.fraction,
                    max_batch=self.mesh.local_batch(self.batch),
                    device=self.mesh.device,
                    decoder=config.data.decoder,
                    threads=config.data.threads or self.mesh.threads,
                    ahead=config.data.ahead,
                    policy="substitute",
                )
            except Failure:  # it is not for this machine, or these images
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
        count = max(*self.mesh.gather(math.ceil(count)), 3)
        wait, communication = self._shares(batches, int(count))
        batches.close()
        return {
            "images_per_second": found["end_to_end"].record(),
            "of_compute": rounded(found["end_to_end"].over(found["compute"])),
            "data_wait": rounded(wait),
            "communication": rounded(communication),
            "engine": self.images.engine.description,
        }

    def _shares(self, batches: Iterator[Batch], steps: int) -> tuple[float, float]:
        """Parts of the time of ``steps`` that they wait for images, and for other processes."""
        clock = Clock()
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
                yield from zip(left, engine.batches(plan.draws(self.mesh.rows)), strict=True)

        batches = endless()

        def once() -> float:
            left, batch = next(batches)
            layout.hits(batch.images, batch.labels)
            return float(min(left, plan.batch))

        with WAITS.paused():
            figure = self.measure({"hits": Work(once, self._filled)}, self.mesh)["hits"]
        batches.close()
        seconds = rounded(IMAGENET_VAL / figure.median)
        return {"images_per_second": figure.record(), "seconds_for_50000_images": seconds}

    def checkpoint(self) -> dict[str, Any]:
        """What a save keeps training from, and how long it takes, below run.root."""
        folder = self.mesh.from_first(lambda: f"{self.config.run.root}/.bench-{os.getpid()}")
        events: list[dict[str, Any]] = []

        def hear(event: str, **values: Any) -> None:
            events.append({"event": event, **values})

        checkpoints = Checkpoints(
            Path(folder),
            self.mesh.saving,
            self.mesh.device,
            keep=1,
            asynchronous=self.config.checkpoint.asynchronous,
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
            raise Failure(str(last["message"]), everywhere=True)
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
        for name, choice in choices.items() if self.mesh.world > 1 else ():
            config = replace(self.config, parallel=replace(self.config.parallel, **choice))
            try:
                check_network(config, self.mesh)
            except Failure:  # it is not for this network, or so many processes
                continue
            mesh = self.mesh.arrange(config.parallel.towers)
            learner = _learner(config, mesh, self.images)
            work = Work(partial(_step, learner, _made(config, mesh), self.steps), self._warm)
            WAITS.take()
            begin = time.perf_counter()
            figure = self.measure({name: work}, mesh)[name]
            share = WAITS.take() / (time.perf_counter() - begin)
            record[name] = {"images_per_second": figure.record(), "communication": rounded(share)}
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
            if on[name] == off or (name == "runtime.update" and self.learner.graphs):
                continue  # a graph has no update but Triton's
            config = _with(self.config, name, off)
            try:
                check_network(config, self.mesh)
            except Failure:  # another option wants this one
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
            set_arithmetic(learner.precision, self.config.runtime.deterministic)
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
            yield from engine.batches(self.images.plan.epoch(epoch, 0, self.mesh.rows))

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
        plain = isinstance(self.images.engine, DataLoaderEngine)
        return data.ahead * (workers if plain else 1) + 2

    @property
    def _warm(self) -> int:
        """Steps that do not count: those before a capture, and it; PowerSGD's first two."""
        return WARM_UP + 2 if self.learner.graphs else 3 if self.mesh.world > 1 else 1


def _step(learner: Learner, batch: Batch, numbers: Iterator[int]) -> float:
    learner.take_step(batch, learner.masks(next(numbers)))
    return float(learner.config.data.batch_size)


def _learner(config: Config, mesh: Mesh, images: Images) -> Learner:
    """One whose steps do all that training's do, and change nothing."""
    soon = replace(config.parallel, powersgd_start=2)
    learner = Learner(replace(config, parallel=soon), mesh, images)
    learner.draw()
    if mesh.world > 1:
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


def _about(parsed: Parsed, bench: Bench) -> dict[str, Any]:
    """What was measured, and where."""
    config, mesh = parsed.config, bench.mesh
    return {
        "what": PROGRAM,
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(mesh.device),
        "recipe": parsed.recipe,
        "variant": config.model.variant,
        "classes": bench.learner.outputs,
        "batch": config.data.batch_size,
        "image_size": config.data.image_size,
        "precision": bench.learner.precision,
        "processes": mesh.world,
        "threads": mesh.threads,
        "turns": {"count": bench.rounds, "seconds": bench.seconds},
        "images": {"kind": bench.images.catalogue.kind, "count": len(bench.images.catalogue.train)},
        "load_average": round(os.getloadavg()[0], 1),
    }


def _baseline(words: Namespace, dotted: list[str], folder: Path) -> dict[str, Any]:
    """In turns, each in a process of its own, so that nothing that one sets up helps another: the
    loop and ours end to end; a DataLoader, NVIDIA's DALI example and our engine alone, all of them
    making the crops of that loop."""
    record: dict[str, Any] = {}
    for name, ours, theirs, more in (
        ("training", "trainer", ["example"], []),
        ("loading", "engine", ["dataloader", "dali"][: 1 + dali.available()], CROPS),
    ):
        turns: dict[str, list[float]] = {one: [] for one in (ours, *theirs)}
        with report.busy(f"measuring {name} beside {' and '.join(theirs)}", True):
            for _ in range(words.rounds):
                for one, values in turns.items():
                    values.append(_turn(one, words, dotted + more, folder))
        figures = {one: Figure(tuple(values)) for one, values in turns.items()}
        record[name] = {one: figure.record() for one, figure in figures.items()}
        for one in theirs:
            record[name][f"over_{one}"] = rounded(figures[ours].over(figures[one]))
    return record


def _turn(name: str, words: Namespace, dotted: list[str], folder: Path) -> float:
    command = [sys.executable, "-W", "ignore", "-m", "alexnet_dist.bench", "--turn", name]
    command += ["--seconds", str(words.seconds), "--baseline", str(folder), *dotted]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise Failure(f"the turn of {name} failed ({reason}): {' '.join(command)} shows more")
    return float(done.stdout.split()[-1])


def _plain_turn(words: Namespace, batch: int) -> float:
    """Images a second of one turn of what is compared with, with nothing of ours around it."""
    torch.set_num_threads(usable_processors())
    running = PLAIN[words.turn](Path(words.baseline), batch)
    for _ in range(2 * usable_processors() + 1):  # workers keep two batches each ready
        next(running)
    images, begin = 0, _now()
    while time.perf_counter() - begin < words.seconds or images < 2 * batch:
        images += next(running)
    return images / (_now() - begin)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _folder(words: Namespace, config: Config) -> Path:
    """The folder of JPEGs, class by class, that the plain loop reads."""
    root = words.baseline or config.data.root
    catalogue = make_catalogue(root, config.data.cache, lambda *_: None)
    if catalogue.kind != "folders":
        raise Failure(
            f"{root} holds no folders of images, which the plain loop reads: give --baseline DIR, "
            "the folder that it was made of"
        )
    return Path(catalogue.train.folder)


def _understand(arguments: list[str]) -> tuple[Namespace, list[str]]:
    options = OwnOptions(PROGRAM, __doc__)
    options.add_argument(
        "--baseline",
        nargs="?",
        const="",
        metavar="DIR",
        help="measure the usual beside it, on the JPEGs of this folder (data.root)",
    )
    options.add_argument(
        "--each", action="store_true", help="turn off, one at a time, what makes computing faster"
    )
    options.add_argument("--rounds", type=int, default=5, help="turns of each (5)")
    options.add_argument("--seconds", type=float, default=3.0, help="of a turn, at least (3)")
    options.add_argument("--out", metavar="FILE.json", help="write the record, and a PNG beside it")
    options.add_argument("--config", help="a YAML file of the trainer's options")
    options.add_argument("--turn", help=SUPPRESS)
    words, dotted = options.understand(arguments)
    for name, least in (("rounds", 1), ("seconds", 0.0)):
        value = getattr(words, name)
        if not value >= least:
            raise Failure(f"--{name} is {value}; it must be at least {least}", everywhere=True)
    if words.out and not Path(words.out).absolute().parent.is_dir():
        raise Failure(f"there is no folder for --out {words.out}: make it", everywhere=True)
    return words, (["--config", words.config] if words.config else []) + dotted


if __name__ == "__main__":
    run_command(main)
