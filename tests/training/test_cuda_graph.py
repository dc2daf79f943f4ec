"""Which steps are captured as a CUDA graph; that captured ones compute the same is in tests/gpu."""

import pytest
import torch

from alexnet_dist.config import CommandParser, Config
from alexnet_dist.errors import UserError
from alexnet_dist.parallel.mesh import Mesh
from alexnet_dist.setup import uses_cuda_graph


def mesh(device: str = "cuda", processes: int = 1) -> Mesh:
    return Mesh(0, processes, torch.device(device), 1, None, None)  # type: ignore[arg-type]


def configured(cuda_graph: str, *words: str) -> Config:
    options = ["--runtime.precision=bf16", f"--runtime.cuda_graph={cuda_graph}", *words]
    return CommandParser().parse(options).config


def test_cuda_graph_of_one_process_in_bf16() -> None:
    for wanted in ("true", "auto"):
        assert uses_cuda_graph(configured(wanted, "--optim.name=lars"), mesh())
    assert not uses_cuda_graph(configured("false"), mesh())


@pytest.mark.parametrize(
    ("where", "option", "message"),
    [
        (mesh("cpu"), "", "needs an NVIDIA GPU: leave it out"),
        (mesh("cuda", 2), "", "cannot capture all-reduces yet, and there are 2 processes"),
        (mesh(), "--parallel.fc=sharded", "take --parallel.fc replicated"),
        (mesh(), "--runtime.precision=fp16", "take --runtime.precision bf16"),
        (mesh(), "--optim.name=sgd", "take --optim.name sgd2012 or lars"),
        (mesh(), "--train.on_nonfinite=skip", "cannot check gradients .* skip: take stop"),
    ],
)
def test_cuda_graph_names_what_cannot_be_captured(where: Mesh, option: str, message: str) -> None:
    words = [option] if option else []
    with pytest.raises(UserError, match=message):
        uses_cuda_graph(configured("true", *words), where)
    assert not uses_cuda_graph(configured("auto", *words), where)
