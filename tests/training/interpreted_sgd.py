"""The update's kernel in Triton's interpreter, on tensors of the CPU, and whole steps with it that
are recorded and replayed; run by test_sgd_triton.py in a process of its own, because Triton must
learn of it before it is imported."""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from alexnet_dist.errors import UserError
from alexnet_dist.model.alexnet import AlexNet
from alexnet_dist.model.dropout import Dropout
from alexnet_dist.parallel import mesh
from alexnet_dist.parallel.ddp import DDPLayout
from alexnet_dist.training.cuda_graph import WARM_UP, CudaGraphStep
from alexnet_dist.training.optim import KrizhevskySGD, build_optimizer, momentum_buffers
from alexnet_dist.training.sgd_triton import BLOCK
from alexnet_dist.training.step import train_step
from tests.training.recorded import Recorder

SHAPES = {
    "conv.weight": (6, 3, 5, 5),
    "conv.bias": (6,),
    "fc.weight": (7, 311),  # two programs and a part of one
    "fc.bias": (7,),
    "own.weight": (BLOCK,),
    "none.weight": (0, 5),  # a share of nothing
}


def parameters() -> dict[str, nn.Parameter]:
    torch.manual_seed(0)
    made = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    made["conv.weight"] = made["conv.weight"].to(memory_format=torch.channels_last)
    return {name: nn.Parameter(tensor) for name, tensor in made.items()}


def optimizer(name: str, mine: dict[str, nn.Parameter], **options: object) -> torch.optim.SGD:
    own = ["own.weight"]
    return build_optimizer(name, mine, lr=0.1, own=own, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["sgd2012", "lars"])
@pytest.mark.parametrize(("momentum", "decay"), [(0.9, 0.05), (0.0, 0.05), (0.9, 0.0)])
def test_against_torchs_fused_update(name: str, momentum: float, decay: float) -> None:
    """Several groups and steps, each with rates of its own, and one that is left out."""
    options = {"momentum": momentum, "weight_decay": decay, "trust": 0.5}
    ours, theirs = parameters(), parameters()
    by_triton = optimizer(name, ours, **options, triton=True)
    fused = optimizer(name, theirs, **options)
    for step, rates in enumerate([(0.1, 0.2, 0.3), (0.1, 0.2, 0.3), (0.01, 0.2, 0.0)]):
        for one, other, rate in zip(by_triton.param_groups, fused.param_groups, rates, strict=True):
            one["lr"] = other["lr"] = rate
        for name_of, w in ours.items():
            w.grad = torch.randn_like(w)
            theirs[name_of].grad = w.grad.clone()
        if step == 1:
            ours["fc.bias"].grad = theirs["fc.bias"].grad = None  # one that nothing has reached
            ours["conv.weight"].grad = ours["conv.weight"].grad.contiguous()  # in another order
            for each in (by_triton, fused):
                each.found_inf = torch.zeros(())  # as a scaler has it
                each.step()
                each.found_inf = torch.ones(())
                each.step()
                del each.found_inf
        else:
            by_triton.step()
            fused.step()
    for mine, other in (
        (ours, theirs),
        (momentum_buffers(by_triton, ours), momentum_buffers(fused, theirs)),
    ):
        for name_of in SHAPES:
            one, two = mine[name_of].detach(), other[name_of].detach()
            assert one.stride() == two.stride()
            assert torch.allclose(one, two, rtol=1e-6, atol=1e-6), name_of
    assert any(v.any() for v in momentum_buffers(by_triton, ours).values()) == bool(momentum)


def test_against_the_definition_and_its_copies() -> None:
    w = nn.Parameter(torch.linspace(-2, 2, 2 * BLOCK + 3))
    copy = torch.zeros_like(w, dtype=torch.bfloat16, requires_grad=False)
    wanted, v = w.detach().double(), torch.zeros(len(w), dtype=torch.float64)
    by_triton = KrizhevskySGD(
        [w], 0.0, weight_decay=0.0005, fused=True, triton=True, copies={w: copy}
    )
    for rate in (0.01, 0.01, 0.001, 0.02, 1e-5):
        w.grad = torch.randn_like(w)
        by_triton.param_groups[0]["lr"] = rate
        by_triton.step()
        v = 0.9 * v - 0.0005 * rate * wanted - rate * w.grad.double()
        wanted = wanted + v
        assert torch.allclose(copy.float(), w, rtol=2**-7)  # cut off, where a GPU rounds
    assert torch.allclose(w.detach().double(), wanted, rtol=1e-6, atol=1e-7)
    assert torch.allclose(-by_triton.state[w]["momentum_buffer"].double(), v, rtol=1e-6, atol=1e-7)


# whole steps, recorded and replayed

BATCH, SIDE = 6, 9


@dataclass
class Batch:
    images: Tensor
    labels: Tensor
    masks: tuple[Tensor, ...]


@pytest.fixture
def here() -> Iterator[mesh.Mesh]:
    yield mesh.start("cpu", threads=1).arrange(1)
    mesh.leave()


def network() -> AlexNet:
    torch.manual_seed(1)
    layers = {
        "conv1": nn.Conv2d(3, 8, 3, 2),
        "relu1": nn.ReLU(),
        "flatten": nn.Flatten(),
        "fc2": nn.Linear(8 * 16, 40),
        "dropout2": Dropout(40),
        "fc3": nn.Linear(40, 5),
    }
    return AlexNet(OrderedDict(layers))


def batches(count: int) -> list[Batch]:
    torch.manual_seed(2)
    return [
        Batch(
            torch.randn(BATCH, 3, SIDE, SIDE).to(memory_format=torch.channels_last),
            torch.randint(5, (BATCH,)),
            (torch.rand(BATCH, 40) > 0.5,),
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize(
    ("name", "precision", "copies", "parts"),
    [("sgd2012", "bf16", True, 1), ("lars", "fp32", False, 2)],
)
def test_a_graphed_step_is_the_plain_one(
    name: str, precision: str, copies: bool, parts: int, here: mesh.Mesh
) -> None:
    """To the bit, over changes of rate; captured once, where Python passes no number any more."""
    results, weights, recorders = [], [], []
    for graphed in (False, True):
        layout = DDPLayout(
            network(),
            here,
            batch=BATCH,
            accumulate=parts,
            precision=precision,  # type: ignore[arg-type]
            weight_copies=copies,
        )
        update = build_optimizer(
            name,  # type: ignore[arg-type]
            layout.parameters,
            lr=0.1,
            momentum=0.9,
            weight_decay=0.0005,
            triton=True,
            copies=layout.copies,
        )
        moving = momentum_buffers(update, layout.parameters)
        written = [*layout.parameters.values(), *moving.values(), *layout.copies.values()]
        recorder = Recorder(written)
        recorders.append(recorder)
        step = CudaGraphStep(layout, update, aside=lambda work: work(), capture=recorder)
        found = []
        for number, batch in enumerate(batches(WARM_UP + 3)):
            for group in update.param_groups:
                group["lr"] = 0.1 / (1 + number) * (2 if group["bias"] else 1)
            if graphed:
                found.append(step(batch, batch.masks))
            else:
                found.append(train_step(layout, update, batch, batch.masks))
        results.append(torch.stack(found))
        weights.append([w.detach() for w in written])
    assert len(results[0][:, 0].unique()) == WARM_UP + 3  # each step has a loss of its own
    assert torch.equal(*results)
    assert all(torch.equal(one, other) for one, other in zip(*weights, strict=True))
    assert [len(recorder.recordings) for recorder in recorders] == [0, 1]
    reading = {str(call[0]) for call in recorders[1].recordings[0].reading(layout.parameters)}
    assert "alexnet_dist.paper_update.default" in reading
    assert (len(reading) == 1) == copies  # then nobody else reads a weight, to cast it


def test_what_cannot_be_captured_is_a_sentence(here: mesh.Mesh) -> None:
    layout = DDPLayout(network(), here, batch=BATCH)
    update = build_optimizer(
        "sgd2012", layout.parameters, lr=0.1, momentum=0.9, weight_decay=0, triton=True
    )
    plain = layout.forward_backward

    def curious(*words: object) -> Tensor:
        result = plain(*words)  # type: ignore[arg-type]
        assert float(result[0]) > 0
        return result

    layout.forward_backward = curious  # type: ignore[method-assign, assignment]
    step = CudaGraphStep(layout, update, aside=lambda work: work(), capture=Recorder([]))
    *first, last = batches(WARM_UP + 1)
    for batch in first:
        step(batch, batch.masks)
    with pytest.raises(UserError, match=r"cannot be captured .*not permitted.*cuda_graph false"):
        step(last, last.masks)
