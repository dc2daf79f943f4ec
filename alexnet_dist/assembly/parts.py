"""What a training run is made of: its images, and what learns from them."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from alexnet_dist.config import Config
from alexnet_dist.data import build_loader
from alexnet_dist.data.corrupt_images import Loader
from alexnet_dist.data.datasets import DatasetInfo, open_datasets, scan_dataset
from alexnet_dist.data.plan import EvalPlan, SamplePlan
from alexnet_dist.data.transforms import build_normalization
from alexnet_dist.errors import UserError
from alexnet_dist.model import (
    MODEL_REGISTRY,
    Network,
    build_on_meta,
    iter_initial_weights,
    make_dropout_masks,
)
from alexnet_dist.parallel import LayoutConfig, ddp_warmup, parallelize, validate_parallel_config
from alexnet_dist.parallel.mesh import Mesh
from alexnet_dist.parallel.precision import Precision, configure_backends, resolve_precision
from alexnet_dist.tracking.console import ProgressReporter
from alexnet_dist.training.cuda_graph import CudaGraphStep, why_not_capturable
from alexnet_dist.training.optim import build_optimizer
from alexnet_dist.training.schedules import Schedule, piecewise_value
from alexnet_dist.training.step import Batch, set_lr, train_step


class Images:
    """The training and the validation images, and the engines that make batches of them.

    Attributes:
        catalogue: which images there are.
        plan, evaluation: who sees which crop of which image when.
        pixels, val_pixels: how pixels become the network's input.
        engine, val_engine: carry the plans out.

    Raises:
        Failure: there are none, or they do not suit the config.
    """

    def __init__(self, config: Config, mesh: Mesh) -> None:
        self.config, data = config, config.data
        self.catalogue = mesh.broadcast_from_rank0(
            lambda: scan_dataset(data.root, data.cache_dir, ProgressReporter())
        )
        _check_batch(config, mesh, self.catalogue)
        train_source, val_source = open_datasets(self.catalogue)
        fraction = data.image_size / data.resize_size
        self.plan = SamplePlan(
            self.catalogue.train.sizes,
            data.batch_size,
            config.train.seed,
            crop=data.train_crop,
            crop_fraction=fraction,
            scale=data.scale,
            ratio=data.ratio,
            hflip=data.hflip,
            pca_noise_std=partial(pca_noise_std, config),
        )
        self.evaluation = EvalPlan(self.catalogue.val.sizes, data.eval_batch_size, fraction)
        reads, stats = MODEL_REGISTRY[config.model.arch].input_norm, self.catalogue.stats
        self.pixels = build_normalization(
            reads, stats, size=data.image_size, pca_noise=data.pca_noise
        )
        self.val_pixels = build_normalization(reads, stats, size=data.image_size)
        skip = data.on_corrupt_image == "skip"

        def engine(dataset: Any, pixels: Any, plan: SamplePlan | EvalPlan, policy: Any) -> Loader:
            return build_loader(
                data.loader,
                dataset,
                pixels,
                plan,
                device=mesh.device,
                max_batch_size=max(mesh.local_batch(plan.batch_size), 1),
                threads=data.threads or mesh.threads,
                prefetch=data.prefetch,
                dali_decoder=data.dali_decoder,
                on_corrupt=policy if skip else "stop",
            )

        self.engine = engine(train_source, self.pixels, self.plan, "substitute")
        self.val_engine = engine(val_source, self.val_pixels, self.evaluation, "skip")

    def close(self) -> None:
        """Let the engines' threads and processes end."""
        self.engine.close()
        self.val_engine.close()


def pca_noise_std(config: Config, epochs: float) -> float:
    """Standard deviation of the PCA noise in the step that begins after so many epochs."""
    data = config.data
    if data.pca_noise == "none":
        return 0.0
    if not data.pca_noise_schedule:
        return data.pca_noise_std
    return piecewise_value(data.pca_noise_schedule, epochs / config.train.epochs_scale)


class Learner:
    """The network under its layout, and its optimizer; without weights before ``draw``.

    Attributes:
        outputs: scores that the network gives.
        model: the network without memory.
        layout: what the loop calls; see parallel/ddp.py.
        take_step: one update of the parameters; see training/loop.py's train_step.
        compiles, graphs: whether the network is compiled, and a step is to be a CUDA graph.

    Raises:
        Failure: there is no such network, or it does not suit the layout.
    """

    def __init__(self, config: Config, mesh: Mesh, images: Images) -> None:
        self.config, self.mesh = config, mesh
        self.precision = resolve_precision(config.runtime.precision, mesh.device)
        configure_backends(self.precision, config.runtime.deterministic)
        self.outputs = config.model.num_classes or len(images.catalogue.train.classes)
        self.model, _ = self._outline()
        runtime = config.runtime
        self.compiles = runtime.compile is True or (
            runtime.compile == "auto" and mesh.device.type == "cuda"
        )
        self.graphs = wants_graph(config, mesh, self.precision)
        parallel, optim = config.parallel, config.optim
        self.layout = parallelize(
            self.model,
            mesh,
            LayoutConfig(
                batch_size=config.data.batch_size,
                grad_accum_steps=config.train.grad_accum_steps,
                precision=self.precision,
                fc=parallel.fc,
                grad_compression=parallel.grad_compression,
                powersgd_rank=parallel.powersgd_rank,
                powersgd_start=parallel.powersgd_start,
                compile=self.compiles,
                skip_nonfinite=config.train.on_nonfinite == "skip",
            ),
        )
        self.schedule = Schedule(
            lr=optim.lr,
            bias_lr_mult=optim.bias_lr_mult,
            lr_mults=optim.lr_mults,
            epochs=config.train.epochs,
            **vars(optim.schedule),
        )
        self._schedule_at_first = self.schedule.state_dict()
        self.optimizer = build_optimizer(
            optim.name,
            self.layout.parameters,
            lr=optim.lr,
            momentum=optim.momentum,
            weight_decay=optim.weight_decay,
            separate_groups={*optim.schedule.milestones, *optim.lr_mults},
            trust=optim.trust_coefficient,
            all_reduce_norms=self.layout.sharding.all_reduce_partial_sums,
        )
        self.take_step: Callable[[Batch, Iterable[Tensor]], Tensor] = (
            CudaGraphStep(self.layout, self.optimizer)
            if self.graphs
            else partial(train_step, self.layout, self.optimizer)
        )

    def draw(self) -> None:
        """Draw the initial weights, and have the schedule stand at its beginning."""
        _, weights = self._outline()
        self.layout.sharding.load_full_weights(self.layout.parameters, weights)
        self.schedule.load_state_dict(self._schedule_at_first)

    def set_rates(self, passes: float) -> dict[str, float]:
        """Give the optimizer its rates for the step that begins after ``passes``; by group."""
        return set_lr(self.optimizer, self.schedule, passes / self.config.train.epochs_scale)

    def masks(self, step: int) -> tuple[Tensor, ...]:
        """The dropout masks of a step."""
        return make_dropout_masks(
            self.model.dropout_layers(),
            seed=self.config.train.seed,
            step=step,
            batch=self.config.data.batch_size,
            rows=self.layout.dropout_rows,
            device=self.mesh.device,
        )

    def warm_up(self) -> None:
        """What has to come before the first step where there are several processes."""
        count, device = self.mesh.local_batch(self.config.data.batch_size), self.mesh.device
        side = self.config.data.image_size
        images = torch.zeros(count, 3, side, side, device=device)
        images = images.to(memory_format=torch.channels_last)
        labels = torch.zeros(count, dtype=torch.int64, device=device)
        ddp_warmup(self.layout, images, labels, self.masks(0))

    def _outline(self) -> tuple[Network, Iterator[tuple[str, Tensor]]]:
        """The network without memory, and its initial weights, each drawn when it is asked for."""
        config = self.config
        torch.manual_seed(config.train.seed)
        try:
            model = build_on_meta(
                config.model.arch,
                num_classes=self.outputs,
                dropout=config.model.dropout,
                image_size=config.data.image_size,
            )
            return model, iter_initial_weights(model, config.model.init)
        except ValueError as error:
            raise UserError(str(error), on_all_ranks=True) from None


def check_network(config: Config, mesh: Mesh) -> None:
    """See that there is such a network, and that it can lie on these processes so.

    Raises:
        Failure: there is not, or it cannot.
    """
    if config.model.arch not in MODEL_REGISTRY:
        raise UserError(
            f"there is no model.arch {config.model.arch}; there are {', '.join(MODEL_REGISTRY)}",
            on_all_ranks=True,
        )
    parallel = config.parallel
    precision = resolve_precision(config.runtime.precision, mesh.device)
    validate_parallel_config(
        MODEL_REGISTRY[config.model.arch],
        mesh.world_size,
        towers=parallel.towers,
        fc=parallel.fc,
        grad_compression=parallel.grad_compression,
        precision=precision,
    )
    wants_graph(config, mesh, precision)


def wants_graph(config: Config, mesh: Mesh, precision: Precision) -> bool:
    """Whether a step is captured as a CUDA graph.

    Raises:
        Failure: it is asked for, and cannot be.
    """
    obstacle = why_not_capturable(
        device=mesh.device,
        processes=mesh.world_size,
        fc=config.parallel.fc,
        precision=precision,
        optimizer=config.optim.name,
        on_nonfinite=config.train.on_nonfinite,
    )
    if config.runtime.cuda_graph is True and obstacle:
        raise UserError(f"runtime.cuda_graph {obstacle}", on_all_ranks=True)
    return bool(config.runtime.cuda_graph) and not obstacle


def _check_batch(config: Config, mesh: Mesh, catalogue: DatasetInfo) -> None:
    batch, images = config.data.batch_size, len(catalogue.train)
    classes, asked = len(catalogue.train.classes), config.model.num_classes
    if batch < mesh.dp_size:
        raise UserError(
            f"data.batch_size {batch} is the global batch, and has no image for some of the "
            f"{mesh.dp_size} {'processes' if mesh.split_size == 1 else 'pairs of processes'}: "
            "raise it, or take fewer processes",
            on_all_ranks=True,
        )
    if config.train.grad_accum_steps > batch // mesh.dp_size:
        raise UserError(
            f"train.grad_accum_steps {config.train.grad_accum_steps} is more than the "
            f"{batch // mesh.dp_size} images of data.batch_size {batch} that fall to a process: "
            "lower it",
            on_all_ranks=True,
        )
    if images < batch:
        raise UserError(
            f"data.batch_size {batch} is more than the {images} images of "
            f"{catalogue.train.folder}: take a smaller one",
            on_all_ranks=True,
        )
    if classes < 2:
        raise UserError(
            f"{catalogue.train.folder} has one class only, of which nothing can be learned: it "
            "wants a folder for each class",
            on_all_ranks=True,
        )
    if asked is not None and asked < classes:
        raise UserError(
            f"model.num_classes is {asked}, but {catalogue.train.folder} has {classes} classes: "
            "leave it out, and the data decides",
            on_all_ranks=True,
        )
