"""From a config to its data, network and optimizer; and to a trained model from a checkpoint."""

import platform
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alexnet_dist import __version__
from alexnet_dist.config import Config, check_data_root, from_dict
from alexnet_dist.data import build_loader
from alexnet_dist.data.datasets import ImageDataset
from alexnet_dist.data.eval_plan import EvalPlan, NumCrops
from alexnet_dist.data.index import DatasetInfo, open_datasets, scan_dataset
from alexnet_dist.data.loader import Loader, OnCorruptImage
from alexnet_dist.data.normalization import Normalization, PcaNoise, build_normalization
from alexnet_dist.data.plan import SamplePlan
from alexnet_dist.data.statistics import ChannelStats
from alexnet_dist.errors import UserError, print_error, refuse
from alexnet_dist.model import MODEL_REGISTRY, Network, build_on_meta, iter_initial_weights
from alexnet_dist.parallel import Layout, LayoutConfig, parallelize, validate_parallel_config
from alexnet_dist.parallel.mesh import Mesh
from alexnet_dist.parallel.precision import resolve_precision, use_precision
from alexnet_dist.tracking.console import ProgressReporter
from alexnet_dist.training.checkpoint import find_checkpoint, load_tensors, read_state
from alexnet_dist.training.cuda_graph import CudaGraphStep, run_on
from alexnet_dist.training.optim import build_optimizer
from alexnet_dist.training.schedules import Schedule, piecewise_value
from alexnet_dist.training.step import train_step

Plan = SamplePlan | EvalPlan
VERSIONS = {
    "alexnet_dist": __version__,
    "torch": torch.__version__,
    "python": platform.python_version(),
}


def validate(config: Config, mesh: Mesh) -> None:
    """Refuse what cannot be trained so on these ranks, before anything begins.

    Raises:
        UserError: there are no images, or there is no such network, or it cannot be placed or
            captured as asked for.
    """
    check_data_root(config)
    arch, archs = config.model.arch, ", ".join(MODEL_REGISTRY)
    refuse({f"there is no model.arch {arch}; there are {archs}": arch not in MODEL_REGISTRY})
    validate_parallel_config(MODEL_REGISTRY[arch], mesh.world_size, layout_config(config, mesh))
    uses_cuda_graph(config, mesh)


# data


@dataclass(frozen=True)
class DataPipeline:
    """The training and the validation images, which crop of which comes when, and the loaders that
    make batches of them."""

    info: DatasetInfo
    plan: SamplePlan
    eval_plan: EvalPlan
    loader: Loader
    eval_loader: Loader

    def close(self) -> None:
        """End the loaders' threads."""
        self.loader.close()
        self.eval_loader.close()


def build_data(config: Config, mesh: Mesh) -> DataPipeline:
    """Find the images, and make their plans and loaders; all ranks call it together.

    Raises:
        UserError: there are no images, or they do not suit the config.
    """
    info = scan_images(config, mesh)
    _check_batch(config, mesh, info)
    return data_pipeline(config, mesh, info)


def data_pipeline(config: Config, mesh: Mesh, info: DatasetInfo) -> DataPipeline:
    """Plans and loaders of the images of ``info``."""
    data = config.data
    plan = SamplePlan(
        info.train.sizes,
        data.batch_size,
        config.train.seed,
        data.train_crop,
        data.image_size / data.resize_size,
        data.scale,
        data.ratio,
        data.hflip,
        _pca_noise_schedule(config),
    )
    train_set, val_set = open_datasets(info)
    eval_plan = EvalPlan(info.val.sizes, data.eval_batch_size, plan.crop_fraction)
    loader = loader_for(config, mesh, train_set, info.stats, plan)
    eval_loader = loader_for(config, mesh, val_set, info.stats, eval_plan)
    return DataPipeline(info, plan, eval_plan, loader, eval_loader)


def scan_images(config: Config, mesh: Mesh, *, only_val: bool = False) -> DatasetInfo:
    """The images at data.root; all ranks call it together. Raises UserError if there are none."""
    check_data_root(config)
    scan = partial(scan_dataset, config.data.root, config.data.cache_dir, only_val=only_val)
    return mesh.broadcast_from_rank0(lambda: scan(ProgressReporter()))


def loader_for(
    config: Config, mesh: Mesh, dataset: ImageDataset, stats: ChannelStats, plan: Plan
) -> Loader:
    """The loader that the options ask for, for this rank's samples of ``plan``."""
    data, training = config.data, isinstance(plan, SamplePlan)
    on_corrupt: OnCorruptImage = "substitute" if training else "skip"
    return build_loader(
        data.loader,
        dataset,
        normalization_for(config, stats, data.pca_noise if training else "none"),
        plan,
        device=mesh.device,
        max_batch_size=max(mesh.local_batch(plan.batch_size), 1) * getattr(plan, "num_crops", 1),
        threads=mesh.threads,
        on_corrupt=on_corrupt if data.on_corrupt_image == "skip" else "stop",
    )


def normalization_for(
    config: Config, stats: ChannelStats, pca_noise: PcaNoise = "none"
) -> Normalization:
    """How pixels become the network's input."""
    pixels = MODEL_REGISTRY[config.model.arch].input_norm
    return build_normalization(pixels, stats, size=config.data.image_size, pca_noise=pca_noise)


def _pca_noise_schedule(config: Config) -> Callable[[float], float]:
    """Epochs done -> standard deviation of the color noise's coefficients."""
    data, scale = config.data, config.train.epochs_scale
    std = 0.0 if data.pca_noise == "none" else data.pca_noise_std
    rows = std if isinstance(std, list) else [(0.0, std)]
    return partial(piecewise_value, [(epochs * scale, std) for epochs, std in rows])


def _check_batch(config: Config, mesh: Mesh, info: DatasetInfo) -> None:
    batch, images, folder = config.data.batch_size, len(info.train), info.train.folder
    local, steps = batch // mesh.dp_size, config.train.grad_accum_steps
    replicas = "processes" if mesh.split_size == 1 else "pairs of processes"
    refuse(
        {
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
    )


# network and optimizer


@dataclass(frozen=True)
class TrainState:
    """The network on the ranks, and what trains it.

    Attributes:
        layout: what computes the network; its file says how it lies on the ranks.
        train_step: ``train_step`` of layout and optimizer (images, labels, masks), as a CUDA graph
            where that is used.
    """

    layout: Layout
    optimizer: torch.optim.SGD
    schedule: Schedule
    train_step: Callable[[Tensor, Tensor, Iterable[Tensor]], Tensor]


def build_training(config: Config, mesh: Mesh, data: DataPipeline) -> TrainState:
    """Network, optimizer and schedule for ``data``, still without weights; see ``init_weights``."""
    optim, num_classes = config.optim, len(data.info.train.classes)
    use_precision(config.runtime.precision, mesh.device, config.runtime.deterministic)
    stream = torch.cuda.Stream(mesh.device) if uses_cuda_graph(config, mesh) else None
    model, options = build_model(config, num_classes), layout_config(config, mesh)
    layout = run_on(stream, partial(parallelize, model, mesh, options))
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
    step: Callable[..., Tensor] = partial(train_step, layout, optimizer)
    if stream is not None:
        step = CudaGraphStep(
            layout,
            optimizer,
            stream,
            before_capture=data.loader.wait_until_idle,
            on_all=lambda captured: all(mesh.all_gather_object(captured)),
            fall_back=config.runtime.cuda_graph == "auto",
        )
    return TrainState(layout, optimizer, schedule, step)


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


def init_weights(config: Config, layout: Layout, num_classes: int) -> None:
    """Initialize the weights, the same on any number of ranks and under any layout."""
    torch.manual_seed(config.train.seed)
    weights = iter_initial_weights(build_model(config, num_classes), config.model.init)
    layout.sharding.load_full_weights(layout.parameters, weights)


def layout_config(config: Config, mesh: Mesh) -> LayoutConfig:
    """The options of the layout that is trained."""
    compiled = config.runtime.compile
    return LayoutConfig(
        batch_size=config.data.batch_size,
        grad_accum_steps=config.train.grad_accum_steps,
        precision=resolve_precision(config.runtime.precision, mesh.device),
        compile=mesh.device.type == "cuda" if compiled == "auto" else compiled,
        skip_nonfinite=config.train.on_nonfinite == "skip",
        **vars(config.parallel),
    )


def uses_cuda_graph(config: Config, mesh: Mesh) -> bool:
    """Whether a step is captured as a CUDA graph.

    Raises:
        UserError: it is asked for, and cannot be.
    """
    wanted, layout = config.runtime.cuda_graph, layout_config(config, mesh)
    obstacles = {
        "runtime.cuda_graph needs an NVIDIA GPU: leave it out": mesh.device.type != "cuda",
        "runtime.cuda_graph captures no towers: take --parallel.towers 1": mesh.split_size > 1,
        "runtime.cuda_graph cannot capture PowerSGD, whose first steps differ: take "
        "--parallel.grad_compression bf16": layout.grad_compression == "powersgd",
        "runtime.cuda_graph captures no sharded layers: take --parallel.fc replicated": (
            layout.fc == "sharded"
        ),
        "runtime.cuda_graph cannot capture the scale of fp16: take --runtime.precision bf16": (
            layout.precision == "fp16"
        ),
        "runtime.cuda_graph needs an update that reads the lr from a tensor: take --optim.name "
        "sgd2012 or lars": config.optim.name == "sgd",
        "runtime.cuda_graph cannot check gradients for train.on_nonfinite skip: take stop": (
            layout.skip_nonfinite
        ),
    }
    if wanted is True:
        refuse(obstacles)
    return bool(wanted) and not any(obstacles.values())


# a trained model


@dataclass(frozen=True)
class LoadedModel:
    """A checkpoint, or a file of weights: its state, and the options that it is used with."""

    path: Path
    state: dict[str, Any]
    config: Config

    @property
    def labels(self) -> list[str]:
        """The class of each output."""
        return list(self.state["classes"])

    @property
    def stats(self) -> ChannelStats:
        """Of the images that it was trained on."""
        return ChannelStats.from_json(self.state["statistics"])

    @property
    def normalization(self) -> Normalization:
        """How pixels become its input."""
        return normalization_for(self.config, self.stats)

    def scan_dataset(self, mesh: Mesh, *, only_val: bool = False) -> DatasetInfo:
        """The images at data.root, labeled by this network's outputs; all ranks call it together.

        Raises:
            UserError: there are none, or they are of other classes.
        """
        info, named = scan_images(self.config, mesh, only_val=only_val), "unnamed" not in self.state
        for warning in info.warnings if mesh.rank == 0 else []:
            print_error(warning)
        if (labeled := _relabel(info, self.labels, named)) is not None:
            return labeled
        fix = "give --data.root a folder with the same class folders"
        if not named:
            fix = (
                f"that file does not name its {len(self.labels)} classes: name the class folders "
                "by their numbers, from 0 on, or by WordNet IDs, or prepare them from a source "
                "that numbers its classes"
            )
        raise UserError(
            f"the classes of {info.val.folder} are not those that {self.path} was trained on: "
            f"{fix}",
            on_all_ranks=True,
        )

    def eval_loader(
        self, mesh: Mesh, dataset: ImageDataset, batch_size: int, num_crops: NumCrops = 1
    ) -> tuple[EvalPlan, Loader]:
        """The crops of all images, ``batch_size`` images in a global batch; and their loader."""
        crop_fraction = self.config.data.image_size / self.config.data.resize_size
        plan = EvalPlan(dataset.index.sizes, batch_size, crop_fraction, num_crops)
        return plan, loader_for(self.config, mesh, dataset, self.stats, plan)

    def layout(self, mesh: Mesh, batch_size: int) -> Layout:
        """The network with its weights on every rank; all ranks call it together."""
        runtime = self.config.runtime
        precision = use_precision(runtime.precision, mesh.device, runtime.deterministic)
        model = build_model(self.config, len(self.labels))
        layout = parallelize(model, mesh, LayoutConfig(batch_size, precision=precision))
        self.load_weights(layout.parameters)
        return layout

    def model(self, device: torch.device) -> Network:
        """The network with its weights on one device, in evaluation mode."""
        model = build_model(self.config, len(self.labels)).to_empty(device=device)
        self.load_weights(dict(model.named_parameters()))
        return model.eval()

    def load_weights(self, parameters: dict[str, torch.nn.Parameter]) -> None:
        """Read the weights by name; raises UserError where they are corrupt, or others."""
        load_tensors(self.path, {f"model.{name}": p.detach() for name, p in parameters.items()})


def _relabel(info: DatasetInfo, classes: list[str], named: bool) -> DatasetInfo | None:
    """The images with the labels of a network's outputs; None where these are other classes.

    Args:
        classes: of each output; where it has no name, its number. Images then need numbers, too:
            their source's, names that are numbers, or WordNet IDs, in whose order ImageNet's
            classes are numbered.
    """
    mine, numbers = info.val.classes, info.class_numbers
    if not numbers and all(re.fullmatch("[0-9]+", name) for name in mine):
        numbers = {name: int(name) for name in mine}
    if not numbers and all(re.fullmatch(r"n\d{8}", name) for name in mine):
        numbers = {name: place for place, name in enumerate(sorted(mine))}
    outputs = mine if named else [str(numbers.get(name)) for name in mine]
    if sorted(outputs) != sorted(classes):
        return None
    place_of = {output: place for place, output in enumerate(classes)}
    places = np.array([place_of[output] for output in outputs])
    ordered = [mine[row] for row in np.argsort(places)]
    train, val = (
        replace(index, labels=places[index.labels], classes=ordered)
        for index in (info.train, info.val)
    )
    return replace(info, train=train, val=val)


def same_classes(info: DatasetInfo, state: dict[str, Any]) -> bool:
    """Whether the outputs of the network of a checkpoint's ``state`` are the labels of images."""
    labeled = _relabel(info, state["classes"], "unnamed" not in state)
    return labeled is not None and labeled.train.classes == info.train.classes


def load_model(path: str, options: Callable[[dict[str, Any]], Config] = from_dict) -> LoadedModel:
    """The model at ``path``: a run (its best checkpoint), a checkpoint, an exported file, or
    torchvision's AlexNet. Raises UserError where there is none.

    ``options`` makes the config that it is used with from the one it was trained with.
    """
    found = find_checkpoint(path)
    state = read_state(found)
    return LoadedModel(found, state, options(state["config"]))
