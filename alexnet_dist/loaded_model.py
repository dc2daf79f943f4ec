"""A trained model: a checkpoint or a file of weights, with the options that it is used with."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from alexnet_dist.config import Config, from_dict
from alexnet_dist.data.datasets import ImageDataset
from alexnet_dist.data.eval_plan import EvalPlan, NumCrops
from alexnet_dist.data.index import DatasetInfo, scan_dataset
from alexnet_dist.data.loader import Loader
from alexnet_dist.data.statistics import ChannelStats
from alexnet_dist.data.transforms import Normalization, build_normalization
from alexnet_dist.errors import UserError
from alexnet_dist.model import MODEL_REGISTRY, Network
from alexnet_dist.parallel import Layout, LayoutConfig, parallelize
from alexnet_dist.parallel.mesh import Mesh
from alexnet_dist.parallel.precision import use_precision
from alexnet_dist.setup import build_model, loader_for
from alexnet_dist.tracking.console import ProgressReporter
from alexnet_dist.training.checkpoint import find_checkpoint, load_tensors, read_state


@dataclass(frozen=True)
class LoadedModel:
    """A checkpoint, or a file of weights: its state, and the options that it is used with."""

    path: Path
    state: dict[str, Any]
    config: Config

    @property
    def labels(self) -> list[str]:
        """The class of each output."""
        return list(self.state["classes"])

    @property
    def normalization(self) -> Normalization:
        """How pixels become its input, without color noise."""
        return build_normalization(
            MODEL_REGISTRY[self.config.model.arch].input_norm,
            ChannelStats.from_json(self.state["statistics"]),
            size=self.config.data.image_size,
        )

    def scan_dataset(self, mesh: Mesh) -> DatasetInfo:
        """The images at data.root; all ranks call it together.

        Raises:
            UserError: there are none, or they are of other classes. A file that does not name its
                classes takes any that are as many.
        """
        data, classes = self.config.data, self.state["classes"]
        info = mesh.broadcast_from_rank0(
            lambda: scan_dataset(data.root, data.cache_dir, ProgressReporter())
        )
        named = not self.state.get("unnamed", False)
        if info.val.classes != classes if named else len(info.val.classes) != len(self.labels):
            raise UserError(
                f"the classes of {info.val.folder} are not those that {self.path} was trained on: "
                "give --data.root a folder with the same class folders",
                on_all_ranks=True,
            )
        return info

    def eval_loader(
        self, mesh: Mesh, dataset: ImageDataset, batch_size: int, num_crops: NumCrops = 1
    ) -> tuple[EvalPlan, Loader]:
        """The crops of all images, ``batch_size`` images in a global batch; and their loader."""
        data = self.config.data
        crop_fraction = data.image_size / data.resize_size  # 224/256 in the paper
        plan = EvalPlan(dataset.index.sizes, batch_size, crop_fraction, num_crops)
        return plan, loader_for(self.config, mesh, dataset, self.normalization, plan)

    def layout(self, mesh: Mesh, batch_size: int) -> Layout:
        """The network with its weights on every rank; all ranks call it together."""
        runtime = self.config.runtime
        precision = use_precision(runtime.precision, mesh.device, runtime.deterministic)
        model = build_model(self.config, len(self.state["classes"]))
        layout = parallelize(model, mesh, LayoutConfig(batch_size, precision=precision))
        self.load_weights(layout.parameters)
        return layout

    def model(self, device: torch.device) -> Network:
        """The network with its weights on one device, in evaluation mode."""
        model = build_model(self.config, len(self.state["classes"])).to_empty(device=device)
        self.load_weights(dict(model.named_parameters()))
        return model.eval()

    def load_weights(self, parameters: dict[str, torch.nn.Parameter]) -> None:
        """Read the weights by name; raises UserError where they are corrupt, or others."""
        load_tensors(self.path, {f"model.{name}": p.detach() for name, p in parameters.items()})


def load_model(path: str, options: Callable[[dict[str, Any]], Config] = from_dict) -> LoadedModel:
    """The model at ``path``: a run (its best checkpoint), a checkpoint, an exported file, or
    torchvision's AlexNet. Raises UserError where there is none.

    ``options`` makes the config that it is used with from the one it was trained with.
    """
    found = find_checkpoint(path)
    state = read_state(found)
    return LoadedModel(found, state, options(state["config"]))
