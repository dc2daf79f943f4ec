"""The most likely labels of images, by a trained network.

python -m alexnet_dist.predict IMAGE|FOLDER... --checkpoint RUN [--ten_crop] [--json FILE]
For each image its path and its five most likely labels with their probabilities, as text, as JSON
lines, as a picture. An image that cannot be read is named, the others are done, and the exit code
is 1.
"""

import json
import os
import sys
from argparse import Namespace
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from alexnet_dist.config import CommandParser, positive_int
from alexnet_dist.data.datasets import ImageDataset, SplitIndex
from alexnet_dist.data.decode import decode, read_size
from alexnet_dist.data.eval_plan import NumCrops
from alexnet_dist.data.folders import LeftOut, list_images
from alexnet_dist.data.formats import validate_bytes
from alexnet_dist.errors import UserError, print_error, run_command
from alexnet_dist.parallel.mesh import Mesh, init_distributed
from alexnet_dist.setup import LoadedModel, load_model
from alexnet_dist.tracking import plots

BATCH = 8  # photographs that the network sees at a time
MAX_IMAGES_IN_FIGURE = 60


class Photographs(ImageDataset):
    """Image files from anywhere, upright as their EXIF data say; their names are full paths."""

    is_decoded = True

    def read(self, index: int) -> NDArray[np.uint8]:
        path = self.path(index)
        if Path(path).is_dir():
            raise OSError("there is no image in this folder")
        return np.array(decode(validate_bytes(np.fromfile(path, np.uint8)), upright=True))

    def path(self, index: int) -> str:
        return self.index.names[index]


def find_images(path: str, left_out: LeftOut) -> list[str]:
    """The images anywhere below a folder, sorted. A file, and what holds no image, is given back:
    reading it tells what is wrong with it."""
    below = list_images(Path(path), left_out) if Path(path).is_dir() else []
    return [str(Path(path, name)) for name, *_ in below] or [path]


def main(arguments: list[str]) -> None:
    """Predict as the command line says."""
    parser = CommandParser("predict", __doc__)
    add, source = parser.add_argument, "a run, a checkpoint, an export, torchvision's weights"
    add("images", nargs="+", metavar="IMAGE", help="a file, or a folder")
    add("--checkpoint", required=True, metavar="RUN", help=source)
    add("--ten_crop", action="store_true", help="average ten crops of each image")
    add("--top", type=positive_int, default=5, metavar="N", help="labels for each image (5)")
    add("--json", metavar="FILE", help="JSON lines; - for standard output instead of text")
    add("--save_image", metavar="FILE.png", help="plot the first images with their labels")
    args = parser.parse(arguments).args
    _check(args)
    model = load_model(args.checkpoint, lambda kept: parser.parse(arguments, kept).config)
    runtime = model.config.runtime
    mesh = init_distributed(runtime.device, runtime.threads).with_layout(1)
    if mesh.world_size > 1:
        raise UserError("predict is one process: start it without torchrun", on_all_ranks=True)
    left_out = LeftOut()
    paths = [path for word in args.images for path in find_images(word, left_out)]
    if left_out:
        print_error(f"left out of the images: {left_out}")
    count, shown = 0, []
    with open(args.json, "w") if args.json not in (None, "-") else nullcontext(sys.stdout) as file:
        for count, (path, best, pixels) in enumerate(predict(model, mesh, paths, args), 1):
            if args.json:
                labels, probabilities = zip(*best, strict=True)
                record = {"path": path, "labels": labels, "probabilities": probabilities}
                print(json.dumps(record), file=file, flush=True)
            if args.json != "-":
                rows = (f"  {100 * prob:6.2f} %  {label}" for label, prob in best)
                print(path, *rows, sep="\n", flush=True)
            if args.save_image and count <= MAX_IMAGES_IN_FIGURE:
                name = os.fsencode(Path(path).name).decode(errors="replace")
                shown.append((pixels, name, best))
    if shown:
        title = f"{model.config.model.arch}, {model.path.name}: {len(shown)} of {count} images"
        images, names, bests = zip(*shown, strict=True)
        plots.plot_predictions(Path(args.save_image), images, names, bests, title)
    if count < len(paths):
        raise SystemExit(1)


def predict(
    model: LoadedModel, mesh: Mesh, paths: list[str], args: Namespace
) -> Iterator[tuple[str, list[tuple[str, float]], NDArray[np.uint8]]]:
    """For each image its path, its best labels with their probabilities, and its center crop, uint8
    [H, W, 3]. One that cannot be read is named and skipped."""
    num_crops: NumCrops = 10 if args.ten_crop else 1
    with ThreadPoolExecutor(mesh.threads) as pool:
        sizes = np.array(list(pool.map(partial(read_size, upright=True), paths)), np.int64)
    sizes = sizes.clip(1)  # where there is none, reading the image will tell why
    dataset = Photographs(SplitIndex("", paths, np.zeros(len(paths), np.int64), sizes, []))
    data = model.config.data
    # DALI would hold a batch of photographs at full size, this loader one in each thread
    data.loader, data.on_corrupt_image = "torch", "skip"
    plan, loader = model.eval_loader(mesh, dataset, BATCH, num_crops)
    layout = model.layout(mesh, BATCH)
    with closing(loader):
        for batch in loader.batches(plan.batches(slice(None))):
            events = loader.corrupt.pop_events()
            for path, reason in {event["path"]: event["reason"] for event in events}.items():
                print_error(f"{path} cannot be read ({reason}): it is skipped")
            crops = layout.logits(batch.images).double().softmax(1)
            probs = crops.unflatten(0, (-1, num_crops)).mean(1)
            best = plots.top_labels(probs, model.labels, args.top)
            centers = batch.images[4 if args.ten_crop else 0 :: num_crops]
            pixels = model.normalization.to_uint8_images(centers)
            names = [paths[index] for index in batch.indices[::num_crops]]
            yield from zip(names, best, pixels, strict=True)


def _check(args: Namespace) -> None:
    if args.save_image and Path(args.save_image).suffix not in (".png", ".pdf"):
        raise UserError(f"--save_image {args.save_image} must end in .png or .pdf")
    for file in (args.json, args.save_image):
        if file not in (None, "-") and not Path(file).absolute().parent.is_dir():
            raise UserError(f"{file} has no folder to lie in: make it first")


if __name__ == "__main__":
    run_command(main)
