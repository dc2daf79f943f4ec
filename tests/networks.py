"""Small trained networks, made in this process: a checkpoint, and its commands."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn

from alexnet_dist.config import Config, to_dict
from alexnet_dist.model import MODEL_REGISTRY, Network, build_model
from alexnet_dist.parallel import mesh
from alexnet_dist.training.checkpoint import CheckpointManager
from tests.conftest import SIDE

CPU = torch.device("cpu")
CLASSES = ["blue", "green", "red"]
MEAN = [120.5, 110.25, 99.0]


def alone() -> None:
    """Be the only process of a group, until ``mesh.destroy_distributed``."""
    mesh.destroy_distributed()  # the one of a test that has failed
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def command(main: Callable[[list[str]], None], *words: object) -> None:
    """Run a command here, and leave its group as its process would."""
    try:
        main([str(word) for word in words])
    finally:
        mesh.destroy_distributed()


def save_network(folder: Path, variant: str, size: int = 67) -> tuple[Path, Network]:
    """A run with a checkpoint of random weights, as training would leave it, and the network."""
    config = Config()
    config.model.arch = variant
    config.data.image_size, config.data.resize_size = size, SIDE
    config.data.root = config.run.output_dir = str(folder)
    config.runtime.precision = "fp32"
    torch.manual_seed(5)
    model = build_model(variant, num_classes=len(CLASSES), image_size=size).eval()
    _sharpen(model, size)
    stats = {"mean": MEAN, "eigenvalues": [3.0, 2.0, 1.0], "eigenvectors": torch.eye(3).tolist()}
    state: dict[str, Any] = {
        "run": folder.name,
        "step": 12,
        "config": to_dict(config),
        "classes": CLASSES,
        "statistics": stats,
        "dataset_hash": "0123456789abcdef",
        "images": {"train": 31, "val": 13},
        "versions": {"alexnet_dist": "0.1.0", "torch": torch.__version__},
        "best": {"top1_error": 12.5, "top5_error": 0.0, "loss": 0.5, "images": 13, "step": 12},
    }
    alone()
    manager, events = weights_manager(folder / "checkpoints", dict(model.named_parameters()))
    manager.save({"last_eval_step": -1, **state}, state["best"])
    manager.wait()
    assert [event["event"] for event in events] == ["checkpoint", "best"], events
    mesh.destroy_distributed()
    return folder, model


def weights_manager(
    folder: Path, parameters: Mapping[str, Tensor], **options: Any
) -> tuple[CheckpointManager, list[dict[str, Any]]]:
    """A manager whose checkpoints hold these parameters alone, and the events that it emits."""
    events: list[dict[str, Any]] = []
    frozen = {name: nn.Parameter(p.detach(), requires_grad=False) for name, p in parameters.items()}
    sharding = SimpleNamespace(to_dtensor=lambda _, tensor: tensor)
    layout: Any = SimpleNamespace(parameters=frozen, sharding=sharding)
    group: Any = dist.new_group(backend="gloo")
    no_optimizer: Any = None

    def emit(event: str, **values: Any) -> None:
        events.append({"event": event, **values})

    return CheckpointManager(folder, group, layout, no_optimizer, emit, **options), events


def ten_crops(image: Image.Image, fraction: float, size: int, mean: Sequence[float]) -> Tensor:
    """The crops [10, 3, size, size] by Pillow, less ``mean``: ``fraction`` of the central square in
    its corners and its center, each followed by its flip."""
    short = min(image.size)
    left, top = (image.width - short) // 2, (image.height - short) // 2
    side, crops = round(short * fraction), []
    room, center = short - side, ((image.width - side) // 2, (image.height - side) // 2)
    for x, y in (*((left + dx, top + dy) for dy in (0, room) for dx in (0, room)), center):
        crop = image.crop((x, y, x + side, y + side))
        pixels = np.asarray(crop.resize((size, size), Image.Resampling.BILINEAR))
        crops += [pixels, pixels[:, ::-1]]
    return torch.tensor(np.array(crops) - mean).float().permute(0, 3, 1, 2)


@torch.no_grad()
def _sharpen(model: Network, size: int) -> None:
    """Have images make a difference to the scores, as they do to trained ones."""
    blotches = torch.rand(32, 3, 5, 5)
    images = torch.nn.functional.interpolate(blotches, size=size, mode="bicubic") * 255 - 110
    images = images / 57 if MODEL_REGISTRY[model.arch].input_norm == "imagenet" else images
    if any(not parameter.requires_grad for parameter in model.parameters()):
        model.train()(images)  # averages of something
    scores = model.eval()(images)
    *_, weight, bias = model.parameters()
    scale = 2 / scores.std(0)
    weight.mul_(scale[:, None])
    bias.sub_(scores.mean(0)).mul_(scale)
