"""What a training run is made of: its images, and what learns from them."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from alexnet_dist.config import Config
from alexnet_dist.data import build_engine
from alexnet_dist.data.augment import pixels_for
from alexnet_dist.data.engine import Engine
from alexnet_dist.data.plan import EvaluationPlan, Plan
from alexnet_dist.data.sources import Catalogue, make_catalogue, open_sources
from alexnet_dist.errors import Failure
from alexnet_dist.model import (
    VARIANTS,
    Network,
    choose_kernels,
    draw_masks,
    initial_weights,
    outline,
    triton_runs_on,
)
from alexnet_dist.parallel import build_layout, check_layout, warm_up
from alexnet_dist.parallel.arithmetic import Precision, choose_precision, set_arithmetic
from alexnet_dist.parallel.ddp import Compression
from alexnet_dist.parallel.mesh import Mesh
from alexnet_dist.tracking.console import IndexProgress
from alexnet_dist.training.graph import GraphedStep, check_graph
from alexnet_dist.training.loop import Batch, set_rates, train_step
from alexnet_dist.training.optim import build_optimizer
from alexnet_dist.training.schedules import Schedule, value_at


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
        self.catalogue = mesh.from_first(
            lambda: make_catalogue(data.root, data.cache, IndexProgress())
        )
        _check_batch(config, mesh, self.catalogue)
        train_source, val_source = open_sources(self.catalogue)
        fraction = data.image_size / data.resize
        self.plan = Plan(
            self.catalogue.train.sizes,
            data.batch_size,
            config.train.seed,
            crop=data.crop,
            fraction=fraction,
            scale=data.scale,
            ratio=data.ratio,
            flip=data.flip,
            strength=self.colour_strength,
        )
        self.evaluation = EvaluationPlan(self.catalogue.val.sizes, data.eval_batch_size, fraction)
        reads, statistics = VARIANTS[config.model.variant].pixels, self.catalogue.statistics
        self.pixels = pixels_for(reads, statistics, side=data.image_size, colour=data.colour)
        self.val_pixels = pixels_for(reads, statistics, side=data.image_size)
        skip = data.on_bad_image == "skip"

        def engine(source: Any, pixels: Any, plan: Plan | None, batch: int, policy: Any) -> Engine:
            return build_engine(
                data.engine,
                source,
                pixels,
                plan=plan,
                fraction=fraction,
                max_batch=max(mesh.local_batch(batch), 1),
                device=mesh.device,
                decoder=data.decoder,
                threads=data.threads or mesh.threads,
                ahead=data.ahead,
                policy=policy if skip else "stop",
            )

        self.engine = engine(train_source, self.pixels, self.plan, data.batch_size, "substitute")
        self.val_engine = engine(val_source, self.val_pixels, None, data.eval_batch_size, "omit")

    def colour_strength(self, passes: float) -> float:
        """That of the colour noise in the step that begins after ``passes``."""
        data = self.config.data
        if data.colour == "none":
            return 0.0
        if not data.colour_table:
            return data.colour_strength
        return value_at(data.colour_table, passes / self.config.train.epochs_scale)

    def close(self) -> None:
        """Let the engines' threads and processes end."""
        self.engine.close()
        self.val_engine.close()


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
        self.precision = choose_precision(config.runtime.precision, mesh.device)
        set_arithmetic(self.precision, config.runtime.deterministic)
        self.outputs = config.model.num_classes or len(images.catalogue.train.classes)
        self.model, _ = self._outline()
        runtime = config.runtime
        self.compiles = runtime.compile is True or (
            runtime.compile == "auto" and mesh.device.type == "cuda"
        )
        self.graphs = wants_graph(config, mesh, self.precision)
        choose_kernels(
            self.model, lrn=runtime.lrn, stem=runtime.stem, pool_first=runtime.pool_first
        )
        parallel, optim = config.parallel, config.optim
        self.layout = build_layout(
            self.model,
            mesh,
            batch=config.data.batch_size,
            accumulate=config.train.accumulate,
            num_classes=self.outputs,
            precision=self.precision,
            fc=parallel.fc,
            fc_schedule=parallel.fc_schedule,
            compression=Compression(
                parallel.compress, parallel.powersgd_rank, parallel.powersgd_start
            ),
            compile_model=self.compiles,
            weight_copies=config.runtime.weight_copies,
        )
        self.schedule = Schedule(
            lr=optim.lr,
            bias_lr=optim.bias_lr,
            factors=optim.factors,
            epochs=config.train.epochs,
            **vars(optim.schedule),
        )
        self._schedule_at_first = self.schedule.state()
        self.optimizer = build_optimizer(
            optim.name,
            self.layout.parameters,
            lr=optim.lr,
            momentum=optim.momentum,
            weight_decay=optim.weight_decay,
            own={*optim.schedule.table, *optim.factors},
            trust=optim.trust,
            whole=self.layout.sharding.whole_sums,
            triton=self.graphs or bool(_wants_triton(config)),
            copies=self.layout.copies,
            fused=config.runtime.update != "foreach",
        )

        self.take_step: Callable[[Batch, Iterable[Tensor]], Tensor] = (
            GraphedStep(self.layout, self.optimizer)
            if self.graphs
            else partial(train_step, self.layout, self.optimizer)
        )

    def draw(self) -> None:
        """Draw the initial weights, and have the schedule stand at its beginning."""
        _, weights = self._outline()
        self.layout.sharding.fill(self.layout.parameters, weights)
        self.schedule.load(self._schedule_at_first)

    def set_rates(self, passes: float) -> dict[str, float]:
        """Give the optimizer its rates for the step that begins after ``passes``; by group."""
        return set_rates(self.optimizer, self.schedule, passes / self.config.train.epochs_scale)

    def masks(self, step: int) -> tuple[Tensor, ...]:
        """The dropout masks of a step."""
        return draw_masks(
            self.model.dropouts(),
            seed=self.config.train.seed,
            step=step,
            batch=self.config.data.batch_size,
            rows=self.layout.mask_rows,
            device=self.mesh.device,
        )

    def warm_up(self) -> None:
        """What has to come before the first step where there are several processes."""
        count, device = self.mesh.local_batch(self.config.data.batch_size), self.mesh.device
        side = self.config.data.image_size
        images = torch.zeros(count, 3, side, side, device=device)
        images = images.to(memory_format=torch.channels_last)
        labels = torch.zeros(count, dtype=torch.int64, device=device)
        warm_up(self.layout, images, labels, self.masks(0))

    def _outline(self) -> tuple[Network, Iterator[tuple[str, Tensor]]]:
        """The network without memory, and its initial weights, each drawn when it is asked for."""
        config = self.config
        torch.manual_seed(config.train.seed)
        try:
            model = outline(
                config.model.variant,
                num_classes=self.outputs,
                dropout=config.model.dropout,
                image_size=config.data.image_size,
            )
            return model, initial_weights(model, config.model.init)
        except ValueError as error:
            raise Failure(str(error), everywhere=True) from None


def check_network(config: Config, mesh: Mesh) -> None:
    """See that there is such a network, and that it can lie on these processes so.

    Raises:
        Failure: there is not, or it cannot.
    """
    if config.model.variant not in VARIANTS:
        raise Failure(
            f"there is no model.variant {config.model.variant}; there are {', '.join(VARIANTS)}",
            everywhere=True,
        )
    if config.runtime.lrn == "triton" and not triton_runs_on(mesh.device):
        raise Failure(
            "runtime.lrn is triton, which wants Triton and an NVIDIA GPU no older than Ampere: "
            "take auto or band",
            everywhere=True,
        )
    parallel = config.parallel
    precision = choose_precision(config.runtime.precision, mesh.device)
    check_layout(
        VARIANTS[config.model.variant],
        mesh.world,
        towers=parallel.towers,
        fc=parallel.fc,
        fc_schedule=parallel.fc_schedule,
        compress=parallel.compress,
        precision=precision,
    )
    _check_update(config, mesh, precision)


def _wants_triton(config: Config) -> str:
    """The option that has the update computed by Triton, or ""."""
    runtime = config.runtime
    if runtime.cuda_graph is True:  # whose launches keep their arguments, the rate among them
        return "runtime.cuda_graph"
    if runtime.weight_copies:
        return "runtime.weight_copies"
    # auto: which of the two is faster has not been measured, and they move the same bytes
    return "runtime.update triton" if runtime.update == "triton" else ""


def _check_update(config: Config, mesh: Mesh, precision: Precision) -> None:
    runtime, fc, wants = config.runtime, config.parallel.fc, _wants_triton(config)
    refusal = ""
    if wants and not triton_runs_on(mesh.device):
        refusal = f"{wants} wants Triton and an NVIDIA GPU no older than Ampere: leave it out"
    elif wants and config.optim.name == "sgd":
        refusal = (
            f"{wants} wants an update that Triton computes, and optim.name is sgd: take "
            "--optim.name paper or lars"
        )
    elif wants and runtime.update in ("fused", "foreach"):
        refusal = (
            f"{wants} wants the update by Triton, and runtime.update is {runtime.update}: take "
            "--runtime.update auto"
        )
    elif runtime.weight_copies and precision != "bf16":
        refusal = (
            f"runtime.weight_copies are copies in bf16, and the precision is {precision}: leave "
            "them out, or take --runtime.precision bf16"
        )
    elif runtime.weight_copies and _normalises_batches(config):
        refusal = (
            f"runtime.weight_copies has no copies of batch normalisation, which model.variant "
            f"{config.model.variant} has: leave them out"
        )
    elif runtime.weight_copies and fc == "sharded":
        refusal = (
            "runtime.weight_copies wants whole layers: leave it out, or take --parallel.fc "
            "replicated"
        )
    if refusal:
        raise Failure(refusal, everywhere=True)
    if runtime.cuda_graph is True:
        check_graph(processes=mesh.world, fc=fc, precision=precision, on_nan=config.train.on_nan)


def _normalises_batches(config: Config) -> bool:
    return any("batch" in row.then for row in VARIANTS[config.model.variant].layers)


def wants_graph(config: Config, mesh: Mesh, precision: Precision) -> bool:
    """Whether a step is to be a CUDA graph: as asked for, or where it can be."""
    if config.runtime.cuda_graph != "auto":
        return config.runtime.cuda_graph
    asked = replace(config, runtime=replace(config.runtime, cuda_graph=True))
    try:
        _check_update(asked, mesh, precision)
    except Failure:
        return False
    return True


def _check_batch(config: Config, mesh: Mesh, catalogue: Catalogue) -> None:
    batch, images = config.data.batch_size, len(catalogue.train)
    classes, asked = len(catalogue.train.classes), config.model.num_classes
    if batch < mesh.replicas:
        raise Failure(
            f"data.batch_size {batch} is the global batch, and has no image for some of the "
            f"{mesh.replicas} {'processes' if mesh.towers == 1 else 'pairs of processes'}: raise "
            "it, or take fewer processes",
            everywhere=True,
        )
    if config.train.accumulate > batch // mesh.replicas:
        raise Failure(
            f"train.accumulate {config.train.accumulate} is more than the {batch // mesh.replicas} "
            f"images of data.batch_size {batch} that fall to a process: lower it",
            everywhere=True,
        )
    if images < batch:
        raise Failure(
            f"data.batch_size {batch} is more than the {images} images of "
            f"{catalogue.train.folder}: take a smaller one",
            everywhere=True,
        )
    if classes < 2:
        raise Failure(
            f"{catalogue.train.folder} has one class only, of which nothing can be learned: it "
            "wants a folder for each class",
            everywhere=True,
        )
    if asked is not None and asked < classes:
        raise Failure(
            f"model.num_classes is {asked}, but {catalogue.train.folder} has {classes} classes: "
            "leave it out, and the data decides",
            everywhere=True,
        )
