"""The most likely labels of images, by a trained network.

python -m alexnet_dist.predict IMAGE|FOLDER|GLOB... --checkpoint RUN [--ten_crop] [--json FILE]
For each image its path and its five most likely labels with their probabilities, as text, as JSON
lines, as a picture. "-" reads paths from standard input, one a line. An image that cannot be read
is named, the others are done, and the exit code is 1. Dotted options are those of the trainer:
--runtime.device cpu.
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

from alexnet_dist.config import CommandParser
from alexnet_dist.data.photographs import LoadedImage, expand_paths, iter_batches, normalize_crops
from alexnet_dist.data.plan import NumCrops
from alexnet_dist.errors import UserError, print_error, run_command
from alexnet_dist.loaded_model import LoadedModel, load_model
from alexnet_dist.parallel.mesh import Mesh, init_distributed
from alexnet_dist.tracking import plots

MAX_IMAGES_IN_FIGURE = 60
NUM_CROPS: tuple[NumCrops, NumCrops] = (1, 10)


@dataclass(frozen=True)
class Prediction:
    """An image's most likely labels, best first, their probabilities, and its center crop,
    uint8 [H, W, 3]."""

    path: str
    labels: list[str]
    probabilities: list[float]
    pixels: NDArray[np.uint8]

    def __str__(self) -> str:
        rows = zip(self.probabilities, self.labels, strict=True)
        return "\n".join([self.path, *(f"  {100 * prob:6.2f} %  {label}" for prob, label in rows)])


def main(arguments: list[str]) -> None:
    """Predict as the command line says."""
    parser = _parser()
    args = parser.parse(arguments).args
    _check(args)
    model = load_model(args.checkpoint, lambda kept: parser.parse(arguments, kept).config)
    mesh = init_distributed(model.config.runtime.device, model.config.runtime.threads)
    if mesh.world_size > 1:
        raise UserError("predict is one process: start it without torchrun", on_all_ranks=True)
    shown: list[Prediction] = []
    good = bad = 0
    with contextlib.ExitStack() as stack:
        file: Any = sys.stdout if args.json == "-" else None
        if args.json and args.json != "-":
            file = stack.enter_context(Path(args.json).open("w"))
        for found in predict(model, mesh.with_layout(1), args):
            if isinstance(found, LoadedImage):
                print_error(f"{found.path} cannot be read ({found.error}): it is skipped")
                bad += 1
                continue
            good += 1
            if file:
                record: dict[str, Any] = {"path": found.path, "labels": found.labels}
                record["probabilities"] = found.probabilities
                print(json.dumps(record), file=file, flush=True)
            if args.json != "-":
                print(found, flush=True)
            if args.save_image and good <= MAX_IMAGES_IN_FIGURE:
                shown.append(found)
    if shown:
        best = [list(zip(p.labels, p.probabilities, strict=True)) for p in shown]
        names = [Path(p.path).name for p in shown]
        title = f"{model.config.model.arch}, {model.path.name}: {len(shown)} of {good} images"
        try:
            plots.plot_predictions(
                Path(args.save_image), [p.pixels for p in shown], names, best, title
            )
        except OSError as error:
            message = f"--save_image {args.save_image} cannot be written ({error.strerror})"
            raise UserError(message) from None
    if not good and not bad:
        raise UserError("there is no image to predict: standard input names none")
    if bad:
        raise SystemExit(1)


def predict(model: LoadedModel, mesh: Mesh, args: Namespace) -> Iterator[Prediction | LoadedImage]:
    """The prediction for each image, in order; one that cannot be read comes back as it is."""
    data, num_crops = model.config.data, NUM_CROPS[args.ten_crop]
    layout, labels = model.layout(mesh, args.batch), model.labels
    words = (line for word in args.images for line in (sys.stdin if word == "-" else [word]))
    for images in iter_batches(
        expand_paths(filter(None, (word.rstrip("\r\n") for word in words))),
        model.crop_fraction,
        data.image_size,
        num_crops,
        batch_size=max(args.batch // num_crops, 1),
        threads=data.threads or mesh.threads,
    ):
        crops = [image.crops for image in images if image.crops is not None]
        top: Iterator[tuple[list[int], list[float]]] = iter(())
        if crops:
            normalized = normalize_crops(torch.cat(crops), model.normalization, mesh.device)
            probs = (
                layout.logits(normalized).double().softmax(1).unflatten(0, (-1, num_crops)).mean(1)
            )
            best = probs.topk(min(args.top, model.num_outputs))
            top = iter(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        for image in images:
            if image.crops is None:
                yield image
                continue
            indices, values = next(top)
            center = image.crops[4 if args.ten_crop else 0].permute(1, 2, 0).numpy()
            yield Prediction(image.path, [labels[index] for index in indices], values, center)


def _parser() -> CommandParser:
    parser = CommandParser("predict", __doc__)
    add = parser.add_argument
    add("images", nargs="+", metavar="IMAGE", help="a file, a folder, a pattern, or -")
    add(
        "--checkpoint",
        required=True,
        metavar="RUN",
        help="a run, a checkpoint, an export, torchvision's weights",
    )
    add("--ten_crop", action="store_true", help="average ten crops of each image")
    add("--top", type=int, default=5, metavar="N", help="labels for each image (5)")
    add("--json", metavar="FILE", help="JSON lines; - for standard output instead of text")
    add("--save_image", metavar="FILE.png", help="plot the first images with their labels")
    add("--batch", type=int, default=64, metavar="N", help="crops in a batch (64)")
    return parser


def _check(args: Namespace) -> None:
    error = ""
    for name in ("top", "batch"):
        if getattr(args, name) < 1:
            error = f"--{name} is {getattr(args, name)}; it must be at least 1"
    if args.save_image and Path(args.save_image).suffix not in (".png", ".pdf"):
        error = f"--save_image {args.save_image} must end in .png or .pdf"
    for name in ("json", "save_image"):
        file = getattr(args, name)
        if file and file != "-" and not Path(file).absolute().parent.is_dir():
            error = f"--{name} {file} has no folder to lie in: make it first"
    if error:
        raise UserError(error)


if __name__ == "__main__":
    run_command(main)
