"""A trained model: a checkpoint or a file of weights, with the options that it is used with."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from alexnet_dist.config import Config, from_dict
from alexnet_dist.data.statistics import ChannelStats
from alexnet_dist.data.transforms import Normalization, build_normalization
from alexnet_dist.errors import UserError
from alexnet_dist.model import MODEL_REGISTRY, Network
from alexnet_dist.parallel import Layout, LayoutConfig, parallelize
from alexnet_dist.parallel.mesh import Mesh
from alexnet_dist.parallel.precision import configure_backends, resolve_precision
from alexnet_dist.setup import build_model
from alexnet_dist.training.checkpoint import find_checkpoint, load_tensors, read_state


@dataclass(frozen=True)
class LoadedModel:
    """A checkpoint, or a file of weights: its state, and the options that it is used with."""

    path: Path
    state: dict[str, Any]
    config: Config

    @property
    def classes(self) -> list[str]:
        """Class names, by index."""
        return list(self.state["classes"])

    @property
    def num_outputs(self) -> int:
        """Logits: as many as there are classes, unless model.num_classes asked for more."""
        return self.config.model.num_classes or len(self.state["classes"])

    @property
    def labels(self) -> list[str]:
        """What to call each output: its class, or its index where it has none."""
        return self.classes + [str(index) for index in range(len(self.classes), self.num_outputs)]

    def has_same_classes(self, classes: list[str]) -> bool:
        """Whether ``classes`` are its own; of a file without names: whether they are as many."""
        unnamed = self.state.get("unnamed", False)
        return classes == self.classes or (unnamed and len(classes) == self.num_outputs)

    @property
    def crop_fraction(self) -> float:
        """Side of a crop over the image's shorter side; 224/256 in the paper."""
        return self.config.data.image_size / self.config.data.resize_size

    @property
    def normalization(self) -> Normalization:
        """How pixels become its input, without color noise."""
        return build_normalization(
            MODEL_REGISTRY[self.config.model.arch].input_norm,
            ChannelStats.from_json(self.state["statistics"]),
            size=self.config.data.image_size,
        )

    def layout(self, mesh: Mesh, batch: int) -> Layout:
        """Its network with its weights on every rank, for batches of ``batch`` images over all
        ranks, which call it together."""
        precision = resolve_precision(self.config.runtime.precision, mesh.device)
        configure_backends(precision, self.config.runtime.deterministic)
        model = build_model(self.config, self.num_outputs)
        layout = parallelize(model, mesh, LayoutConfig(batch, precision=precision))
        self.load_weights(layout.parameters)
        return layout

    def model(self, device: torch.device) -> Network:
        """Its network with its weights on one device, in evaluation mode."""
        model = build_model(self.config, self.num_outputs).to_empty(device=device)
        model = model.to(memory_format=torch.channels_last)
        self.load_weights(dict(model.named_parameters()))
        return model.eval()

    def load_weights(self, parameters: dict[str, torch.nn.Parameter]) -> None:
        """Read the weights into ``parameters``, by name; all ranks call it together.

        Raises:
            UserError: they are of another network, or corrupt.
        """
        tensors = {f"model.{name}": p.detach() for name, p in parameters.items()}
        load_tensors(self.path, tensors)


def load_model(path: str, options: Callable[[dict[str, Any]], Config] = from_dict) -> LoadedModel:
    """The model at ``path``: a run (its best checkpoint), a checkpoint, an exported file, or
    torchvision's AlexNet.

    Args:
        options: makes the config that it is used with from the one it was trained with.

    Raises:
        UserError: there is none.
    """
    try:
        found = find_checkpoint(path)
        state = read_state(found)
    except UserError as error:
        raise UserError(str(error), on_all_ranks=True) from None
    return LoadedModel(found, state, options(state["config"]))
