"""Export a trained network to files for other programs; each is tried before it is kept.

python -m alexnet_dist.export --checkpoint RUN --out FOLDER [--format safetensors onnx ...]
safetensors   model.safetensors: the weights, and in the header all that is known of them; predict
              and evaluate take the file as --checkpoint, training as --model.pretrained
onnx          model.onnx: for onnxruntime and others, any batch size
torchvision   torchvision.pth: a state_dict of torchvision.models.alexnet, from model.arch
              torchvision only
Beside them goes a MODEL_CARD.md of facts.
"""

import importlib.util
import io
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from safetensors import SafetensorError
from torch import Tensor, nn

from alexnet_dist.config import CommandParser
from alexnet_dist.errors import UserError, run_command
from alexnet_dist.model import MODEL_REGISTRY
from alexnet_dist.parallel.mesh import init_distributed
from alexnet_dist.setup import LoadedModel, load_model
from alexnet_dist.training.weight_files import write_safetensors

FILES = {"safetensors": "model.safetensors", "onnx": "model.onnx", "torchvision": "torchvision.pth"}
CPU = torch.device("cpu")
TOLERANCE = 1e-3
"""Error of logits, relative to the largest: other programs add in another order."""
DATA_STATE = ("classes", "unnamed", "statistics", "dataset_hash", "images")
PUBLIC_STATE = ("step", "best", "run", "versions", *DATA_STATE)
"""What of a checkpoint's state goes into a file, besides its options."""


def main(arguments: list[str]) -> None:
    """Export as the command line says."""
    parser = CommandParser("export", __doc__, trainer_options=False)
    parser.add_argument("--checkpoint", metavar="RUN", required=True, help="what predict takes")
    parser.add_argument("--out", metavar="FOLDER", required=True)
    parser.add_argument("--format", nargs="+", choices=FILES, default=["safetensors"])
    args = parser.parse(arguments).args
    trained, out = load_model(args.checkpoint), Path(args.out)
    _check_formats(args.format, trained.config.model.arch)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out} cannot be made ({error.strerror}): give another") from None
    init_distributed("cpu")
    model, facts = trained.model(CPU), []
    for name in args.format:
        file = out / FILES[name]
        off = _export(name, trained, model, file)
        facts.append(f"{file.name}: {file.stat().st_size / 1e6:.1f} MB, logits off by {off:.1g}")
        print(f"{out}/{facts[-1]}", flush=True)
    (out / "MODEL_CARD.md").write_text(model_card(trained, model, facts), encoding="utf-8")


def _check_formats(names: list[str], arch: str) -> None:
    """Refuse what cannot be exported, before anything is."""
    needed = ("onnx", "onnxscript", "onnxruntime") if "onnx" in names else ()
    missing = [package for package in needed if importlib.util.find_spec(package) is None]
    if missing:
        raise UserError(f"onnx needs {', '.join(missing)}: pip install 'alexnet-dist[export]'")
    if "torchvision" in names and arch != "torchvision":
        raise UserError(
            f"torchvision's class is another network than {arch}, and cannot take its weights: "
            "leave out --format torchvision, or train --model.arch torchvision"
        )


def public_state(trained: LoadedModel) -> dict[str, Any]:
    """What is known of a network, without the paths of the machine that trained it."""
    private = "data.root", "data.cache_dir", "model.pretrained"
    config = {
        section: {key: v for key, v in options.items() if f"{section}.{key}" not in private}
        for section, options in trained.state["config"].items()
        if section not in ("run", "wandb")
    }
    state = {name: trained.state[name] for name in PUBLIC_STATE if name in trained.state}
    return state | {"arch": trained.config.model.arch, "config": config}


def model_card(trained: LoadedModel, model: nn.Module, files: list[str]) -> str:
    """A page of facts, in Markdown."""
    state, data, pixels = trained.state, trained.config.data, trained.normalization
    best, arch = state.get("best") or {}, trained.config.model.arch
    evaluation = ", ".join(f"{name} {value}" for name, value in best.items()) or "not known"
    classes = ", ".join(trained.labels[:10]) + (", ..." if len(trained.labels) > 10 else "")
    return f"""# AlexNet, model.arch {arch}

- architecture: {MODEL_REGISTRY[arch].source} (P: the paper of 2012, S: its authors' source code)
- parameters: {sum(p.numel() for p in model.parameters() if p.requires_grad):,}
- run: {state.get("run", "not known")}, step {state.get("step", "not known")}
- best evaluation: {evaluation}
- input: RGB, float32 [B, 3, {data.image_size}, {data.image_size}], (pixel of 0..255 - mean) / std
- mean {pixels.mean.tolist()}, std {pixels.std.tolist()}
- crop: the center of an image whose shorter side is {data.resize_size}
- output: logits [B, {len(trained.labels)}] of the classes {classes}
""" + "".join(f"- {file}\n" for file in files)


@torch.no_grad()
def _export(name: str, trained: LoadedModel, model: nn.Module, file: Path) -> float:
    """Write a file and try it; the largest error of its logits, relative to the largest logit."""
    partial, errors = file.with_name(f".partial-{file.name}"), []
    try:
        _write(name, trained, model, partial)
        infer = _read(name, trained, partial)
        for batch in (2, 1, 5):
            images = _random_images(trained, batch)
            exact = model(images).numpy()
            errors.append(np.abs(np.asarray(infer(images)) - exact).max() / np.abs(exact).max())
        if not np.max(errors) <= TOLERANCE:  # NaN is an error, too
            raise UserError(
                f"{file.name} would not compute what the network does (off by {np.max(errors):.2g} "
                "of the largest logit), and is not kept: try another version of torch or onnx"
            )
        os.replace(partial, file)
    except (OSError, SafetensorError) as problem:
        why = getattr(problem, "strerror", problem)
        raise UserError(f"{file} cannot be written ({why}): make room, or change --out") from None
    finally:
        partial.unlink(missing_ok=True)
    return float(np.max(errors))


def _write(name: str, trained: LoadedModel, model: nn.Module, path: Path) -> None:
    if name == "safetensors":
        write_safetensors(path, model.state_dict(), public_state(trained))
    elif name == "torchvision":
        buffer = io.BytesIO()  # torch's own file writer does not say that a disk is full
        torch.save({key: tensor.clone() for key, tensor in model.state_dict().items()}, buffer)
        path.write_bytes(buffer.getvalue())
    else:
        images = _random_images(trained, 2)
        model(images)  # LRN makes its window in its first forward
        options: dict[str, Any] = {"input_names": ["images"], "output_names": ["logits"]}
        options["dynamic_shapes"] = ({0: torch.export.Dim("batch")},)
        with warnings.catch_warnings(action="ignore"):  # about torch's own internals
            program = torch.onnx.export(model, (images,), verbose=False, **options)
        assert program is not None
        program.model.metadata_props["classes"] = json.dumps(trained.labels)
        program.save(path, external_data=False)


def _read(name: str, trained: LoadedModel, path: Path) -> Callable[[Tensor], Any]:
    """The network of a file: images [B, 3, H, W] to logits [B, classes]."""
    if name == "safetensors":
        return load_model(str(path)).model(CPU)
    if name == "torchvision":
        model = torchvision.models.alexnet(num_classes=len(trained.labels)).eval()
        model.load_state_dict(torch.load(path, weights_only=True))
        return model
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": images.numpy()})[0]


def _random_images(trained: LoadedModel, batch: int) -> Tensor:
    """Random pixels, normalized: float32 [batch, 3, H, W]."""
    shape = batch, 3, *[trained.config.data.image_size] * 2
    pixels = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(batch))
    norm = trained.normalization
    mean, std = torch.from_numpy(np.stack([norm.mean, norm.std])[:, :, None, None])
    return ((pixels - mean) / std).float()


if __name__ == "__main__":
    run_command(main)
