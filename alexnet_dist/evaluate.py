"""Exact top-1 and top-5 error of a checkpoint on the validation images, on any number of processes.

python -m alexnet_dist.evaluate --checkpoint RUN [RUN ...] [--ten_crop] [--data.root DIR]
The probabilities of several checkpoints are averaged, as the paper does with five networks
(Krizhevsky et al. 2012, section 6), and with --ten_crop those of ten crops of each image: corners,
center, and their horizontal flips (section 4.1). Options are those that the checkpoint was trained
with, unless given here. The last line is JSON: top1_error and top5_error in percent, loss, images.
"""

import contextlib
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from alexnet_dist.config import CommandParser, Config
from alexnet_dist.data.corrupt_images import Loader
from alexnet_dist.data.datasets import DatasetInfo, open_datasets, scan_dataset
from alexnet_dist.data.plan import EvalPlan, NumCrops
from alexnet_dist.errors import UserError, run_command
from alexnet_dist.loaded_model import LoadedModel, load_model
from alexnet_dist.parallel.mesh import Mesh, init_distributed
from alexnet_dist.parallel.sharded_loss import ShardedClasses, to_counts
from alexnet_dist.setup import loader_for
from alexnet_dist.tracking.console import ProgressReporter
from alexnet_dist.training.evaluation import EvalMetrics, check_all_images_counted, evaluate


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
    parser.add_argument("--ten_crop", action="store_true", help="average ten crops of each image")
    args = parser.parse(arguments).args
    models = load_models(args.checkpoint, lambda kept: parser.parse(arguments, kept).config)
    runtime, data = models[0].config.runtime, models[0].config.data
    mesh = init_distributed(runtime.device, runtime.threads).with_layout(1)
    info = mesh.broadcast_from_rank0(
        lambda: scan_dataset(data.root, data.cache_dir, ProgressReporter())
    )
    if not models[0].has_same_classes(info.val.classes):
        raise UserError(
            f"the classes of {info.val.folder} are not those that {models[0].path} was trained on: "
            "give --data.root a folder with the same class folders",
            on_all_ranks=True,
        )
    if len(models) == 1 and not args.ten_crop:
        result = evaluate_one(models[0], mesh, info)
    else:
        result = evaluate_average(models, 10 if args.ten_crop else 1, mesh, info)
        result |= {"checkpoints": len(models), "num_crops": 10 if args.ten_crop else 1}
    if mesh.rank == 0:
        print(json.dumps(result), flush=True)


def load_models(paths: list[str], options: Callable[[dict[str, Any]], Config]) -> list[LoadedModel]:
    """The models at ``paths``, with ``options`` made from those that they were trained with.

    The data are read as the first model's options say, but each model has its own image_size and
    resize_size.

    Raises:
        UserError: there is no such checkpoint, or their classes differ.
    """
    models: list[LoadedModel] = []
    for path in paths:
        model = load_model(path, options)
        own = model.config.data
        first = models[0].config.data if models else own
        data = replace(first, image_size=own.image_size, resize_size=own.resize_size)
        models.append(replace(model, config=replace(model.config, data=data)))
    for model in models[1:]:
        if (model.classes, model.num_outputs) != (models[0].classes, models[0].num_outputs):
            raise UserError(
                f"{model.path} has other classes than {models[0].path}, and their probabilities "
                "have no average: give checkpoints that were trained on the same classes",
                on_all_ranks=True,
            )
    return models


def evaluate_one(model: LoadedModel, mesh: Mesh, info: DatasetInfo) -> dict[str, float]:
    """Errors of one model on the center crops of the validation images."""
    plan = EvalPlan(info.val.sizes, model.config.data.eval_batch_size, model.crop_fraction)
    layout = model.layout(mesh, plan.batch_size)
    with contextlib.closing(_loader(model, mesh, info, plan)) as loader:
        result = evaluate(layout, loader.batches(plan.batches(mesh.batch_slice)), mesh.device)
        return _count(result, len(_skipped(loader, mesh)), info)


def evaluate_average(
    models: list[LoadedModel], num_crops: NumCrops, mesh: Mesh, info: DatasetInfo
) -> dict[str, float]:
    """Errors of the probabilities averaged over the models and the crops of the validation images.

    One model after another sees all images. Each rank keeps the logarithms of its own images'
    summed probabilities in float64 [images of the rank, classes]: 400 MB over all ranks for
    ImageNet. An image that one model has to skip is skipped.
    """
    eval_batch_size = models[0].config.data.eval_batch_size
    # a batch has as many crops as with one crop, but an image for each rank at least
    batch = eval_batch_size if num_crops == 1 else max(eval_batch_size // num_crops, mesh.dp_size)
    plan = EvalPlan(info.val.sizes, batch, num_crops=num_crops)
    mine = np.concatenate([s.indices[::num_crops] for s in plan.batches(mesh.batch_slice)])
    shape, device = (len(mine), models[0].num_outputs), mesh.device
    log_probs = torch.full(shape, -torch.inf, dtype=torch.float64, device=device)
    added = torch.zeros(len(mine), dtype=torch.int64, device=device)
    skipped: set[Any] = set()
    for model in models:
        model_plan = replace(plan, crop_fraction=model.crop_fraction)
        layout = model.layout(mesh, batch)
        with contextlib.closing(_loader(model, mesh, info, model_plan)) as loader:
            for images in loader.batches(model_plan.batches(mesh.batch_slice)):
                if len(images.indices):
                    rows = np.searchsorted(mine, images.indices[::num_crops])
                    at = torch.from_numpy(rows).to(device)
                    crops = layout.logits(images.images).double().log_softmax(1)
                    summed = crops.unflatten(0, (-1, num_crops)).logsumexp(1)
                    log_probs[at] = torch.logaddexp(log_probs[at], summed)
                    added[at] += 1
            skipped |= _skipped(loader, mesh)

    complete = added == len(models)
    labels = torch.from_numpy(info.val.labels[mine]).to(device)[complete]
    classes, metrics = ShardedClasses(shape[1]), EvalMetrics(device)
    for some, correct in zip(
        log_probs[complete].split(eval_batch_size), labels.split(eval_batch_size), strict=True
    ):
        metrics.update(to_counts(*classes.label_ranks(some, correct)))
    return _count(metrics.compute(), len(skipped), info)


def _loader(model: LoadedModel, mesh: Mesh, info: DatasetInfo, plan: EvalPlan) -> Loader:
    return loader_for(model.config, mesh, open_datasets(info)[1], model.normalization, plan)


def _skipped(loader: Loader, mesh: Mesh) -> set[Any]:
    """Indices of the images that any rank's loader has skipped."""
    ranks = mesh.all_gather_object(loader.corrupt.pop_events())
    return {event["index"] for events in ranks for event in events}


def _count(result: dict[str, float], skipped: int, info: DatasetInfo) -> dict[str, float]:
    check_all_images_counted(result, skipped, len(info.val))
    return result | ({"num_skipped": skipped} if skipped else {})


if __name__ == "__main__":
    run_command(main)
