"""A trained network as files for other programs, each held to the network before it is kept.

python -m alexnet_dist.export --checkpoint RUN --out FOLDER [--format safetensors onnx ...]
safetensors   the weights under our names, all that is known of them in the header; predict and
              evaluate take it as --checkpoint, and training as --model.pretrained
onnx          for onnxruntime and others, any batch
torch_export  torch.export's .pt2, any batch
torchvision   a state_dict for torchvision.models.alexnet, of variant torchvision only
--preprocess puts the pixels' way into onnx and torch_export: their input is then uint8 [batch,
height, width, 3] of any size, of which the central view is cut, resized and normalised as in
evaluation. Images whose shorter side is data.resize_size are not resized, and give the same pixels;
in others a value of 0..255 may differ by 1.
A folder gets a MODEL_CARD.md, too. --out may be a file, of one format.
"""

import contextlib
import importlib.util
import json
import logging
import os
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from numpy.typing import NDArray
from torch import Tensor, nn

from alexnet_dist.assembly.trained import LoadedModel, read
from alexnet_dist.config import CommandParser
from alexnet_dist.data.photographs import finish
from alexnet_dist.errors import UserError, run_command
from alexnet_dist.model import MODEL_REGISTRY
from alexnet_dist.model.preprocessing import Preprocessed
from alexnet_dist.parallel.mesh import init_distributed
from alexnet_dist.tracking.card import Exported, card
from alexnet_dist.training import weights

OPSET = 18
BATCHES = (2, 1, 5)
"""Of the random images that a file is tried on."""
TOLERANCE = 1e-3
"""How far a graph's scores may be from the network's, as a part of the largest: other programs add
in other orders."""
KNOWN = ("step", "best", "run", "classes", "unnamed", "statistics", "fingerprint", "images")
"""What of a checkpoint's state goes along, besides its options and versions."""

Answers = Callable[[Tensor], NDArray[np.float32]]


@dataclass(frozen=True)
class Subject:
    """What is exported: a network, on the CPU in float32.

    Attributes:
        ready: takes what the graphs take; ``model`` itself, or with the pixels' way before it.
    """

    trained: LoadedModel
    model: nn.Module
    ready: nn.Module
    preprocess: bool
    opset: int

    def images(self, batch: int) -> Tensor:
        """Random images, as stored: uint8 [batch, H, W, 3]."""
        data = self.trained.config.data
        short = data.resize_size if self.preprocess else data.image_size
        long = short + 9 if self.preprocess else short
        generator = torch.Generator().manual_seed(batch)
        return torch.randint(0, 256, (batch, short, long, 3), generator=generator).to(torch.uint8)

    def finished(self, images: Tensor) -> Tensor:
        """The input that the network wants for them: their central view, which is not resized."""
        side = self.trained.config.data.image_size
        top, left = ((length - side) // 2 for length in images.shape[1:3])
        central = images[:, top : top + side, left : left + side].permute(0, 3, 1, 2)
        return finish(central, self.trained.pixels, torch.device("cpu")).contiguous()

    def takes(self, images: Tensor) -> Tensor:
        """The input that the graphs want for them."""
        return images if self.preprocess else self.finished(images)

    def sizes(self) -> dict[int, Any]:
        """The dimensions of what the graphs take that may be of any length."""
        names = ("batch", "height", "width") if self.preprocess else ("batch",)
        return {at: torch.export.Dim(name) for at, name in enumerate(names)}


@dataclass(frozen=True)
class Format:
    """A kind of file: its name, how it is written, and how it is read back to answer."""

    file: str
    write: Callable[[Subject, Path], None]
    read: Callable[[Subject, Path], Answers]
    packages: tuple[str, ...] = ()


def main(arguments: list[str]) -> None:
    """Export as the command line says."""
    words = _understand(arguments)
    places = _places(words)
    trained = read(words.checkpoint)
    _refuse(words, trained)
    init_distributed("cpu")
    subject = _subject(trained, words)
    far = {}
    for name, place in places.items():
        far[name] = _export(FORMATS[name], subject, place)
        size = place.stat().st_size / 1e6
        print(f"{place}: {size:.1f} MB, {_agreement(far[name])}", flush=True)
    if not _is_file(words.out):
        page = Path(words.out, "MODEL_CARD.md")
        text = card(shared(trained), _described(subject, places, far))
        page.write_text(text, encoding="utf-8")
        print(page, flush=True)


def shared(trained: LoadedModel) -> dict[str, Any]:
    """What is known of a network, less the paths of the machine that it was trained on."""
    state = trained.state
    config = {part: dict(options) for part, options in state["config"].items()}
    for name in ("root", "cache"):
        config.get("data", {}).pop(name, None)
    for part in ("run", "track"):
        config.pop(part, None)
    if config["model"].get("weights"):
        config["model"]["weights"] = Path(config["model"]["weights"]).name
    known = {name: state[name] for name in KNOWN if name in state}
    return known | {
        "variant": trained.config.model.arch,
        "config": config,
        "versions": state.get("versions", {}),
    }


def _described(subject: Subject, places: dict[str, Path], far: dict[str, float]) -> Exported:
    trained, pixels = subject.trained, subject.trained.pixels
    return Exported(
        source=MODEL_REGISTRY[trained.config.model.arch].source,
        outputs=trained.outputs,
        side=trained.config.data.image_size,
        resize=trained.config.data.resize_size,
        mean=pixels.mean.tolist(),
        std=pixels.std.tolist(),
        dropout=trained.config.model.dropout,
        preprocess=subject.preprocess,
        files={name: (place.name, _agreement(far[name])) for name, place in places.items()},
    )


def _export(kind: Format, subject: Subject, place: Path) -> float:
    """Write a file, and try it: how far from the network its scores are at most, as a part of the
    largest."""
    partial = place.with_name(f".partial-{place.name}")
    try:
        with _quiet():
            kind.write(subject, partial)
        far = _distance(subject, kind.read(subject, partial))
        if not far <= TOLERANCE:
            raise UserError(
                f"{place.name} would not compute what the network does (its scores are off by "
                f"{far:.2g} of the largest), and is not kept: try another version of torch or onnx"
            )
        os.replace(partial, place)
        return far
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or "the disk takes no more"
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):
            raise  # else it is torch's writer of archives, which does not say why it stopped
        raise UserError(
            f"{place} cannot be written ({reason}): make room, or give another --out"
        ) from None
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch and onnx say of their internals."""
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


@torch.no_grad()
def _distance(subject: Subject, answers: Answers) -> float:
    far = []
    for batch in BATCHES:
        images = subject.images(batch)
        right = subject.model(subject.finished(images)).numpy()
        far.append(np.abs(answers(images) - right).max() / max(np.abs(right).max(), 1e-30))
    return float(np.max(far))


def _subject(trained: LoadedModel, words: Namespace) -> Subject:
    model = _plain(trained)
    data, pixels = trained.config.data, trained.pixels
    ready: nn.Module = model
    if words.preprocess:
        mean, std = torch.from_numpy(pixels.mean), torch.from_numpy(pixels.std)
        ready = Preprocessed(model, mean, std, side=data.image_size, fraction=trained.fraction)
    subject = Subject(trained, model, ready.eval(), words.preprocess, words.opset)
    with torch.no_grad():  # layers make their constants when they first compute
        subject.ready(subject.takes(subject.images(1)))
    return subject


def _plain(trained: LoadedModel) -> nn.Module:
    """The network with its weights in the order that their files have."""
    return trained.model(torch.device("cpu")).to(memory_format=torch.contiguous_format)


# the formats


def _write_safetensors(subject: Subject, path: Path) -> None:
    weights.write(path, subject.model.state_dict(), shared(subject.trained))


def _read_safetensors(subject: Subject, path: Path) -> Answers:
    model = _plain(read(str(path)))
    return lambda images: model(subject.finished(images)).numpy()


def _write_onnx(subject: Subject, path: Path) -> None:
    program = torch.onnx.export(
        subject.ready,
        (subject.takes(subject.images(2)),),
        dynamo=True,
        dynamic_shapes=(subject.sizes(),),
        opset_version=subject.opset,
        input_names=["images"],
        output_names=["scores"],
        external_data=False,
        verbose=False,
    )
    assert program is not None
    if program.model.opset_imports[""] != subject.opset:  # it says so in a log, and goes on
        raise UserError(
            f"--opset {subject.opset} cannot be written by the torch and onnx that are installed: "
            f"leave it out, for {OPSET}"
        )
    program.model.metadata_props["classes"] = json.dumps(subject.trained.labels)
    program.save(path, external_data=False)


def _read_onnx(subject: Subject, path: Path) -> Answers:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": subject.takes(images).numpy()})[0]


def _write_graph(subject: Subject, path: Path) -> None:
    images = subject.takes(subject.images(2))
    program = torch.export.export(subject.ready, (images,), dynamic_shapes=(subject.sizes(),))
    names = json.dumps(subject.trained.labels)
    torch.export.save(program, path, extra_files={"classes.json": names})


def _read_graph(subject: Subject, path: Path) -> Answers:
    program = torch.export.load(path).module()
    return lambda images: program(subject.takes(images)).numpy()


def _write_torchvision(subject: Subject, path: Path) -> None:
    state = {name: tensor.clone() for name, tensor in subject.model.state_dict().items()}
    torch.save(state, path)


def _read_torchvision(subject: Subject, path: Path) -> Answers:
    model = torchvision.models.alexnet(num_classes=subject.trained.outputs).eval()
    model.load_state_dict(torch.load(path, weights_only=True))
    return lambda images: model(subject.finished(images)).numpy()


FORMATS = {
    "safetensors": Format("model.safetensors", _write_safetensors, _read_safetensors),
    "onnx": Format("model.onnx", _write_onnx, _read_onnx, ("onnx", "onnxscript", "onnxruntime")),
    "torch_export": Format("model.pt2", _write_graph, _read_graph),
    "torchvision": Format("torchvision.pth", _write_torchvision, _read_torchvision),
}
_GRAPHS = ("onnx", "torch_export")


# the command line


def _understand(arguments: list[str]) -> Namespace:
    options = CommandParser("export", __doc__, trainer_options=False)
    add = options.add_argument
    add("--checkpoint", metavar="RUN", help="a run, a checkpoint, an export, torchvision's weights")
    add("--out", metavar="FOLDER", help="a folder, or a file of one format")
    add("--format", nargs="+", default=[], metavar="FORMAT", help=f"{', '.join(FORMATS)}")
    add("--preprocess", action="store_true", help="take images as they are stored")
    add("--opset", type=int, default=OPSET, help=f"of onnx ({OPSET})")
    words = options.parse(arguments).args
    if words.checkpoint is None:
        raise UserError(
            "there is no network: give --checkpoint a run's folder, or an exported file"
        )
    if words.out is None:
        raise UserError("there is no place to write to: give --out a folder, or a file")
    unknown = [name for name in words.format if name not in FORMATS]
    if unknown:
        raise UserError(f"there is no format {unknown[0]}; there are {', '.join(FORMATS)}")
    return words


def _is_file(out: str) -> bool:
    endings = {Path(kind.file).suffix for kind in FORMATS.values()}
    return Path(out).suffix in endings and not Path(out).is_dir()


def _places(words: Namespace) -> dict[str, Path]:
    """Where each format goes, in a folder that is made if it is not there."""
    out = Path(words.out)
    folder = out.parent if _is_file(words.out) else out
    if _is_file(words.out):
        by_ending = [name for name, kind in FORMATS.items() if Path(kind.file).suffix == out.suffix]
        if words.format not in ([], by_ending):
            raise UserError(
                f"--out {out} is a file of format {by_ending[0]}, not {' '.join(words.format)}: "
                "give --out a folder"
            )
        places = {by_ending[0]: out}
    else:
        places = {name: out / FORMATS[name].file for name in words.format or ["safetensors"]}
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {folder} cannot be made ({error.strerror}): give another") from None
    if not os.access(folder, os.W_OK):
        raise UserError(f"--out {folder} cannot be written: give another folder")
    words.format = list(places)
    return places


def _refuse(words: Namespace, trained: LoadedModel) -> None:
    """Refuse what cannot be exported, before anything is."""
    for name in words.format:
        missing = [one for one in FORMATS[name].packages if importlib.util.find_spec(one) is None]
        if missing:
            raise UserError(
                f"--format {name} needs {', '.join(missing)}: pip install 'alexnet-dist[export]'"
            )
    variant = trained.config.model.arch
    if "torchvision" in words.format and variant != "torchvision":
        raise UserError(
            f"torchvision's class is another network than {variant}, and cannot take its weights: "
            "leave out --format torchvision, or train --model.arch torchvision"
        )
    if words.preprocess and not set(_GRAPHS) & set(words.format):
        raise UserError(
            f"--preprocess is for --format {' and '.join(_GRAPHS)}: weights hold no graph"
        )


def _agreement(far: float) -> str:
    """How far a file was found to be from the network, for people."""
    if far == 0:
        return "gives the network's scores to the bit"
    return f"gives the network's scores to {far:.1g} of the largest"


if __name__ == "__main__":
    run_command(main)
