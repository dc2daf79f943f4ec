"""The paper's update by Triton: its kernel interpreted, alone and in steps that are recorded,
compiled for a GPU that is not there, and refused where it cannot be."""

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from alexnet_dist.assembly import parts
from alexnet_dist.config import Config
from alexnet_dist.errors import UserError
from alexnet_dist.parallel import mesh
from alexnet_dist.training.optim import sgd_triton
from tests.interpreter import WANTED, run_interpreted

needs_triton = pytest.mark.skipif(sgd_triton is None, reason=WANTED)


@needs_triton
def test_in_the_interpreter() -> None:
    run_interpreted(Path(__file__).with_name("interpreted_sgd.py"))


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize(("copying", "stores"), [(False, 4), (True, 5)])
def test_memory_is_read_and_written_once(copying: bool, stores: int) -> None:
    """As compiled for an H100: 16 bytes to a thread, two loads of each of the three tensors, two
    stores of weight and velocity, and one of the copy."""
    from triton import compile as compiled
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, many = sgd_triton._update, 3
    names = kernel.arg_names
    kinds: dict = dict.fromkeys(("rate_pointer", "left_out_pointer"), "*fp32")
    kinds |= dict.fromkeys(("weights", "momentum_buffers", "gradients"), ("*fp32",) * many)
    kinds |= {"copies": ("*bf16",) * many * copying, "counts": ("i32",) * many}
    kinds |= dict.fromkeys(("momentum", "decay"), "fp32")
    values = {"tensors": many, "moving": True, "copying": copying, "block": sgd_triton.BLOCK}
    kinds |= dict.fromkeys(values, "constexpr")
    tuples = [name for name in names if isinstance(kinds[name], tuple)]
    source = ASTSource(
        kernel,
        {name: kinds[name] for name in names},
        {(names.index(name),): value for name, value in values.items()},
        {
            (names.index(name), at): [["tt.divisibility", 16]]
            for name in tuples
            for at in range(len(kinds[name]))
        },
    )
    options = {"num_warps": sgd_triton.WARPS}
    code = compiled(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    found = Counter(re.findall(r"(?:ld|st)\.global[.\w]*", code))
    assert found == {
        "ld.global.b32": 2,
        "ld.global.v4.b32": 6 * many,
        "st.global.v4.b32": stores * many,
    }


@pytest.fixture
def here() -> Iterator[mesh.Mesh]:
    yield mesh.start("cpu", threads=1)
    mesh.leave()


def refusal(here: mesh.Mesh, *words: str) -> str:
    config = Config()
    config.runtime.precision = "bf16"
    for word in words:
        room, name, value = re.split("[.=]", word)
        setattr(getattr(config, room), name, value == "true" or value)
    with pytest.raises(UserError) as failure:
        parts.check_network(config, here)
    assert failure.value.on_all_ranks
    return str(failure.value)


def test_refusals_name_the_thing_and_the_mend(
    here: mesh.Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph, copies = "runtime.cuda_graph=true", "runtime.weight_copies=true"
    triton = "runtime.update=triton"
    for option in (graph, copies, triton):
        assert "an NVIDIA GPU no older than Ampere: leave it out" in refusal(here, option)
    monkeypatch.setattr(parts, "triton_runs_on", lambda device: True)
    for words, sentence in (
        ((graph, "optim.name=sgd"), "take --optim.name sgd2012 or lars"),
        ((copies, "runtime.update=fused"), "runtime.update is fused: take --runtime.update auto"),
        ((copies, "model.arch=alexnet_bn"), "no copies of batch normalisation"),
        ((copies, "parallel.fc=sharded"), "take --parallel.fc replicated"),
        ((graph, "parallel.fc=sharded"), "take --parallel.fc replicated"),
        ((graph, "train.on_nonfinite=skip"), "take --train.on_nonfinite stop"),
        ((graph, "train.on_nonfinite=rollback"), "take --train.on_nonfinite stop"),
    ):
        assert sentence in refusal(here, *words)
    monkeypatch.setattr(parts, "resolve_precision", lambda wanted, device: "fp16")
    assert "the precision is fp16" in refusal(here, copies)
    assert "cannot capture the scale of fp16" in refusal(here, graph)
    choose = parts.wants_graph
    config = Config()
    config.runtime.cuda_graph = "auto"
    assert choose(config, here, "bf16")
    assert not choose(config, here, "fp16")
    object.__setattr__(here, "world", 2)
    assert not choose(config, here, "bf16")
    assert "no sums over processes yet, and there are 2" in refusal(here, graph)
