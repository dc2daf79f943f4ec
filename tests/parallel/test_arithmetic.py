"""How numbers are computed, chosen by the device."""

from pathlib import Path

import pytest
import torch

from alexnet_dist.parallel import arithmetic


def test_precision_follows_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(Path, "read_text", lambda _: "flags : sse avx2")
    assert arithmetic.choose_precision("auto", cpu) == "fp32"
    monkeypatch.setattr(Path, "read_text", lambda _: "flags : avx512_bf16")
    assert arithmetic.choose_precision("auto", cpu) == "bf16"
    assert arithmetic.choose_precision("fp16", cpu) == "fp16"
