"""The best labels of images, by a trained network.

python -m alexnet_dist.predict IMAGE|FOLDER|GLOB... --checkpoint RUN [--ten_crop] [--json FILE]
Each image's path and five best labels as text, as JSON lines, as a picture. "-" reads paths from
standard input, one a line. An image that cannot be read is named, the others are done, and the exit
code is 1. Dotted options are those of the trainer: --runtime.device cpu.
"""

import contextlib
import json
import sys
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from alexnet_dist.assembly.trained import LoadedModel, read
from alexnet_dist.config import CommandParser
from alexnet_dist.data.photographs import (
    LoadedImage,
    expand_paths,
    iter_batches,
    normalize_crops,
)
from alexnet_dist.errors import UserError, print_error, run_command
from alexnet_dist.parallel import LayoutConfig, parallelize
from alexnet_dist.parallel.mesh import Mesh, init_distributed
from alexnet_dist.parallel.precision import configure_backends, resolve_precision
from alexnet_dist.tracking.plots import plot_predictions

PICTURED = 60
"""Images that a picture shows at most."""


@dataclass(frozen=True)
class Answer:
    """An image's best labels with their probabilities, best first, and its central view."""

    path: str
    labels: list[str]
    probabilities: list[float]
    seen: NDArray[np.uint8]


def main(arguments: list[str]) -> None:
    """Predict as the command line says."""
    parser = _parser()
    words = parser.parse(arguments).args
    _check(words)
    network = read(words.checkpoint, lambda kept: parser.parse(arguments, kept).config)
    runtime = network.config.runtime
    mesh = init_distributed(runtime.device, runtime.threads)
    if mesh.world_size > 1:
        raise UserError("predict is one process: start it without torchrun", on_all_ranks=True)
    files = expand_paths(_lines(words.images))
    pictured: list[Answer] = []
    good = bad = 0
    with contextlib.ExitStack() as stack:
        record = _json_file(words.json, stack)
        for one in answers(
            network, mesh, files, 10 if words.ten_crop else 1, words.top, words.batch
        ):
            if isinstance(one, LoadedImage):
                print_error(f"{one.path} cannot be read ({one.error}): it is left out")
                bad += 1
                continue
            good += 1
            if record is not None:
                plain = {"path": one.path, "labels": one.labels, "probabilities": one.probabilities}
                print(json.dumps(plain), file=record, flush=True)
            if words.json != "-":
                print(text(one), flush=True)
            if words.save_image and good <= PICTURED:
                pictured.append(one)
    if pictured:
        _draw(Path(words.save_image), pictured, network, good)
    if bad or not good:
        if not bad:
            raise UserError("there is no image to predict: standard input names none")
        raise SystemExit(1)


def answers(
    network: LoadedModel, mesh: Mesh, files: Iterator[str], views: Any, top: int, batch: int
) -> Iterator[Answer | LoadedImage]:
    """The answer for each file, in order; what cannot be read comes back as it is.

    Args:
        views: 1 or 10, whose probabilities are averaged.
        batch: views that the network is given at once.
    """
    config = network.config
    precision = resolve_precision(config.runtime.precision, mesh.device)
    configure_backends(precision, config.runtime.deterministic)
    layout = parallelize(network.build_on_meta(), mesh, LayoutConfig(batch, precision=precision))
    network.fill(layout.parameters)
    labels, top = network.labels, min(top, network.outputs)
    for some in iter_batches(
        files,
        network.fraction,
        config.data.image_size,
        views,
        batch_size=max(batch // views, 1),
        threads=config.data.threads or mesh.threads,
    ):
        seen = [one.crops for one in some if one.crops is not None]
        if seen:
            scores = layout.logits(normalize_crops(torch.cat(seen), network.pixels, mesh.device))
            chances = scores.double().softmax(1).reshape(len(seen), views, -1).mean(1)
            best = chances.topk(top)
            found = iter(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        for one in some:
            if one.crops is None:
                yield one
                continue
            numbers, values = next(found)
            central = one.crops[(views - 1) // 2].permute(1, 2, 0).numpy()
            yield Answer(one.path, [labels[number] for number in numbers], values, central)


def text(answer: Answer) -> str:
    """An answer for people."""
    rows = zip(answer.labels, answer.probabilities, strict=True)
    return "\n".join([answer.path, *(f"  {100 * value:6.2f} %  {label}" for label, value in rows)])


def _parser() -> CommandParser:
    parser = CommandParser("predict", __doc__)
    add = parser.add_argument
    add("images", nargs="+", metavar="IMAGE", help="a file, a folder, a pattern, or -")
    what = "a run, a checkpoint, an export, torchvision's weights"
    add("--checkpoint", required=True, metavar="RUN", help=what)
    add("--ten_crop", action="store_true", help="average ten crops, as in the paper")
    add("--top", type=int, default=5, metavar="N", help="labels for each image (5)")
    add("--json", metavar="FILE", help="JSON lines; - for standard output instead of text")
    add("--save_image", metavar="FILE.png", help=f"the first {PICTURED} images with their labels")
    add("--batch", type=int, default=64, metavar="N", help="views in a step (64)")
    return parser


def _check(words: Namespace) -> None:
    for name in ("top", "batch"):
        if getattr(words, name) < 1:
            raise UserError(f"--{name} is {getattr(words, name)}; it must be at least 1")
    if words.save_image and Path(words.save_image).suffix not in (".png", ".pdf"):
        raise UserError(f"--save_image {words.save_image} must end in .png or .pdf")
    for name in ("json", "save_image"):
        file = getattr(words, name)
        if file and not Path(file).absolute().parent.is_dir():
            raise UserError(f"--{name} {file} has no folder to lie in: make it first")


def _lines(words: list[str]) -> Iterator[str]:
    """The words, and in the place of - those of standard input."""
    for word in words:
        if word == "-":
            yield from filter(None, (line.rstrip("\r\n") for line in sys.stdin))
        else:
            yield word


def _json_file(name: str | None, stack: contextlib.ExitStack) -> Any:
    if name is None or name == "-":
        return sys.stdout if name else None
    try:
        return stack.enter_context(open(name, "w", encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--json {name} cannot be written ({error.strerror})") from None


def _draw(path: Path, pictured: list[Answer], network: LoadedModel, good: int) -> None:
    title = f"{network.config.model.arch}, {network.path.name}"
    if good > len(pictured):
        title += f": the first {len(pictured)} of {good} images"
    try:
        plot_predictions(
            path,
            [one.seen for one in pictured],
            [Path(one.path).name for one in pictured],
            [list(zip(one.labels, one.probabilities, strict=True)) for one in pictured],
            title,
        )
    except OSError as error:
        raise UserError(f"--save_image {path} cannot be written ({error.strerror})") from None


if __name__ == "__main__":
    run_command(main)
