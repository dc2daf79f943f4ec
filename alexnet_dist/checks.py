"""What the doctor looks at: a table of checks, each a function that returns what it has seen.

A check may raise, hang and crash: doctor.py runs it in a process of its own, against a deadline.
"""

import hashlib
import itertools
import json
import os
import platform
import re
import resource
import shutil
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from importlib import metadata
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from alexnet_dist import __version__, setup
from alexnet_dist.config import Config, to_dict
from alexnet_dist.data import dali
from alexnet_dist.data.datasets import ImageDataset
from alexnet_dist.data.eval_plan import EvalPlan
from alexnet_dist.data.index import DatasetInfo, open_datasets, scan_dataset
from alexnet_dist.model.layer_stats import training_flops
from alexnet_dist.parallel.mesh import Mesh, available_cpus, init_distributed
from alexnet_dist.parallel.precision import use_precision
from alexnet_dist.tracking.run_dir import resolve_run_dir
from alexnet_dist.tracking.wandb import has_api_key, resolve_mode, server_url
from alexnet_dist.training.checkpoint import CheckpointManager
from alexnet_dist.training.preemption import deadline

Status = Literal["ok", "warning", "fails"]
MIB, GB = 2**20, 1e9
SHM_LEAST, SHM_ADVISED = 32 * MIB, 128 * MIB
"""Of /dev/shm for each GPU: a buffer of NCCL; and NVIDIA's 1 GB for a container, of eight GPUs."""
SLOW = 0.7
"""A process that reaches less than this part of the median's speed is named."""


class Finding(NamedTuple):
    """What a check has seen, and how to fix it."""

    status: Status
    seen: str
    fix: str = ""


def judge(seen: str, *problems: tuple[Status, bool, str]) -> Finding:
    """What the first of ``problems`` that is there says: status, whether it is there, fix."""
    found = (Finding(status, seen, fix) for status, present, fix in problems if present)
    return next(found, Finding("ok", seen))


@dataclass
class Context:
    """What checks know.

    Attributes:
        path: the run's folder.
        probe: a folder beside it for the checks to write in; rank 0 makes it.
        failed: names of the checks that have failed on any process.
        mesh: all processes of the run, once they have met.
        flops: that all of them reach in a second.
        save_seconds: that a checkpoint takes.
    """

    config: Config
    path: Path
    probe: Path
    quick: bool
    world_size: int
    local_world_size: int
    failed: set[str] = field(default_factory=set)
    mesh: Mesh = field(init=False, repr=False)
    flops: float = 0.0
    save_seconds: float = 0.0

    @cached_property
    def sample(self) -> DatasetInfo:
        """Images of each split, by chance."""
        data, count = self.config.data, 16 if self.quick else 256
        return scan_dataset(data.root, data.cache_dir, lambda *_: None, sample=count)

    @cached_property
    def num_classes(self) -> int:
        """As in the data; as in ImageNet, where these cannot be read."""
        return 1000 if "images" in self.failed else len(self.sample.train.classes)

    @cached_property
    def model_bytes(self) -> int:
        """Of the network's parameters, all float32."""
        return sum(p.nbytes for p in setup.build_model(self.config, self.num_classes).parameters())

    @property
    def flops_per_image(self) -> int:
        """Of a training step."""
        arch, size = self.config.model.arch, self.config.data.image_size
        return training_flops(arch, self.num_classes, size)

    @cached_property
    def data(self) -> setup.DataPipeline:
        """The sample as this process would load it, were it the only one."""
        batch = min(self.mesh.local_batch(self.config.data.batch_size), len(self.sample.train))
        data = replace(self.config.data, batch_size=max(batch, 1), on_corrupt_image="skip")
        return setup.data_pipeline(replace(self.config, data=data), self.alone, self.sample)

    @property
    def alone(self) -> Mesh:
        """This process as a mesh of its own."""
        return replace(self.mesh, rank=0, world_size=1, split_size=1)


def versions(here: Context) -> Finding:
    """Of what training runs on, and a digest of its options."""
    found = {"alexnet-dist": __version__, "Python": ".".join(platform.python_version_tuple()[:2])}
    dalis = [f"nvidia-dali-cuda{cuda}" for cuda in (130, 120, 110)]
    for name in (*dalis, "torchvision", "torch"):
        with suppress(metadata.PackageNotFoundError):
            found[name.replace("nvidia-dali-cuda", "DALI for CUDA ")] = metadata.version(name)
    digest = hashlib.sha256(json.dumps(to_dict(here.config)).encode()).hexdigest()[:6]
    seen = ", ".join(f"{name} {version}" for name, version in found.items())
    cuda = (torch.version.cuda or "").partition(".")[0]
    other = any(name.startswith("DALI") and f"CUDA {cuda}" not in name for name in found)
    seen = f"{seen}, built for CUDA {torch.version.cuda}; options {digest}"
    fix = f"torch and DALI are for other versions of CUDA: pip install nvidia-dali-cuda{cuda}0"
    return judge(seen, ("warning", other and bool(cuda), fix))


def gpus(here: Context) -> Finding:
    """What nvidia-smi and torch say of them."""
    local, wanted, known = here.local_world_size, here.config.runtime.device, _nvidia_smi()
    count, reason = torch.cuda.device_count(), ""
    if wanted == "cpu" or (count == 0 and not known and wanted == "auto"):
        return Finding("ok", f"{count or 'no'} GPU here: trains on CPUs")
    try:
        for number in range(max(min(count, local), 1)):  # this torch may have no kernels for it
            torch.ones(8, 8, device=f"cuda:{number}").mm(torch.ones(8, 8, device=f"cuda:{number}"))
            torch.cuda.synchronize(number)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
    seen = f"torch sees {count}, nvidia-smi {len(known)}"
    if not reason:
        kind, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
        seen += f": {kind}, capability {capability[0]}.{capability[1]}"
    troubles = [f"GPU {row[0]} {trouble}" for row in known for trouble in _troubles(*row[2:])]
    driver = f"a driver for CUDA {torch.version.cuda} or later ({known[0][1] if known else 'none'})"
    return judge(
        "; ".join([seen, *filter(None, [reason]), *troubles]),
        ("fails", bool(reason), f"install {driver}, or take --runtime.device cpu"),
        ("fails", count < local, f"take --nproc_per_node={count}, or --runtime.device cpu"),
        ("warning", bool(troubles), "see who uses it, or have the administrator look at it"),
    )


def _nvidia_smi() -> list[list[str]]:
    """Index, driver, MiB used and in all, errors, reasons to throttle of each GPU; or nothing."""
    fields = "index,driver_version,memory.used,memory.total,ecc.errors.uncorrected.volatile.total"
    query = f"--query-gpu={fields},clocks_throttle_reasons.active"
    rows = _output("nvidia-smi", query, "--format=csv,noheader,nounits").splitlines()
    return [row for row in (line.split(", ") for line in rows) if len(row) == 6]


def _troubles(used: str, total: str, errors: str, throttled: str) -> list[str]:
    troubles = {
        f"has {used} of {total} MiB in use": used.isdigit() and int(used) > 0.1 * int(total),
        f"has {errors} memory errors that ECC could not correct": errors.strip("0").isdigit(),
        # hardware slowdown, thermal slowdown by software and hardware, power brake (nvml.h)
        f"is throttled ({throttled})": throttled[:2] == "0x" and bool(int(throttled, 16) & 0xE8),
    }
    return [trouble for trouble, there in troubles.items() if there]


def processors(here: Context) -> Finding:
    """CPUs that may be used, against processes and threads."""
    cpus, local = available_cpus(), here.local_world_size
    threads = here.config.runtime.threads or max(cpus // local, 1)
    more = "give the job more CPUs (sbatch --cpus-per-task, docker --cpus, taskset)"
    return judge(
        f"{cpus} of {os.cpu_count()} may be used; processes: {local}, threads of each: {threads}",
        ("fails", cpus < local, f"{more}, or take fewer processes"),
        ("warning", cpus < local * threads, f"{more}, or --runtime.threads {cpus // local}"),
    )


def memory(here: Context) -> Finding | None:
    """What is free of main memory, or of what a container may have, against copies of the model."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    free = int(re.findall(r"MemAvailable: +(\d+)", meminfo.read_text())[0]) * 1024
    with suppress(OSError, ValueError):  # "max" where there is no limit; files' cache counts, too
        free = min(free, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    # of weights and momentum, in a checkpoint that is written; on CPUs in training, too
    copies = 2 if torch.cuda.device_count() else 6
    need = copies * here.model_bytes * here.local_world_size
    fix = "give the job more memory (sbatch --mem, docker --memory), or take fewer processes"
    seen = f"{free / GB:,.1f} GB free, at least {need / GB:,.1f} needed"
    return judge(seen, ("fails", free < need, fix))


def shared_memory(here: Context) -> Finding | None:
    """Through /dev/shm NCCL sends between the GPUs of a host."""
    if not Path("/dev/shm").is_dir():
        return None
    free, local = shutil.disk_usage("/dev/shm").free, here.local_world_size
    used = local > 1 and torch.cuda.device_count() > 1
    fix = f"NCCL wants {SHM_ADVISED // MIB} MiB for each GPU: docker run --shm-size=1g"
    return judge(
        f"{free / MIB:,.0f} MiB free",
        ("fails", used and free < SHM_LEAST * local, fix),
        ("warning", free < SHM_ADVISED * local, fix),
    )


def open_files(here: Context) -> Finding:
    """How many files and connections a process may have open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    need = 256 + 4 * here.world_size
    fix = f"ulimit -n {hard}" if hard != soft else "raise nofile in /etc/security/limits.conf"
    seen = f"a process may have {soft:,}, and takes up to {need:,}"
    return judge(seen, ("fails", soft < need, fix))


def run_folder(here: Context) -> Finding:
    """Whether one can write, sync and rename beside it, and the checkpoints have room."""
    run, keep = here.config.run, here.config.checkpoint.keep_last + 2  # the best, and a new one
    resolve_run_dir(run.output_dir, run.name, here.path.name, run.resume)
    here.probe.mkdir(parents=True)
    with (here.probe / "new").open("w") as file:
        file.write(here.probe.name)
        os.fsync(file.fileno())
    (here.probe / "new").rename(here.probe / "token")
    kept = sum(file.stat().st_size for file in here.path.glob("checkpoints/step-*/*"))
    free, size = shutil.disk_usage(here.probe).free + kept, 2 * here.model_bytes
    return judge(
        f"{free / GB:,.1f} GB in {here.path.parent}, for {keep} checkpoints of {size / GB:.2f} GB",
        ("fails", free < keep * size, "make room, or give another --run.output_dir"),
    )


def same_folder(here: Context) -> Finding | None:
    """Whether this process sees what process 0 has written there."""
    if "run folder" in here.failed:
        return None
    token, fix = here.probe / "token", "give --run.output_dir a disk that all hosts share"
    seen = token.is_file() and token.read_text() == here.probe.name
    what = f"{here.path.parent} is {'' if seen else 'not '}what process 0 writes to"
    return judge(what, ("fails", not seen, fix))


def remove_probe(here: Context) -> None:
    """Leave nothing behind."""
    shutil.rmtree(here.probe, ignore_errors=True)
    with suppress(OSError):  # where there is something else
        here.probe.parent.rmdir()


def images(here: Context) -> Finding:
    """Their layout; whether a sample of them can be read, and how fast."""
    info = here.sample
    seen = f"{info.kind}, {len(info.train.classes):,} classes, the same in train and val"
    if here.quick:
        return Finding("ok", seen)
    files = [(data, row) for data in open_datasets(info) for row in range(len(data.index))]
    cold = info.kind == "folders" and all(_forget(data.path(row)) for data, row in files)
    bad: dict[str, str] = {}

    def read(file: tuple[ImageDataset, int]) -> int:
        data, row = file
        try:
            return data.read(row).nbytes
        except OSError as error:
            bad[data.path(row)] = error.strerror or str(error)
            return 0

    begun = time.perf_counter()
    with ThreadPoolExecutor(16) as pool:
        size, count = sum(pool.map(read, files)), len(files)
    seconds = time.perf_counter() - begun
    rate = f"{count / seconds:,.0f} a second, {size / seconds / 1e6:,.0f} MB/s"
    if not bad:
        return Finding("ok", f"{seen}; {count} read at {rate}{', not cached' if cold else ''}")
    path, reason = next(iter(bad.items()))
    seen = f"of {count} {len(bad)} cannot be read, as {path} ({reason})"
    skip = here.config.data.on_corrupt_image == "skip"
    fix = "fix or remove it, or go on without it by --data.on_corrupt_image skip"
    return Finding("warning" if skip else "fails", seen, fix)


def _forget(path: str) -> bool:
    """Have the kernel drop a file from its cache."""
    with suppress(OSError, AttributeError):
        file = os.open(path, os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)
        return True
    return False


def wandb(here: Context) -> Finding:
    """The mode that a run would take, and whether it can."""
    mode, has_key = resolve_mode(here.config.wandb.mode), has_api_key()
    files = here.path.parent.glob("*/wandb/offline-run-*/*.wandb")
    left = sum(not file.with_name(f"{file.name}.synced").exists() for file in files)
    seen, error = f"{mode}, {'a' if has_key else 'no'} key, {left} offline runs not synced", ""
    url = server_url()
    if mode == "online":
        try:
            address = url.hostname or "", url.port or {"http": 80}.get(url.scheme, 443)
            socket.create_connection(address, 4).close()
        except OSError as refused:
            error = f"; {url.geturl()} does not answer ({refused})"
    return judge(
        seen + error,
        ("fails", mode == "online" and not has_key, "wandb login, or --wandb.mode offline"),
        ("warning", bool(error), "the run will be offline: wandb sync it later"),
    )


# all processes together


def processes(here: Context) -> Finding:
    """Whether they meet as in a run, by which network, and how far apart their clocks are."""
    runtime = here.config.runtime
    if torch.cuda.device_count():
        os.environ |= {"NCCL_DEBUG": "INFO", "NCCL_DEBUG_FILE": f"{tempfile.gettempdir()}/nccl-%p"}
    mesh = init_distributed(runtime.device, runtime.threads)
    setup.validate(here.config, mesh)
    here.mesh = mesh.with_layout(here.config.parallel.towers)
    if mesh.world_size == 1:
        return Finding("ok", "1")
    here.failed.update(*mesh.all_gather_object(here.failed))  # what follows, all do or none
    dist.all_reduce(torch.ones(1, device=mesh.device))
    dist.barrier(mesh.long_timeout_group)
    times, hosts = mesh.all_gather_object(time.time()), _hosts(mesh)
    offsets = np.abs(np.array(times) - statistics.median(times))
    off, host = offsets.max(), hosts[int(offsets.argmax())]
    way = mesh.all_gather_object(_transport())[-1]
    seen = f"{mesh.world_size} on {len(set(hosts))} hosts, by {way}, clocks within {off:.3f} s"
    fix = f"set the clock of host {host} by NTP: time limits go by it"
    return judge(seen, ("warning", off > 2, fix))


def _hosts(mesh: Mesh) -> list[str]:
    return mesh.all_gather_object(socket.gethostname())


def _transport() -> str:
    """What tensors go through: as NCCL's log says, or the interface towards process 0."""
    log = Path(tempfile.gettempdir(), f"nccl-{os.getpid()}")
    if log.is_file():
        ways = sorted(set(re.findall(r" via (\S+)", log.read_text())))
        log.unlink()
        return f"NCCL via {', '.join(ways)}"
    with suppress(OSError):
        address = socket.gethostbyname(os.environ["MASTER_ADDR"])
        if route := re.search(r"dev (\S+)", _output("ip", "route", "get", address)):
            return f"gloo, {os.environ.get('GLOO_SOCKET_IFNAME', route[1])}"
    return "gloo"


def computing(here: Context) -> Finding:
    """Matrix products in training's precision; who is slow at them."""
    mesh = here.mesh
    precision = use_precision(here.config.runtime.precision, mesh.device, False)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    size = 8192 if mesh.device.type == "cuda" else 1024
    a = torch.randn(size, size, device=mesh.device, dtype=dtype)
    dist.barrier(mesh.long_timeout_group)
    times = [_time(lambda: a @ a, mesh.device) for _ in range(10)]
    speeds = mesh.all_gather_object(2 * size**3 / min(times))
    here.flops, slowest = sum(speeds), int(np.argmin(speeds))
    share, host = speeds[slowest] / statistics.median(speeds), _hosts(mesh)[slowest]
    seen = f"{here.flops / 1e9:,.0f} GFLOP/s in products of {precision} matrices"
    fix = f"process {slowest} (host {host}) has {share:.2f} of the median: see what runs there"
    return judge(seen, ("warning", share < SLOW, fix))


def network(here: Context) -> Finding | None:
    """An all-reduce of this model's gradients, or of as many as tell how long it takes."""
    mesh, full, size, seconds = here.mesh, here.model_bytes, 2**16, 0.0
    if mesh.world_size == 1:
        return None
    while seconds < 0.3 and size < full:
        size = min(4 * size, full)
        seconds = _all_reduce_seconds(mesh, size)
    size = size // 8 * 4  # again: the first one connects, and fills what queues there are
    seconds = _all_reduce_seconds(mesh, size) * full / size
    bus = 2 * (mesh.world_size - 1) / mesh.world_size * full / seconds
    step = here.config.data.batch_size * here.flops_per_image / here.flops
    seen = (
        f"an all-reduce of {full / 1e6:,.0f} MB of gradients takes {seconds:,.2f} s (bus bandwidth "
        f"{bus * 8e-6:,.1f} Mbit/s), computing at least {step:,.2f}{_slow_host(mesh, size)}"
    )
    fix = "take --parallel.fc sharded, --parallel.grad_compression bf16, or a larger batch"
    other = "no step ends before runtime.hang_timeout: choose the network by GLOO_SOCKET_IFNAME"
    return judge(
        seen,
        ("fails", seconds > here.config.runtime.hang_timeout, f"{other}, NCCL_SOCKET_IFNAME"),
        ("warning", seconds > 2 * step, fix),
    )


def _all_reduce_seconds(mesh: Mesh, size: int) -> float:
    """Of ``size`` bytes, on the process that takes longest."""
    gradients = torch.ones(size // 4, device=mesh.device)
    dist.barrier(mesh.long_timeout_group)
    return max(mesh.all_gather_object(_time(lambda: dist.all_reduce(gradients), mesh.device)))


def _slow_host(mesh: Mesh, size: int) -> str:
    """Have each host send to the next, one after another: a slow one is so in both directions."""
    hosts, times = _hosts(mesh), list[float]()
    first = [hosts.index(host) for host in dict.fromkeys(hosts)]
    if len(first) < 3:
        return ""
    for source, to in zip(first, first[1:] + first[:1], strict=True):
        seconds = 0.0
        for count in (1, size // 4):  # the first one connects
            tensor = torch.ones(count, device=mesh.device)
            if mesh.rank == source:
                dist.send(tensor, to)
            elif mesh.rank == to:
                seconds = _time(partial(dist.recv, tensor, source), mesh.device)
        times.append(mesh.all_gather_object(seconds)[to])
    links = np.minimum(times, np.roll(times, 1))
    slow, factor = int(links.argmax()), links.max() / np.median(links)
    name = f"host {hosts[first[slow]]} (process {first[slow]})"
    return f"; {name} has the slowest link, {factor:.0f} times the median" if factor > 2 else ""


def checkpoint(here: Context) -> Finding | None:
    """Write one of this model, as training would."""
    if here.quick or {"run folder", "same folder", "images"} & here.failed:
        return None
    state, said = setup.build_training(here.config, here.mesh, here.data), list[str]()
    manager = CheckpointManager(
        here.probe,
        here.mesh.checkpoint_group,
        state.layout,
        state.optimizer,
        emit=lambda event, **values: said.append(values.get("message", "")),
    )
    manager.save({"step": 0, "last_eval_step": 0})
    manager.wait()
    here.save_seconds = manager.longest_save
    if here.mesh.rank > 0:
        return None
    seen = f"{2 * here.model_bytes / GB:.2f} GB written in {here.save_seconds:.1f} s"
    return judge(seen, ("fails", bool(said[0]), said[0]))


def decoder(here: Context) -> Finding | None:
    """DALI's pixels of eight images against those of Pillow and torch."""
    if here.quick or "images" in here.failed or not dali.available():
        return None
    if here.data.loader.dataset.is_decoded:
        return None
    dataset, data, pixels = here.data.loader.dataset, here.config.data, []
    plan = EvalPlan(dataset.index.sizes, 8, data.image_size / data.resize_size)
    rows = np.flatnonzero(dataset.index.sizes.min(1))[:8]
    for name in ("torch", "dali"):
        config = replace(here.config, data=replace(data, loader=name))
        loader = setup.loader_for(config, here.alone, dataset, here.sample.stats, plan)
        with closing(loader.batches([plan.samples(rows)])) as batches:
            pixels.append(loader.normalization.to_uint8_images(next(batches).images).astype(float))
        loader.close()
    off = np.abs(pixels[0] - pixels[1]).mean()
    seen = f"{loader.description}: {off:.2f} of 255 from Pillow's pixels of {len(rows)} images"
    return judge(seen, ("fails", off > 2, "take --data.loader torch"))


def loading(here: Context) -> Finding | None:
    """How fast images arrive, against what the network would take at matrix products' speed."""
    if here.quick or "images" in here.failed:
        return None
    plan, threads = here.data.plan, here.mesh.threads
    epochs = (plan.epoch(epoch, 0, slice(None)) for epoch in itertools.count())
    with closing(here.data.loader.batches(itertools.chain.from_iterable(epochs))) as batches:
        begun = time.perf_counter()
        for _ in range(2 * max(threads, 2) + 2):  # as many as may lie ready
            if time.perf_counter() < begun + 2:
                next(batches)
        begun, count = time.perf_counter(), 0
        while (seconds := time.perf_counter() - begun) < 2:
            count += len(next(batches).indices)
    arrive = sum(here.mesh.all_gather_object(count / seconds))
    takes, how = here.flops / here.flops_per_image, here.data.loader.description
    seen = f"{how}: images arrive at {arrive:,.0f} a second, the network takes {takes:,.0f}"
    fix = "prepare smaller images (python -m alexnet_dist.prepare), or give more CPUs"
    return judge(f"{seen} at most", ("warning", arrive < 0.9 * takes, fix))


def _time(work: Callable[[], object], device: torch.device) -> float:
    """Seconds until the device has done ``work``."""
    sync = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    sync()
    begun = time.perf_counter()
    work()
    sync()
    return time.perf_counter() - begun


def slurm(here: Context) -> Finding | None:
    """The job's limits, against the time that a checkpoint takes."""
    job, end, save = os.environ.get("SLURM_JOB_ID"), deadline(None), here.save_seconds
    if job is None or here.mesh.rank > 0:
        return None
    left = end - time.time() if end else float("nan")
    shown, script = _output("scontrol", "show", "job", job), ""
    if shown:
        script = _output("scontrol", "write", "batch_script", job, "-")
    signal = re.search(r"^#SBATCH .*--signal=\S*@(\d+)", script, re.MULTILINE)
    ahead, grace = float(signal[1]) if signal else left, here.config.run.sigterm_grace
    told = f", with a signal {signal[1]} s before" if signal else ""
    tool = "" if shown else "; no scontrol in here: slurm/lib.sh requeues from outside"
    return judge(
        f"job {job} ends in {left:,.0f} s{told}{tool}",
        ("fails", left < 10 + 3 * save, "it has to save before: give the job more --time"),
        ("warning", left != left, "the end of the job is not known: export SLURM_JOB_END_TIME"),
        ("warning", "Requeue=0" in shown, "it is not requeued: sbatch --requeue"),
        ("warning", ahead < 2 * save, f"a checkpoint takes {save:.0f} s: raise --signal's @"),
        ("warning", grace < save, f"a checkpoint takes {save:.0f} s: raise --run.sigterm_grace"),
    )


def _output(*command: str) -> str:
    """What a command prints; nothing where it fails, or there is none."""
    with suppress(OSError, subprocess.TimeoutExpired):
        return subprocess.run(command, capture_output=True, text=True, timeout=5).stdout
    return ""


class Check(NamedTuple):
    """A line of the page.

    Attributes:
        scope: who runs it: one process, one of each host, all; or all "together", once all are
            there, each in the process of the check before.
        if_stuck: what to do where it hangs or crashes, or processes differ.
        seconds: its deadline.
        same: whether all processes have to see the same.
    """

    name: str
    run: Callable[[Context], Finding | None]
    scope: Literal["one", "hosts", "all", "together"]
    if_stuck: str
    seconds: float = 10.0
    same: bool = False


_NETWORK = "let hosts reach each other on all ports; see GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME"
_STORAGE = "look at the storage of --data.root: it hangs, or is slow"
_RUNS = "look at the storage of --run.output_dir, or give another one"

CHECKS = (
    Check("versions", versions, "all", "give all the same packages and options", same=True),
    Check("GPUs", gpus, "hosts", "look at nvidia-smi: a driver or a GPU hangs", 15),
    Check("images", images, "hosts", _STORAGE, 15),
    Check("processors", processors, "hosts", ""),
    Check("memory", memory, "hosts", ""),
    Check("/dev/shm", shared_memory, "hosts", "mount it"),
    Check("open files", open_files, "all", ""),
    Check("run folder", run_folder, "one", _RUNS),
    Check("W&B", wandb, "one", "take --wandb.mode offline"),
    Check("same folder", same_folder, "together", _RUNS),
    Check("processes", processes, "together", _NETWORK, 30),
    Check("computing", computing, "together", "look what else runs there", 15),
    Check("checkpoint", checkpoint, "together", _RUNS, 25),
    Check("SLURM", slurm, "together", "look at scontrol: it hangs"),
    Check("network", network, "together", _NETWORK, 25),
    Check("decoder", decoder, "together", "take --data.loader torch", 20),
    Check("loading", loading, "together", _STORAGE, 20),
)
