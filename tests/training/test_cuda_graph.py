"""Which steps are captured as a CUDA graph; that captured ones compute the same is in tests/gpu."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from alexnet_dist.config import CommandParser, Config
from alexnet_dist.errors import UserError
from alexnet_dist.parallel.mesh import Mesh
from alexnet_dist.setup import uses_cuda_graph
from alexnet_dist.training import cuda_graph
from alexnet_dist.training.sgd2012 import KrizhevskySGD


def mesh(device: str = "cuda", processes: int = 1) -> Mesh:
    return Mesh(0, processes, torch.device(device), 1, None, None)  # type: ignore[arg-type]


def configured(cuda_graph: str, *words: str) -> Config:
    options = ["--runtime.precision=bf16", f"--runtime.cuda_graph={cuda_graph}", *words]
    return CommandParser().parse(options).config


@pytest.mark.parametrize("processes", [1, 8])
def test_cuda_graph_in_bf16(processes: int) -> None:
    for wanted in ("true", "auto"):
        assert uses_cuda_graph(configured(wanted, "--optim.name=lars"), mesh("cuda", processes))
    assert not uses_cuda_graph(configured("false"), mesh())


@pytest.mark.parametrize(
    ("where", "option", "message"),
    [
        (mesh("cpu"), "", "needs an NVIDIA GPU: leave it out"),
        (replace(mesh("cuda", 2), split_size=2), "", "captures no towers: take"),
        (mesh("cuda", 2), "--parallel.grad_compression=powersgd", "take .* bf16"),
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


@pytest.mark.parametrize("here", [True, False])
@pytest.mark.parametrize("fall_back", [True, False])
def test_a_step_that_cannot_be_captured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fall_back: bool, here: bool
) -> None:
    """Whether here or on another process. The loader is idle when it is tried, once; steps then go
    on eagerly on all if that is allowed."""
    calls: list[str] = []

    def capture(step: Any, stream: Any) -> tuple[None, torch.Tensor]:
        calls.append("capture")
        if here:
            raise RuntimeError("operation would make the legacy stream depend on a capturing one.")
        return None, torch.zeros(2)

    def train_step(*_: Any) -> torch.Tensor:
        calls.append("step")
        return torch.zeros(2)

    monkeypatch.setattr(cuda_graph, "_capture", capture)
    monkeypatch.setattr(cuda_graph, "train_step", train_step)
    optimizer = KrizhevskySGD([torch.nn.Parameter(torch.ones(1))], lr=0.1, momentum=0.9)
    no_gpu: Any = None
    agree: Any = {"before_capture": lambda: calls.append("idle"), "on_all": lambda captured: False}
    step = cuda_graph.CudaGraphStep(no_gpu, optimizer, no_gpu, fall_back=fall_back, **agree)
    batch = torch.zeros(2, 3), torch.zeros(2)
    for _ in range(cuda_graph.CAPTURE_WARMUP_STEPS):
        step(*batch, ())
    if not fall_back:
        reason = "depend on a capturing one" if here else "another process cannot"
        with pytest.raises(UserError, match=rf"{reason}\): take --runtime.cuda_graph false"):
            step(*batch, ())
        return
    for _ in range(2):
        step(*batch, ())
    warm_up = ["step"] * cuda_graph.CAPTURE_WARMUP_STEPS
    assert calls == [*warm_up, "idle", "capture", "step", "step"]
    assert "steps go on without one" in capsys.readouterr().err
