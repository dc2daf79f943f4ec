"""How numbers are computed, chosen by the device."""

from pathlib import Path
from typing import Any

import pytest
import torch

from alexnet_dist.parallel import precision as precision_module
from alexnet_dist.training.optim import build_optimizer


def test_precision_follows_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(Path, "read_text", lambda _: "flags : sse avx2")
    assert precision_module.resolve_precision("auto", cpu) == "fp32"
    for processor, precision in (
        ("GenuineIntel flags : avx512_bf16", "fp32"),
        ("GenuineIntel flags : avx512_bf16 amx_bf16", "bf16"),
        ("AuthenticAMD flags : avx512_bf16", "bf16"),
    ):
        monkeypatch.setattr(Path, "read_text", lambda _, text=processor: text)
        assert precision_module.resolve_precision("auto", cpu) == precision
    assert precision_module.resolve_precision("fp16", cpu) == "fp16"


@pytest.mark.parametrize("name", ["sgd2012", "sgd", "lars"])
def test_an_update_that_is_not_finite_is_left_out_without_a_trace(name: Any) -> None:
    """Guarded or not, the updates around it have the same bits."""
    cpu, weights = torch.device("cpu"), []
    gradients = [torch.randn(10, 10) for _ in range(4)]
    for guarded in (False, True):
        weight = torch.nn.Parameter(torch.ones(10, 10))
        options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.0005}
        optimizer: Any = build_optimizer(name, {"a.weight": weight}, **options)
        scaler, left_out = None, []
        if guarded:
            scaler = precision_module.SyncedGradScaler(cpu, None, fp16=False, skip=True)
        steps = gradients[:2] + [torch.full((10, 10), float("inf"))] * guarded + gradients[2:]
        for gradient in steps:
            (weight * gradient).sum().backward()
            if scaler is None:
                optimizer.step()
            else:
                scaler.scale(torch.ones(()))  # as the loss is scaled, by 1
                scaler.unscale_(optimizer)
                scaler.step(optimizer)
                scaler.update()
                left_out.append(float(scaler.skipped))
            optimizer.zero_grad()
        weights.append(weight.detach())
        assert left_out == [0, 0, 1, 0, 0] * guarded
    assert torch.equal(*weights)


def test_compiled_max_pooling_adds_nothing_atomically() -> None:
    from torch._inductor import config
    from torch._inductor.utils import run_fw_bw_and_get_code

    torch.compiler.reset()
    pool = precision_module.compile_module(torch.nn.MaxPool2d(3, 2))
    images = torch.randn(2, 8, 13, 13).to(memory_format=torch.channels_last).requires_grad_()
    with config.patch(force_disable_caches=True):
        _, (_, backward) = run_fw_bw_and_get_code(lambda: pool(images))
    assert "max_pool2d_with_indices_backward" in backward
    assert "scatter" not in backward
