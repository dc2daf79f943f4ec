"""Local response normalization against its definition, in float64."""

import pytest
import torch

from alexnet_dist.model.lrn import LocalResponseNorm, WithinChannelLRN


def by_definition(x: torch.Tensor, alpha: float, k: float, groups: int) -> torch.Tensor:
    """Krizhevsky et al. 2012, section 3.3, channel by channel, alpha over n = 5 as in torch."""
    channels = x.shape[1] // groups
    result = []
    for channel in range(x.shape[1]):
        first = channel // channels * channels
        low = max(first, channel - 2)
        high = min(first + channels - 1, channel + 2)
        squares = x[:, low : high + 1].pow(2).sum(1)
        result.append(x[:, channel] / (k + alpha / 5 * squares).pow(0.75))
    return torch.stack(result, 1)


@pytest.mark.parametrize("groups", [1, 2])
def test_local_and_its_gradient(groups: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 12, 5, 4, dtype=torch.float64, requires_grad=True)
    y = LocalResponseNorm(0.7, groups=groups)(x)
    wanted = by_definition(x, 0.7, 2.0, groups)
    assert torch.allclose(y, wanted, rtol=1e-12, atol=0)
    torchs = torch.nn.LocalResponseNorm(5, alpha=0.7, beta=0.75, k=2.0)(x)
    assert torch.allclose(y, torchs, rtol=1e-12) == (groups == 1)
    grad = torch.randn_like(x)
    (ours,) = torch.autograd.grad(y, x, grad)
    (theirs,) = torch.autograd.grad(wanted, x, grad)
    assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-14)


def test_spatial_and_its_gradient() -> None:
    x = torch.randn(2, 3, 7, 6, dtype=torch.float64, requires_grad=True)
    y = WithinChannelLRN(0.9)(x)
    patches = torch.nn.functional.unfold(x.pow(2).flatten(0, 1)[:, None], 5, padding=2)
    wanted = x / (1 + 0.9 / 25 * patches.sum(1).view_as(x)).pow(0.75)
    assert torch.allclose(y, wanted, rtol=1e-12)
    assert torch.autograd.gradcheck(WithinChannelLRN(0.9), x)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keeps_dtype_and_layout_under_autocast(dtype: torch.dtype, compiled: bool) -> None:
    """Dynamo, too, must see that autocast is on."""
    x = torch.randn(2, 96, 8, 8).to(dtype).to(memory_format=torch.channels_last)
    layer = LocalResponseNorm(groups=2)
    layer = torch.compile(layer, backend="eager") if compiled else layer  # type: ignore[assignment]
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    wanted = by_definition(x.double(), 5e-4, 2.0, 2)
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    assert torch.allclose(y.double(), wanted, rtol=tolerance, atol=tolerance)


def test_an_exported_graph_has_no_autocast() -> None:
    x = torch.randn(2, 16, 8, 8)
    for layer in (LocalResponseNorm(groups=2), WithinChannelLRN()):
        layer(x)  # which makes the window
        graph = torch.export.export(layer, (x,))
        assert "autocast" not in str(graph)
        assert torch.equal(graph.module()(x), layer(x))
