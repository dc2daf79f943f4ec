"""Weights in one file: what export writes (safetensors, with the checkpoint's state as JSON in its
header), or the state_dict() of torchvision's AlexNet. Nothing in a file is executed."""

import json
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from alexnet_dist.errors import UserError

FORMAT = 4
"""Of checkpoints and exported files. Those of alexnet_dist 0.1.0 have up to 2, or none; 3 was
written before 0.2.0 was released."""

READABLE = (
    "give a run's folder, one of its checkpoints, an exported .safetensors, or the state_dict() of "
    "torchvision.models.alexnet"
)
"""What error messages about weights propose."""


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write ``tensors`` under their names into one file, and ``state`` into its header."""
    header = {name: json.dumps(value) for name, value in state.items()}
    header |= {"format": "pt", "alexnet_dist": str(FORMAT)}
    save_file({name: t.contiguous() for name, t in tensors.items()}, path, header)


def read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors in a file of weights, under a checkpoint's names, and its state; nothing in it
    is executed."""
    header: dict[str, str] = {}
    if path.suffix == ".safetensors":
        found = load_file(path)
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
    else:
        found = _load_pth(path)
    if not isinstance(found, dict) or not all(isinstance(t, Tensor) for t in found.values()):
        raise ValueError("it holds something else than tensors by name")
    tensors = {f"model.{name}": tensor for name, tensor in found.items()}
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    if "alexnet_dist" in header:
        state = {name: json.loads(header[name]) for name in header if name != "format"}
        state["format"] = state.pop("alexnet_dist")
    else:
        state = _torchvision_state(path, shapes)
    return tensors, {**state, "tensors": shapes}


def _load_pth(path: Path) -> Any:
    """A state_dict, also inside what PyTorch's ImageNet example saves, and of a network that was
    wrapped by DataParallel or DistributedDataParallel."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if forbidden := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise UserError(
                f"{path} holds {forbidden[1]} and not tensors alone, as torch.save(model) writes "
                "it, and it might execute anything: write model.state_dict() instead",
                on_all_ranks=True,
            ) from None
        raise
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    if isinstance(found, dict):
        found = {re.sub(r"\bmodule\.", "", str(name)): value for name, value in found.items()}
    return found


def _torchvision_state(path: Path, shapes: dict[str, list[int]]) -> dict[str, Any]:
    """All that is known of bare tensors, if they are those of torchvision's AlexNet: its classes
    have no names, but indices."""
    last = shapes.get("model.classifier.6.weight")
    if last is None or shapes.get("model.features.0.weight") != [64, 3, 11, 11]:
        message = f"{path} is neither an export of this package nor torchvision's AlexNet"
        raise UserError(f"{message}: {READABLE}", on_all_ranks=True)
    # unused by a network that normalizes with ImageNet's own statistics
    statistics = {"mean": [0.0] * 3, "eigenvalues": [0.0] * 3, "eigenvectors": [[0.0] * 3] * 3}
    return {
        "format": FORMAT,
        "config": {"model": {"arch": "torchvision"}},
        "classes": [str(index) for index in range(last[0])],
        "unnamed": True,
        "statistics": statistics,
    }
