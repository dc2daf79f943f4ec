"""What a config reaches on this machine, part by part, beside what the hardware allows.

python -m alexnet_dist.bench --config configs/fast.yaml --data.root DIR [--out FILE.json]
Measured are the limits (a matrix product, a memory copy), each loader alone, computing alone,
training end to end with the time it waits for data and for other ranks, and peak memory. The last
line names the bottleneck and the fix. It works under torchrun, too. Dotted options are those of the
trainer; the learning rate is 0. What an evaluation or a checkpoint takes is in a run's records.
"""

import contextlib
import itertools
import json
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from alexnet_dist import setup
from alexnet_dist.config import CommandParser, Config, positive_int
from alexnet_dist.data import dali
from alexnet_dist.data.index import open_datasets
from alexnet_dist.data.loader import Batch, Loader
from alexnet_dist.errors import UserError, run_command
from alexnet_dist.model.layer_stats import training_flops
from alexnet_dist.parallel.mesh import Mesh, init_distributed
from alexnet_dist.parallel.precision import device_name
from alexnet_dist.training.cuda_graph import CAPTURE_WARMUP_STEPS
from alexnet_dist.training.step import StepThrottle, StepTimer

LOADERS: tuple[Literal["dali", "torch", "gpu_cache"], ...] = ("dali", "torch", "gpu_cache")
MATMUL, COPY = "limit: matrix product", "limit: memory copy"
COMPUTE, TRAINING = "computing alone", "training end to end"
DATA_WAIT, RANK_WAIT = "  of it waiting for data", "  of it waiting for other ranks"
UNITS = {MATMUL: "GFLOP/s", COPY: "GB/s"}  # of all others: images/s


@dataclass(frozen=True)
class BenchCase:
    """Work to be timed: ``run`` does it once, and returns how many units (say, images) all ranks
    have done; in each round it first runs ``warmup`` times, and then ``on_start`` is called."""

    run: Callable[[], float]
    warmup: int = 1
    on_start: Callable[[], object] = lambda: None


def time_interleaved(
    cases: Mapping[str, BenchCase], *, rounds: int, seconds: float
) -> dict[str, list[float]]:
    """Units per second of each case by round, over at least ``seconds`` in each of ``rounds``.

    The cases take turns, so that whatever else the machine does meanwhile slows all of them. In a
    process group all ranks call this together, and run each case equally often.
    """
    speeds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, case in cases.items():
            for _ in range(case.warmup):
                case.run()
            _elapsed(0.0)
            case.on_start()
            begin, units, repeats = time.perf_counter(), case.run(), 1
            while (passed := _elapsed(begin)) < seconds:
                units += sum(case.run() for _ in range(repeats))
                repeats *= 2
            speeds[name].append(units / passed)
    return speeds


def _elapsed(begin: float) -> float:
    """Seconds from ``begin`` until the slowest rank's device is done; the same on all ranks."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    seconds = torch.tensor(time.perf_counter() - begin, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return float(seconds)


def summarize(rounds: Sequence[float]) -> dict[str, float]:
    """Median, lowest and highest, to four significant digits."""
    values = {"median": statistics.median(rounds), "low": min(rounds), "high": max(rounds)}
    return {name: float(f"{value:.4g}") for name, value in values.items()}


class TrainBenchmark:
    """Data, model and optimizer of a config, ready to be timed."""

    def __init__(self, config: Config, mesh: Mesh) -> None:
        optim, parallel = replace(config.optim, lr=0.0), replace(config.parallel, powersgd_start=2)
        self.config = config = replace(config, optim=optim, parallel=parallel)
        self.mesh, self.batch_size = mesh, config.data.batch_size
        self.prefetched = 2 * max(mesh.threads, 2) + 2  # more than any loader's
        self.data = setup.build_data(config, mesh)
        num_classes = len(self.data.info.train.classes)
        size = config.data.image_size
        self.flops_per_image = training_flops(config.model.arch, num_classes, size)
        self.state = setup.build_training(config, mesh, self.data)
        setup.init_weights(config, self.state.layout, num_classes)
        self.state.layout.warm_up(size)
        self.steps, self.timer = itertools.count(), StepTimer()
        self.throttle = StepThrottle(mesh.device)

    def run(self, *, rounds: int, seconds: float) -> dict[str, Any]:
        """Measure everything; returns the record that --out writes."""
        mesh, model = self.mesh, self.config.model
        batches = self.batches(self.data.loader)
        batch = next(batches)
        captured = setup.uses_cuda_graph(self.config, mesh)
        for _ in range(CAPTURE_WARMUP_STEPS + 2 if captured else 4):
            self.step(batch)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if mesh.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(mesh.device)
        cases = self.limits() | self.loading_cases()
        cases |= {
            COMPUTE: BenchCase(lambda: self.step(batch)),
            TRAINING: self.training_case(batches),
        }
        timed = time_interleaved(cases, rounds=rounds, seconds=seconds)
        total, data_wait, _ = self.timer.pop_times()  # the last round's
        rank_wait = self.state.layout.comm_timer.pop_seconds()
        results: dict[str, dict[str, Any]] = {
            name: {"unit": UNITS.get(name, "images/s"), **summarize(speeds)}
            for name, speeds in timed.items()
        }
        results |= {
            DATA_WAIT: {"unit": "%", "median": round(100 * data_wait / total, 2)},
            RANK_WAIT: {"unit": "%", "median": round(100 * rank_wait / total, 2)},
            "peak memory of training": {"unit": "GiB", "median": round(peak / 2**30, 2)},
        }
        record = {
            "config": f"{model.arch}, {self.state.layout.precision}, batch {self.batch_size}",
            "device": f"{mesh.world_size} x {device_name(mesh.device)}, {mesh.threads} threads",
            "torch": torch.__version__,
            "dataset": self.data.info.kind,
            "loader": self.data.loader.description,
            "flops_per_image": self.flops_per_image,
            "results": results,
        }
        return record | {"bottleneck": bottleneck(record)}

    def batches(self, loader: Loader) -> Iterator[Batch]:
        """This rank's training batches, epoch after epoch."""
        for epoch in itertools.count():
            yield from loader.batches(self.data.plan.epoch(epoch, 0, self.mesh.batch_slice))

    def step(self, batch: Batch) -> float:
        """One training step; returns the images of the global batch."""
        masks = self.state.layout.dropout_masks(0, next(self.steps))
        self.state.train_step(batch.images, batch.labels, masks)
        self.throttle.step_launched(batch)
        return float(self.batch_size)

    def training_case(self, batches: Iterator[Batch]) -> BenchCase:
        """Training steps; the timers then know what the last round waited for."""

        def run() -> float:
            batch = next(batches)
            self.timer.mark_data_ready()
            images = self.step(batch)
            self.timer.mark_step_done()
            return images

        def on_start() -> None:
            self.timer.pop_times()
            self.state.layout.comm_timer.pop_seconds()

        return BenchCase(run, self.prefetched, on_start)

    def loading_case(self, loader: Loader) -> BenchCase:
        batches = self.batches(loader)
        return BenchCase(lambda: self.batch_size * bool(next(batches)), self.prefetched)

    def loading_cases(self) -> dict[str, BenchCase]:
        """The loaders that there are for this machine and these images."""
        cases: dict[str, BenchCase] = {}
        dataset = open_datasets(self.data.info)[0]
        what = self.mesh, dataset, self.data.info.stats, self.data.plan
        for name in LOADERS:
            config = replace(self.config, data=replace(self.config.data, loader=name))
            with contextlib.suppress(UserError):
                loader = setup.loader_for(config, *what)
                cases[f"loading alone: {name}"] = self.loading_case(loader)
        return cases

    def limits(self) -> dict[str, BenchCase]:
        """A large matrix product in training's precision, and a copy of more than caches hold (read
        and written)."""
        device, ranks = self.mesh.device, self.mesh.world_size
        size = 8192 if device.type == "cuda" else 2048
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.state.layout.precision)
        a = torch.randn(size, size, device=device, dtype=dtype)
        source, target = torch.zeros(2, 2**26, device=device)
        return {
            MATMUL: BenchCase(lambda: 2e-9 * size**3 * ranks * bool((a @ a).numel())),
            COPY: BenchCase(lambda: 2e-9 * ranks * target.copy_(source).nbytes),
        }


def bottleneck(record: Mapping[str, Any]) -> str:
    """What takes the time, and what to do about it, in one line."""
    results = {name: result["median"] for name, result in record["results"].items()}
    data, ranks = results[DATA_WAIT], results[RANK_WAIT]
    if max(data, ranks) < 5:
        share = results[COMPUTE] * record["flops_per_image"] / (1e9 * results[MATMUL])
        return f"computing, at {share:.0%} of what matrix products alone would allow"
    if ranks > data:
        return (
            f"waiting for other ranks, {ranks:.0f}% of the time: take a larger data.batch_size, "
            "--parallel.fc sharded, or --parallel.grad_compression bf16"
        )
    if not dali.available():
        fix = "install DALI (pip install nvidia-dali-cuda130)"
    elif record["dataset"] != "pixels":
        fix = "prepare raw pixels (python -m alexnet_dist.prepare ... --format pixels)"
    else:
        fix = "take more --runtime.threads, or --data.loader gpu_cache"
    return f"waiting for data, {data:.0f}% of the time: {fix}"


def show(record: Mapping[str, Any]) -> None:
    """Print the record as a table."""
    print(f"{record['config']}; {record['device']}; {record['loader']}")
    print(f"{'':<34}{'median':>10}{'lowest':>10}{'highest':>10}")
    for name, result in record["results"].items():
        numbers = (f"{result[k]:,.4g}" if k in result else "" for k in ("median", "low", "high"))
        print(f"{name:<34}", *(f"{number:>10}" for number in numbers), f" {result['unit']}", sep="")
    print(f"bottleneck: {record['bottleneck']}")


def main(arguments: list[str]) -> None:
    """Measure as the command line says."""
    parser = CommandParser("bench", __doc__)
    add = parser.add_argument
    add("--rounds", type=positive_int, default=5, help="how often each part is timed (5)")
    add("--seconds", type=float, default=3.0, help="of each, at least (3)")
    add("--out", type=Path, metavar="FILE.json", help="write the record there")
    parsed = parser.parse(arguments)
    options, config = parsed.args, parsed.config
    if options.out and not options.out.absolute().parent.is_dir():
        raise UserError(f"there is no folder for --out {options.out}: make it", on_all_ranks=True)
    runtime = config.runtime
    mesh = init_distributed(runtime.device, runtime.threads, runtime.hang_timeout)
    setup.validate(config, mesh)
    benchmark = TrainBenchmark(config, mesh.with_layout(config.parallel.towers))
    record = benchmark.run(rounds=options.rounds, seconds=options.seconds)
    if mesh.rank == 0:
        show(record)
        if options.out:
            options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    run_command(main)
