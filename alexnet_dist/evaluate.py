"""Exact top-1 and top-5 error of a checkpoint on the validation images, on any number of processes.

python -m alexnet_dist.evaluate --checkpoint RUN [RUN ...] [--ten_crop] [--data.root DIR]
Of several checkpoints the chances are averaged, as the paper does with five networks (Krizhevsky et
al. 2012, section 6), and with --ten_crop those of ten views of each image: its corners, its centre,
and their reflections (section 4.1). The last line is JSON: top1_error and top5_error in percent,
loss, images.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from alexnet_dist.assembly.trained import LoadedModel, read
from alexnet_dist.config import CommandParser, Config
from alexnet_dist.data import build_loader
from alexnet_dist.data.corrupt_images import Batch, Loader
from alexnet_dist.data.datasets import DatasetInfo, open_datasets, scan_dataset
from alexnet_dist.data.plan import EvalPlan, NumCrops
from alexnet_dist.errors import UserError, run_command
from alexnet_dist.parallel import Layout, LayoutConfig, parallelize
from alexnet_dist.parallel.mesh import Mesh, init_distributed
from alexnet_dist.parallel.precision import configure_backends, resolve_precision
from alexnet_dist.parallel.sharded_loss import ShardedClasses, to_counts
from alexnet_dist.tracking.console import ProgressReporter
from alexnet_dist.training.step import EvalMetrics, check_all_images_counted, evaluate


def main(arguments: list[str]) -> None:
    """Evaluate as the command line says."""
    parser = CommandParser("evaluate", __doc__)
    parser.add_argument(
        "--checkpoint",
        nargs="+",
        required=True,
        metavar="RUN",
        help="a run's folder, whose best checkpoint it is, or one of its checkpoints",
    )
    parser.add_argument("--ten_crop", action="store_true", help="ten crops of each image")
    args = parser.parse(arguments).args
    views: NumCrops = 10 if args.ten_crop else 1
    networks = read_networks(args.checkpoint, lambda kept: parser.parse(arguments, kept).config)
    config = networks[0].config
    mesh = init_distributed(config.runtime.device, config.runtime.threads)
    data = config.data
    catalogue = mesh.broadcast_from_rank0(
        lambda: scan_dataset(data.root, data.cache_dir, ProgressReporter())
    )
    if not networks[0].knows(catalogue.val.classes):
        raise UserError(
            f"the classes of {catalogue.val.folder} are not those that {networks[0].path} was "
            "trained on: give --data.root a folder with the same class folders",
            on_all_ranks=True,
        )
    if len(networks) == views == 1:
        result = evaluate_one(networks[0], mesh, catalogue)
    else:
        result = evaluate_average(networks, views, mesh, catalogue)
    asked = {"checkpoints": len(networks), "views": views}
    result |= {name: count for name, count in asked.items() if count > 1}
    if mesh.rank == 0:
        print(json.dumps(result), flush=True)


def read_networks(
    paths: list[str], options: Callable[[dict[str, Any]], Config]
) -> list[LoadedModel]:
    """The networks of checkpoints, under ``options`` of those they were trained with.

    Images and how they are read are as the first one has them, but each has its own image_size
    and resize.

    Raises:
        Failure: there is no such checkpoint, or they are not of the same classes.
    """
    networks: list[LoadedModel] = []
    for path in paths:
        network = read(path, options)
        config = network.config
        first = networks[0].config if networks else config
        data = replace(
            first.data, image_size=config.data.image_size, resize_size=config.data.resize_size
        )
        networks.append(replace(network, config=replace(config, data=data)))
    for network in networks[1:]:
        classes, outputs = networks[0].state["classes"], networks[0].outputs
        if network.state["classes"] != classes or network.outputs != outputs:
            raise UserError(
                f"{network.path} tells other classes apart than {networks[0].path}, and their "
                "chances have no average: give checkpoints that were trained on the same ones",
                on_all_ranks=True,
            )
    return networks


def evaluate_one(network: LoadedModel, mesh: Mesh, catalogue: DatasetInfo) -> dict[str, float]:
    """Errors of a network on the validation images, by their central views."""
    plan = EvalPlan(catalogue.val.sizes, network.config.data.eval_batch_size)
    layout, engine, batches = lay_out(network, plan, mesh, catalogue)
    result = evaluate(layout, batches, mesh.device)
    left_out = sum(len(news) for news in mesh.all_gather_object(engine.corrupt.pop_events()))
    check_all_images_counted(result, left_out, len(catalogue.val))
    engine.close()
    return result | ({"num_skipped": left_out} if left_out else {})


def evaluate_average(
    networks: list[LoadedModel], views: NumCrops, mesh: Mesh, catalogue: DatasetInfo
) -> dict[str, float]:
    """Errors of the chances averaged over the networks and the views of the validation images.

    One network after another goes through the images. Of those of this process the logarithms of
    the summed chances are kept in float64, for ImageNet 400 MB over all processes. An image that
    one network has to leave out is left out.
    """
    batch_size = networks[0].config.data.eval_batch_size
    # a step has as many rows as with one view, unless that leaves a process without any image
    images = batch_size if views == 1 else max(batch_size // views, mesh.dp_size)
    plan = EvalPlan(catalogue.val.sizes, images, num_crops=views)
    mine = np.concatenate([some.indices[::views] for some in plan.batches(mesh.batch_slice)])
    shape, device = (len(mine), networks[0].outputs), mesh.device
    chances = torch.full(shape, -torch.inf, dtype=torch.float64, device=device)
    added = torch.zeros(len(mine), dtype=torch.int64, device=device)
    left_out: set[Any] = set()
    for network in networks:
        layout, engine, batches = lay_out(network, plan, mesh, catalogue)
        for batch in batches:
            if len(batch.indices):
                rows = torch.from_numpy(np.searchsorted(mine, batch.indices[::views])).to(device)
                each = layout.logits(batch.images).double().log_softmax(1)
                more = each.unflatten(0, (-1, views)).logsumexp(1)
                chances[rows] = torch.logaddexp(chances[rows], more)
                added[rows] += 1
        everyone = mesh.all_gather_object(engine.corrupt.pop_events())
        left_out |= {event["index"] for news in everyone for event in news}
        engine.close()

    whole = added == len(networks)
    labels = torch.from_numpy(catalogue.val.labels[mine]).to(device)
    classes, errors = ShardedClasses(shape[1]), EvalMetrics(device)
    for some, right in zip(
        chances[whole].split(batch_size), labels[whole].split(batch_size), strict=True
    ):
        errors.update(to_counts(*classes.label_ranks(some, right)))
    result: dict[str, float] = errors.compute()
    check_all_images_counted(result, len(left_out), len(catalogue.val))
    return result | ({"num_skipped": len(left_out)} if left_out else {})


def lay_out(
    network: LoadedModel, plan: EvalPlan, mesh: Mesh, catalogue: DatasetInfo
) -> tuple[Layout, Loader, Iterable[Batch]]:
    """The network with its weights, and the engine with this process's images as it wants them, in
    the steps of the ``plan``."""
    config, data = network.config, network.config.data
    plan = replace(plan, crop_fraction=network.fraction)
    engine = build_loader(
        data.loader,
        open_datasets(catalogue)[1],
        network.pixels,
        plan,
        device=mesh.device,
        max_batch_size=max(mesh.local_batch(plan.batch_size), 1) * plan.num_crops,
        threads=data.threads or mesh.threads,
        prefetch=data.prefetch,
        dali_decoder=data.dali_decoder,
        on_corrupt="skip" if data.on_corrupt_image == "skip" else "stop",
    )
    precision = resolve_precision(config.runtime.precision, mesh.device)
    configure_backends(precision, config.runtime.deterministic)
    options = LayoutConfig(plan.batch_size, precision=precision)
    layout = parallelize(network.build_on_meta(), mesh, options)
    network.fill(layout.parameters)
    return layout, engine, engine.batches(plan.batches(mesh.batch_slice))


if __name__ == "__main__":
    run_command(main)
