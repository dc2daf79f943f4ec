"""Each thing that can be wrong: one sentence that names it and the mend, no traceback of ours, an
exit code that is not 0, and no hang."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import TINY, Result, command, environment, events, launch, train, write_images


def refused(processes: int, *options: str, **env: str) -> str:
    """What a training command says when it is refused."""
    result = launch(processes, *TINY, *options, timeout=120, **env)
    return the_sentence(result)


def the_sentence(result: Result) -> str:
    assert result.code != 0
    assert not result.ours_in_traceback, result.err
    assert len(result.said) >= 1, result.err
    return result.said[0]


@pytest.fixture
def runs(tmp_path: Path) -> str:
    return f"--run.output_dir={tmp_path / 'runs'}"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--optim.lrr=1"], "no option --optim.lrr; did you mean --optim.lr?"),
        (
            ["--data.batch_size=many"],
            "data.batch_size must be a whole number of at least 1, not many",
        ),
        (["--config=nowhere.yaml"], "there is no config nowhere.yaml"),
        (["--data.root=/nowhere"], "there is no folder /nowhere: give --data.root"),
        (["--model.arch=alexnet"], "there is no model.arch alexnet; there are paper,"),
        (["--run.resume=/nowhere"], "there is no run at /nowhere"),
        (["--runtime.device=cuda"], "runtime.device is cuda, but torch sees no GPU here"),
    ],
)
def test_options(options: list[str], sentence: str, images: Path, runs: str) -> None:
    if "cuda" in options[0] and Path("/dev/nvidia0").exists():
        pytest.skip("this machine has a GPU")
    assert sentence in refused(0, f"--data.root={images}", runs, *options)


def test_one_sentence_for_all_processes(tmp_path: Path, runs: str) -> None:
    result = launch(2, *TINY, f"--data.root={tmp_path}", runs)
    assert "has no folder train/" in the_sentence(result)
    assert len(result.said) == 1


def test_folders_without_classes_or_with_others(tmp_path: Path, runs: str) -> None:
    root = tmp_path / "i"
    (root / "train").mkdir(parents=True)
    assert "has no folders in it" in refused(0, f"--data.root={root}", runs)
    shutil.rmtree(root)
    write_images(root)
    (root / "val/red").rename(root / "val/rouge")
    assert "differ (red, rouge)" in refused(0, f"--data.root={root}", runs)
    shutil.rmtree(root / "train/red")
    shutil.rmtree(root / "train/green")
    for name in ("rouge", "green"):
        shutil.rmtree(root / "val" / name)
    assert "has only one class" in refused(0, f"--data.root={root}", runs)


def test_fewer_images_than_replicas_or_than_a_batch(images: Path, runs: str) -> None:
    root = f"--data.root={images}"
    sentence = refused(3, root, runs, "--data.batch_size=2")
    assert "data.batch_size 2 is the global batch" in sentence
    assert "more than the 31 images" in refused(0, root, runs, "--data.batch_size=32")


def test_an_image_that_cannot_be_decoded(tmp_path: Path, runs: str) -> None:
    root = write_images(tmp_path / "i")
    result = launch(0, *TINY, f"--data.root={root}", runs, "--train.max_steps=1")
    assert result.code == 0, result.err  # the index knows all images as good
    for number, file in enumerate(sorted((root / "train/green").glob("*.jpg"))):
        left = (300, -2)[number % 2]  # a part of the header, or all but the end marker
        file.write_bytes(file.read_bytes()[:left])
    result = launch(2, *TINY, f"--data.root={root}", runs, "--run.name=stop")
    assert any("train/green" in s and "cannot be decoded" in s for s in result.said)
    assert the_sentence(result)
    train(2, root, tmp_path, "--run.name=skip", "--data.on_corrupt_image=skip")
    news = events(tmp_path / "skip", "corrupt_image")
    assert {Path(e["path"]).parent.name for e in news} == {"green"}
    assert {Path(e["substitute"]).parent.name for e in news} == {"red"}
    train(0, root, tmp_path, "--run.name=alone", "--data.on_corrupt_image=skip")
    alone = [(e["path"], e["substitute"]) for e in events(tmp_path / "alone", "corrupt_image")]
    assert sorted(alone) == sorted((e["path"], e["substitute"]) for e in news)
    digests = [
        [e["sample_order_hash"] for e in events(tmp_path / name, "epoch")]
        for name in ("skip", "alone")
    ]
    assert digests[0] == digests[1]


def test_a_checkpoint_of_another_model(images: Path, tmp_path: Path, runs: str) -> None:
    root = f"--data.root={images}"
    train(0, images, tmp_path / "runs", "--run.name=run", "--train.max_steps=1")
    for option, words in (
        ("--model.arch=owt", "model.arch cannot change from paper to owt"),
        ("--train.seed=5", "train.seed cannot change from 2012 to 5"),
        ("--data.batch_size=9", "data.batch_size cannot change from 7 to 9"),
    ):
        sentence = refused(0, root, runs, "--run.name=run", option)
        assert words in sentence
        assert "--run.resume never" in sentence
    checkpoint = tmp_path / "runs/run/checkpoints/last"
    start = [f"--model.pretrained={checkpoint.resolve()}", "--run.name=other"]
    assert "is of another network" in refused(0, root, runs, *start, "--model.arch=owt")
    fewer = write_images(tmp_path / "fewer")
    for split in ("train", "val"):
        shutil.rmtree(fewer / split / "red")
    train(0, fewer, tmp_path / "runs", *start, "--train.max_steps=1")


@pytest.mark.slow
def test_other_images_under_a_run(tmp_path: Path, runs: str) -> None:
    root = write_images(tmp_path / "i")
    train(0, root, tmp_path / "runs", "--run.name=run", "--train.max_steps=1")
    (root / "train/red/002.jpg").unlink()
    sentence = refused(0, f"--data.root={root}", runs, "--run.name=run")
    assert "are not those of before" in sentence


def test_a_harmless_change_is_recorded(images: Path, tmp_path: Path) -> None:
    train(0, images, tmp_path, "--run.name=run", "--train.max_steps=1")
    train(0, images, tmp_path, "--run.name=run", "--train.max_steps=2", "--optim.lr=0.0005")
    (resume,) = events(tmp_path / "run", "resume")
    assert resume["changed"] == {"optim.lr": [0.001, 0.0005], "train.max_steps": [1, 2]}


def test_a_run_folder_in_use(images: Path, tmp_path: Path, runs: str) -> None:
    holder = (
        "import sys, time; from pathlib import Path; from alexnet_dist.tracking.run_dir import *; "
        "lock(Path(sys.argv[1])); print('held', flush=True); "
        "time.sleep(60)"
    )
    with subprocess.Popen(
        [os.sys.executable, "-c", holder, str(tmp_path / "runs/run")],  # type: ignore[attr-defined]
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        sentence = refused(2, f"--data.root={images}", runs, "--run.name=run")
        process.kill()
    assert "in use by another run" in sentence
    assert "--run.name" in sentence


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(images: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=190m", "tmpfs", str(small)], capture_output=True
    )
    if mounted.returncode != 0:
        pytest.skip("this user may not mount a small file system to fill")
    try:
        # one checkpoint (140 MB) fits, a second beside it does not
        result = train(2, images, small, "--run.name=run")
        failed = events(small / "run", "checkpoint_failed")
        assert len(failed) == 1
        assert "No space left on device" in failed[0]["message"]
        assert "training continues" in result.out
        assert (small / "run/checkpoints/last").resolve().name == "step-00000004"
        assert not list((small / "run/checkpoints").glob(".partial*"))
        assert events(small / "run", "finished")
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


def test_a_loss_that_explodes(images: Path, runs: str) -> None:
    sentence = refused(2, f"--data.root={images}", runs, "--optim.lr=1e30")
    assert "take a smaller --optim.lr" in sentence


@pytest.mark.parametrize("every", ["1", "100"])
def test_a_loss_that_explodes_reaches_no_checkpoint(
    every: str, images: Path, tmp_path: Path
) -> None:
    """The weights go with the first update, and no record would fall due before the epoch's end."""
    options = [
        f"--checkpoint.interval_steps={every}",
        "--train.log_interval=1000",
        "--run.name=run",
    ]
    roots = [f"--data.root={images}", f"--run.output_dir={tmp_path}"]
    sentence = refused(0, *roots, *options, "--optim.lr=1e38")
    assert "the last checkpoint is intact" in sentence
    assert not list((tmp_path / "run/checkpoints").iterdir())


def test_pictures_that_cannot_be_written_cost_nothing(images: Path, tmp_path: Path) -> None:
    for name in ("first_batch", "curves", "kernels", "predictions"):
        (tmp_path / "run" / f"{name}.png").mkdir(parents=True)  # no file can be there
    train(0, images, tmp_path, "--run.name=run", "--train.epochs=1")
    assert len(events(tmp_path / "run", "warning")) == 4
    assert events(tmp_path / "run", "finished")


def test_nothing_to_evaluate(tmp_path: Path) -> None:
    result = launch(0, module="alexnet_dist.evaluate")
    assert "arguments are required: --checkpoint" in the_sentence(result)
    result = launch(2, f"--checkpoint={tmp_path}", module="alexnet_dist.evaluate")
    assert "there is no checkpoint at" in the_sentence(result)


def test_debug_shows_where_it_came_from() -> None:
    result = launch(0, "--data.root=/nowhere", "--debug", "--run.output_dir=/tmp/none")
    assert "Traceback" in result.err


def test_interrupt_is_no_traceback(images: Path, tmp_path: Path) -> None:
    import signal
    import time

    options = [
        *TINY,
        f"--data.root={images}",
        f"--run.output_dir={tmp_path}",
        "--train.epochs=10000",
    ]
    with subprocess.Popen(
        command(0, "alexnet_dist.train", *options, "--run.name=run"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # shells may ignore it
    ) as process:
        while not (tmp_path / "run/metrics.jsonl").exists():
            time.sleep(0.2)
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "stopped by Ctrl-C" in out
    assert "saved; the same command resumes" in out
    assert "Traceback" not in err
