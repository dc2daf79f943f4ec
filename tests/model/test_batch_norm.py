"""Batch normalization against torch's, and what becomes of its running averages."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from alexnet_dist.model import build_model
from alexnet_dist.model.batch_norm import BatchNorm
from alexnet_dist.training.optim import build_optimizer, momentum_buffers

AllReduce = Callable[[Tensor], Tensor] | None
BOTH: list[AllReduce] = [None, torch.clone]
"""torch's kernel, and the sums of many processes, of which there is one."""


@pytest.mark.parametrize("all_reduce", BOTH)
@pytest.mark.parametrize("shape", [(5, 6, 4, 3), (7, 6)])
def test_it_is_torchs(shape: tuple[int, ...], all_reduce: AllReduce) -> None:
    generator = torch.Generator().manual_seed(3)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    ours = BatchNorm(6, eps=1e-3, momentum=0.2).double()
    ours.all_reduce = all_reduce
    theirs = (nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d)(6, 1e-3, 0.2).double()
    averages = {"running_mean": theirs.running_mean, "running_var": theirs.running_var}
    with torch.no_grad():
        for name in ("weight", "bias"):
            getattr(theirs, name).copy_(random(6))
            getattr(ours, name).copy_(getattr(theirs, name))
    for _ in range(3):
        x, upstream = 3 * random(*shape) + 1, random(*shape)
        found = []
        for layer in (ours, theirs):
            mine = x.clone().requires_grad_()
            y = layer(mine)
            found.append([y, *torch.autograd.grad(y, [mine, layer.weight, layer.bias], upstream)])
        for one, other in zip(*found, strict=True):
            assert torch.allclose(one, other, rtol=1e-10, atol=1e-10)
        for name, wanted in averages.items():
            assert torch.allclose(getattr(ours, name), wanted, rtol=1e-12, atol=0)
    assert torch.equal(ours.eval()(x), ours(x))  # which moves nothing
    assert torch.allclose(ours(x), theirs.eval()(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("all_reduce", BOTH)
def test_its_arithmetic_is_float32_and_does_not_cancel(all_reduce: AllReduce) -> None:
    layer = BatchNorm(2, momentum=1.0)
    layer.all_reduce = all_reduce
    x = torch.randn(64, 2, 9, 9, generator=torch.Generator().manual_seed(1)) + 3000
    y = layer(x)
    exact = x.double().var((0, 2, 3))
    assert torch.allclose(layer.running_var.double(), exact, rtol=1e-4)
    assert y.var((0, 2, 3)).tolist() == pytest.approx([1, 1], rel=1e-3)
    low = layer((x - 3000).bfloat16())
    assert low.dtype == torch.bfloat16
    rounded = (x - 3000).bfloat16().double().var((0, 2, 3))
    assert torch.allclose(layer.running_var.double(), rounded, rtol=1e-5)


@pytest.mark.parametrize("all_reduce", BOTH)
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, 3e38])
def test_what_is_not_finite_leaves_no_trace(wrong: float, all_reduce: AllReduce) -> None:
    layer = BatchNorm(3)
    layer.all_reduce = all_reduce
    x = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    layer(x)
    before = layer.running_mean.clone(), layer.running_var.clone()
    nonfinite = x.clone()
    nonfinite[1, 2] = wrong
    layer(nonfinite)
    assert torch.equal(layer.running_mean, before[0])
    assert torch.equal(layer.running_var, before[1])
    layer(x)
    assert not torch.equal(layer.running_mean, before[0])


def test_the_optimizer_moves_scale_and_shift_without_decay_and_no_average() -> None:
    model = build_model("alexnet_bn", num_classes=3, image_size=67)
    parameters = dict(model.named_parameters())
    averages = {
        f"bn{layer}.{name}" for layer in range(1, 6) for name in ("running_mean", "running_var")
    }
    assert {name for name, p in parameters.items() if not p.requires_grad} == averages
    for name in ("sgd2012", "sgd", "lars"):
        optimizer = build_optimizer(name, parameters, lr=1, momentum=0.9, weight_decay=0.1)
        groups = {g["name"]: (g["param_names"], g["weight_decay"]) for g in optimizer.param_groups}
        weights, biases = groups["weights"], groups["biases"]
        assert (weights[1], biases[1]) == (0.1, 0.0)
        assert weights[0] == [f"{layer}.weight" for layer in LAYERS]
        assert {"bn1.weight", "bn1.bias", "conv5.bias", "fc8.bias"} < set(biases[0])
        assert set(weights[0] + biases[0]) == set(parameters) - averages
        assert set(momentum_buffers(optimizer, parameters)) == set(parameters) - averages


LAYERS = ["conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8"]


@pytest.mark.parametrize("init", [None, "torch"])
def test_it_begins_as_its_source_does(init: str | None) -> None:
    state = build_model("alexnet_bn", num_classes=3, image_size=67, init=init).state_dict()
    for layer, features in zip(range(1, 6), (96, 256, 384, 384, 256), strict=True):
        for name, value in (("weight", 1), ("bias", 0), ("running_mean", 0), ("running_var", 1)):
            assert state[f"bn{layer}.{name}"].tolist() == [value] * features
    has_bias = [layer for layer in LAYERS if f"{layer}.bias" in state]
    assert has_bias == ["conv5", "fc6", "fc7", "fc8"]
    if init is None:
        biases = [float(state[f"{layer}.bias"][0]) for layer in has_bias]
        assert biases == pytest.approx([0.1, 0.1, 0.1, 0])
        for layer, std in (("conv3", 0.01), ("fc6", 0.005), ("fc7", 0.005)):
            assert state[f"{layer}.weight"].std().item() == pytest.approx(std, rel=0.02)
