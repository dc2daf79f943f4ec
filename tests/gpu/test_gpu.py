"""What only a GPU can show: mixed decoding, NCCL, bf16, memory that does not grow."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from alexnet_dist.data import dali_probe, gpu_cache
from alexnet_dist.data.datasets import ImageDataset
from alexnet_dist.data.loader import Batch
from alexnet_dist.data.normalization import Normalization, build_normalization
from alexnet_dist.data.plan import SamplePlan, TrainCrop
from alexnet_dist.model import build_model, make_dropout_masks
from alexnet_dist.model.alexnet import fused_block
from alexnet_dist.model.dropout import Dropout
from alexnet_dist.model.lrn import LocalResponseNorm
from alexnet_dist.parallel.collectives import CommTimer
from alexnet_dist.parallel.precision import SyncedGradScaler, resolve_precision
from alexnet_dist.training import checkpoint
from alexnet_dist.training.sgd2012 import KrizhevskySGD, sgd2012_update
from alexnet_dist.training.step import StepThrottle
from tests.conftest import TINY, events, launch, losses, train, write_images
from tests.data.corrupt_images import (
    corrupt_files,
    encode,
    odd_images,
    photograph,
    put,
    write_folder,
)
from tests.data.loading import build, load, open_train, scan
from tests.distributed.groups import running, tensors, workers
from tests.networks import weights_manager
from tests.prepare.packed_folder import write_prepared

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda", 0)
ALL = slice(None)


def open_images(root: Path, pixels: bool = False) -> tuple[ImageDataset, Normalization]:
    """JPEGs, or raw ``pixels``, of 160 to a side, of which 112 are the network's input."""
    folder = write_images(root / "i", train=64, side=160)
    folder = write_prepared(folder, root / "pixels", "pixels") if pixels else folder
    stats = scan(folder).stats
    normalization = build_normalization("centered", stats, size=112, pca_noise="source")
    return open_train(folder), normalization


def assert_close(ours: list[Batch], theirs: list[Batch], mean_difference: float) -> None:
    """Of 255, on average."""
    for one, other in zip(ours, theirs, strict=True):
        assert one.images.device == GPU
        assert one.images.shape == other.images.shape
        assert one.images.is_contiguous(memory_format=torch.channels_last)
        assert one.indices.tolist() == other.indices.tolist()
        assert torch.equal(one.labels, other.labels)
        difference = (one.images - other.images).abs()
        assert difference.sum() <= mean_difference * difference.numel()


def use_decoder(decoder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have DALI take this one where it would choose."""
    pytest.importorskip("nvidia.dali", reason="DALI is not installed here")
    found = dali_probe.probe_decoder(GPU)
    assert found in ("roi", "full")
    if decoder == "roi" and found != "roi":
        pytest.skip("decoding a region ends the process on this GPU (nvImageCodec issue 55)")
    monkeypatch.setattr(dali_probe, "probe_decoder", lambda _: decoder)


@pytest.mark.parametrize("decoder", ["roi", "full", "cpu", "none"])
def test_dali_agrees_with_the_torch_loader(
    decoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_decoder(decoder, monkeypatch)
    dataset, normalization = open_images(tmp_path, pixels=decoder == "none")
    plan = SamplePlan(dataset.index.sizes, 16, 1, crop_fraction=0.8, pca_noise_std=lambda _: 0.1)
    samples = list(plan.epoch(0, 0, ALL))
    ours, theirs = (
        load(name, dataset, plan, samples, normalization, device=GPU)[0]
        for name in ("dali", "torch")
    )
    assert_close(ours, theirs, 1.0 if decoder == "none" else 2.0)


@pytest.mark.parametrize("fits", [True, False])
@pytest.mark.parametrize("crop", ["paper", "random_resized"])
def test_gpu_cache_gives_the_torch_loaders_batches(
    crop: TrainCrop, fits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit where no box is resized, in an epoch that is longer than what is prefetched, and
    for a rank without any image; also of pixels that do not fit into the GPU."""
    monkeypatch.setattr(gpu_cache, "fits_in_gpu_memory", lambda *_: fits)
    dataset, normalization = open_images(tmp_path, pixels=True)
    plan = SamplePlan(dataset.index.sizes, 7, 1, crop, 0.7, pca_noise_std=lambda _: 0.1)
    samples = [*plan.epoch(0, 0, ALL), plan.sample(0, 0, slice(7, None, 8))]
    ours, theirs = (
        load(name, dataset, plan, samples, normalization, device=GPU)[0]
        for name in ("gpu_cache", "torch")
    )
    assert_close(ours, theirs, 0.0 if crop == "paper" else 0.05)


def test_auto_takes_the_gpu_cache_for_raw_pixels(tmp_path: Path) -> None:
    plain = write_images(tmp_path / "i")
    folder = write_prepared(plain, tmp_path / "pixels", "pixels")
    for name in ("auto", "torch"):
        options = [f"--data.loader={name}", "--runtime.deterministic=true"]
        train(1, folder, tmp_path / name, "--run.name=run", *options)
    (start,) = events(tmp_path / "auto" / "run", "start")
    assert start["loader"] == "gpu_cache: 0.0 GB of raw pixels, in the memory of the GPU"
    assert losses(tmp_path / "auto/run") == losses(tmp_path / "torch/run")


@pytest.mark.parametrize("decoder", ["roi", "full"])
def test_dali_decodes_odd_images_and_names_corrupt_ones(
    decoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_decoder(decoder, monkeypatch)
    good, corrupt = odd_images(), corrupt_files()
    plain = encode(photograph(), "JPEG")
    paths = write_folder(tmp_path, good | dict.fromkeys(corrupt, plain))
    dataset = open_train(tmp_path)
    for kind, content in corrupt.items():
        put(paths[kind], content)
    count = len(dataset.index)
    plan = SamplePlan(dataset.index.sizes, count, 1, crop_fraction=64 / 96)
    options: dict[str, Any] = {"device": GPU, "on_corrupt": "skip"}
    samples = [plan.sample(0, 0)]
    ((one,), found), ((other,), _) = (
        load(name, dataset, plan, samples, **options) for name in ("dali", "torch")
    )
    assert {event["path"] for event in found} == {str(paths[kind]) for kind in corrupt}
    assert one.indices.tolist() == other.indices.tolist()
    differences = (one.images - other.images).abs().mean((1, 2, 3))
    rows = {index: row for row, index in enumerate(one.indices.tolist())}
    for kind in good:
        row = rows[dataset.index.names.index(f"all/{paths[kind].name}")]
        assert differences[row] < 2.0, kind  # of 255


def test_dalis_memory_does_not_grow(tmp_path: Path) -> None:
    pytest.importorskip("nvidia.dali", reason="DALI is not installed here")
    dataset, normalization = open_images(tmp_path)
    plan = SamplePlan(dataset.index.sizes, 16, 1, crop="random_resized")
    loader, used = build("dali", dataset, plan, normalization, device=GPU), []
    for epoch in range(30):
        for batch in loader.batches(plan.epoch(epoch, 0, ALL)):
            float(batch.images.sum())
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info()
        used.append(total - free)
    assert used[-1] - used[5] < 64 * 2**20


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--runtime.compile=true"],
        ["--parallel.fc=sharded"],
        ["--parallel.fc=sharded", "--runtime.compile=true"],
    ],
)
@pytest.mark.parametrize("precision", ["bf16", "fp16", "tf32"])
def test_training_with_nccl(precision: str, options: list[str], tmp_path: Path) -> None:
    root = write_images(tmp_path / "i")
    on_gpu = [f"--runtime.precision={precision}", "--train.epochs=6", *options]
    train(1, root, tmp_path, "--run.name=run", *on_gpu)
    run = losses(tmp_path / "run")
    assert run[max(run)] < run[1]
    assert events(tmp_path / "run", "start")[0]["precision"] == precision


def test_evaluate_computes_as_training_did(tmp_path: Path) -> None:
    root = write_images(tmp_path / "i")
    train(1, root, tmp_path, "--run.name=run")
    result = launch(0, f"--checkpoint={tmp_path / 'run'}", module="alexnet_dist.evaluate")
    assert result.code == 0, result.err
    counted, wanted = json.loads(result.out.splitlines()[-1]), events(tmp_path / "run", "best")[-1]
    assert counted["top1_error"] == wanted["top1_error"]
    assert counted["loss"] == pytest.approx(wanted["loss"], rel=1e-5)


def test_more_processes_than_gpus(tmp_path: Path) -> None:
    root = write_images(tmp_path / "i")
    count = torch.cuda.device_count() + 1
    result = launch(count, *TINY, f"--data.root={root}", f"--run.output_dir={tmp_path}")
    assert result.code != 0
    assert f"{count} processes on this machine, but" in result.said[0]


@pytest.mark.parametrize("variant", ["paper", "original145", "one_column", "torchvision"])
def test_deterministic_runs_have_the_same_bits(variant: str, tmp_path: Path) -> None:
    root = write_images(tmp_path / "i", side=256)
    options = ["--runtime.deterministic=true", f"--model.arch={variant}", "--train.epochs=1"]
    options += ["--data.image_size=224", "--data.resize_size=256"]
    for name in ("one", "two"):
        train(1, root, tmp_path, f"--run.name={name}", *options)
    assert losses(tmp_path / "one") == losses(tmp_path / "two")


def test_a_gpu_trains_as_a_cpu_does(tmp_path: Path) -> None:
    root = write_images(tmp_path / "i")
    plain = ["--data.loader=torch"]
    train(1, root, tmp_path, "--run.name=gpu", *plain)
    train(1, root, tmp_path, "--run.name=cpu", "--runtime.device=cpu", *plain)
    assert losses(tmp_path / "gpu") == pytest.approx(losses(tmp_path / "cpu"), rel=1e-3)


def test_response_normalization() -> None:
    x = torch.randn(2, 96, 9, 9, device=GPU, dtype=torch.float64)
    ours, cpu = LocalResponseNorm(groups=2)(x), LocalResponseNorm(groups=2)(x.cpu())
    assert torch.allclose(ours.cpu(), cpu, rtol=1e-12)


@pytest.mark.skipif(fused_block is None, reason="Triton is not installed here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("shape", "groups"), [((3, 96, 55, 55), 2), ((5, 256, 27, 27), 2)])
@pytest.mark.parametrize("relu_first", [True, False])
@pytest.mark.parametrize("compiled", [False, True])
def test_fused_block(
    shape: tuple[int, ...], groups: int, dtype: torch.dtype, relu_first: bool, compiled: bool
) -> None:
    """Against the layers one by one in float64; twice the same bits."""
    torch.manual_seed(6)  # no two values of a window are closer than 1e-6: float32 tells them apart
    cpu = torch.randn(shape).mul_(60).to(dtype).to(memory_format=torch.channels_last)
    z, bias = cpu.to(GPU).requires_grad_(), torch.randn(shape[1]).mul_(20).to(GPU).requires_grad_()

    def block(z: Tensor, bias: Tensor) -> Tensor:
        return fused_block.norm_pool(z, bias, 2.0, 1e-4, groups, relu_first)[0]

    called = torch.compile(block, fullgraph=True) if compiled else block
    results = []
    for _ in range(2):
        y = called(z, bias)
        grad = torch.ones_like(y) * torch.arange(y.shape[-1], device=GPU)
        results.append([y, *torch.autograd.grad(y, (z, bias), grad)])
    exact, exact_bias = (x.detach().double().requires_grad_() for x in (z, bias))
    a = exact + exact_bias[:, None, None]
    normalized = LocalResponseNorm(5e-4, groups=groups)(a.relu() if relu_first else a)
    wanted = F.max_pool2d(normalized, 3, 2, ceil_mode=True)
    wanted = wanted if relu_first else wanted.relu()
    theirs = wanted, *torch.autograd.grad(wanted, (exact, exact_bias), grad.double())
    error = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    for one, two, other in zip(*results, theirs, strict=True):
        assert torch.equal(one, two)
        largest = float(other.detach().abs().max())
        assert torch.allclose(one.double(), other, rtol=error, atol=2e-6 * largest)


@pytest.mark.skipif(fused_block is None, reason="Triton is not installed here")
@pytest.mark.parametrize(("arch", "blocks"), [("paper", 2), ("original145", 1), ("owt", 2)])
def test_networks_take_the_fused_block(arch: str, blocks: int) -> None:
    """Each block launches both kernels, under autocast, and the logits are those without it."""
    model = build_model(arch, num_classes=3, image_size=67).to(GPU)
    model = model.to(memory_format=torch.channels_last).eval()
    images = torch.randn(4, 3, 67, 67, device=GPU).mul_(50)
    images = images.to(memory_format=torch.channels_last)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        with torch.autocast("cuda", torch.bfloat16):
            logits = model(images)
        logits.float().sum().backward()
    counts = {event.key: event.count for event in profile.key_averages()}
    assert (counts.get("_forward"), counts.get("_backward")) == (blocks, blocks)
    with torch.autocast("cuda", torch.bfloat16):
        plain = torch.nn.Sequential(*model.children())(images)
    largest = float(plain.abs().max())
    assert torch.allclose(logits.float(), plain.float(), rtol=0.05, atol=0.05 * largest)


def test_sgd2012_compiled_is_the_plain_function() -> None:
    """Over changes of the learning rate, and one step that a scaler skips."""
    torch.manual_seed(0)
    shapes = [(96, 3, 11, 11), (96,), (1000, 4096), (1000,), (7, 3)]
    compiled = [torch.nn.Parameter(torch.randn(shape, device=GPU)) for shape in shapes]
    compiled[0].data = compiled[0].data.to(memory_format=torch.channels_last)
    plain = [torch.nn.Parameter(w.detach().double()) for w in compiled]
    options: dict[str, Any] = {"lr": 0.0, "momentum": 0.9, "weight_decay": 0.0005}
    ours, reference = KrizhevskySGD(compiled, **options), KrizhevskySGD(plain, **options)
    reference._update = sgd2012_update
    for lr, found_inf in ((0.01, None), (0.001, 1.0), (0.001, 0.0), (0.02, 0.0)):
        for w, exact in zip(compiled, plain, strict=True):
            w.grad = torch.randn_like(w)
            exact.grad = w.grad.double()
        for optimizer in (ours, reference):
            optimizer.param_groups[0]["lr"] = lr
            optimizer.found_inf = (  # type: ignore[attr-defined]
                None if found_inf is None else torch.tensor(found_inf, device=GPU)
            )
            optimizer.step()
    for w, exact in zip(compiled, plain, strict=True):
        buffers = ours.state[w]["momentum_buffer"], reference.state[exact]["momentum_buffer"]
        assert torch.allclose(w.detach().double(), exact.detach(), rtol=1e-5, atol=1e-6)
        assert torch.allclose(buffers[0].double(), buffers[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("processes", "options"),
    [
        (1, []),
        (1, ["--runtime.compile=true"]),
        (1, ["--optim.name=lars", "--optim.lr=0.02", "--train.grad_accum_steps=2"]),
        (2, []),  # with DDP's all-reduces
        (2, ["--parallel.grad_compression=bf16", "--model.arch=alexnet_bn"]),
    ],
)
def test_a_cuda_graph_step_is_the_eager_one(
    processes: int, options: list[str], tmp_path: Path
) -> None:
    """Over twenty steps, nine of them replayed, each with another learning rate."""
    if torch.cuda.device_count() < processes:
        pytest.skip(f"needs {processes} GPUs")
    root = write_images(tmp_path / "i")
    same = ["--runtime.precision=bf16", "--runtime.deterministic=true", "--train.epochs=5"]
    same += ["--optim.schedule.name=one_cycle", "--optim.lr=0.002", *options]
    train(processes, root, tmp_path, "--run.name=plain", "--runtime.cuda_graph=false", *same)
    train(processes, root, tmp_path, "--run.name=graph", "--runtime.cuda_graph=true", *same)
    plain, graph = losses(tmp_path / "plain"), losses(tmp_path / "graph")
    assert len(plain) == 20
    assert graph == pytest.approx(plain, rel=1e-4)


def test_waits_are_those_of_the_stream() -> None:
    """A process that has launched everything at once has still waited as long as its device."""
    timer = CommTimer(GPU)
    for _ in range(2):
        timer.start()
        timer.start()  # more has come
        torch.cuda._sleep(50_000_000)  # cycles
        timer.stop()
    assert 0.02 < timer.pop_seconds() < 0.2  # of 1 to 2 GHz
    assert timer.pop_seconds() == 0


def test_a_process_keeps_near_its_device() -> None:
    pace, batches, alive = StepThrottle(GPU), [torch.zeros(1, device=GPU) for _ in range(5)], []
    for batch in batches:
        begun = time.perf_counter()
        torch.cuda._sleep(100_000_000)
        pace.step_launched(Batch(batch, batch, np.zeros(1, np.int64)))
        alive.append(time.perf_counter() - begun)
    assert max(alive[: StepThrottle.MAX_STEPS_AHEAD]) < min(alive[StepThrottle.MAX_STEPS_AHEAD :])


def test_batch_normalization_is_that_of_the_cpu(tmp_path: Path) -> None:
    """Losses, and the running averages that an evaluation reads."""
    root = write_images(tmp_path / "i")
    options = ["--model.arch=alexnet_bn", "--train.max_steps=3", "--runtime.precision=fp32"]
    for device in ("cpu", "cuda"):
        train(0, root, tmp_path / device, "--run.name=run", f"--runtime.device={device}", *options)
    ours, theirs = (tmp_path / device / "run" for device in ("cuda", "cpu"))
    assert losses(ours) == pytest.approx(losses(theirs), rel=1e-3)
    (mine,), (other,) = (events(run, "eval") for run in (ours, theirs))
    assert mine["loss"] == pytest.approx(other["loss"], rel=1e-2)


def test_the_fast_recipe_compiles_and_captures(tmp_path: Path) -> None:
    root = write_images(tmp_path / "i")
    options = ["--config=configs/fast.yaml", "--train.max_steps=14"]
    result = train(0, root, tmp_path, "--run.name=run", "--runtime.precision=bf16", *options)
    assert "cannot be captured" not in result.err  # it is captured, beside DALI where that is
    (start,) = events(tmp_path / "run", "start")
    assert start["compiled"]
    assert start["cuda_graph"]
    assert len(losses(tmp_path / "run")) == 14


def test_the_doctor_sees_this_gpu() -> None:
    result = launch(1, "--quick", module="alexnet_dist.doctor")
    assert "capability" in result.out, result.err
    assert result.code == 0, result.out


def test_bench_measures_every_part(tmp_path: Path) -> None:
    pytest.importorskip("nvidia.dali", reason="DALI is not installed here")
    root, out = write_images(tmp_path / "i"), tmp_path / "bench.json"
    options = [*TINY, f"--data.root={root}", f"--run.output_dir={tmp_path}", f"--out={out}"]
    options += ["--rounds=1", "--seconds=0.1", "--runtime.precision=bf16"]
    result = launch(0, *options, module="alexnet_dist.bench")
    assert result.code == 0, result.err[-3000:]
    record = json.loads(out.read_text())
    assert {"limit: matrix product", "loading alone: dali"} <= set(record["results"])
    peak = record["results"]["peak memory of training"]["median"] * 2**30
    assert 0 < peak < torch.cuda.mem_get_info(GPU)[1]


def test_dropout_masks_are_those_of_a_cpu() -> None:
    layers = [Dropout(4096, 0.5), Dropout(100, 0.3, first_unit=7)]
    for step in range(3):
        options: dict[str, Any] = {"seed": 1, "step": step, "batch": 300, "rows": slice(1, None, 2)}
        cpu = make_dropout_masks(layers, device=torch.device("cpu"), **options)
        for ours, theirs in zip(
            make_dropout_masks(layers, device=GPU, **options), cpu, strict=True
        ):
            assert torch.equal(ours.cpu(), theirs)


def test_precision_is_bf16_where_the_gpu_has_it() -> None:
    wanted = "bf16" if torch.cuda.get_device_capability(GPU) >= (8, 0) else "fp16"
    assert resolve_precision("auto", GPU) == wanted


def test_a_save_holds_what_was_there_when_it_began(tmp_path: Path) -> None:
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        live = {"a": torch.randn(4096, 4096, device=GPU)}
        kernel = torch.randn(96, 3, 11, 11, device=GPU)
        live["b"] = kernel.to(memory_format=torch.channels_last)
        before = {name: tensor.clone() for name, tensor in live.items()}
        manager, emitted = weights_manager(tmp_path, live)
        for step in (1, 2):
            manager.save({"step": step, "last_eval_step": -1})
            for tensor in live.values():  # training goes on
                tensor.mul_(2)
            manager.wait()
            assert emitted[-1]["event"] == "checkpoint"
            checkpoint.load_tensors(tmp_path / emitted[-1]["path"], manager.state_tensors())
            assert all(torch.equal(live[name], before[name]) for name in live)
    finally:
        dist.destroy_process_group()


def test_a_preempted_run_resumes_bit_for_bit(tmp_path: Path) -> None:
    root = write_images(tmp_path / "i")
    few = ["--train.epochs=10", "--runtime.deterministic=true"]
    train(1, root, tmp_path / "reference", "--run.name=run", *few)
    with running(1, root, tmp_path, *few) as launcher:
        os.kill(workers(launcher.pid)[0], signal.SIGUSR2)
        launcher.communicate(timeout=60)
    assert events(tmp_path / "run", "preempted")
    train(1, root, tmp_path, "--run.name=run", *few)
    assert losses(tmp_path / "run") == losses(tmp_path / "reference/run")
    assert tensors(tmp_path / "run") == tensors(tmp_path / "reference/run")


def test_an_update_that_is_not_finite_is_left_out() -> None:
    weight = torch.nn.Parameter(torch.ones(1000, device=GPU))
    optimizer = torch.optim.SGD([weight], lr=1.0, fused=True)
    for gradient, after in ((float("nan"), 1.0), (0.5, 0.5)):
        scaler = SyncedGradScaler(GPU, None, fp16=False, skip=True)
        scaler.scale((weight * gradient).sum()).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert weight.unique().tolist() == [after]
        assert float(scaler.skipped) == (gradient != gradient)
