"""Which steps are captured as a CUDA graph; that captured ones compute the same is in tests/gpu."""

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


@pytest.mark.parametrize("fall_back", [True, False])
def test_a_step_that_cannot_be_captured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fall_back: bool
) -> None:
    """The loader is idle when it is tried, once; steps then go on eagerly if that is allowed."""
    calls: list[str] = []

    def capture(step: Any) -> None:
        calls.append("capture")
        raise RuntimeError("operation would make the legacy stream depend on a capturing stream.")

    def train_step(*_: Any) -> torch.Tensor:
        calls.append("step")
        return torch.zeros(2)

    monkeypatch.setattr(cuda_graph, "_capture", capture)
    monkeypatch.setattr(cuda_graph, "train_step", train_step)
    monkeypatch.setattr(cuda_graph, "_run_on_side_stream", lambda step: step())
    optimizer = KrizhevskySGD([torch.nn.Parameter(torch.ones(1))], lr=0.1, momentum=0.9)
    layout: Any = None
    step = cuda_graph.CudaGraphStep(
        layout, optimizer, before_capture=lambda: calls.append("idle"), fall_back=fall_back
    )
    batch = torch.zeros(2, 3), torch.zeros(2)
    for _ in range(cuda_graph.CAPTURE_WARMUP_STEPS):
        step(*batch, ())
    if not fall_back:
        with pytest.raises(UserError, match=r"depend on a capturing stream\): take --runtime.cuda"):
            step(*batch, ())
        return
    for _ in range(2):
        step(*batch, ())
    assert calls == ["step"] * 3 + ["idle", "capture"] + ["step"] * 2
    assert "steps go on without one" in capsys.readouterr().err
