"""Triton's kernels in Triton's interpreter, on tensors of the CPU; run by test_lrn_triton.py in a
process of its own, because Triton must learn of it before it is imported."""

import pytest
import torch

from alexnet_dist.model.lrn_triton import BLOCK, is_supported, lrn
from tests.model.test_lrn import by_definition

PAPER, SOURCE = (2.0, 5e-4), (2.0, 1e-4)  # k, and alpha in torch's meaning


def activations(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """So large that the sums weigh as much as k."""
    torch.manual_seed(0)
    x = torch.randn(*shape).mul_(60).to(dtype).to(memory_format=torch.channels_last)
    return x.requires_grad_()


def gradients(
    x: torch.Tensor, grad: torch.Tensor, k: float, alpha: float, groups: int
) -> tuple[torch.Tensor, ...]:
    """Output and gradient of the kernels, and of the definition in float64."""
    y = lrn(x, k, alpha / 5, groups)
    (ours,) = torch.autograd.grad(y, x, grad)
    exact = x.detach().double().requires_grad_()
    wanted = by_definition(exact, 5, alpha, 0.75, k, groups)
    (theirs,) = torch.autograd.grad(wanted, exact, grad.double())
    return y, ours, wanted, theirs


@pytest.mark.parametrize(
    ("shape", "groups", "constants", "dtype"),
    [
        # a tower by itself; 630 eights, which the last program has not enough of
        ((3, 48, 5, 7), 1, PAPER, torch.float32),
        ((1, 96, 3, 5), 2, PAPER, torch.bfloat16),
        ((1, 128, 3, 1), 1, SOURCE, torch.float16),
        ((1, 128, 3, 1), 1, SOURCE, torch.bfloat16),
        ((3, 256, 1, 3), 2, SOURCE, torch.float32),
        # a group of one eight, which has no neighbour
        ((2, 8, 3, 3), 1, (1.0, 2e-3), torch.float32),
    ],
)
def test_against_the_definition(
    shape: tuple[int, ...], groups: int, constants: tuple[float, float], dtype: torch.dtype
) -> None:
    x = activations(*shape, dtype=dtype)
    grad = torch.randn(shape).to(dtype).to(memory_format=torch.channels_last)
    y, ours, wanted, theirs = gradients(x, grad, *constants, groups)
    plain = grad * wanted / x.double()
    assert (theirs - plain).abs().max() > 0.05  # the sum over neighbours is there to be missed
    rtol, atol = {
        torch.float32: (2e-6, 1e-6),
        torch.bfloat16: (2**-7, 2**-9),  # the interpreter cuts off, where a GPU rounds
        torch.float16: (2**-11, 2**-12),
    }[dtype]
    for mine, other in ((y, wanted), (ours, theirs)):
        assert mine.dtype == dtype
        assert mine.stride() == x.stride()
        assert torch.allclose(mine.double(), other, rtol=rtol, atol=atol)


def test_gradients_of_any_layout() -> None:
    x = activations(1, 48, 3, 5)
    grad = torch.ones(()).expand(1, 48, 3, 5)  # as a sum gives it
    _, ours, _, theirs = gradients(x, grad, *PAPER, 1)
    assert torch.allclose(ours.double(), theirs, rtol=2e-6, atol=1e-6)
    _, again, _, theirs = gradients(x, torch.randn(1, 48, 3, 5), *PAPER, 1)  # not channels-last
    assert torch.allclose(again.double(), theirs, rtol=2e-6, atol=1e-6)


def test_beyond_a_group_nothing_is_read() -> None:
    x = activations(1, 96, 1, 3).detach()
    x[:, 48:] = torch.nan
    assert lrn(x, 2.0, 1e-4, 2)[:, :48].isfinite().all()
    assert not lrn(x, 2.0, 1e-4, 1)[:, :48].isfinite().all()


def test_which_tensors_are_supported() -> None:
    x = activations(2, 96, 3, 3).detach()
    assert is_supported(x, 2)
    assert is_supported(activations(2, 96, 3, 3, dtype=torch.bfloat16), 1)
    assert not is_supported(x.contiguous(), 2)
    assert not is_supported(x.double(), 2)
    assert not is_supported(x[:, :88], 2)
    assert not is_supported(x[..., 1:], 2)
    assert len(lrn(x[:0], 2.0, 1e-4, 2)) == 0


def test_as_torch_wants_its_operators() -> None:
    """Schema, shapes without data, gradients, and what torch.compile makes of it."""
    x = activations(1, 16, 3, BLOCK // 6)
    torch.library.opcheck(lrn, (x, 2.0, 1e-4, 2))
