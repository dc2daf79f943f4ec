"""What a config reaches on this machine, part by part, beside what the hardware allows.

python -m alexnet_dist.bench --config configs/fast.yaml --data.root DIR [--out FILE.json]
Measured are the limits (a matrix product, a memory copy, the decoder), computing alone, training
end to end with the time it waits for data and for other ranks, each loader alone, evaluation, the
stall of a checkpoint, and peak memory. The last line names the bottleneck and the fix. It works
under torchrun, too. Dotted options are those of the trainer; the learning rate is 0.
"""

import itertools
import json
import math
import os
import resource
import shutil
import statistics
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from alexnet_dist.assembly.parts import Images, Learner, check_network
from alexnet_dist.config import CommandParser, Config
from alexnet_dist.data import build_loader, dali
from alexnet_dist.data.corrupt_images import Batch, Loader
from alexnet_dist.data.datasets import open_datasets
from alexnet_dist.errors import UserError, run_command
from alexnet_dist.model.layer_stats import layer_stats, training_flops
from alexnet_dist.parallel.mesh import Mesh, init_distributed
from alexnet_dist.parallel.precision import device_name
from alexnet_dist.training.checkpoint import CheckpointManager
from alexnet_dist.training.cuda_graph import CAPTURE_WARMUP_STEPS
from alexnet_dist.training.step import StepThrottle, StepTimer

LOADERS: tuple[Literal["dali", "torch", "gpu_cache"], ...] = ("dali", "torch", "gpu_cache")
MATMUL, COPY, DECODER = "limit: matrix product", "limit: memory copy", "limit: decoding alone"
COMPUTE, TRAINING, EVALUATION = "computing alone", "training end to end", "evaluation"
UNITS = {MATMUL: "GFLOP/s", COPY: "GB/s"}  # of all others: images/s


@dataclass(frozen=True)
class BenchCase:
    """Work to be timed.

    Attributes:
        run: does it once; returns how many units (say, images) all ranks together have done.
        warmup: how often it runs untimed at the beginning of each round.
    """

    run: Callable[[], float]
    warmup: int = 1


@dataclass(frozen=True)
class BenchResult:
    """Units per second, one value per round."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    def speedup_over(self, other: "BenchResult") -> float:
        """The median of the ratios to ``other``, round by round."""
        return statistics.median(a / b for a, b in zip(self.rounds, other.rounds, strict=True))

    def summary(self) -> dict[str, float]:
        """Median, lowest and highest, to four significant digits."""
        values = {"median": self.median, "low": min(self.rounds), "high": max(self.rounds)}
        return {name: float(f"{value:.4g}") for name, value in values.items()}


def time_interleaved(
    cases: Mapping[str, BenchCase], *, rounds: int, seconds: float
) -> dict[str, BenchResult]:
    """Units per second of each case, over at least ``seconds`` in each of ``rounds``.

    The cases take turns, so that whatever else the machine does meanwhile slows all of them. In a
    process group all ranks call this together, and run each case equally often.
    """
    speeds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, case in cases.items():
            for _ in range(case.warmup):
                case.run()
            _elapsed(0.0)
            begin, units, repeats = time.perf_counter(), case.run(), 1
            while (passed := _elapsed(begin)) < seconds:
                units += sum(case.run() for _ in range(repeats))
                repeats *= 2
            speeds[name].append(units / passed)
    return {name: BenchResult(tuple(values)) for name, values in speeds.items()}


def _elapsed(begin: float) -> float:
    """Seconds from ``begin`` until the slowest rank's device is done; the same on all ranks."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    seconds = torch.tensor(time.perf_counter() - begin, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return float(seconds)


class TrainBenchmark:
    """Data, model and optimizer of a config, ready to be timed as ``time_interleaved`` does."""

    def __init__(self, config: Config, mesh: Mesh, *, rounds: int, seconds: float) -> None:
        optim, parallel = replace(config.optim, lr=0.0), replace(config.parallel, powersgd_start=2)
        self.config = config = replace(config, optim=optim, parallel=parallel)
        self.mesh, self.batch_size, self.seconds = mesh, config.data.batch_size, seconds
        self.time = partial(time_interleaved, rounds=rounds, seconds=seconds)
        self.threads = config.data.threads or mesh.threads
        self.prefetched = config.data.prefetch * max(self.threads, 2) + 2  # more than any loader's
        self.data = Images(config, mesh)
        self.train_set = open_datasets(self.data.catalogue)[0]
        self.state = Learner(config, mesh, self.data)
        self.state.draw()
        if mesh.world_size > 1:
            self.state.warm_up()
        self.steps, self.throttle = itertools.count(), StepThrottle(mesh.device)

    def run(self) -> dict[str, Any]:
        """Measure everything; returns the record that --out writes."""
        config, mesh, device = self.config, self.mesh, self.mesh.device
        batches = self.batches(self.data.engine)
        compute = BenchCase(partial(self.step, next(batches)), CAPTURE_WARMUP_STEPS + 2)
        results = self.time({COMPUTE: compute, TRAINING: self.training_case(batches)})
        waits = self.wait_fractions(batches, results[TRAINING].median)
        batches.close()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(device)
        results |= self.time({MATMUL: self.matmul_case(), COPY: self.copy_case()})
        if dali.available() and not self.train_set.is_decoded:
            results |= self.time({DECODER: self.decoder_case()})
        for name in LOADERS:
            results |= self.time_loader(name)
        results |= self.time({EVALUATION: self.evaluation_case()})
        size = {"num_classes": self.state.outputs, "image_size": config.data.image_size}
        return {
            "config": f"{config.model.arch}, {self.state.precision}, batch {self.batch_size}",
            "device": f"{mesh.world_size} x {device_name(device)}, {mesh.threads} threads",
            "torch": torch.__version__,
            "dataset": self.data.catalogue.kind,
            "loader": self.data.engine.description,
            "flops_per_image": training_flops(layer_stats(config.model.arch, **size)),
            "results": {name: result.summary() for name, result in results.items()},
            "data_time_fraction": waits[0],
            "comm_time_fraction": waits[1],
            "checkpoint": self.checkpoint(),
            "peak_memory_gib": round(peak / 2**30, 2),
        }

    def batches(self, loader: Loader) -> Generator[Batch, None, None]:
        """This rank's training batches, epoch after epoch."""
        for epoch in itertools.count():
            yield from loader.batches(self.data.plan.epoch(epoch, 0, self.mesh.batch_slice))

    def step(self, batch: Batch) -> float:
        """One training step; returns the images of the global batch."""
        self.state.take_step(batch, self.state.masks(next(self.steps)))
        self.throttle.step_launched(batch)
        return float(self.batch_size)

    def training_case(self, batches: Iterator[Batch]) -> BenchCase:
        """Training on the loader's batches."""
        return BenchCase(lambda: self.step(next(batches)), self.prefetched)

    def wait_fractions(self, batches: Iterator[Batch], speed: float) -> tuple[float, float]:
        """Fractions of the time for which training waits for data, and for other ranks."""
        self.throttle.wait()
        timer = StepTimer()
        comm_timer = self.state.layout.comm_timer
        comm_timer.pop_seconds()
        for _ in range(max(math.ceil(self.seconds * speed / self.batch_size), 3)):
            batch = next(batches)
            timer.mark_data_ready()
            self.step(batch)
            timer.mark_step_done()
        self.throttle.wait()
        communication, (seconds, data, _) = comm_timer.pop_seconds(), timer.pop_times()
        return round(data / seconds, 3), round(communication / seconds, 3)

    def loading_case(self, loader: Loader) -> BenchCase:
        """A loader's batches alone."""
        batches = self.batches(loader)
        return BenchCase(lambda: self.batch_size * bool(next(batches)), self.prefetched)

    def time_loader(self, name: Literal["dali", "torch", "gpu_cache"]) -> dict[str, BenchResult]:
        """The loader of this name; nothing where it is not for this machine or these images."""
        try:
            loader = build_loader(
                name,
                self.train_set,
                self.data.pixels,
                self.data.plan,
                device=self.mesh.device,
                max_batch_size=self.mesh.local_batch(self.batch_size),
                threads=self.threads,
                prefetch=self.config.data.prefetch,
                dali_decoder=self.config.data.dali_decoder,
                on_corrupt="substitute",
            )
        except UserError:
            return {}
        found = self.time({f"loading alone: {name}": self.loading_case(loader)})
        loader.close()
        return found

    def evaluation_case(self) -> BenchCase:
        """Evaluation on the validation images."""
        loader, plan = self.data.val_engine, self.data.evaluation
        epochs = (loader.batches(plan.batches(self.mesh.batch_slice)) for _ in itertools.count())
        batches = itertools.chain.from_iterable(epochs)

        def run() -> float:
            batch = next(batches)
            self.state.layout.eval_counts(batch.images, batch.labels)
            return float(self.mesh.dp_size * len(batch.labels))

        return BenchCase(run, self.prefetched)

    def matmul_case(self) -> BenchCase:
        """GFLOP of a large matrix product in training's precision."""
        device, side = self.mesh.device, 8192 if self.mesh.device.type == "cuda" else 2048
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.state.precision)
        a = torch.randn(side, side, device=device, dtype=dtype)
        return BenchCase(lambda: 2e-9 * side**3 * self.mesh.world_size * bool((a @ a).numel()))

    def copy_case(self) -> BenchCase:
        """GB read and written by a copy of more than caches hold."""
        source, target = torch.zeros(2, 2**26, device=self.mesh.device)
        size = 2e-9 * source.nbytes * self.mesh.world_size
        return BenchCase(lambda: size * bool(target.copy_(source).nbytes))

    def decoder_case(self) -> BenchCase:
        """Images that DALI decodes, from memory, doing nothing else."""
        from nvidia.dali import fn, pipeline_def

        gpu = self.mesh.device.index if self.mesh.device.type == "cuda" else None
        encoded = [self.train_set.read(i) for i in range(self.mesh.local_batch(self.batch_size))]

        @pipeline_def(batch_size=len(encoded), num_threads=self.threads, device_id=gpu)  # type: ignore[untyped-decorator]
        def decode() -> Any:
            return fn.decoders.image(
                fn.external_source(lambda: encoded, no_copy=True),
                device="cpu" if gpu is None else "mixed",
            )

        pipeline = decode()
        pipeline.build()
        return BenchCase(lambda: float(self.mesh.world_size * len(pipeline.run()[0])), warmup=4)

    def checkpoint(self) -> dict[str, float]:
        """Seconds for which a save stops training, and until it is complete; and its size."""
        root, pid = self.config.run.output_dir, self.mesh.broadcast_from_rank0(os.getpid)
        folder = Path(root, f".bench-{pid}")
        events: list[dict[str, Any]] = []
        manager = CheckpointManager(
            folder,
            self.mesh.checkpoint_group,
            self.state.layout,
            self.state.optimizer,
            lambda event, **values: events.append({"event": event, **values}),
            keep_last=1,
            async_save=self.config.checkpoint.async_save,
        )
        try:
            for step in (1, 2):  # the first allocates the memory that the second copies to
                manager.save({"step": step, "last_eval_step": -1})
                time.sleep(2 * manager.longest_save)  # training would continue meanwhile
                manager.wait()
        finally:
            if self.mesh.rank == 0:
                shutil.rmtree(folder, ignore_errors=True)
        if events[-1]["event"] != "checkpoint":
            raise UserError(str(events[-1]["message"]), on_all_ranks=True)
        size = sum(tensor.nbytes for tensor in manager.state_tensors().values())
        stall, seconds = (round(events[-1][key], 4) for key in ("stall", "seconds"))
        return {"stall_seconds": stall, "seconds": seconds, "mib": round(size / 2**20)}


def bottleneck(record: Mapping[str, Any]) -> str:
    """What takes the time, and what to do about it, in one line."""
    data, ranks = record["data_time_fraction"], record["comm_time_fraction"]
    if max(data, ranks) < 0.05:
        limit = record["results"][MATMUL]["median"] * 1e9 / record["flops_per_image"]
        share = record["results"][COMPUTE]["median"] / limit
        return f"computing, at {share:.0%} of what matrix products alone would allow"
    if ranks > data:
        return (
            f"waiting for other ranks, {ranks:.0%} of the time: take a larger data.batch_size, "
            "--parallel.fc sharded, or --parallel.grad_compression bf16"
        )
    if record["loader"].startswith("DataLoader") and not dali.available():
        fix = "install DALI (pip install nvidia-dali-cuda130)"
    elif record["dataset"] != "pixels":
        fix = "prepare raw pixels (python -m alexnet_dist.prepare ... --format pixels)"
    else:
        fix = "take more --data.threads, or --data.loader gpu_cache"
    return f"waiting for data, {data:.0%} of the time: {fix}"


def show(record: Mapping[str, Any]) -> None:
    """Print the record as a table."""
    table = Table(box=None, pad_edge=False)
    for title in ("", "median", "lowest", "highest", ""):
        table.add_column(title, justify="right" if title else "left")
    for name, result in record["results"].items():
        table.add_row(name, *(f"{x:,.4g}" for x in result.values()), UNITS.get(name, "images/s"))
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"{record['config']}; {record['device']}; {record['loader']}", table, sep="\n")
    console.print(
        f"training waits {record['data_time_fraction']:.1%} of the time for data, "
        f"{record['comm_time_fraction']:.1%} for other ranks\n"
        f"a checkpoint of {record['checkpoint']['mib']:,} MiB stalls training for "
        f"{record['checkpoint']['stall_seconds']:.3f} s of {record['checkpoint']['seconds']:.3f}\n"
        f"peak memory {record['peak_memory_gib']} GiB\nbottleneck: {record['bottleneck']}"
    )


def main(arguments: list[str]) -> None:
    """Measure as the command line says."""
    parser = CommandParser("bench", __doc__, default_config="quickstart")
    parser.add_argument("--rounds", type=int, default=5, help="how often each part is timed (5)")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each, at least (3)")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the record there")
    parsed = parser.parse(arguments)
    options, config = parsed.args, parsed.config
    if options.rounds < 1:
        raise UserError(f"--rounds is {options.rounds}; it must be at least 1", on_all_ranks=True)
    if options.out and not options.out.absolute().parent.is_dir():
        raise UserError(f"there is no folder for --out {options.out}: make it", on_all_ranks=True)
    mesh = init_distributed(
        config.runtime.device, config.runtime.threads, config.runtime.hang_timeout
    )
    check_network(config, mesh)
    mesh = mesh.with_layout(config.parallel.towers)
    benchmark = TrainBenchmark(config, mesh, rounds=options.rounds, seconds=options.seconds)
    record = benchmark.run()
    record["bottleneck"] = bottleneck(record)
    if mesh.rank == 0:
        show(record)
        if options.out:
            options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    run_command(main)
