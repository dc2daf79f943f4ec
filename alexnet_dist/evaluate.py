"""Exact top-1 and top-5 error of a checkpoint on the validation images, on any number of processes.

python -m alexnet_dist.evaluate --checkpoint RUN [RUN ...] [--ten_crop] [--data.root DIR]
The probabilities of several checkpoints are averaged, as the paper does with five networks
(Krizhevsky et al. 2012, section 6), and with --ten_crop those of ten crops of each image: corners,
center, and their horizontal flips (section 4.1). Options are those that the checkpoint was trained
with, unless given here. The last line is JSON: top1_error and top5_error in percent, loss, images.
"""

import json
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from alexnet_dist.config import CommandParser, Config
from alexnet_dist.data.datasets import ImageDataset
from alexnet_dist.data.eval_plan import EvalPlan, NumCrops
from alexnet_dist.data.index import open_datasets
from alexnet_dist.data.loader import Loader
from alexnet_dist.errors import UserError, run_command
from alexnet_dist.parallel.mesh import Mesh, init_distributed
from alexnet_dist.parallel.sharded_loss import eval_counts
from alexnet_dist.parallel.sharding import ShardSpec
from alexnet_dist.setup import LoadedModel, load_model
from alexnet_dist.training.evaluation import EvalMetrics, count_skipped


def main(arguments: list[str]) -> None:
    """Evaluate as the command line says."""
    parser = CommandParser("evaluate", __doc__)
    a_run = "a run's folder, whose best checkpoint it is, or one of its checkpoints"
    parser.add_argument("--checkpoint", nargs="+", required=True, metavar="RUN", help=a_run)
    parser.add_argument("--ten_crop", action="store_true", help="average ten crops of each image")
    args = parser.parse(arguments).args
    models = load_models(args.checkpoint, lambda kept: parser.parse(arguments, kept).config)
    runtime = models[0].config.runtime
    mesh = init_distributed(runtime.device, runtime.threads).with_layout(1)
    dataset = open_datasets(models[0].scan_dataset(mesh, only_val=True))[1]
    num_crops: NumCrops = 10 if args.ten_crop else 1
    if len(models) == num_crops == 1:
        result = evaluate_one(models[0], mesh, dataset)
    else:
        result = evaluate_average(models, num_crops, mesh, dataset)
        result |= {"checkpoints": len(models), "num_crops": num_crops}
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
        own, first = model.config.data, (models or [model])[0]
        data = replace(first.config.data, image_size=own.image_size, resize_size=own.resize_size)
        models.append(replace(model, config=replace(model.config, data=data)))
        if model.labels != first.labels:
            raise UserError(
                f"{model.path} has other classes than {first.path}, and their probabilities "
                "have no average: give checkpoints that were trained on the same classes",
                on_all_ranks=True,
            )
    return models


def evaluate_one(model: LoadedModel, mesh: Mesh, dataset: ImageDataset) -> dict[str, float]:
    """Errors of one model on the center crops of the images."""
    batch_size = model.config.data.eval_batch_size
    layout, metrics = model.layout(mesh, batch_size), EvalMetrics(mesh.device)
    plan, loader = model.eval_loader(mesh, dataset, batch_size)
    with closing(loader):
        for batch in loader.batches(plan.batches(mesh.batch_slice)):
            metrics.update(layout.eval_counts(batch.images, batch.labels))
        skipped = _skipped(loader, mesh)
    return count_skipped(metrics.compute(), len(skipped), len(dataset.index))


def evaluate_average(
    models: list[LoadedModel], num_crops: NumCrops, mesh: Mesh, dataset: ImageDataset
) -> dict[str, float]:
    """Errors of the probabilities averaged over the models and the crops of the images.

    One model after another sees all images. Each rank keeps the logarithms of its own images'
    summed probabilities in float64 [images of the rank, classes]: 400 MB over all ranks for
    ImageNet. An image that one model has to skip is skipped.
    """
    eval_batch_size = models[0].config.data.eval_batch_size
    # a batch has as many crops as with one crop, but an image for each rank at least
    batch_size = max(eval_batch_size // num_crops, mesh.dp_size)
    plan = EvalPlan(dataset.index.sizes, batch_size)
    mine = np.concatenate([samples.indices for samples in plan.batches(mesh.batch_slice)])
    shape, device = (len(mine), len(models[0].labels)), mesh.device
    log_probs = torch.full(shape, -torch.inf, dtype=torch.float64, device=device)
    added = torch.zeros(len(mine), dtype=torch.int64, device=device)
    skipped: set[Any] = set()
    for model in models:
        layout = model.layout(mesh, batch_size)
        plan, loader = model.eval_loader(mesh, dataset, batch_size, num_crops)
        with closing(loader):
            for batch in loader.batches(plan.batches(mesh.batch_slice)):
                rows = np.searchsorted(mine, batch.indices[::num_crops])
                at = torch.from_numpy(rows).to(device)
                crops = layout.logits(batch.images).double().log_softmax(1)
                summed = crops.unflatten(0, (-1, num_crops)).logsumexp(1)
                log_probs[at] = torch.logaddexp(log_probs[at], summed)
                added[at] += 1
            skipped |= _skipped(loader, mesh)

    complete = added == len(models)
    labels = torch.from_numpy(dataset.index.labels[mine]).to(device)[complete]
    classes, metrics = ShardSpec(shape[1]), EvalMetrics(device)
    parts = (tensor.split(eval_batch_size) for tensor in (log_probs[complete], labels))
    for some, correct in zip(*parts, strict=True):
        metrics.update(eval_counts(some, correct, classes))
    return count_skipped(metrics.compute(), len(skipped), len(dataset.index))


def _skipped(loader: Loader, mesh: Mesh) -> set[Any]:
    """Indices of the images that any rank's loader has skipped."""
    ranks = mesh.all_gather_object(loader.corrupt.pop_events())
    return {event["index"] for events in ranks for event in events}


if __name__ == "__main__":
    run_command(main)
