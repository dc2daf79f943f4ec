"""The page that goes along with exported files: what they are, where from, and how to use them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml


@dataclass(frozen=True)
class Exported:
    """What a page says of a network besides its state.

    Attributes:
        source: where the network is described.
        outputs: scores that it gives.
        side, resize: of the images that it reads, and of the shorter side they are cut from.
        mean, std: [3], of pixels of 0..255.
        dropout: probability, by which the networks of 2012 multiply when they answer.
        preprocess: whether the graphs take images as they are stored.
        files: by format, a file's name and how far its scores are the network's, in words.
    """

    source: str
    outputs: int
    side: int
    resize: int
    mean: list[float]
    std: list[float]
    dropout: float
    preprocess: bool
    files: Mapping[str, tuple[str, str]]


def card(state: Mapping[str, Any], network: Exported) -> str:
    """The page, in Markdown; ``state`` is a checkpoint's, without anybody's paths."""
    run = f", run {state['run']}" if "run" in state else ""
    step = f", after step {state['step']}" if "step" in state else ""
    table = [f"| `{file}` | {kind} | {said} |" for kind, (file, said) in network.files.items()]
    parts = [
        f"# AlexNet, variant {state['variant']}{run}{step}",
        f"{network.outputs} classes. Source: {network.source} (P is Krizhevsky, Sutskever, Hinton "
        "2012, S their program of that year). Trained and exported by alexnet_dist.",
        "## Files",
        "\n".join(["| file | format | on random images, it |", "|---|---|---|", *table]),
        "## Images",
        _images(network),
        "## Use",
        _preparation(network),
        *(_USES[kind](file, state, network) for kind, (file, _) in network.files.items()),
        "## Data",
        _data(state),
        "## Errors",
        _errors(state),
        "## Recipe",
        "```yaml\n" + yaml.safe_dump(state["config"], sort_keys=False) + "```",
        "## Provenance",
        _provenance(state),
    ]
    return "\n\n".join(parts) + "\n"


def _images(network: Exported) -> str:
    scaled = "" if set(network.std) == {1.0} else f", and they are divided by {_row(network.std)}"
    said = (
        f"Red, green and blue of 0..255. The central square of {network.side}/{network.resize} of "
        f"the shorter side is resized (bilinear, antialiased) to {network.side} x {network.side}, "
        f"and {_row(network.mean)} is subtracted from the channels{scaled}."
    )
    if network.preprocess:
        said += (
            " The graphs do all this, and take uint8 [batch, height, width, 3]: the same pixels "
            f"as in evaluation from images whose shorter side is {network.resize}; from others, "
            "which are resized, a value may differ by 1."
        )
    return f"{said} Ten views: `python -m alexnet_dist.predict --ten_crop`."


def _preparation(network: Exported) -> str:
    """Code that makes ``image`` and, for whatever does not do it itself, ``images``."""
    mean, std, side = _row(network.mean), _row(network.std), network.side
    return _python(
        "import numpy as np",
        "import torch",
        "from PIL import Image",
        "",
        'image = Image.open("photo.jpg").convert("RGB")',
        f"side = round(min(image.size) * {side} / {network.resize})",
        "left, top = (image.width - side) // 2, (image.height - side) // 2",
        "central = image.crop((left, top, left + side, top + side))",
        f"central = central.resize(({side}, {side}), Image.Resampling.BILINEAR)",
        f"pixels = (np.asarray(central) - np.array([{mean}])) / np.array([{std}])",
        "images = pixels.astype(np.float32).transpose(2, 0, 1)[None]",
    )


def _data(state: Mapping[str, Any]) -> str:
    if "fingerprint" not in state:
        return "Not known: these weights came without a record."
    said = f"Images of fingerprint `{state['fingerprint']}`, {len(state['classes'])} classes"
    if "images" in state:
        said += (
            f"; {state['images']['train']:,} to train on, {state['images']['val']:,} to validate"
        )
    return f"{said}."


def _errors(state: Mapping[str, Any]) -> str:
    if "step" not in state:
        return "Not known: these weights came without a record."
    best = state.get("best")
    if not best:
        return "Not evaluated at the end of a pass so far."
    said = (
        f"Top-1 error {best['top1_error']:.2f} %, top-5 error {best['top5_error']:.2f} %, loss "
        f"{best['loss']:.4f} on {best['images']:,} validation images, by their central views: the "
        f"run's best evaluation, after step {best['step']}."
    )
    if best["step"] != state["step"]:
        said += f" These weights are of step {state['step']}, which it was not."
    return said


def _provenance(state: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in state["versions"].items())
    if not versions:
        return "Not known: these weights came without a record."
    return f"Trained with {versions}."


def _row(values: list[float]) -> str:
    return ", ".join(f"{value:.6g}" for value in values)


# how each file is used


def _python(*lines: str) -> str:
    return "\n".join(["```python", *lines, "```"])


def _taken(network: Exported) -> list[str]:
    return ["images = np.array(image)[None]"] if network.preprocess else []


def _safetensors(file: str, state: Mapping[str, Any], network: Exported) -> str:
    shell = "\n".join(
        [
            "```sh",
            f"python -m alexnet_dist.predict photo.jpg --checkpoint {file}",
            f"python -m alexnet_dist.evaluate --checkpoint {file} --data.root DATA",
            f"python -m alexnet_dist.train --model.pretrained {file} --data.root DATA",
            "```",
        ]
    )
    build_on_meta = (
        f'network = outline("{state["variant"]}", num_classes={network.outputs}, '
        f"image_size={network.side}, dropout={network.dropout})"
    )
    return f"`{file}` with this package:\n\n{shell}\n\n" + _python(
        "from alexnet_dist.model import outline",
        "from safetensors.torch import load_file",
        "",
        build_on_meta,
        'network = network.to_empty(device="cpu").eval()',
        f'network.load_state_dict(load_file("{file}"))',
        "scores = network(torch.from_numpy(images)).detach().numpy()",
        "print(scores.argmax())",
    )


def _onnx(file: str, state: Mapping[str, Any], network: Exported) -> str:
    return f"`{file}` with onnxruntime:\n\n" + _python(
        "import json",
        "import onnxruntime",
        "",
        *_taken(network),
        f'session = onnxruntime.InferenceSession("{file}")',
        'scores = session.run(None, {"images": images})[0]',
        'classes = json.loads(session.get_modelmeta().custom_metadata_map["classes"])',
        "print(classes[scores.argmax()])",
    )


def _torch_export(file: str, state: Mapping[str, Any], network: Exported) -> str:
    return f"`{file}` with torch alone:\n\n" + _python(
        "import json",
        "",
        *_taken(network),
        'also = {"classes.json": ""}',
        f'network = torch.export.load("{file}", extra_files=also).module()',
        "scores = network(torch.from_numpy(images)).detach().numpy()",
        'print(json.loads(also["classes.json"])[scores.argmax()])',
    )


def _torchvision(file: str, state: Mapping[str, Any], network: Exported) -> str:
    return f"`{file}` with torchvision alone:\n\n" + _python(
        "import torchvision",
        "",
        f"network = torchvision.models.alexnet(num_classes={network.outputs}).eval()",
        f'network.load_state_dict(torch.load("{file}", weights_only=True))',
        "scores = network(torch.from_numpy(images)).detach().numpy()",
        "print(scores.argmax())",
    )


_USES = {
    "safetensors": _safetensors,
    "onnx": _onnx,
    "torch_export": _torch_export,
    "torchvision": _torchvision,
}
