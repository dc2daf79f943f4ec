"""The paper's update and LARS, against numbers worked out from their formulas."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from alexnet_dist.errors import UserError
from alexnet_dist.training.optim import build_optimizer, momentum_buffers
from alexnet_dist.training.sgd2012 import KrizhevskySGD, sgd2012_update


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_sgd2012_follows_its_definition(momentum: float, dtype: torch.dtype, fused: bool) -> None:
    """Over changes of the learning rate, in float64."""
    torch.manual_seed(0)
    w = nn.Parameter(torch.randn(50, dtype=dtype))
    expected, v = w.detach().double().clone(), torch.zeros(50, dtype=torch.float64)
    optimizer = KrizhevskySGD([w], lr=0.0, momentum=momentum, weight_decay=0.0005, fused=fused)
    for lr in (0.01, 0.01, 0.001, 0.02, 1e-5):
        w.grad = torch.randn(50, dtype=dtype)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        v = momentum * v - 0.0005 * lr * expected - lr * w.grad.double()
        expected = expected + v
        assert optimizer.param_groups[0]["lr"] == lr
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    assert torch.allclose(w.detach().double(), expected, rtol=tolerance, atol=tolerance)
    if momentum:
        buffer = optimizer.state[w]["momentum_buffer"].double()
        assert torch.allclose(-buffer, v, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["sgd2012", "lars"])
def test_sgd2012_as_on_gpus_is_torchs_fused_kernel(name: Any) -> None:
    """Traced as torch.compile does it there. Three groups with learning rates of their own, a
    missing gradient, one in another memory format, an empty shard, and a step that a gradient
    scaler skips."""
    torch.compiler.reset()
    shapes = {"conv.weight": (6, 3, 5, 5), "fc.weight": (7, 311), "own.weight": (0, 5)}
    shapes |= {"conv.bias": (6,), "fc.bias": (7,)}
    results = []
    for fused in (False, True):
        torch.manual_seed(0)
        parameters = {n: nn.Parameter(torch.randn(shape)) for n, shape in shapes.items()}
        conv = parameters["conv.weight"]
        conv.data = conv.data.to(memory_format=torch.channels_last)
        options: Any = {"momentum": 0.9, "weight_decay": 0.05, "separate_groups": ["own.weight"]}
        optimizer: Any = build_optimizer(name, parameters, lr=0.1, **options)
        optimizer.trust_coefficient = 0.5
        optimizer._fused = fused
        optimizer._update = torch.compile(sgd2012_update, fullgraph=True, backend="aot_eager")
        optimizer.grad_scale = None
        for step, lrs in enumerate([(0.1, 0.2, 0.3), (0.1, 0.2, 0.3), (0.01, 0.2, 0.0)]):
            for group, lr in zip(optimizer.param_groups, lrs, strict=True):
                group["lr"] = lr
            for parameter in parameters.values():
                parameter.grad = torch.randn_like(parameter)
            if step == 1:
                parameters["fc.bias"].grad = None
                if not fused:  # torch's kernel would read it in the wrong order
                    conv.grad = conv.grad.contiguous()  # type: ignore[union-attr]
                optimizer.found_inf, before = torch.ones(()), conv.detach().clone()
                optimizer.step()
                assert torch.equal(conv, before)
                optimizer.found_inf = torch.zeros(())
            optimizer.step()
        buffers = momentum_buffers(optimizer, parameters)
        results.append([*(p.detach() for p in parameters.values()), *buffers.values()])
    for ours, theirs in zip(*results, strict=True):
        assert ours.stride() == theirs.stride()
        assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-6)


def test_parameter_groups_and_their_weight_decay() -> None:
    net = nn.ModuleDict({"conv1": nn.Linear(2, 2), "fc8": nn.Linear(2, 2)})
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.5}
    parameters, own = dict(net.named_parameters()), ["weights", "conv1.weight"]
    optimizer = build_optimizer("sgd2012", parameters, separate_groups=own, **options)
    groups = {g["name"]: (len(g["params"]), g["weight_decay"]) for g in optimizer.param_groups}
    assert groups == {"conv1.weight": (1, 0.5), "biases": (2, 0.0), "weights": (1, 0.5)}
    with pytest.raises(UserError, match=r"conv9\.weight, and the network has no such parameter"):
        build_optimizer("sgd2012", parameters, separate_groups={"conv9.weight"}, **options)


def test_momentum_buffers_are_those_of_the_optimizer() -> None:
    w = nn.Parameter(torch.ones(3))
    optimizer = build_optimizer("sgd", {"w": w}, lr=0.1, momentum=0.9, weight_decay=0.0)
    momentum_buffers(optimizer, {"w": w})["w"].fill_(2.0)
    w.grad = torch.zeros(3)
    optimizer.step()
    assert w.tolist() == pytest.approx([1 - 0.1 * 0.9 * 2] * 3)


def test_lars_by_hand() -> None:
    """Two steps; norms are of full tensors, and biases keep the plain learning rate."""
    w = nn.Parameter(torch.tensor([[3.0, 4.0]], dtype=torch.float64))
    bias = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    parameters, options = {"fc.weight": w, "fc.bias": bias}, {"momentum": 0.5, "weight_decay": 0.1}
    optimizer: Any = build_optimizer("lars", parameters, lr=2.0, **options)
    optimizer.trust_coefficient = 0.01
    w.grad = torch.tensor([[0.0, 1.5]], dtype=torch.float64)
    bias.grad = torch.tensor([0.25], dtype=torch.float64)
    optimizer.step()  # |w| = 5, |g| = 1.5: local = 0.01 * 5 / (1.5 + 0.1 * 5) = 0.025
    # v = -2 * 0.025 * [0 + 0.3, 1.5 + 0.4] = [-0.015, -0.095]
    assert w.tolist() == [pytest.approx([2.985, 3.905])]
    assert bias.item() == pytest.approx(0.5)
    for group in optimizer.param_groups:
        group["lr"] = 1.0
    w.grad = torch.tensor([[0.6, -0.8]], dtype=torch.float64)
    bias.grad = torch.tensor([0.0], dtype=torch.float64)
    optimizer.step()
    norm = math.hypot(2.985, 3.905)
    local = 0.01 * norm / (1.0 + 0.1 * norm)
    v = [-0.0075 - local * (0.6 + 0.2985), -0.0475 - local * (-0.8 + 0.3905)]
    assert w.tolist() == [pytest.approx([2.985 + v[0], 3.905 + v[1]])]
    assert bias.item() == pytest.approx(0.25)
    assert optimizer.state[w]["momentum_buffer"].tolist() == [pytest.approx([-v[0], -v[1]])]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_lars_moves_a_tensor_of_zeros_and_bears_a_gradient_of_zeros(decay: float) -> None:
    zeros, ones = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.ones(2, 2))
    parameters = {"a.weight": zeros, "b.weight": ones}
    optimizer = build_optimizer("lars", parameters, lr=0.5, momentum=0.9, weight_decay=decay)
    zeros.grad, ones.grad = torch.ones(2, 2), torch.zeros(2, 2)
    optimizer.step()
    assert zeros.flatten().tolist() == [-0.5] * 4
    left = 1 - 0.5 * 0.001 if decay else 1.0  # the decay alone: 0.001 / decay * decay * w
    assert ones.flatten().tolist() == pytest.approx([left] * 4)


def test_lars_sums_the_squares_of_four_million_weights() -> None:
    w = nn.Parameter(torch.full((2048, 2048), 0.1))
    optimizer = build_optimizer("lars", {"fc.weight": w}, lr=1.0, momentum=0.9, weight_decay=0.0)
    w.grad = torch.zeros_like(w)
    w.grad[0, 0] = 1.0
    optimizer.step()
    assert w[0, 0].item() == pytest.approx(0.1 - 0.001 * 204.8, rel=1e-5)
