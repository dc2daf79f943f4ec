"""Each thing that can be wrong: one error message that names it and the fix, no traceback of ours,
an exit code that is not 0, and no hang."""

import shutil
from pathlib import Path

import pytest

from alexnet_dist.tracking.run_dir import lock
from tests.conftest import TINY, Result, events, launch, train, write_images


def refused(processes: int, *options: str) -> str:
    """The error message of a training command."""
    return error_message(launch(processes, *TINY, *options, timeout=120))


def error_message(result: Result) -> str:
    assert result.code != 0
    assert not result.ours_in_traceback, result.err
    assert len(result.said) >= 1, result.err
    return result.said[0]


@pytest.fixture
def runs(tmp_path: Path) -> str:
    return f"--run.output_dir={tmp_path / 'runs'}"


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--data.root=/nowhere", "there is no folder /nowhere: give --data.root"),
        ("--data.root=", "there are no images: give --data.root the folder that holds train/ and"),
        ("--model.arch=alexnet", "there is no model.arch alexnet; there are paper,"),
        ("--run.resume=/nowhere", "there is no run at /nowhere"),
        ("--runtime.device=cuda", "runtime.device is cuda, but torch sees no GPU here"),
        ("--data.batch_size=32", "more than the 31 images"),
    ],
)
def test_options(option: str, message: str, images: Path, runs: str) -> None:
    if "cuda" in option and Path("/dev/nvidia0").exists():
        pytest.skip("this machine has a GPU")
    assert message in refused(0, f"--data.root={images}", runs, option)


def test_one_error_message_for_all_processes(images: Path, tmp_path: Path, runs: str) -> None:
    result = launch(2, *TINY, f"--data.root={tmp_path}", runs)
    assert "has no folder train/" in error_message(result)
    assert len(result.said) == 1
    message = refused(3, f"--data.root={images}", runs, "--data.batch_size=2")
    assert "data.batch_size 2 is the global batch" in message


def test_one_class(tmp_path: Path, runs: str) -> None:
    root = write_images(tmp_path / "i", train=21)
    for folder in (*root.glob("*/green"), *root.glob("*/red")):
        shutil.rmtree(folder)
    assert "has only one class" in refused(0, f"--data.root={root}", runs)


def test_an_image_that_cannot_be_decoded(tmp_path: Path, runs: str) -> None:
    root = write_images(tmp_path / "i")
    train(0, root, tmp_path, "--run.name=run", "--train.max_steps=1")  # the index has good images
    for number, file in enumerate(sorted((root / "train/green").glob("*.jpg"))):
        left = (300, -2)[number % 2]  # a part of the header, or all but the end marker
        file.write_bytes(file.read_bytes()[:left])
    result = launch(2, *TINY, f"--data.root={root}", runs, "--run.name=stop")
    assert error_message(result)
    assert any("train/green" in s and "cannot be decoded" in s for s in result.said)
    found = []
    for processes in (2, 0):
        name = f"skip{processes}"
        train(processes, root, tmp_path, f"--run.name={name}", "--data.on_corrupt_image=skip")
        pairs = [(e["path"], e["substitute"]) for e in events(tmp_path / name, "corrupt_image")]
        order = [e["sample_order_hash"] for e in events(tmp_path / name, "epoch")]
        found.append((sorted(pairs), order))
    assert found[0] == found[1]
    classes = {tuple(Path(path).parent.name for path in pair) for pair in found[0][0]}
    assert classes == {("green", "red")}


def test_what_cannot_change_under_a_run(tmp_path: Path, runs: str) -> None:
    images = write_images(tmp_path / "i")
    root = f"--data.root={images}"
    train(0, images, tmp_path / "runs", "--run.name=run", "--train.max_steps=1")
    for option, words in (
        ("--model.arch=owt", "model.arch cannot change from paper to owt"),
        ("--data.batch_size=9", "data.batch_size cannot change from 7 to 9"),
    ):
        message = refused(0, root, runs, "--run.name=run", option)
        assert words in message
        assert "--run.resume never" in message
    checkpoint = (tmp_path / "runs/run/checkpoints/last").resolve()
    other = [f"--model.pretrained={checkpoint}", "--run.name=other"]
    assert "is of another network" in refused(0, root, runs, *other, "--model.arch=owt")
    fewer = write_images(tmp_path / "fewer")
    for folder in fewer.glob("*/red"):
        shutil.rmtree(folder)
    train(0, fewer, tmp_path / "runs", *other, "--train.max_steps=1")
    (images / "train/red/002.jpg").unlink()
    assert "are not those of before" in refused(0, root, runs, "--run.name=run")


def test_a_run_folder_in_use(images: Path, tmp_path: Path, runs: str) -> None:
    lock(tmp_path / "runs/run")
    message = refused(2, f"--data.root={images}", runs, "--run.name=run")
    assert "in use by another run" in message
    assert "--run.name" in message


@pytest.mark.parametrize(("processes", "interval"), [(2, "1"), (0, "100")])
def test_a_loss_that_explodes(processes: int, interval: str, images: Path, tmp_path: Path) -> None:
    """It reaches no checkpoint, though no record would fall due before the epoch's end."""
    options = [f"--data.root={images}", f"--run.output_dir={tmp_path}", "--run.name=run"]
    options += [f"--checkpoint.interval_steps={interval}", "--train.log_interval=1000"]
    message = refused(processes, *options, "--optim.lr=1e38")
    assert "take a smaller --optim.lr" in message
    assert "the last checkpoint is intact" in message
    assert not list((tmp_path / "run/checkpoints").iterdir())


def test_plots_that_cannot_be_written_cost_nothing(images: Path, tmp_path: Path) -> None:
    for name in ("first_batch", "curves", "kernels", "predictions"):
        (tmp_path / "run" / f"{name}.png").mkdir(parents=True)  # no file can be there
    train(0, images, tmp_path, "--run.name=run", "--train.epochs=1")
    warnings = [event["message"] for event in events(tmp_path / "run", "warning")]
    assert len(warnings) == 4
    assert all(".png could not be written (Is a directory" in message for message in warnings)
    assert events(tmp_path / "run", "finished")
