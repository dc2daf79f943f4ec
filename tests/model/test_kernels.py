"""Whichever way a layer is computed, it is the same function."""

from typing import Any

import pytest
import torch
from torch import nn

from alexnet_dist.model import build_model, choose_kernels
from alexnet_dist.model.lrn import LocalResponseNorm

PLAIN = {"lrn": "torch", "stem": "plain", "pool_first": False}


def _computed(variant: str, **how: Any) -> list[torch.Tensor]:
    """Scores and all gradients, in float64."""
    torch.manual_seed(3)
    model = build_model(variant, num_classes=3, dropout=0, image_size=71).double()
    choose_kernels(model, **(PLAIN | how))
    images = torch.randn(2, 3, 71, 71, dtype=torch.float64).mul(60)
    scores = model(images)
    return [scores, *torch.autograd.grad(scores.square().sum(), list(model.parameters()))]


@pytest.mark.parametrize("variant", ["paper", "original145", "torchvision"])
def test_every_way_gives_the_same_scores_and_gradients(variant: str) -> None:
    plain = _computed(variant)
    for how in ({"lrn": "band"}, {"stem": "folded"}, {"pool_first": True}):
        for ours, wanted in zip(_computed(variant, **how), plain, strict=True):
            assert torch.allclose(ours, wanted, rtol=1e-9, atol=1e-9 * float(wanted.abs().max()))


def test_the_ways_are_what_they_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model("paper", num_classes=3, image_size=71)
    norms = [layer for layer in model.modules() if isinstance(layer, LocalResponseNorm)]
    names = [name for name, _ in model.named_children()]
    for lrn, kernel in (("band", "band"), ("torch", "torch"), ("auto", "triton")):
        choose_kernels(model, lrn=lrn, stem="plain", pool_first=False)  # type: ignore[arg-type]
        assert [layer.kernel for layer in norms] == [kernel] * 2
    assert [name for name, _ in model.named_children()] == names

    asked: list[tuple[int, ...]] = []
    convolution = nn.functional.conv2d

    def conv2d(x: torch.Tensor, weight: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
        asked.append(tuple(weight.shape))
        return convolution(x, weight, *rest, **more)

    monkeypatch.setattr(nn.functional, "conv2d", conv2d)
    plain, folded = (96, 3, 11, 11), (96, 48, 3, 3)
    for stem, in_fp32, in_bf16 in (
        ("plain", plain, plain),
        ("folded", folded, folded),
        ("auto", plain, folded),
    ):
        choose_kernels(model, lrn="torch", stem=stem, pool_first=True)  # type: ignore[arg-type]
        for lowered, shape in ((False, in_fp32), (True, in_bf16)):
            asked.clear()
            with torch.autocast("cpu", torch.bfloat16, enabled=lowered):
                model(torch.zeros(1, 3, 71, 71))
            assert asked[0] == shape
    after = [name for name, _ in model.named_children()]
    assert after.index("pool5") + 1 == after.index("relu5")
    assert after.index("relu1") < after.index("lrn1") < after.index("pool1")  # these do not commute
