"""Plot the paper's figures 1, 3 and 4, and the curves of runs, as PNG and as PDF.

python -m alexnet_dist.figures RUN [RUN ...] [--only curves|1|3|4 ...] [--out DIR]

Figure 1 compares the training errors of several runs; figure 3 shows the kernels of the first
layer; figure 4 the best labels of validation images, and the training images nearest to some of
them in the last hidden layer (Krizhevsky et al. 2012, sections 3.1 and 6.1). Figures 3 and 4 are of
the first run. Another --train.seed samples other images.
"""

import os
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from alexnet_dist.config import CommandParser, positive_int
from alexnet_dist.data.datasets import SplitIndex
from alexnet_dist.data.index import open_datasets
from alexnet_dist.errors import UserError, run_command
from alexnet_dist.model import MODEL_REGISTRY, Network
from alexnet_dist.parallel.mesh import Mesh, init_distributed
from alexnet_dist.parallel.precision import Precision, autocast, use_precision
from alexnet_dist.setup import LoadedModel, load_model
from alexnet_dist.tracking import Event, plots
from alexnet_dist.tracking.console import ProgressReporter
from alexnet_dist.tracking.logger import read_events

TARGET_ERROR = 25.0
"""Training error (%) that figure 1 of the paper compares at."""

NUM_LABELED = 8
"""Images with labels in figure 4."""

Ints = NDArray[np.int64]


def main(arguments: list[str]) -> None:
    """Plot as the command line says."""
    parser = _parser()
    args = _check(parser.parse(arguments).args)
    if {"curves", "1"} & set(args.only):
        records = {run: read_events(Path(run)) for run in args.runs}
        if "curves" in args.only:
            plot_curves(args.out, records)
        if "1" in args.only:
            plot_figure1(args.out, records)
    if {"3", "4"} & set(args.only):
        model = load_model(args.runs[0], lambda config: parser.parse(arguments, config).config)
        mesh = init_distributed(model.config.runtime.device, model.config.runtime.threads)
        network = model.model(mesh.device).to(memory_format=torch.channels_last)
        if "3" in args.only:
            kernels = next(p for p in network.parameters() if p.dim() == 4).detach().cpu().numpy()
            towers = MODEL_REGISTRY[model.config.model.arch].towers
            save(args.out / "figure3", plots.plot_kernels, kernels, towers)
        if "4" in args.only:
            plot_figure4(args, model, network, mesh)


def _parser() -> CommandParser:
    parser = CommandParser("figures", __doc__)
    add = parser.add_argument
    count: dict[str, Any] = {"type": positive_int, "metavar": "N"}
    only = ("curves", "1", "3", "4")
    add("runs", nargs="*", metavar="RUN", help="a run's folder")
    add("--only", nargs="+", choices=only, help="1 is of several runs")
    add("--out", type=Path, metavar="DIR", help="RUN/figures unless given")
    add("--images", nargs="+", metavar="PATH", help="validation images to label; 8 are sampled")
    add("--queries", default=5, help="test images with neighbors (5)", **count)
    add("--neighbors", default=6, help="nearest training images of each (6)", **count)
    add("--train_images", help="search so many training images, not all", **count)
    return parser


def _check(args: Namespace) -> Namespace:
    """Check the command's own options, and fill in defaults."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("figures is one process: start it without torchrun", on_all_ranks=True)
    if not args.runs:
        raise UserError("there is nothing to plot: give the folders of one or several runs")
    for run in args.runs:
        if not Path(run).is_dir():
            raise UserError(f"there is no run at {run}: give a run's folder")
    args.only = args.only or ["curves", "3", "4", *["1"] * (len(args.runs) > 1)]
    args.out = args.out or Path(args.runs[0], "figures")
    return args


def plot_curves(out: Path, records: dict[str, list[Event]]) -> None:
    """Loss, error and learning rates of all runs."""
    for run, events in records.items():
        if not any(event["event"] == "train" for event in events):
            raise UserError(f"the records of {run} have no step of training yet: leave it out")
    save(out / "curves", plots.plot_curves, records)


def plot_figure1(out: Path, records: dict[str, list[Event]]) -> None:
    """Training error of several runs over epochs, and when each reaches TARGET_ERROR."""
    if len(records) < 2:
        raise UserError("figure 1 compares runs: give two or more, such as another with tanh")
    series = {}
    for run, events in records.items():
        known = [e for e in events if e["event"] == "epoch" and e["top1_error"] is not None]
        complete = [e for e in known if e["epoch"] == round(e["epoch"])]
        errors = {round(e["epoch"]): e["top1_error"] for e in complete}
        if not errors:
            raise UserError(f"the records of {run} have no complete epoch yet: leave it out")
        reached = epochs_to_error(errors, TARGET_ERROR)
        needed = f"more than {max(errors)}" if reached is None else f"{reached:.3g}"
        series[f"{run}: {needed} epochs to {TARGET_ERROR:g} %"] = errors
    print("\n".join(series))
    save(out / "figure1", plots.plot_figure1, series, TARGET_ERROR)


def epochs_to_error(errors: dict[int, float], target: float) -> float | None:
    """Epochs after which ``errors`` (%), by complete epochs, reach ``target``, interpolated from
    the epoch before; None where they stay above."""
    last = float("inf")
    for epoch, error in errors.items():
        if error <= target:
            return epoch - (target - error) / (last - error)
        last = error
    return None


def plot_figure4(args: Namespace, model: LoadedModel, network: Network, mesh: Mesh) -> None:
    """Validation images with their best labels; others with the nearest training images.

    Raises:
        UserError: the images are not there, or not of the network's classes.
    """
    info, config = model.scan_dataset(mesh), model.config
    generator = np.random.default_rng(config.train.seed)
    labeled = generator.permutation(len(info.val))[:NUM_LABELED]
    queries = generator.permutation(len(info.val))[: args.queries]
    candidates = np.sort(generator.permutation(len(info.train))[: args.train_images])
    if args.images:
        labeled = find_images(info.val, args.images)
    runtime = config.runtime
    precision = use_precision(runtime.precision, mesh.device, runtime.deterministic)
    extract = partial(extract_features, network, precision)
    size = max(config.data.eval_batch_size, len(labeled), args.queries, args.neighbors)
    (train_plan, train_loader), (val_plan, val_loader) = (
        model.eval_loader(mesh, dataset, size) for dataset in open_datasets(info)
    )

    def features() -> Iterator[tuple[Ints, Tensor]]:
        chunks = (candidates[at : at + size] for at in range(0, len(candidates), size))
        batches = train_loader.batches(map(train_plan.samples, chunks))
        with ProgressReporter() as progress:
            for at, batch in enumerate(batches, 1):
                done = min(at * size, len(candidates))
                progress("nearest training images", done, len(candidates))
                yield batch.indices, extract(batch.images)[0]

    with closing(train_loader), closing(val_loader):
        tests = list(val_loader.batches(map(val_plan.samples, (labeled, queries))))
        best = extract(tests[0].images)[1].softmax(1)
        nearest = knn(extract(tests[1].images)[0], features(), args.neighbors)
        found = list(train_loader.batches(map(train_plan.samples, nearest)))

    names = info.short_names
    pixels = [model.normalization.to_uint8_images(batch.images) for batch in (*tests, *found)]
    captions = [[names[n] for n in batch.labels.tolist()] for batch in (*tests, *found)]
    left = pixels[0], captions[0], plots.top_labels(best, names)
    save(args.out / "figure4-labels", plots.plot_predictions, *left)
    rows = np.concatenate([pixels[1][:, None], np.stack(pixels[2:])], 1)
    row_names = [[query, *near] for query, near in zip(captions[1], captions[2:], strict=True)]
    save(args.out / "figure4-neighbors", plots.plot_neighbors, rows, row_names)


@torch.no_grad()
def extract_features(
    network: Network, precision: Precision, images: Tensor
) -> tuple[Tensor, Tensor]:
    """Of images [B, 3, H, W] the last hidden layer [B, units], in the paper 4,096 behind the ReLU
    of fc7, and the logits [B, classes]; float32."""
    convolutions, classifier = network.split_features_classifier()
    *hidden, last = classifier.values()
    with autocast(precision, images.device):
        features = nn.Sequential(convolutions, *hidden)(images)
        return features.float(), last(features).float()


def knn(queries: Tensor, batches: Iterable[tuple[Ints, Tensor]], k: int) -> Ints:
    """Indices [q, k] of the features nearest to ``queries`` [q, units] in Euclidean distance,
    nearest first, of equal ones the first.

    ``batches``: image indices [b] with features [b, units]. Only the nearest so far are kept:
    all those of ImageNet would take 21 GB.
    """
    distances = queries.new_empty(len(queries), 0)
    indices = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for batch_indices, features in batches:
        # as a matrix product it would lose the digits that tell neighbors apart
        new = torch.cdist(queries, features, compute_mode="donot_use_mm_for_euclid_dist")
        new_indices = torch.from_numpy(batch_indices).to(queries.device).expand(len(queries), -1)
        distances, indices = torch.cat([distances, new], 1), torch.cat([indices, new_indices], 1)
        order = distances.argsort(dim=1, stable=True)[:, :k]
        distances, indices = distances.gather(1, order), indices.gather(1, order)
    return indices.cpu().numpy()


def find_images(index: SplitIndex, paths: list[str]) -> Ints:
    """Indices of images by path, or by name below the split's folder."""
    indices = {name: at for at, name in enumerate(index.names)}
    folder = Path(index.folder).resolve()
    names = [os.path.relpath(Path(p).resolve(), folder) if Path(p).exists() else p for p in paths]
    for path, name in zip(paths, names, strict=True):
        if name not in indices:
            raise UserError(f"{path} is none of the validation images of {index.folder}")
    return np.array([indices[name] for name in names], np.int64)


def save(stem: Path, plot: Callable[..., None], *what: Any) -> None:
    """``plot`` a figure as PNG and as PDF, and print where."""
    for path in (stem.with_suffix(".png"), stem.with_suffix(".pdf")):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            plot(path, *what)
        except OSError as error:
            raise UserError(f"{path} cannot be written ({error.strerror}): give --out") from None
        print(path, flush=True)


if __name__ == "__main__":
    run_command(main)
