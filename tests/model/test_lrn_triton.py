"""LRN by Triton without a GPU: interpreted, and compiled for one that is not there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from alexnet_dist.model import lrn as room
from alexnet_dist.model.lrn import LocalResponseNorm
from tests.conftest import environment

needs_triton = pytest.mark.skipif(room.lrn_triton is None, reason="Triton is for Linux")


@needs_triton
def test_in_the_interpreter() -> None:
    """In a process of its own, because Triton chooses its interpreter when it is imported."""
    tests = str(Path(__file__).with_name("interpreted_lrn.py"))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", tests],
        capture_output=True,
        text=True,
        env=environment(TRITON_INTERPRET="1"),
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    assert "passed" in done.stdout


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize(("name", "tensors"), [("_forward", 1), ("_backward", 2)])
def test_each_way_reads_and_writes_once(name: str, tensors: int) -> None:
    """As compiled for an H100 in bf16: 16 bytes to a thread of each tensor, besides the four or
    eight on either side that its neighbours have loaded, and nothing through shared memory."""
    from triton import compile as compiled
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(room.lrn_triton, name)
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
    binary = compiled(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    code = binary.asm["ptx"]
    assert binary.metadata.shared == 0
    assert re.findall(r"st\.global[.\w]*", code) == ["st.global.v4.b32"]
    loads = re.findall(r"ld\.global[.\w]*", code)
    assert loads.count("ld.global.v4.b32") == tensors
    assert len(loads) == 3 * tensors


@needs_triton
def test_triton_computes_what_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a pretended GPU: Triton, unless the layer or the tensor does not suit."""
    monkeypatch.setattr(room, "is_triton_supported", lambda device: True)
    x = torch.randn(2, 96, 3, 3).to(memory_format=torch.channels_last)
    calls = []
    monkeypatch.setattr(room.lrn_triton, "lrn", lambda x, *constants: calls.append(constants))
    LocalResponseNorm(5, 5e-4, 0.75, 2.0, 2)(x)
    assert calls == [(2.0, pytest.approx(1e-4), 2)]
    for layer, tensor in (
        (LocalResponseNorm(groups=2), x.contiguous()),
        (LocalResponseNorm(groups=2), x.double()),
        (LocalResponseNorm(3, groups=2), x),
        (LocalResponseNorm(beta=0.5), x),
    ):
        assert layer(tensor).shape == x.shape
    assert len(calls) == 1
