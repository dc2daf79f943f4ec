"""Copies of weights in bf16: the same bits as autocast's, and their masters none the wiser."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from alexnet_dist.model import MODEL_REGISTRY, ModelSpec, build_on_meta, iter_initial_weights
from alexnet_dist.model.alexnet import LayerSpec
from alexnet_dist.parallel import mesh
from alexnet_dist.parallel.copies import WithCopies
from alexnet_dist.parallel.ddp import DDPLayout, GradCompression, averaged
from alexnet_dist.training import checkpoint
from alexnet_dist.training.checkpoint import CheckpointManager
from alexnet_dist.training.optim import build_optimizer

CPU = torch.device("cpu")


@pytest.fixture
def here() -> Iterator[mesh.Mesh]:
    yield mesh.init_distributed("cpu", threads=1).with_layout(1)
    mesh.destroy_distributed()


SMALL = ModelSpec(
    "the kinds of layers that there are, but thin",
    (
        LayerSpec("conv1", 8, 11, 4, std=0.1, post_ops="relu lrn pool"),
        LayerSpec("conv2", 8, 3, 1, 1, 2, std=0.1, post_ops="relu pool"),
        LayerSpec("fc3", 16, groups=2, std=0.1, post_ops="relu dropout"),
        LayerSpec("fc4", 0, std=0.1),
    ),
)


def losses(here: mesh.Mesh, *, copies: bool, compiled: bool = False) -> tuple[Tensor, DDPLayout]:
    """Of four steps, and the layout with the gradients of the last one."""
    torch.manual_seed(0)
    model = build_on_meta("small", num_classes=3, image_size=67)
    weights = iter_initial_weights(model)
    options = {"precision": "bf16", "weight_copies": copies, "compile_model": compiled}
    layout = DDPLayout(model, here, batch=2, **options)  # type: ignore[arg-type]
    layout.sharding.load_full_weights(layout.parameters, weights)
    update = build_optimizer("sgd2012", layout.parameters, lr=1e-3, momentum=0.9, weight_decay=5e-4)
    found = []
    for _ in range(4):
        update.zero_grad()
        images = torch.randn(2, 3, 67, 67).mul_(50).to(memory_format=torch.channels_last)
        masks = (torch.rand(2, 16) > 0.5,)
        found.append(layout.forward_backward(images, torch.tensor([0, 2]), masks))
        update.step()
    return torch.stack(found), layout


def test_they_give_autocasts_bits(here: mesh.Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever updates the weights, here torch, which knows of no copy."""
    monkeypatch.setitem(MODEL_REGISTRY, "small", SMALL)
    (plain, one), (ours, other) = (losses(here, copies=copies) for copies in (False, True))
    assert len(plain[:, 0].unique()) == 4
    assert torch.equal(plain, ours)
    assert not one.copies
    assert list(one.parameters) == list(other.parameters) == list(other.copies)
    for name, weight in one.parameters.items():
        gradient, mine = weight.grad, other.parameters[name].grad
        assert gradient is not None
        assert mine is not None
        assert (mine.dtype, mine.stride()) == (torch.float32, gradient.stride())
        assert torch.equal(mine, gradient)


def test_who_writes_both_spares_the_cast(here: mesh.Mesh, tmp_path: Path) -> None:
    model = nn.Linear(4, 3)
    lowered = WithCopies(model)
    lowered.refresh()
    copy = lowered.copies["weight"]
    assert torch.equal(copy, model.weight.bfloat16())
    with torch.no_grad():
        model.weight.add_(1)
        copy.fill_(7)  # as an update would
    lowered.refresh()
    assert copy.unique().tolist() == [7]
    checkpoints = CheckpointManager(tmp_path, here.checkpoint_group, CPU)
    stored = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    checkpoints.begin({"step": 1}, stored, best=False)
    saved = checkpoints.settle()
    assert saved is not None
    checkpoint.load(saved.path, stored)
    lowered.refresh()  # the same weights again, but written
    assert torch.equal(copy, model.weight.bfloat16())


def test_ddp_hears_of_the_weights_gradients(here: mesh.Mesh) -> None:
    """Its hook rounds them, which nothing else does to the sum of two passes."""
    gradients = []
    for hooked in (False, True):
        torch.manual_seed(0)
        net = nn.Linear(40, 30)
        net.forward = lambda x, masks=(), plain=net.forward: plain(x)  # type: ignore[method-assign, misc]
        lowered = WithCopies(net)
        lowered.refresh()
        mean = averaged(lowered, here, GradCompression("bf16")) if hooked else lowered
        assert [name.rpartition(".")[2] for name, _ in mean.named_parameters()] == [
            "weight",
            "bias",
        ]
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                mean(torch.randn(8, 40), ()).float().sum().backward()
        assert net.weight.grad is not None
        gradients.append(net.weight.grad.clone())
    plain, rounded = gradients
    assert torch.equal(rounded, rounded.bfloat16().float())
    assert not torch.equal(plain, rounded)
    assert torch.allclose(plain, rounded, rtol=2**-7)
