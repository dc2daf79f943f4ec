"""The table of variants against the counts of the paper and of its source."""

import pytest
import torch
from torch.nn import functional as F

from alexnet_dist.model import MODEL_REGISTRY, build_model, dropout_layers
from alexnet_dist.model.layer_stats import layer_stats
from alexnet_dist.summary import memory_estimate, table


@pytest.mark.parametrize(
    ("arch", "classes", "parameters"),
    [
        ("paper", 1000, 60_965_224),
        ("original145", 1000, 60_965_224),
        ("half_column", 1000, 59_798_312),
        ("one_column", 1000, 62_378_344),
        ("one_column", 10, 58_322_314),
        ("torchvision", 1000, 61_100_840),
        ("alexnet_bn", 1000, 60_965_224 - (96 + 256 + 2 * 384) + 2 * (96 + 2 * 256 + 2 * 384)),
    ],
)
def test_parameters(arch: str, classes: int, parameters: int) -> None:
    stats = layer_stats(arch, num_classes=classes)
    assert sum(layer.parameters for layer in stats) == parameters
    giga = {"paper": 0.724, "one_column": 1.135}.get(arch)
    if giga and classes == 1000:
        assert round(sum(layer.multiply_adds for layer in stats) / 1e9, 3) == giga


def test_the_table_of_the_review_line_by_line() -> None:
    conv = [(96, 55, 55), (256, 27, 27), (384, 13, 13), (384, 13, 13), (256, 13, 13)]
    wanted = [
        ("Conv2d", conv[0], 34_944), ("ReLU", conv[0], 0), ("LocalResponseNorm", conv[0], 0),
        ("MaxPool2d", (96, 27, 27), 0),
        ("Conv2d", conv[1], 614_656), ("ReLU", conv[1], 0), ("LocalResponseNorm", conv[1], 0),
        ("MaxPool2d", (256, 13, 13), 0),
        ("Conv2d", conv[2], 885_120), ("ReLU", conv[2], 0),
        ("Conv2d", conv[3], 1_327_488), ("ReLU", conv[3], 0),
        ("Conv2d", conv[4], 884_992), ("ReLU", conv[4], 0), ("MaxPool2d", (256, 6, 6), 0),
        ("AdaptiveAvgPool2d", (256, 6, 6), 0),
        ("Linear", (4096,), 37_752_832), ("ReLU", (4096,), 0), ("Dropout", (4096,), 0),
        ("Linear", (4096,), 16_781_312), ("ReLU", (4096,), 0), ("Dropout", (4096,), 0),
        ("Linear", (10,), 40_970),
    ]  # fmt: skip
    layers = layer_stats("one_column", num_classes=10, image_size=227)
    assert [(row.kind, row.shape, row.parameters) for row in layers] == wanted
    sizes = {name: round(value, 2) for name, value in memory_estimate(layers, 227).items()}
    assert list(sizes.values()) == [0.59, 14.75, 222.48, 237.82]
    text = table("one_column", num_classes=10, image_size=227)
    assert "58,322,314" in text
    assert "237.82" in text


@pytest.mark.parametrize("arch", MODEL_REGISTRY)
@pytest.mark.parametrize("size", [224, 227])
def test_every_network_reads_both_sizes(arch: str, size: int) -> None:
    assert layer_stats(arch, num_classes=7, image_size=size)[-1].shape == (7,)


def test_layers_of_the_authors_nets() -> None:
    shapes = {
        arch: {layer.name: layer.shape for layer in layer_stats(arch)}
        for arch in ("paper", "alexnet_bn", *(f"original{n}" for n in (145, 146, 147, 148, 150)))
    }
    assert shapes["original145"]["pool5"] == shapes["original146"]["conv6"] == (256, 6, 6)
    names = ("pool1", "conv2", "pool2", "conv3", "pool5")
    assert [shapes["original147"][name][1] for name in names] == [28, 26, 13, 13, 7]
    assert not [name for name in shapes["original148"] if name.startswith(("lrn", "cnorm"))]
    assert shapes["original150"]["conv2"][0] == 320
    assert shapes["original150"]["fc6"] == (8192,)
    order = {arch: list(layers) for arch, layers in shapes.items()}
    assert order["paper"][:4] == ["conv1", "relu1", "lrn1", "pool1"]
    assert order["original145"][:4] == ["conv1", "lrn1", "pool1", "relu1"]
    assert order["original145"][4:9] == ["conv2", "relu2", "lrn2", "cnorm2", "pool2"]
    assert order["alexnet_bn"][:4] == ["conv1", "bn1", "relu1", "pool1"]


def test_initial_weights() -> None:
    torch.manual_seed(0)
    source = build_model("paper", image_size=67).state_dict()
    assert source["conv3.weight"].std().item() == pytest.approx(0.03, rel=0.02)
    assert source["conv1.weight"].std().item() == pytest.approx(0.01, rel=0.02)
    biases = {n.split(".")[0]: float(v[0]) for n, v in source.items() if n.endswith("bias")}
    assert [n for n, v in biases.items() if v == 1] == ["conv2", "conv4", "conv5", "fc6", "fc7"]
    paper = build_model("paper", image_size=67, init="paper").state_dict()
    assert paper["conv3.weight"].std().item() == pytest.approx(0.01, rel=0.02)
    assert float(build_model("owt", image_size=67).state_dict()["fc8.bias"][0]) == -7


@pytest.mark.parametrize(
    ("arch", "first", "meet", "shape"),
    [
        ("paper", "conv2", "conv3", (96, 7, 7)),
        ("paper", "conv4", "fc6", (384, 3, 3)),
        ("original150", "conv2", "fc8", (96, 7, 7)),
    ],
)
def test_where_towers_meet(arch: str, first: str, meet: str, shape: tuple[int, ...]) -> None:
    model = build_model(arch, image_size=67, num_classes=3).eval()
    layers = dict(model.named_children())
    names = list(layers)
    x = torch.randn(1, *shape)
    other = torch.cat([x[:, : shape[0] // 2], x[:, shape[0] // 2 :] + 1], 1)  # the second tower
    for name in names[names.index(first) : names.index(meet)]:
        x, other = layers[name](x), layers[name](other)
        half = x.shape[1] // 2
        assert torch.equal(x[:, :half], other[:, :half]), name
        assert not torch.equal(x[:, half:], other[:, half:]), name
    assert not torch.equal(layers[meet](x)[0, 0], layers[meet](other)[0, 0])


def test_the_stem_reads_three_zeros_beyond_the_edge() -> None:
    conv = build_model("paper").get_submodule("conv1")
    x = torch.randn(1, 3, 224, 224)
    padded = F.pad(x, (0, 3, 0, 3))
    plain = F.conv2d(padded, conv.weight, conv.bias, stride=4)
    assert torch.equal(conv(x), plain)
    assert conv(x).shape[-1] == conv(padded).shape[-1] == 55


@pytest.mark.parametrize("size", [224, 227, 67, 70])
@pytest.mark.parametrize("arch", ["paper", "torchvision"])
def test_blocks_as_channels(arch: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Are the same first convolution: as computed under autocast on CPUs, here in float64."""
    conv = build_model(arch).get_submodule("conv1" if arch == "paper" else "features.0").double()
    x = torch.randn(2, 3, size, size, dtype=torch.float64)

    def compute() -> tuple[torch.Tensor, torch.Tensor]:
        y = conv(x)
        (gradient,) = torch.autograd.grad(y.pow(2).sum(), conv.weight)
        return y.detach(), gradient

    plain, gradient = compute()
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: True)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: torch.float64)
    shapes = []
    conv2d = F.conv2d
    monkeypatch.setattr(F, "conv2d", lambda x, w, b: shapes.append(w.shape) or conv2d(x, w, b))
    blocks, its_gradient = compute()
    assert [shape[1:] for shape in shapes] == [(48, 3, 3)]
    assert torch.allclose(blocks, plain, rtol=1e-10, atol=1e-10)
    assert torch.allclose(its_gradient, gradient, rtol=1e-10, atol=1e-8)


def test_torchvision_is_its_own_class() -> None:
    import torchvision

    model = build_model("torchvision", num_classes=5).eval()
    theirs = torchvision.models.alexnet(num_classes=5).eval()
    theirs.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 224, 224)
    ours, other = model(x), theirs(x)
    assert torch.equal(ours, other)
    ours.pow(2).sum().backward()
    other.pow(2).sum().backward()
    for parameter, its in zip(model.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(parameter.grad, its.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["relu", "tanh"])
def test_the_four_layers_of_figure_1(kind: str) -> None:
    layers = layer_stats(f"figure1_{kind}", num_classes=10, image_size=32)
    assert sum(row.parameters for row in layers) == 89_578
    torch.manual_seed(0)
    model = build_model(f"figure1_{kind}", num_classes=10, image_size=32)
    assert dropout_layers(model) == []
    torch.manual_seed(0)
    weights = build_model("figure1_relu", num_classes=10, image_size=32).state_dict()
    x = images = 1000 * torch.randn(3, 3, 32, 32)
    for name in ("conv1", "conv2", "conv3"):  # the order of the paper: what pooling sees is bent
        x = F.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], padding=2)
        x = F.max_pool2d(getattr(torch, kind)(x), 3, 2, ceil_mode=True)
    assert x.shape == (3, 64, 4, 4)
    scores = F.linear(x.flatten(1), weights["fc4.weight"], weights["fc4.bias"])
    assert torch.allclose(model(images), scores, rtol=1e-5, atol=1e-7)
    assert scores.std() > 1e-3


def test_what_cannot_be_built_is_refused() -> None:
    with pytest.raises(ValueError, match="no arch 'alexnet'"):
        build_model("alexnet")
    with pytest.raises(ValueError, match="too small"):
        build_model("paper", image_size=20)
    with pytest.raises(ValueError, match="torchvision"):
        build_model("torchvision", init="paper")
