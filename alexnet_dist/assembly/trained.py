"""A trained network: its weights, the options it was trained under, what its images are like."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from alexnet_dist.config import Config, from_dict
from alexnet_dist.data.statistics import ChannelStats
from alexnet_dist.data.transforms import Normalization, build_normalization
from alexnet_dist.errors import UserError
from alexnet_dist.model import MODEL_REGISTRY, Network, build_on_meta
from alexnet_dist.training.checkpoint import find_checkpoint, load_tensors, read_state


@dataclass(frozen=True)
class LoadedModel:
    """A checkpoint or a file of weights, its state, and the options that it is used under."""

    path: Path
    state: dict[str, Any]
    config: Config

    @property
    def classes(self) -> list[str]:
        """Names, in the order of their numbers."""
        return list(self.state["classes"])

    @property
    def outputs(self) -> int:
        """Scores that it gives: as many as there are classes, unless it was asked for more."""
        return self.config.model.num_classes or len(self.state["classes"])

    @property
    def labels(self) -> list[str]:
        """What to call each output: its class, or its number where there is none of that name."""
        return self.classes + [str(number) for number in range(len(self.classes), self.outputs)]

    def knows(self, classes: list[str]) -> bool:
        """Whether ``classes`` are its own; where it has only numbers for its own, if they are as
        many."""
        unnamed = self.state.get("unnamed", False)
        return classes == self.classes or (unnamed and len(classes) == self.outputs)

    @property
    def fraction(self) -> float:
        """Side of a view over that of the image's central square, 224/256 in the paper."""
        return self.config.data.image_size / self.config.data.resize_size

    @property
    def pixels(self) -> Normalization:
        """How the pixels of an image become its input, without colour noise."""
        return build_normalization(
            MODEL_REGISTRY[self.config.model.arch].input_norm,
            ChannelStats.from_json(self.state["statistics"]),
            size=self.config.data.image_size,
        )

    def build_on_meta(self) -> Network:
        """The network without memory, for a layout; see ``fill``."""
        return build_on_meta(
            self.config.model.arch,
            num_classes=self.outputs,
            dropout=self.config.model.dropout,
            image_size=self.config.data.image_size,
        )

    def fill(self, parameters: dict[str, torch.nn.Parameter]) -> None:
        """Read the weights into ``parameters``, by name; all processes call it together.

        Raises:
            Failure: they are of another network, or damaged.
        """
        tensors = {f"model.{name}": p.detach() for name, p in parameters.items()}
        load_tensors(self.path, tensors)

    def model(self, device: torch.device) -> Network:
        """The network with its weights, on one device; after ``init_distributed``."""
        model = self.build_on_meta().to_empty(device=device)
        model = model.to(memory_format=torch.channels_last)
        self.fill(dict(model.named_parameters()))
        return model.eval()


def read(path: str, options: Callable[[dict[str, Any]], Config] = from_dict) -> LoadedModel:
    """The network at ``path``: a run, whose best checkpoint it is, a checkpoint, a file that export
    wrote, or torchvision's AlexNet.

    Args:
        options: the options it is used under, of those it was trained under.

    Raises:
        Failure: there is none.
    """
    try:
        found = find_checkpoint(path)
        state = read_state(found)
    except UserError as failure:
        raise UserError(str(failure), on_all_ranks=True) from None
    return LoadedModel(found, state, options(state["config"]))
