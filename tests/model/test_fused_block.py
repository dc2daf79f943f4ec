"""The kernels behind convolutions without a GPU: interpreted, and compiled for some that are not
there."""

import os
import re
import sys
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from alexnet_dist.model import alexnet, build_model
from tests.conftest import call, environment
from tests.model.test_lrn import by_definition

kernels = pytest.importorskip("alexnet_dist.model.fused_block", reason="Triton is for Linux")

IN_INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not IN_INTERPRETER, reason="run by test_in_the_interpreter")
compiled = pytest.mark.skipif(IN_INTERPRETER, reason="needs Triton's compiler")
K, ALPHA = 2.0, 5e-4


@compiled
def test_in_the_interpreter() -> None:
    """In a process of its own, because Triton chooses its interpreter when it is imported."""
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = call(words, env=environment(TRITON_INTERPRET="1"))
    assert done.code == 0, done.out[-5000:]
    assert "13 passed" in done.out


def plain(z: Tensor, bias: Tensor, groups: int, relu_first: bool) -> Tensor:
    """What ``norm_pool`` computes, by its definition."""
    a = z + bias[:, None, None]
    y = by_definition(a.relu() if relu_first else a, ALPHA, K, groups)
    pooled = F.max_pool2d(y, 3, 2, ceil_mode=True)
    return pooled if relu_first else pooled.relu()


@interpreted
@pytest.mark.parametrize("relu_first", [True, False])
@pytest.mark.parametrize(
    ("shape", "groups", "dtype"),
    [
        ((2, 96, 7, 7), 2, torch.float32),  # 84 and 168 threads' work: the last program is not full
        ((1, 48, 9, 5), 1, torch.bfloat16),
        ((1, 256, 3, 5), 2, torch.float16),
        ((2, 8, 8, 6), 1, torch.float32),  # windows over the edge; a group without a neighbor
    ],
)
def test_against_the_definition(
    shape: tuple[int, ...], groups: int, dtype: torch.dtype, relu_first: bool
) -> None:
    """The values are so large that the sums of squares weigh as much as k."""
    torch.manual_seed(0)
    z = torch.randn(shape).mul_(60).to(dtype).to(memory_format=torch.channels_last)
    z, bias = z.requires_grad_(), torch.randn(shape[1]).mul_(20).requires_grad_()
    pooled, _ = kernels.norm_pool(z, bias, K, ALPHA / 5, groups, relu_first)
    grad = torch.randn(pooled.shape).to(dtype)  # not channels-last
    ours = pooled, *torch.autograd.grad(pooled, (z, bias), grad)
    exact, exact_bias = (x.detach().double().requires_grad_() for x in (z, bias))
    wanted = plain(exact, exact_bias, groups, relu_first)
    theirs = wanted, *torch.autograd.grad(wanted, (exact, exact_bias), grad.double())
    # the interpreter cuts 16 bits off, where a GPU rounds
    error = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    for mine, other in zip(ours, theirs, strict=True):
        largest = float(other.detach().abs().max())
        assert torch.allclose(mine.double(), other, rtol=error, atol=2e-6 * largest)
    assert pooled.dtype == ours[1].dtype == dtype
    assert pooled.is_contiguous(memory_format=torch.channels_last)


@interpreted
def test_beyond_a_group_nothing_is_read_and_nan_is_the_maximum() -> None:
    z, bias = torch.randn(1, 96, 3, 3), torch.zeros(96)
    z[:, 48:, 1, 1] = torch.nan
    for relu_first in (True, False):
        assert kernels.norm_pool(z, bias, K, 1e-4, 2, relu_first)[0][:, :48].isfinite().all()
        assert kernels.norm_pool(z, bias, K, 1e-4, 2, relu_first)[0][:, 48:].isnan().all()
        assert not kernels.norm_pool(z, bias, K, 1e-4, 1, relu_first)[0][:, :48].isfinite().all()


@interpreted
def test_of_equal_values_the_first_is_the_maximum() -> None:
    """As torch has it: row by row."""
    z = torch.zeros(1, 8, 3, 3)
    z[:, :, 1, 0] = z[:, :, 0, 2] = 1.0
    code = kernels.norm_pool(z, torch.zeros(8), K, 1e-4, 1, True)[1]
    assert code.unique().tolist() == [2]


@interpreted
def test_as_torch_wants_its_operators() -> None:
    """Schema, shapes without data, gradients, and what torch.compile makes of it."""
    z = torch.randn(1, 16, 5, 4).to(memory_format=torch.channels_last).requires_grad_()
    bias = torch.randn(16, requires_grad=True)
    torch.library.opcheck(kernels.norm_pool, (z, bias, 2.0, 1e-4, 2, True))
    assert len(kernels.norm_pool(z[:0], bias, 2.0, 1e-4, 2, True)[0]) == 0


@interpreted
@pytest.mark.parametrize(("arch", "blocks"), [("paper", 2), ("original145", 1)])
def test_networks_take_them(monkeypatch: pytest.MonkeyPatch, arch: str, blocks: int) -> None:
    """With a pretended GPU: the same logits and gradients, in both orders of the layers; but not
    where something else stands between them."""
    torch.manual_seed(0)
    model = build_model(arch, num_classes=3, image_size=51)
    images = torch.randn(1, 3, 51, 51).mul_(50)
    images = images.to(memory_format=torch.channels_last)
    results, norm_pool = [], MagicMock(wraps=kernels.norm_pool)
    monkeypatch.setattr(alexnet, "fused_block", SimpleNamespace(norm_pool=norm_pool))
    for pretend in (False, True):
        monkeypatch.setattr(alexnet, "has_triton", lambda device, there=pretend: there)
        logits = model.eval()(images)
        parameters = list(model.parameters())
        gradients = torch.autograd.grad(logits.square().sum(), parameters)
        results.append([logits.detach(), *gradients])
    assert norm_pool.call_count == blocks
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))


@compiled
@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(("name", "loads"), [("_forward", 11), ("_backward", 8)])
def test_compiled_for_gpus(name: str, loads: int, capability: int) -> None:
    """In bf16: 16 bytes a load of each tensor's eight channels, nothing spilled."""
    from triton import compile as compile_kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(kernels, name)
    names = kernel.arg_names
    constants = {"channels": 96, "per_group": 6, "relu_first": True, "threads": kernels.THREADS}
    constants |= {"width": 55, "out_width": 27}
    kinds = dict.fromkeys(("k", "scale"), "fp32") | dict.fromkeys(constants, "constexpr")
    kinds |= {"bias_pointer": "*fp32", "bias_grad_pointer": "*fp32", "code_pointer": "*u8"}
    kinds |= {n: "*bf16" for n in names if n.endswith("pointer") and n not in kinds}
    source = ASTSource(
        kernel,
        {arg: kinds.get(arg, "i32") for arg in names},
        {(names.index(constant),): value for constant, value in constants.items()},
        {(at,): [["tt.divisibility", 16]] for at, n in enumerate(names) if n.endswith("pointer")},
    )
    binary = compile_kernel(source, target=GPUTarget("cuda", capability, 32))
    code = binary.asm["ptx"]
    assert len(re.findall(r"ld\.global\.v4", code)) == loads
    assert not re.findall(r"(?:ld|st)\.local", code)
