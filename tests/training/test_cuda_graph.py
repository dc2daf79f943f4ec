"""Which steps are captured as a CUDA graph; that captured ones compute the same is in tests/gpu."""

from typing import Any

import pytest
import torch

from alexnet_dist.training.cuda_graph import why_not_capturable

CAPTURABLE: dict[str, Any] = {
    "device": torch.device("cuda"),
    "processes": 1,
    "fc": "replicated",
    "precision": "bf16",
    "optimizer": "lars",
    "on_nonfinite": "stop",
}


def test_cuda_graph_of_one_process_in_bf16() -> None:
    assert why_not_capturable(**CAPTURABLE) == ""


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("device", torch.device("cpu"), "needs an NVIDIA GPU: leave it out"),
        ("processes", 2, "cannot capture all-reduces yet, and there are 2 processes"),
        ("fc", "sharded", "take --parallel.fc replicated"),
        ("precision", "fp16", "take --runtime.precision bf16"),
        ("optimizer", "sgd", "take --optim.name sgd2012 or lars"),
        ("on_nonfinite", "skip", "cannot check gradients for train.on_nonfinite skip: take stop"),
    ],
)
def test_cuda_graph_names_what_cannot_be_captured(option: str, value: Any, message: str) -> None:
    assert message in why_not_capturable(**CAPTURABLE | {option: value})
