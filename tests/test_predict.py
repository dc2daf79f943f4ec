"""The best labels of images: an evaluation's numbers, and a word for every image."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from alexnet_dist.data.datasets import FolderDataset, SplitIndex
from alexnet_dist.data.plan import EvalPlan
from alexnet_dist.data.torch_loader import TorchLoader
from alexnet_dist.errors import UserError
from alexnet_dist.loaded_model import load_model
from alexnet_dist.model import Network
from alexnet_dist.predict import main
from tests.conftest import SIDE
from tests.networks import CLASSES, CPU, command, save_network

NAMES = [*CLASSES, "3", "4", "5"]
"""What the outputs are called: those without a class by their number."""
SIZES = [(SIDE, SIDE), (90, 130), (200, 77), (50, 60), (SIDE, 99)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Network]:
    return save_network(tmp_path_factory.mktemp("runs") / "run", "paper", more_outputs=3)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Blotches of colour, three to a size; in folders, and of two formats."""
    folder = tmp_path_factory.mktemp("photographs")
    generator = np.random.default_rng(3)
    for number, (height, width) in enumerate(SIZES * 3):
        blotches = generator.integers(0, 256, (5, 5, 3), np.uint8)
        image = Image.fromarray(blotches).resize((width, height), Image.Resampling.BICUBIC)
        place = folder / ("a" if number < 8 else "b") / f"{number:02d}"
        place.parent.mkdir(exist_ok=True)
        image.save(place.with_suffix(".png" if number % 2 else ".jpg"))
    return folder


def predicted(capsys: pytest.CaptureFixture[str], *words: object) -> list[dict]:
    capsys.readouterr()
    command(main, *words, "--json", "-")
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def by_class(answers: list[dict]) -> np.ndarray:
    """Probabilities [images, classes] in the order of NAMES."""
    return np.array([[dict(zip(a["labels"], a["probabilities"], strict=True))[name]
                      for name in NAMES] for a in answers])  # fmt: skip


def test_the_numbers_are_an_evaluations(
    trained: tuple[Path, Network], photographs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, model = trained
    answers = predicted(capsys, photographs, "--checkpoint", run, "--batch", 4, "--top", 6)
    names = sorted(str(path.relative_to(photographs)) for path in photographs.rglob("*.*"))
    assert [a["path"] for a in answers] == [str(photographs / name) for name in names]

    sizes = np.array([Image.open(photographs / name).size[::-1] for name in names])
    labels = np.zeros(len(names), np.int64)
    source = FolderDataset(SplitIndex(str(photographs), names, labels, sizes, CLASSES))
    network = load_model(str(run))
    engine = TorchLoader(source, network.normalization, device=CPU, threads=0)
    batches = engine.batches(EvalPlan(sizes, 4, network.crop_fraction).batches(slice(None)))
    with torch.no_grad():
        wanted = torch.cat([model(batch.images).double().softmax(1) for batch in batches]).numpy()
    np.testing.assert_allclose(by_class(answers), wanted, rtol=1e-4)
    assert np.ptp(wanted, 0).min() > 0.1  # the images do make a difference
    for answer in answers:
        assert answer["probabilities"] == sorted(answer["probabilities"], reverse=True)


def test_ten_views_are_averaged(
    trained: tuple[Path, Network], photographs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, model = trained
    files = sorted(photographs.rglob("*.png"))
    answers = predicted(capsys, *files, "--checkpoint", run, "--ten_crop", "--top", 9)
    wanted = []
    for file in files:
        image = Image.open(file)
        short = min(image.size)
        square = image.crop(
            [x + d for d in (0, short) for x in ((image.width - short) // 2,
                                                 (image.height - short) // 2)]
        )  # fmt: skip
        side = round(short * 67 / SIDE)
        room, views = short - side, []
        middle = [(length - side) // 2 - (length - short) // 2 for length in image.size]
        for left, top in ((0, 0), (0, room), (room, 0), (room, room), middle):
            cut = square.crop((left, top, left + side, top + side))
            pixels = np.asarray(cut.resize((67, 67), Image.Resampling.BILINEAR), np.float32)
            views += [pixels, pixels[:, ::-1]]
        x = torch.tensor(np.array(views) - [120.5, 110.25, 99.0]).float().permute(0, 3, 1, 2)
        with torch.no_grad():
            wanted.append(model(x).softmax(1).mean(0).numpy())
    np.testing.assert_allclose(by_class(answers), wanted, atol=2e-3)  # Pillow's resize is another
    one = by_class(predicted(capsys, *files, "--checkpoint", run, "--top", 6))
    assert np.abs(by_class(answers) - one).max() > 0.02


def test_what_cannot_be_read_is_named_and_the_rest_is_done(
    trained: tuple[Path, Network], photographs: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    good = sorted(photographs.rglob("*.jpg"))
    cut, empty = tmp_path / "cut.jpg", tmp_path / "empty"
    cut.write_bytes(good[1].read_bytes()[:-20])
    empty.mkdir()
    words = [good[0], cut, tmp_path / "none.jpg", empty, tmp_path / "*.png", good[2]]
    with pytest.raises(SystemExit) as ended:
        command(main, *words, "--checkpoint", trained[0], "--batch", 1)
    assert ended.value.code == 1
    said = capsys.readouterr()
    assert [line for line in said.out.splitlines() if line[0] != " "] == [
        str(good[0]),
        str(good[2]),
    ]
    assert said.err.splitlines() == [
        f"alexnet_dist: {path} cannot be read ({reason}): it is skipped"
        for path, reason in (
            (cut, "it is cut short: a JPEG without its end marker"),
            (tmp_path / "none.jpg", "No such file or directory"),
            (empty, "there is no image in this folder"),
            (tmp_path / "*.png", "No such file or directory"),
        )
    ]


def test_lists_patterns_and_odd_names(
    trained: tuple[Path, Network], photographs: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    odd = tmp_path / "odd [1] name.jpg"
    odd.write_bytes(next(photographs.rglob("*.jpg")).read_bytes())
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{odd}\n\n{photographs}/b\n"))
    answers = predicted(
        capsys, f"{photographs}/**/0*.png", "-", "--checkpoint", trained[0], "--top", 2
    )
    wanted = [*sorted(photographs.glob("a/*.png")), *sorted(photographs.glob("b/0*.png")), odd]
    wanted += sorted(photographs.glob("b/*"))
    assert [a["path"] for a in answers] == [str(path) for path in wanted]
    assert {len(a["labels"]) for a in answers} == {2}


def test_text_json_and_picture(
    trained: tuple[Path, Network], photographs: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run, _ = trained
    file, picture = tmp_path / "answers.jsonl", tmp_path / "picture.png"
    words = [photographs / "b", "--checkpoint", run, "--json", file, "--save_image", picture]
    command(main, *words, "--runtime.device", "cpu", "--runtime.threads=1")
    answers = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(answers) == 7
    assert {label for answer in answers for label in answer["labels"]} == set(NAMES)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 7 * 6
    first = answers[0]
    assert lines[:2] == [
        first["path"], f"  {100 * first['probabilities'][0]:6.2f} %  {first['labels'][0]}"
    ]  # fmt: skip
    width, height = Image.open(picture).size
    assert 1000 < width < 1300  # four columns
    assert 900 < height < 1300  # two rows


def test_what_is_asked_for_wrongly(trained: tuple[Path, Network], tmp_path: Path) -> None:
    run = ["--checkpoint", str(trained[0])]
    (tmp_path / "weights.txt").touch()
    for words, sentence in (
        ([*run], "required: IMAGE"),
        (["a.jpg"], "required: --checkpoint"),
        (["a.jpg", *run, "--views", "5"], "--views is now --ten_crop"),
        (["a.jpg", *run, "--top", "0"], "--top is 0; it must be at least 1"),
        (["a.jpg", *run, "--save_image", "a.gif"], r"must end in \.png or \.pdf"),
        (["a.jpg", *run, "--json", f"{tmp_path}/no/a"], "has no folder to lie in"),
        (["a.jpg", *run, "--runtime.devise=cpu"], "runtime.device"),
        (["a.jpg", *run, "--ten_corp"], "did you mean --ten_crop"),
        (["a.jpg", "--checkpoint", str(tmp_path)], "there is no checkpoint at"),
        (["a.jpg", "--checkpoint", f"{tmp_path}/weights.txt"], "holds no weights"),
    ):
        with pytest.raises(UserError, match=sentence):
            command(main, *words)
