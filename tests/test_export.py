"""Exported files: each computes what the network does, and says where it comes from."""

import contextlib
import dataclasses
import io
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from alexnet_dist import evaluate, export
from alexnet_dist.assembly.trained import read
from alexnet_dist.data.photographs import finish, view
from alexnet_dist.errors import UserError
from alexnet_dist.export import FORMATS, main
from alexnet_dist.model import Network, build_model
from alexnet_dist.model.preprocessing import Preprocessed
from alexnet_dist.parallel import mesh
from alexnet_dist.training.optim import build_optimizer
from alexnet_dist.training.saver import Saver
from tests.conftest import SIDE, train, write_images
from tests.networks import CLASSES, CPU, MEAN, alone, command, save_network

Made = tuple[Path, Network]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("networks")


@pytest.fixture(scope="module")
def paper(place: Path) -> Made:
    return save_network(place / "paper", "paper")


@pytest.fixture(scope="module")
def weights(paper: Made, place: Path) -> Path:
    """The network ``paper`` as safetensors."""
    command(main, "--checkpoint", paper[0], "--out", place / "weights.safetensors")
    return place / "weights.safetensors"


@pytest.fixture(scope="module")
def noise(place: Path) -> Path:
    """A data folder of the networks' classes."""
    return write_images(place / "noise")


@pytest.fixture
def group() -> Iterator[None]:
    alone()
    yield
    mesh.destroy_distributed()


def images(count: int, height: int = 67, width: int = 67) -> torch.Tensor:
    """Blotches of colour, uint8 [count, height, width, 3]."""
    generator = torch.Generator().manual_seed(count)
    blotches = torch.rand(count, 3, 5, 5, generator=generator) * 255
    large = torch.nn.functional.interpolate(blotches, size=(height, width), mode="bicubic")
    return large.clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def scores(model: torch.nn.Module, x: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        return model(x).numpy()


@pytest.mark.usefixtures("group")
def test_safetensors_are_read_back_to_the_bit(paper: Made, weights: Path) -> None:
    run, model = paper
    before, after = read(str(run)), read(str(weights))
    found = after.model(CPU)
    for name, parameter in model.named_parameters():
        assert torch.equal(found.get_parameter(name), parameter), name
    for name in ("classes", "statistics", "step", "best", "fingerprint", "images", "versions"):
        assert after.state[name] == before.state[name]
    mine, theirs = before.config, after.config
    assert (theirs.data.root, theirs.run.output_dir) == (None, "runs")  # nobody's paths
    mine.data.root, mine.run.output_dir = None, "runs"
    assert mine == theirs
    with safe_open(weights, "pt") as file:
        header = file.metadata()
    assert str(run.parent) not in json.dumps(header)
    assert json.loads(header["classes"]) == CLASSES
    assert json.loads(header["variant"]) == "paper"


@pytest.mark.usefixtures("group")
def test_a_run_starts_from_safetensors(paper: Made, weights: Path) -> None:
    for variant, outputs, anew in (
        ("paper", 3, []),
        ("paper", 7, ["fc8.weight", "fc8.bias"]),
        ("original146", 3, ["conv6.weight", "conv6.bias"]),
    ):
        mine = build_model(variant, num_classes=outputs, image_size=67)
        drawn = {name: value.clone() for name, value in mine.named_parameters()}
        parameters = dict(mine.named_parameters())
        optimizer = build_optimizer("sgd2012", parameters, lr=1, momentum=0, weight_decay=0)
        layout = SimpleNamespace(
            parameters=parameters, sharding=SimpleNamespace(to_dtensor=lambda _, tensor: tensor)
        )
        saver = Saver(None, layout, optimizer, print)  # type: ignore[arg-type]
        assert saver.start_from(str(weights)) == anew
        theirs = dict(paper[1].named_parameters())
        for name, parameter in mine.named_parameters():
            assert torch.equal(parameter, drawn[name] if name in anew else theirs[name]), name
    with pytest.raises(UserError, match=r"another network: model\.conv1\.weight should be \[64"):
        read(str(weights)).fill(dict(build_model("owt", image_size=67).named_parameters()))


def test_torchvisions_class_loads_what_is_written(place: Path) -> None:
    run, model = save_network(place / "vision", "torchvision")
    out = place / "vision.pth"
    command(main, "--checkpoint", run, "--out", out)
    x = (images(5).permute(0, 3, 1, 2).float() - 120) / 57
    wanted = scores(model, x)
    theirs = torchvision.models.alexnet(num_classes=3).eval()
    theirs.load_state_dict(torch.load(out, weights_only=True))
    np.testing.assert_allclose(scores(theirs, x), wanted, atol=1e-3)
    assert np.abs(wanted).max() > 1

    alone()  # and its file is read as torchvision's own would be, without a record
    found = read(str(out))
    np.testing.assert_allclose(scores(found.model(CPU), x), wanted, atol=1e-3)
    mesh.destroy_distributed()
    assert found.labels == ["0", "1", "2"]
    assert found.knows(["a", "b", "c"])
    assert not found.knows(["a", "b", "c", "d"])
    assert found.pixels.mean == pytest.approx([123.675, 116.28, 103.53])
    assert (found.pixels.side, found.config.data.resize_size) == (224, 256)
    out.unlink()


@pytest.mark.slow
def test_torchvisions_weights_are_read_and_go_on(place: Path) -> None:
    theirs = torchvision.models.alexnet(num_classes=12).eval()
    torch.save(theirs.state_dict(), place / "theirs.pth")
    x = (images(2, 224, 224).permute(0, 3, 1, 2).float() / 255 - 0.45) / 0.22
    command(main, "--checkpoint", place / "theirs.pth", "--out", place / "theirs")
    alone()
    for file in (place / "theirs.pth", place / "theirs/model.safetensors"):
        found = read(str(file))
        np.testing.assert_allclose(scores(found.model(CPU), x), scores(theirs, x), atol=1e-6)
        assert found.knows([f"class {number}" for number in range(12)])
    mesh.destroy_distributed()
    other = torchvision.models.alexnet(num_classes=12).eval()
    other.load_state_dict(load_file(place / "theirs/model.safetensors"))
    assert np.array_equal(scores(other, x), scores(theirs, x))
    assert "came without a record" in (place / "theirs/MODEL_CARD.md").read_text()


@pytest.mark.parametrize("size", [(SIDE, SIDE), (SIDE, 120), (200, 131), (131, 200), (40, 61)])
def test_preprocessing_is_an_evaluations(size: tuple[int, int], tmp_path: Path) -> None:
    """Against the pixels that every engine is held to, by a network that hands them through."""
    (stored,) = images(1, *size)
    Image.fromarray(stored.numpy()).save(tmp_path / "image.png")
    fraction = 67 / SIDE
    seen = view(str(tmp_path / "image.png"), fraction, 67, 1).views
    assert seen is not None
    mean, std = torch.tensor([120.0, 110.0, 100.0]), torch.tensor([57.0, 58.0, 59.0])
    whole = Preprocessed(torch.nn.Identity(), mean, std, side=67, fraction=fraction)
    (ours,) = whole(stored[None])
    theirs = (seen[0] - mean[:, None, None]) * (1 / std)[:, None, None]
    off = ((ours - theirs) * std[:, None, None]).abs()
    if min(size) == SIDE:
        assert torch.equal(ours, theirs)
    assert off.max() < 1.01
    assert off.mean() < 0.25


def hold_to_checkpoint(graph: object, model: Network, run: Path) -> None:
    """A graph with preprocessing to the network behind our own pixels."""
    pixels = read(str(run)).pixels
    for count, height, width in ((1, SIDE, SIDE), (5, SIDE, 99), (2, 131, 200), (3, 90, 50)):
        stored = images(count, height, width)
        seen = []
        for image in stored:
            buffer = run / "image.png"
            Image.fromarray(image.numpy()).save(buffer)
            found = view(str(buffer), 67 / SIDE, 67, 1).views
            assert found is not None
            seen.append(found)
        wanted = scores(model, finish(torch.cat(seen), pixels, CPU))
        got = graph(stored)  # type: ignore[operator]
        tolerance = 2e-3 if min(height, width) == SIDE else 0.15  # pixels that differ by 1
        np.testing.assert_allclose(got, wanted, atol=tolerance)
        assert np.abs(wanted).max() > 0.5


def test_onnx_and_the_models_card(paper: Made, place: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    import onnx

    run, model = paper
    out = place / "out"
    command(main, "--checkpoint", run, "--out", out, "--format", "onnx", "--preprocess")
    assert sorted(path.name for path in out.iterdir()) == [
        "MODEL_CARD.md", "model.onnx"
    ]  # fmt: skip
    written = onnx.load(out / "model.onnx")
    onnx.checker.check_model(written)
    assert written.opset_import[0].version == 18
    session = onnxruntime.InferenceSession(out / "model.onnx")
    assert session.get_inputs()[0].shape == ["batch", "height", "width", 3]
    assert session.get_inputs()[0].type == "tensor(uint8)"
    hold_to_checkpoint(lambda x: session.run(None, {"images": x.numpy()})[0], model, run)

    card = (out / "MODEL_CARD.md").read_text()
    for words in (
        "# AlexNet, variant paper, run paper, after step 12",
        "fingerprint `0123456789abcdef`, 3 classes; 31 to train on, 13 to validate",
        "Top-1 error 12.50 %, top-5 error 0.00 %, loss 0.5000 on 13 validation images",
        "alexnet_dist 0.1.0, torch ",
        "  lr: 0.01\n",
    ):
        assert words in card
    assert str(place) not in card
    follow(card, out, model, 1)


def follow(card: str, out: Path, model: Network, uses: int) -> None:
    """Do as the page says, with a photograph that needs no resize."""
    (stored,) = images(1, SIDE, 100)
    Image.fromarray(stored.numpy()).save(out / "photo.png")
    (seen,) = [view(str(out / "photo.png"), 67 / SIDE, 67, 1).views]
    assert seen is not None
    wanted = scores(model, seen.float() - torch.tensor(MEAN)[:, None, None])
    preparation, *blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(blocks) == uses
    for block in blocks:
        said, names = io.StringIO(), {}  # type: ignore[var-annotated]
        code = (preparation + block).replace("photo.jpg", "photo.png")
        with contextlib.chdir(out), contextlib.redirect_stdout(said):
            exec(compile(code, "MODEL_CARD.md", "exec"), names)
        np.testing.assert_allclose(names["scores"], wanted, atol=1e-3)
        best = int(wanted.argmax())
        assert said.getvalue().strip() in (str(best), CLASSES[best])


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "kind"), [("original150", "pt2"), ("torchvision", "onnx")])
def test_graphs_take_finished_images(variant: str, kind: str, place: Path) -> None:
    run, model = save_network(place / variant, variant)
    out = place / f"{variant}.{kind}"
    command(main, "--checkpoint", run, "--out", out, "--opset", "20")
    if kind == "pt2":
        module = torch.export.load(out).module()
        graph = lambda x: scores(module, x)  # noqa: E731
    else:
        session = pytest.importorskip("onnxruntime").InferenceSession(out)
        assert session.get_inputs()[0].shape == ["batch", 3, 67, 67]
        graph = lambda x: session.run(None, {"images": x.numpy()})[0]  # noqa: E731
    for count in (1, 5):
        stored = images(count, SIDE, SIDE)[:, 4:71, 4:71].permute(0, 3, 1, 2)
        x = finish(stored, read(str(run)).pixels, CPU).contiguous()
        np.testing.assert_allclose(graph(x), scores(model, x), atol=2e-3)
        assert np.abs(graph(x)).max() > 0.5
    out.unlink()


@pytest.mark.slow
def test_a_graph_of_torchs_takes_stored_images(place: Path) -> None:
    run, model = save_network(place / "145", "original145")
    out = place / "145.pt2"
    command(main, "--checkpoint", run, "--out", out, "--preprocess")
    also = {"classes.json": ""}
    graph = torch.export.load(out, extra_files=also).module()
    assert json.loads(also["classes.json"]) == CLASSES
    hold_to_checkpoint(lambda x: scores(graph, x), model, run)


@pytest.mark.slow
def test_a_run_on_two_towers_starts_from_a_file(
    paper: Made, weights: Path, noise: Path, tmp_path: Path
) -> None:
    """Each tower takes its half; after a step of next to nothing they still are those weights."""
    options = [f"--model.pretrained={weights}", "--run.name=run", "--train.max_steps=1"]
    train(2, noise, tmp_path, *options, "--parallel.towers=2", "--optim.lr=1e-12")
    alone()
    model = read(str(tmp_path / "run")).model(CPU)
    mesh.destroy_distributed()
    for name, parameter in paper[1].named_parameters():
        torch.testing.assert_close(model.get_parameter(name), parameter, atol=1e-9, rtol=1e-6)


@pytest.mark.slow
def test_files_are_evaluated(
    paper: Made, weights: Path, noise: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(torchvision.models.alexnet(num_classes=3).state_dict(), tmp_path / "theirs.pth")
    results = []
    for file in (paper[0], weights, tmp_path / "theirs.pth"):
        command(evaluate.main, "--checkpoint", file, "--data.root", noise)
        results.append(json.loads(capsys.readouterr().out))
    assert results[0] == results[1]
    assert results[0]["images"] == results[2]["images"] == 13


def test_what_cannot_be_read(weights: Path, tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "harm"),)

    content = weights.read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(content[: len(content) // 2])
    (tmp_path / "text.safetensors").write_text("weights")
    torch.save({"a": Harm()}, tmp_path / "harm.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"features.0.weight": torch.zeros(3)}, tmp_path / "other.pth")
    (tmp_path / "later.safetensors").write_bytes(
        content.replace(b'"alexnet_dist":"1"', b'"alexnet_dist":"9"', 1)
    )
    for name, sentence in {
        "cut.safetensors": "cannot be read as weights .*: it is damaged",
        "text.safetensors": "cannot be read as weights .*: it is damaged",
        "harm.pth": "cannot be read as weights .*: it is damaged",
        "list.pth": "holds something else than tensors by name",
        "other.pth": "neither an export of this package nor torchvision's AlexNet",
        "later.safetensors": "is of format 9, this version reads 1",
    }.items():
        with pytest.raises(UserError, match=sentence) as failure:
            read(str(tmp_path / name))
        assert str(tmp_path / name) in str(failure.value)
        assert "\n" not in str(failure.value)
        assert failure.value.on_all_ranks
    assert not (tmp_path / "harm").exists()


def test_what_cannot_be_exported(
    paper: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = ["--checkpoint", paper[0]]
    (tmp_path / "file").touch()
    for words, sentence in (
        (["--out", tmp_path], "there is no network: give --checkpoint"),
        ([*run], "there is no place to write to: give --out"),
        ([*run, "--out", tmp_path, "--format", "caffe"], "there is no format caffe; there are"),
        ([*run, "--out", tmp_path / "file/x"], "cannot be made"),
        ([*run, "--out", tmp_path / "a.onnx", "--format", "safetensors"], "a file of format onnx"),
        ([*run, "--out", tmp_path, "--preprocess"], "--preprocess is for --format onnx and"),
        ([*run, "--out", tmp_path, "--format", "torchvision"], "another network than paper"),
        ([*run, "--out", tmp_path, "--model.dropout=0"], "is no option of export"),
    ):
        with pytest.raises(UserError, match=sentence):
            command(main, *words)
    with monkeypatch.context() as patch:
        patch.setattr(export.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(UserError, match=r"pip install 'alexnet-dist\[export\]'"):
            command(main, *run, "--out", tmp_path, "--format", "onnx")

    def other(*_: object) -> object:
        return lambda images: scores(paper[1], torch.zeros(len(images), 3, 67, 67))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    for change, sentence in (
        ({"read": other}, "would not compute what the network does"),
        ({"write": full}, "cannot be written .No space left on device."),
    ):
        kind = FORMATS["safetensors"]
        monkeypatch.setitem(FORMATS, "safetensors", dataclasses.replace(kind, **change))
        with pytest.raises(UserError, match=sentence):
            command(main, *run, "--out", tmp_path)
        monkeypatch.setitem(FORMATS, "safetensors", kind)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
