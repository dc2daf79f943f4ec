"""The paper's figures 1, 3 and 4, and the curves of runs, as PNG and as PDF.

python -m alexnet_dist.figures RUN [RUN ...] [--out DIR] [--only curves|1|3|4 ...]
Without --only, all that the runs have the records and checkpoints for; --out is RUN/figures unless
it is given. Other options of its own: --images PATH ... (of the validation images, for figure 4's
labels; else eight are drawn), --queries N (5 test images, drawn, for figure 4's neighbours),
--neighbours N (6), --train_images N (neighbours are looked for among so many, drawn, instead of
among all), --names FILE (what to call class folders: lines such as "n01440764 tench, Tinca tinca").
Another --train.seed draws others. Krizhevsky et al. 2012, sections 3.1 and 6.1.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alexnet_dist.assembly.trained import LoadedModel
from alexnet_dist.assembly.trained import read as read_network
from alexnet_dist.config import CommandParser, Config, pop_option
from alexnet_dist.data import build_loader
from alexnet_dist.data.corrupt_images import Batch
from alexnet_dist.data.plan import SampleParams, center_crop_boxes
from alexnet_dist.data.sources import DatasetInfo, ImageDataset, open_datasets, scan_dataset
from alexnet_dist.errors import UserError, run_command
from alexnet_dist.model import MODEL_REGISTRY, Network
from alexnet_dist.parallel.mesh import Mesh, init_distributed
from alexnet_dist.parallel.precision import autocast, configure_backends, resolve_precision
from alexnet_dist.tracking import Event, paper_figures, passes, plots
from alexnet_dist.tracking.console import ProgressReporter
from alexnet_dist.tracking.logger import drop_superseded, read_events

FIGURES = ("curves", "1", "3", "4")
IMAGES, QUERIES, NEIGHBOURS, LABELS = 8, 5, 6, 5
"""How many figure 4 shows: images with labels, test images, neighbours of each, and labels."""


@dataclass(frozen=True)
class Wanted:
    """The options of this command's own, and the dotted ones that it leaves."""

    runs: list[str]
    only: list[str]
    out: Path
    images: list[str]
    queries: int
    neighbours: int
    train_images: int | None
    words: dict[str, str]
    rest: list[str]


def main(arguments: list[str]) -> None:
    """Draw as the command line says."""
    wanted = understand(arguments)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError(
            "figures are drawn by one process: start this without torchrun", on_all_ranks=True
        )
    names = _names(wanted.runs)
    drawn = [figure for figure in FIGURES if figure in wanted.only or not wanted.only]
    of_records, of_networks = {"curves", "1"} & set(drawn), {"3", "4"} & set(drawn)
    # what was asked for must be there
    records = {
        name: drop_superseded(read_events(Path(run) / "metrics.jsonl"))
        for name, run in names.items()
        if of_records and (wanted.only or (Path(run) / "metrics.jsonl").is_file())
    }
    networks = {
        name: read_network(run, partial(_config, wanted.rest))
        for name, run in names.items()
        if of_networks and (wanted.only or (Path(run) / "checkpoints" / "last").exists())
    }
    if not records and not networks:
        raise UserError(
            f"{wanted.runs[0]} has neither records nor checkpoints: give a run's folder"
        )
    if "curves" in drawn and records:
        draw_curves(wanted, records)
    comparable = len(records) > 1 and all(passes.errors(events)[0] for events in records.values())
    if "1" in wanted.only or ("1" in drawn and comparable):
        draw_figure1(wanted, records)
    if not networks:
        return
    runtime = next(iter(networks.values())).config.runtime
    mesh = init_distributed(runtime.device, runtime.threads)
    for name, network in networks.items():
        which = "" if len(networks) == 1 else f"-{name.replace('/', '-')}"
        if "3" in drawn:
            draw_figure3(wanted, network, which)
        if "4" in drawn:
            draw_figure4(wanted, network, mesh, which)


def understand(arguments: list[str]) -> Wanted:
    """The command line.

    Raises:
        Failure: a run, an option or a value that there is not.
        SystemExit: --help was asked for.
    """
    runs = [*takewhile(lambda word: not word.startswith("-"), arguments)]
    values, rest = {}, arguments[len(runs) :]
    for name in ("out", "only", "images", "queries", "neighbours", "train_images", "names"):
        values[name], rest = pop_option(rest, name)
    _config(rest, None)  # which may be asked for --help, and knows what is misspelt
    if not runs:
        raise UserError("there is nothing to draw: name one or several runs' folders first")
    for run in runs:
        if not Path(run).is_dir():
            raise UserError(f"there is no run at {run}: give a run's folder")
    for figure in values["only"]:
        if figure not in FIGURES:
            raise UserError(f"there is no figure {figure}: --only takes {', '.join(FIGURES)}")

    def one(name: str) -> str | None:
        if len(values[name]) > 1:
            raise UserError(
                f"--{name} takes one value, not {' '.join(values[name])}: runs come before options"
            )
        return values[name][0] if values[name] else None

    def number(name: str, default: int) -> int:
        word = one(name)
        if word is None:
            return default
        if not word.isdecimal() or int(word) < 1:
            raise UserError(f"--{name} wants a whole number from 1 on, not {word}")
        return int(word)

    return Wanted(
        runs,
        values["only"],
        Path(one("out") or Path(runs[0]) / "figures"),
        values["images"],
        number("queries", QUERIES),
        number("neighbours", NEIGHBOURS),
        number("train_images", 0) or None,
        _read_words(one("names")),
        rest,
    )


def draw_curves(wanted: Wanted, records: dict[str, list[Event]]) -> None:
    """The runs by passes, in one figure.

    Raises:
        Failure: a run has no records of training.
    """
    for name, events in records.items():
        if not any(event["event"] == "train" for event in events):
            raise UserError(f"the records of {name} have no step of training yet: leave it out")
    _draw(wanted, "curves", lambda path: plots.curves(path, records))


def draw_figure1(wanted: Wanted, records: dict[str, list[Event]]) -> None:
    """Training error of two or more runs by passes, and when each reaches 25 %.

    Raises:
        Failure: there is one run only, or one without a whole pass.
    """
    if len(records) < 2:
        raise UserError(
            "figure 1 compares runs, and here is one: give two or more, such as one with ReLU and "
            "one with tanh"
        )
    lines = {
        name: (passes.errors(events), passes.fine_errors(events))
        for name, events in records.items()
    }
    for name, (whole, _) in lines.items():
        if not whole[0]:
            raise UserError(
                f"the records of {name} have no whole pass yet: train on, or leave it out"
            )
    result = passes.compare({name: whole for name, (whole, _) in lines.items()})
    title = passes.verdict(result)
    _draw(wanted, "figure1", lambda path: paper_figures.training_error(path, lines, title))
    for run in result:
        whole, _ = lines[run["name"]]
        run["errors"] = dict(zip(*whole, strict=True))
        run |= _origin(records[run["name"]])
    record = json.dumps({"training_error": passes.LEVEL, "runs": result}, indent=1) + "\n"
    _write(wanted.out / "figure1.json", lambda path: path.write_text(record))


def _origin(events: list[Event]) -> dict[str, Any]:
    """What a run was, and what it was computed by."""
    start = next((event for event in events if event["event"] == "start"), {})
    config = start.get("config", {})
    kept = {"variant": ("model", "arch"), "lr": ("optim", "lr"), "seed": ("train", "seed")}
    known = {name: config.get(room, {}).get(option) for name, (room, option) in kept.items()}
    facts = ("train_images", "world_size", "device", "precision", "versions")
    return known | {name: start[name] for name in facts if name in start}


def draw_figure3(wanted: Wanted, network: LoadedModel, which: str) -> None:
    """The kernels of the first layer, tower by tower.

    Raises:
        Failure: they do not read an image's three colours.
    """
    variant = network.config.model.arch
    layers = network.build_on_meta().named_parameters()
    name, first = next((name, p) for name, p in layers if p.dim() > 1)
    if first.dim() != 4 or first.shape[1] != 3:
        raise UserError(
            f"{name} of {variant} does not read the three colours of an image: leave out figure 3"
        )
    weights = torch.nn.Parameter(torch.empty(first.shape))
    network.fill({name: weights})
    towers, shown = MODEL_REGISTRY[variant].towers, weights.detach().numpy()
    _draw(wanted, f"figure3{which}", lambda path: plots.kernels(path, shown, towers))


def draw_figure4(wanted: Wanted, network: LoadedModel, mesh: Mesh, which: str) -> None:
    """Validation images with their five best labels; test images and the nearest training images.

    The validation images serve as test images.

    Raises:
        Failure: the images are not there, or not those of the network's classes.
    """
    data, runtime = network.config.data, network.config.runtime
    catalogue = scan_dataset(data.root, data.cache_dir, ProgressReporter())
    if catalogue.val.classes != network.classes:
        raise UserError(
            f"the classes of {catalogue.val.folder} are not those that {network.path} was trained "
            "on: give --data.root a folder with the same class folders"
        )
    chosen = find_images(catalogue, wanted.images)
    draw = np.random.default_rng(network.config.train.seed)
    shown = draw.permutation(len(catalogue.val))[:IMAGES]
    queries = draw.permutation(len(catalogue.val))[: wanted.queries]
    among = np.sort(draw.permutation(len(catalogue.train))[: wanted.train_images])

    precision = resolve_precision(runtime.precision, mesh.device)
    configure_backends(precision, runtime.deterministic)
    eye = Eye(network.model(mesh.device), precision)
    train, val = (Views(source, network, mesh) for source in open_datasets(catalogue))
    names = [wanted.words.get(name, name) for name in network.classes]
    names += [f"class {n}" for n in range(len(names), network.outputs)]

    _draw_labels(wanted, which, eye, val.of(chosen if len(chosen) else shown), val, names)
    _draw_neighbours(wanted, which, eye, val.of(queries), train, among, names)
    train.close()
    val.close()


def _draw_labels(
    wanted: Wanted, which: str, eye: "Eye", batch: Batch, views: "Views", names: list[str]
) -> None:
    pixels, labels = views.seen(batch), batch.labels.tolist()
    chances = eye.scores(batch.images).softmax(1)
    rows = [
        [(names[n], float(row[n]), n == label) for n in row.argsort(descending=True)[:LABELS]]
        for row, label in zip(chances.cpu(), labels, strict=True)
    ]
    truths = [names[label] for label in labels]
    _draw(
        wanted,
        f"figure4-labels{which}",
        lambda path: paper_figures.guesses(path, pixels, truths, rows),
    )


def _draw_neighbours(
    wanted: Wanted,
    which: str,
    eye: "Eye",
    batch: Batch,
    views: "Views",
    among: NDArray[np.int64],
    names: list[str],
) -> None:
    features = ((one.numbers, eye.features(one.images)) for one in views.batches(among))
    numbers, _ = nearest(eye.features(batch.images), features, wanted.neighbours)
    rows = [views.of(row) for row in numbers]
    found = [views.seen(row) for row in rows]
    pixels, labels = views.seen(batch), batch.labels.tolist()
    captions = [
        [(names[n], n == label) for n in row.labels.tolist()]
        for row, label in zip(rows, labels, strict=True)
    ]
    truths = [names[label] for label in labels]
    _draw(
        wanted,
        f"figure4-neighbours{which}",
        lambda path: paper_figures.neighbours(path, pixels, truths, found, captions),
    )


class Eye:
    """What a network makes of images: its scores, and the activations that they are made from.

    Those are the outputs of the last hidden layer, 4,096 behind the ReLU of fc7, with dropout as
    it is at test.
    """

    def __init__(self, model: Network, precision: Any) -> None:
        self._convolutions, behind = model.split_features_classifier()
        *self._hidden, self._last = behind.values()
        self._lower = lambda images: autocast(precision, images.device)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """float32 [b, units]."""
        with self._lower(images):
            x = self._convolutions(images)
            for layer in self._hidden:
                x = layer(x)
        return x.float()

    @torch.no_grad()
    def scores(self, images: Tensor) -> Tensor:
        """float32 [b, classes]."""
        features = self.features(images)
        with self._lower(images):
            return self._last(features).float()


class Views:
    """The central views of a split's images, as the network reads them, by number."""

    def __init__(self, source: ImageDataset, network: LoadedModel, mesh: Mesh) -> None:
        data = network.config.data
        self._sizes, self._fraction = source.index.sizes, network.fraction
        self._batch, self._pixels = data.eval_batch_size, network.pixels
        self._engine = build_loader(
            data.loader,
            source,
            self._pixels,
            plan=None,
            fraction=network.fraction,
            max_batch=data.eval_batch_size,
            device=mesh.device,
            decoder=data.dali_decoder,
            threads=data.threads or mesh.threads,
            ahead=data.prefetch,
            policy="omit" if data.on_corrupt_image == "skip" else "stop",
        )

    def steps(self, numbers: NDArray[np.int64]) -> int:
        """Batches that so many images make."""
        return -(-len(numbers) // self._batch)

    def batches(self, numbers: NDArray[np.int64]) -> Iterator[Batch]:
        """The images in this order; those that are to be skipped are left out."""
        parts = (numbers[at : at + self._batch] for at in range(0, len(numbers), self._batch))
        return self._engine.batches(map(self._draws, parts))

    def of(self, numbers: NDArray[np.int64]) -> Batch:
        """A few images as one batch."""
        parts = [*self.batches(numbers)]
        return Batch(
            torch.cat([part.images for part in parts]),
            torch.cat([part.labels for part in parts]),
            np.concatenate([part.numbers for part in parts]),
        )

    def seen(self, batch: Batch) -> NDArray[np.uint8]:
        """A batch as people see it, [b, H, W, 3]."""
        return self._pixels.seen(batch.images)

    def close(self) -> None:
        self._engine.close()

    def _draws(self, numbers: NDArray[np.int64]) -> SampleParams:
        def boxes_of(numbers: NDArray[np.int64]) -> NDArray[np.int64]:
            return center_crop_boxes(self._sizes[numbers], self._fraction)

        none = np.zeros(len(numbers), np.bool_)
        return SampleParams(numbers, boxes_of(numbers), none, np.zeros((len(numbers), 3)), boxes_of)


def nearest(
    queries: Tensor, batches: Iterable[tuple[NDArray[np.int64], Tensor]], count: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Of each of ``queries`` [q, units] the numbers and Euclidean distances [q, count] of the
    features nearest to it, nearest first, of equal ones the first.

    ``batches`` are images' numbers with their features [b, units], of which no more are kept than
    the answer: those of ImageNet would take 21 GB.
    """
    distances = queries.new_empty(len(queries), 0)
    numbers = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for of, features in batches:
        # the way of a matrix product loses the digits that tell neighbours apart
        more = torch.cdist(queries, features, compute_mode="donot_use_mm_for_euclid_dist")
        those = torch.from_numpy(of).to(queries.device).expand(len(queries), -1)
        distances = torch.cat([distances, more], 1)
        numbers = torch.cat([numbers, those], 1)
        order = distances.argsort(dim=1, stable=True)[:, :count]
        distances, numbers = distances.gather(1, order), numbers.gather(1, order)
    return numbers.cpu().numpy(), distances.cpu().numpy()


def find_images(catalogue: DatasetInfo, paths: list[str]) -> NDArray[np.int64]:
    """The numbers of validation images by path, or by their name below the split's folder.

    Raises:
        Failure: one is none of them.
    """
    numbers = {name: number for number, name in enumerate(catalogue.val.names)}
    folder = Path(catalogue.val.folder)
    found = []
    for path in paths:
        whole = Path(path).resolve()
        below = whole.is_relative_to(folder.resolve())
        name = whole.relative_to(folder.resolve()).as_posix() if below else path
        if name not in numbers:
            raise UserError(
                f"{path} is none of the validation images of {folder}: --images takes their paths"
            )
        found.append(numbers[name])
    return np.array(found, np.int64)


def _config(words: list[str], underneath: dict[str, Any] | None) -> Config:
    return CommandParser("figures", __doc__).parse(words, underneath).config


def _names(runs: list[str]) -> dict[str, str]:
    """What to call each run: its folder's name, or its whole path where two have the same."""
    short = [Path(run).resolve().name for run in runs]
    return {
        name if short.count(name) == 1 else run: run for name, run in zip(short, runs, strict=True)
    }


def _read_words(path: str | None) -> dict[str, str]:
    """What to call class folders, of a file with a folder's name and its words in each line."""
    if path is None:
        return {}
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        raise UserError(
            f"{path} cannot be read: --names takes a text file of lines such as "
            "'n01440764 tench, Tinca tinca'"
        ) from None
    pairs = (line.split(maxsplit=1) for line in lines)
    return {pair[0]: pair[1].strip() for pair in pairs if len(pair) == 2}


def _draw(wanted: Wanted, stem: str, draw: Callable[[Path], object]) -> None:
    for ending in (".png", ".pdf"):
        _write(wanted.out / f"{stem}{ending}", draw)


def _write(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file, and say where it is."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path)
    except OSError as error:
        raise UserError(
            f"{path} could not be written ({error.strerror}): give another --out"
        ) from None
    print(path, flush=True)


if __name__ == "__main__":
    run_command(main)
