"""From a config to what a training run is made of: its data, and its network and optimizer."""

import platform
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from alexnet_dist import __version__
from alexnet_dist.config import Config
from alexnet_dist.data import build_loader
from alexnet_dist.data.datasets import ImageDataset
from alexnet_dist.data.eval_plan import EvalPlan
from alexnet_dist.data.index import DatasetInfo, open_datasets, scan_dataset
from alexnet_dist.data.loader import Loader, OnCorruptImage
from alexnet_dist.data.plan import SamplePlan
from alexnet_dist.data.transforms import Normalization, build_normalization
from alexnet_dist.errors import UserError
from alexnet_dist.model import MODEL_REGISTRY, Network, build_on_meta, iter_initial_weights
from alexnet_dist.parallel import Layout, LayoutConfig, parallelize, validate_parallel_config
from alexnet_dist.parallel.mesh import Mesh
from alexnet_dist.parallel.precision import resolve_precision, use_precision
from alexnet_dist.tracking.console import ProgressReporter
from alexnet_dist.training.cuda_graph import CudaGraphStep
from alexnet_dist.training.optim import build_optimizer
from alexnet_dist.training.schedules import Schedule, piecewise_value
from alexnet_dist.training.step import LabeledImages, train_step

VERSIONS = {
    "alexnet_dist": __version__,
    "torch": torch.__version__,
    "python": platform.python_version(),
}


@dataclass(frozen=True)
class DataPipeline:
    """The training and the validation images, and the loaders that make batches of them.

    Attributes:
        plan, eval_plan: which crop of which image comes when.
        normalization, eval_normalization: how pixels become the network's input.
    """

    info: DatasetInfo
    plan: SamplePlan
    eval_plan: EvalPlan
    normalization: Normalization
    eval_normalization: Normalization
    loader: Loader
    eval_loader: Loader

    def close(self) -> None:
        """End the loaders' threads and processes."""
        self.loader.close()
        self.eval_loader.close()


def build_data(config: Config, mesh: Mesh) -> DataPipeline:
    """Find the images, and make their plans and loaders; all ranks call it together.

    Raises:
        UserError: there are no images, or they do not suit the config.
    """
    data = config.data
    info = mesh.broadcast_from_rank0(
        lambda: scan_dataset(data.root, data.cache_dir, ProgressReporter())
    )
    _check_batch(config, mesh, info)
    plan = SamplePlan(
        info.train.sizes,
        data.batch_size,
        config.train.seed,
        data.train_crop,
        data.image_size / data.resize_size,
        data.scale,
        data.ratio,
        data.hflip,
        pca_noise_schedule(config),
    )
    eval_plan = EvalPlan(info.val.sizes, data.eval_batch_size, plan.crop_fraction)
    pixels = MODEL_REGISTRY[config.model.arch].input_norm
    normalize = partial(build_normalization, pixels, info.stats, size=data.image_size)
    training, evaluation = normalize(pca_noise=data.pca_noise), normalize()
    train_set, val_set = open_datasets(info)
    loader = loader_for(config, mesh, train_set, training, plan, on_corrupt="substitute")
    eval_loader = loader_for(config, mesh, val_set, evaluation, eval_plan)
    return DataPipeline(info, plan, eval_plan, training, evaluation, loader, eval_loader)


def loader_for(
    config: Config,
    mesh: Mesh,
    dataset: ImageDataset,
    normalization: Normalization,
    plan: SamplePlan | EvalPlan,
    *,
    on_corrupt: OnCorruptImage = "skip",
) -> Loader:
    """The loader that the options ask for, for this rank's samples of ``plan``.

    Args:
        on_corrupt: what is done with corrupt images where data.on_corrupt_image is not stop.
    """
    data = config.data
    return build_loader(
        data.loader,
        dataset,
        normalization,
        plan,
        device=mesh.device,
        max_batch_size=max(mesh.local_batch(plan.batch_size), 1) * getattr(plan, "num_crops", 1),
        threads=mesh.threads,
        on_corrupt=on_corrupt if data.on_corrupt_image == "skip" else "stop",
    )


def pca_noise_schedule(config: Config) -> Callable[[float], float]:
    """Epochs done -> standard deviation of the color noise's coefficients."""
    data, scale = config.data, config.train.epochs_scale
    std = 0.0 if data.pca_noise == "none" else data.pca_noise_std
    rows = std if isinstance(std, list) else [(0.0, std)]
    return partial(piecewise_value, [(epochs * scale, std) for epochs, std in rows])


@dataclass(frozen=True)
class TrainState:
    """The network on the ranks, and what trains it.

    Attributes:
        layout: what computes the network; its file says how it lies on the ranks.
        train_step: ``train_step`` of layout and optimizer, as a CUDA graph where that is used.
    """

    layout: Layout
    optimizer: torch.optim.SGD
    schedule: Schedule
    train_step: Callable[[LabeledImages, Iterable[Tensor]], Tensor]


def build_training(config: Config, mesh: Mesh, num_classes: int) -> TrainState:
    """Network, optimizer and schedule, still without weights; see ``init_weights``."""
    optim, runtime = config.optim, config.runtime
    use_precision(runtime.precision, mesh.device, runtime.deterministic)
    layout = parallelize(build_model(config, num_classes), mesh, layout_config(config, mesh))
    optimizer = build_optimizer(
        optim.name,
        layout.parameters,
        lr=optim.lr,
        momentum=optim.momentum,
        weight_decay=optim.weight_decay,
        separate_groups={*optim.schedule.milestones, *optim.lr_mults},
        all_reduce_norms=layout.sharding.all_reduce_partial_sums,
    )
    schedule = Schedule(
        lr=optim.lr,
        lr_mults=optim.lr_mults,
        epochs=config.train.epochs,
        epochs_scale=config.train.epochs_scale,
        **vars(optim.schedule),
    )
    step = CudaGraphStep if uses_cuda_graph(config, mesh) else partial(partial, train_step)
    return TrainState(layout, optimizer, schedule, step(layout, optimizer))


def layout_config(config: Config, mesh: Mesh) -> LayoutConfig:
    """The options of the layout that is trained."""
    parallel = config.parallel
    return LayoutConfig(
        batch_size=config.data.batch_size,
        grad_accum_steps=config.train.grad_accum_steps,
        precision=resolve_precision(config.runtime.precision, mesh.device),
        fc=parallel.fc,
        grad_compression=parallel.grad_compression,
        powersgd_rank=parallel.powersgd_rank,
        powersgd_start=parallel.powersgd_start,
        compile=is_compiled(config, mesh),
        skip_nonfinite=config.train.on_nonfinite == "skip",
    )


def init_weights(config: Config, layout: Layout, num_classes: int) -> None:
    """Initialize the weights, the same on any number of ranks and under any layout."""
    torch.manual_seed(config.train.seed)
    weights = iter_initial_weights(build_model(config, num_classes), config.model.init)
    layout.sharding.load_full_weights(layout.parameters, weights)


def build_model(config: Config, num_classes: int) -> Network:
    """The network on the meta device.

    Raises:
        UserError: there is no such network, or not for images of this size.
    """
    try:
        return build_on_meta(
            config.model.arch,
            num_classes=num_classes,
            dropout=config.model.dropout,
            image_size=config.data.image_size,
        )
    except ValueError as error:
        raise UserError(str(error), on_all_ranks=True) from None


def is_compiled(config: Config, mesh: Mesh) -> bool:
    """Whether the network runs under torch.compile."""
    wanted = config.runtime.compile
    return mesh.device.type == "cuda" if wanted == "auto" else wanted


def uses_cuda_graph(config: Config, mesh: Mesh) -> bool:
    """Whether a step is captured as a CUDA graph.

    Raises:
        UserError: it is asked for, and cannot be.
    """
    wanted, fc, optimizer = config.runtime.cuda_graph, config.parallel.fc, config.optim.name
    precision = resolve_precision(config.runtime.precision, mesh.device)
    obstacles = {
        "needs an NVIDIA GPU: leave it out": mesh.device.type != "cuda",
        f"cannot capture all-reduces yet, and there are {mesh.world_size} processes: leave it out, "
        "or take one": mesh.world_size > 1,
        "captures no sharded layers: take --parallel.fc replicated": fc == "sharded",
        "cannot capture the scale of fp16: take --runtime.precision bf16": precision == "fp16",
        "needs an update that reads the lr from a tensor: take --optim.name sgd2012 or lars": (
            optimizer == "sgd"
        ),
        "cannot check gradients for train.on_nonfinite skip: take stop": (
            config.train.on_nonfinite == "skip"
        ),
    }
    obstacle = next((text for text, present in obstacles.items() if present), "")
    if wanted is True and obstacle:
        raise UserError(f"runtime.cuda_graph {obstacle}", on_all_ranks=True)
    return bool(wanted) and not obstacle


def validate(config: Config, mesh: Mesh) -> None:
    """Refuse what cannot be trained so on these ranks, before anything begins.

    Raises:
        UserError: there is no such network, or it cannot be placed or captured as asked for.
    """
    if config.model.arch not in MODEL_REGISTRY:
        raise UserError(
            f"there is no model.arch {config.model.arch}; there are {', '.join(MODEL_REGISTRY)}",
            on_all_ranks=True,
        )
    spec, towers = MODEL_REGISTRY[config.model.arch], config.parallel.towers
    validate_parallel_config(spec, mesh.world_size, towers, layout_config(config, mesh))
    uses_cuda_graph(config, mesh)


def _check_batch(config: Config, mesh: Mesh, info: DatasetInfo) -> None:
    batch, images, folder = config.data.batch_size, len(info.train), info.train.folder
    local, steps = batch // mesh.dp_size, config.train.grad_accum_steps
    replicas = "processes" if mesh.split_size == 1 else "pairs of processes"
    problems = {
        f"data.batch_size {batch} is the global batch, and has no image for some of the "
        f"{mesh.dp_size} {replicas}: raise it, or take fewer processes": local < 1,
        f"train.grad_accum_steps {steps} is more than the {local} images of data.batch_size "
        f"{batch} that a process computes: lower it": steps > local,
        f"data.batch_size {batch} is more than the {images} images of {folder}: lower it": (
            images < batch
        ),
        f"{folder} has only one class: it needs a folder for each of several classes": (
            len(info.train.classes) < 2
        ),
    }
    for problem, present in problems.items():
        if present:
            raise UserError(problem, on_all_ranks=True)
