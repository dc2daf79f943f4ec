"""LRN by Triton without a GPU: interpreted, and compiled for one that is not there."""

import os
import re
import subprocess
import sys

import pytest
import torch

from alexnet_dist.model import lrn as room
from alexnet_dist.model.lrn import LocalResponseNorm
from tests.conftest import environment
from tests.model.test_lrn import by_definition

kernels = pytest.importorskip("alexnet_dist.model.lrn_triton", reason="Triton is for Linux")

IN_INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not IN_INTERPRETER, reason="run by test_in_the_interpreter")
compiled = pytest.mark.skipif(IN_INTERPRETER, reason="needs Triton's compiler")


@compiled
def test_in_the_interpreter() -> None:
    """In a process of its own, because Triton chooses its interpreter when it is imported."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        capture_output=True,
        text=True,
        env=environment(TRITON_INTERPRET="1"),
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    assert "9 passed" in done.stdout


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
    y = kernels.lrn(x, k, alpha / 5, groups)
    (ours,) = torch.autograd.grad(y, x, grad)
    exact = x.detach().double().requires_grad_()
    wanted = by_definition(exact, alpha, k, groups)
    (theirs,) = torch.autograd.grad(wanted, exact, grad.double())
    return y, ours, wanted, theirs


@interpreted
@pytest.mark.parametrize(
    ("shape", "groups", "constants", "dtype"),
    [
        # a tower by itself; 630 eights, which the last program has not enough of
        ((3, 48, 5, 7), 1, PAPER, torch.float32),
        ((1, 96, 3, 5), 2, PAPER, torch.bfloat16),
        ((1, 128, 3, 1), 1, SOURCE, torch.float16),
        ((1, 128, 3, 1), 1, SOURCE, torch.bfloat16),
        ((3, 256, 1, 3), 2, SOURCE, torch.float32),
        # a group of one eight, which has no neighbor
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
    assert (theirs - plain).abs().max() > 0.05  # the sum over neighbors is there to be missed
    rtol, atol = {
        torch.float32: (2e-6, 1e-6),
        torch.bfloat16: (2**-7, 2**-9),  # the interpreter cuts off, where a GPU rounds
        torch.float16: (2**-11, 2**-12),
    }[dtype]
    for mine, other in ((y, wanted), (ours, theirs)):
        assert mine.dtype == dtype
        assert mine.stride() == x.stride()
        assert torch.allclose(mine.double(), other, rtol=rtol, atol=atol)


@interpreted
def test_gradients_of_any_layout() -> None:
    x = activations(1, 48, 3, 5)
    grad = torch.ones(()).expand(1, 48, 3, 5)  # as a sum gives it
    _, ours, _, theirs = gradients(x, grad, *PAPER, 1)
    assert torch.allclose(ours.double(), theirs, rtol=2e-6, atol=1e-6)
    _, again, _, theirs = gradients(x, torch.randn(1, 48, 3, 5), *PAPER, 1)  # not channels-last
    assert torch.allclose(again.double(), theirs, rtol=2e-6, atol=1e-6)


@interpreted
def test_beyond_a_group_nothing_is_read() -> None:
    x = activations(1, 96, 1, 3).detach()
    x[:, 48:] = torch.nan
    assert kernels.lrn(x, 2.0, 1e-4, 2)[:, :48].isfinite().all()
    assert not kernels.lrn(x, 2.0, 1e-4, 1)[:, :48].isfinite().all()


@interpreted
def test_as_torch_wants_its_operators() -> None:
    """Schema, shapes without data, gradients, and what torch.compile makes of it."""
    x = activations(1, 16, 3, kernels.BLOCK // 6)
    torch.library.opcheck(kernels.lrn, (x, 2.0, 1e-4, 2))
    assert len(kernels.lrn(x[:0], 2.0, 1e-4, 2)) == 0


@compiled
@pytest.mark.slow
@pytest.mark.parametrize(("name", "tensors"), [("_forward", 1), ("_backward", 2)])
def test_each_way_reads_and_writes_once(name: str, tensors: int) -> None:
    """As compiled for an H100 in bf16: 16 bytes to a thread of each tensor, besides the four or
    eight on either side that its neighbors have loaded, and nothing through shared memory."""
    from triton import compile as compile_kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(kernels, name)
    names = kernel.arg_names
    kinds = {"count": "i32", "k": "fp32", "scale": "fp32"}
    kinds |= dict.fromkeys(("per_group", "eights"), "constexpr")
    pointers = [at for at, arg in enumerate(names) if arg.endswith("pointer")]
    source = ASTSource(
        kernel,
        {arg: kinds.get(arg, "*bf16") for arg in names},
        {(names.index("per_group"),): 6, (names.index("eights"),): 128},
        {(at,): [["tt.divisibility", 16]] for at in pointers},
    )
    binary = compile_kernel(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    code = binary.asm["ptx"]
    assert binary.metadata.shared == 0
    assert re.findall(r"st\.global[.\w]*", code) == ["st.global.v4.b32"]
    loads = re.findall(r"ld\.global[.\w]*", code)
    assert loads.count("ld.global.v4.b32") == tensors
    assert len(loads) == 3 * tensors


@compiled
def test_triton_computes_what_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a pretended GPU: Triton, unless the tensor does not suit."""
    monkeypatch.setattr(room, "is_triton_supported", lambda device: True)
    x = torch.randn(2, 96, 3, 3).to(memory_format=torch.channels_last)
    calls = []
    monkeypatch.setattr(kernels, "lrn", lambda x, *constants: calls.append(constants))
    LocalResponseNorm(groups=2)(x)
    assert calls == [(2.0, pytest.approx(1e-4), 2)]
    for tensor in (x.contiguous(), x.double(), x[:, :88], x[..., 1:]):
        assert LocalResponseNorm(groups=2)(tensor).shape == tensor.shape
    assert len(calls) == 1
