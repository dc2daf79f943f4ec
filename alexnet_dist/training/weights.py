"""A network's weights where they lie: in a checkpoint, or alone in one file.

A file is what export writes, safetensors with the checkpoint's state as JSON in its header; or the
bare tensors of torchvision's AlexNet, of which nothing else is known. Nothing in it is ever run.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from alexnet_dist.errors import UserError
from alexnet_dist.training import checkpoint

FORMAT = "1"
_MARK = "alexnet_dist"
_OURS, _TORCH = ".safetensors", (".pth", ".pt")


def find(path: str) -> Path:
    """The file or the checkpoint that ``path`` means; of a run, its best checkpoint.

    Raises:
        Failure: there is none.
    """
    return Path(path) if Path(path).is_file() else checkpoint.find(path)


def read_state(found: Path) -> dict[str, Any]:
    """What is known besides the tensors, "tensors" being their shapes; as a checkpoint's state.

    Raises:
        Failure: it cannot be read, or is of something else.
    """
    if not found.is_file():
        return checkpoint.read_state(found)
    shapes, header = _outline(found)
    if _MARK not in header:
        return _of_torchvision(found, shapes)
    if header[_MARK] != FORMAT:
        raise UserError(
            f"{found} is of format {header[_MARK]}, this version reads {FORMAT}: take the version "
            "of alexnet_dist that wrote it",
            on_all_ranks=True,
        )
    try:
        state = {name: json.loads(header[name]) for name in header if name not in ("format", _MARK)}
    except ValueError as error:
        raise _unreadable(found, error) from None
    return state | {"tensors": shapes}


def load(found: Path, tensors: Mapping[str, Tensor]) -> None:
    """Read tensors by name into those given, which may be parts; all processes call it together.

    Raises:
        Failure: they are of another network, or damaged.
    """
    if not found.is_file():
        checkpoint.load(found, tensors)
        return
    whole = _tensors(found)
    checkpoint.check_shapes(found, {name: list(t.shape) for name, t in whole.items()}, tensors)
    with torch.no_grad():
        for name, tensor in tensors.items():
            if isinstance(tensor, DTensor):
                part = distribute_tensor(
                    whole[name], tensor.device_mesh, tensor.placements, src_data_rank=None
                )
                tensor.to_local().copy_(part.to_local())
            else:
                tensor.copy_(whole[name])


def write(path: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """A file with ``tensors`` under their names, and ``state`` in its header."""
    header = {"format": "pt", _MARK: FORMAT}  # the first is asked for by other programs
    header |= {name: json.dumps(value) for name, value in state.items()}
    path.write_bytes(save({name: t.contiguous() for name, t in tensors.items()}, header))


def _outline(path: Path) -> tuple[dict[str, list[int]], dict[str, str]]:
    """Shapes by name, and what stands in the header."""
    if path.suffix in _TORCH:
        return {name: list(tensor.shape) for name, tensor in _tensors(path).items()}, {}
    _refuse_others(path)
    try:
        with safe_open(path, "pt") as file:
            shapes = {f"model.{name}": file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
            return shapes, file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, error) from None


def _tensors(path: Path) -> dict[str, Tensor]:
    _refuse_others(path)
    try:
        if path.suffix == _OURS:
            with safe_open(path, "pt") as file:
                return {f"model.{name}": file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a pickle that is damaged, or forbidden, raises is anything
        raise _unreadable(path, error) from None
    if not isinstance(found, dict) or not all(isinstance(t, Tensor) for t in found.values()):
        raise UserError(
            f"{path} holds something else than tensors by name: give a file that torch.save wrote "
            "of a model's state_dict()",
            on_all_ranks=True,
        )
    return {f"model.{name}": tensor for name, tensor in found.items()}


def _of_torchvision(path: Path, shapes: dict[str, list[int]]) -> dict[str, Any]:
    """All that can be said of bare tensors, if they are those of torchvision's AlexNet.

    Its classes have no names, but numbers; those of its published weights are ImageNet's, sorted
    by their folders' names.
    """
    last = shapes.get("model.classifier.6.weight")
    if last is None or shapes.get("model.features.0.weight") != [64, 3, 11, 11]:
        raise UserError(
            f"{path} is neither an export of this package nor torchvision's AlexNet: give a run's "
            "folder, an exported .safetensors, or the state_dict() of torchvision.models.alexnet",
            on_all_ranks=True,
        )
    return {
        "config": {"model": {"arch": "torchvision"}},
        "classes": [str(number) for number in range(last[0])],
        "unnamed": True,
        # of no use to a network that reads pixels by ImageNet's own: black, and no directions
        "statistics": {
            "mean": [0.0] * 3,
            "eigenvalues": [0.0] * 3,
            "eigenvectors": [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]],
        },
        "tensors": shapes,
    }


def _refuse_others(path: Path) -> None:
    if path.suffix not in (_OURS, *_TORCH):
        raise UserError(
            f"{path} holds no weights that can be read: give a run's folder, a checkpoint, or a "
            f"file that ends in {_OURS} or {' or '.join(_TORCH)}",
            on_all_ranks=True,
        )


def _unreadable(path: Path, error: Exception) -> UserError:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return UserError(
        f"{path} cannot be read as weights ({lines[0].strip().rstrip('.')}): it is damaged or "
        "something else; export it again, or fetch it again",
        on_all_ranks=True,
    )
