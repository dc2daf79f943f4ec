"""What many processes do together: the same as one, and the same after a stop."""

import os
import signal
from pathlib import Path

import pytest

from tests.conftest import TINY, evaluate, events, losses, succeed, train
from tests.distributed.groups import alive, running, sample_order, steps, tensors, wait_for, workers


@pytest.fixture(scope="module")
def reference(images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Undisturbed runs, on 0 (no torchrun), 2 and 3 processes."""
    runs = tmp_path_factory.mktemp("reference")
    for processes in (0, 2, 3):
        train(processes, images, runs, f"--run.name=on{processes}")
    return {processes: runs / f"on{processes}" for processes in (0, 2, 3)}


def test_any_number_of_processes_trains_alike(reference: dict[int, Path]) -> None:
    """To rounding; from the same samples in the same order, each image evaluated once."""
    alone, order = losses(reference[0]), sample_order(reference[0])
    assert sorted(alone) == list(range(1, 9))
    (first, images), (second, _) = order.values()
    assert first != second
    assert images == 28
    errors = [e["top1_error"] for e in events(reference[0], "eval")]
    for run in reference.values():
        assert losses(run) == pytest.approx(alone, rel=1e-4)
        assert sample_order(run) == order
        assert [e["top1_error"] for e in events(run, "eval")] == pytest.approx(errors)
        assert [e["images"] for e in events(run, "eval")] == [13, 13]


def test_training_learns(images: Path, tmp_path: Path) -> None:
    """To tell three colors apart, in 16 steps: from the loss of a guess, log 3, to none."""
    options = ["--model.arch=alexnet_bn", "--train.epochs=4", "--optim.lr=0.02"]
    train(2, images, tmp_path, "--run.name=run", *options)
    epochs, evals = (events(tmp_path / "run", kind) for kind in ("epoch", "eval"))
    assert epochs[0]["loss"] > 0.9
    assert epochs[-1]["loss"] < 0.3
    assert evals[-1]["loss"] < 0.3
    assert evals[-1]["top1_error"] == 0


def test_the_records_say_where_the_time_went(reference: dict[int, Path]) -> None:
    for processes, run in reference.items():
        for event in events(run, "train"):
            waits = event["data_time_fraction"], event["comm_time_fraction"]
            assert all(0 <= fraction <= 1 for fraction in waits)
            assert sum(waits) < 1
            assert (waits[1] > 0) == (processes > 0)


def test_evaluate_counts_what_training_counted(reference: dict[int, Path]) -> None:
    wanted = events(reference[2], "best")[-1]
    for processes in (0, 3):
        counted = evaluate(processes, "--checkpoint", str(reference[2]))
        assert counted["images"] == 13
        assert counted["top1_error"] == wanted["top1_error"]
        assert counted["loss"] == pytest.approx(wanted["loss"], rel=1e-5)


def test_steps_are_recorded_before_an_evaluation(images: Path, tmp_path: Path) -> None:
    train(0, images, tmp_path, "--run.name=run", "--train.max_steps=6", "--train.log_interval=20")
    recorded = [(e["step"], e["steps"]) for e in events(tmp_path / "run", "train")]
    assert recorded == [(4, 4), (6, 2)]  # at the end of the first epoch, and of training


def test_a_resumed_run_keeps_its_options_and_records_a_change(images: Path, tmp_path: Path) -> None:
    options = [option for option in TINY if not option.startswith("--runtime.threads")]
    options += [f"--data.root={images}", f"--run.output_dir={tmp_path}", "--run.name=run"]
    changed = ["--train.max_steps=2", "--optim.lr=0.0005"]
    for more in (["--runtime.threads=3", "--train.max_steps=1"], changed):
        succeed(0, "train", *options, *more)
    start, resume = events(tmp_path / "run", "start", "resume")
    assert (start["threads"], resume["threads"]) == (3, 3)
    assert resume["changed"] == {"optim.lr": [0.001, 0.0005], "train.max_steps": [1, 2]}


LAYOUTS = [(2, "--parallel.towers=2"), (3, "--parallel.fc=sharded")]
SLOW = [pytest.param(*layout, marks=pytest.mark.slow) for layout in LAYOUTS]


@pytest.mark.parametrize(("processes", "layout"), [(3, "--parallel.fc=replicated"), *SLOW])
def test_a_killed_run_resumes(processes: int, layout: str, images: Path, tmp_path: Path) -> None:
    """Bit for bit, though all of its processes die at once after a checkpoint."""
    run, options = tmp_path / "run", [layout, "--checkpoint.interval_steps=2", "--train.epochs=2"]
    train(processes, images, tmp_path, "--run.name=reference", layout)
    with running(processes, images, tmp_path, *options) as launcher:
        wait_for(lambda: (run / "checkpoints/last").exists() and steps(run) >= 3)
        for pid in (launcher.pid, *workers(launcher.pid)):
            os.kill(pid, signal.SIGKILL)
    train(processes, images, tmp_path, "--run.name=run")  # by the options that its folder keeps
    assert events(run, "resume")[0]["step"] >= 2
    assert losses(run) == losses(tmp_path / "reference")
    assert tensors(run) == tensors(tmp_path / "reference")


@pytest.mark.slow
def test_a_stopped_run_resumes_bit_for_bit(images: Path, tmp_path: Path) -> None:
    """And the sums over three processes do not depend on how many steps are read at once."""
    options = ["--train.log_interval=3", "--train.epochs=3"]
    train(3, images, tmp_path, "--run.name=reference", *options)
    options += ["--checkpoint.interval_steps=2", "--run.name=run"]
    train(3, images, tmp_path, *options, "--train.max_steps=5")
    train(3, images, tmp_path, *options)
    run, wanted = (losses(tmp_path / name) for name in ("run", "reference"))
    assert sorted(run) == sorted([5, *wanted])  # where it was stopped, and not
    del run[5], run[6], wanted[6]
    assert run == wanted
    again, epochs = (
        {e["step"]: e["loss"] for e in events(tmp_path / name, "epoch")}
        for name in ("run", "reference")
    )
    assert again.items() >= epochs.items()
    assert tensors(tmp_path / "run") == tensors(tmp_path / "reference")


@pytest.mark.slow
def test_precision_may_change_and_evaluation_batches_be_small(images: Path, tmp_path: Path) -> None:
    options = ["--run.name=run", "--data.eval_batch_size=2", "--train.epochs=1"]
    train(3, images, tmp_path, *options, "--train.max_steps=1")
    train(3, images, tmp_path, *options, "--train.max_steps=2", "--runtime.precision=fp16")
    assert [e["images"] for e in events(tmp_path / "run", "eval")] == [13, 13]


SHARDED = ["--parallel.towers=1", "--parallel.fc=sharded"]
ONE_DEVICE = ["--parallel.towers=1", "--parallel.fc=replicated"]
ATTEMPTS: dict[str, list[tuple[int, int, list[str]]]] = {
    "processes": [(2, 3, []), (3, 6, []), (0, 8, [])],
    "layouts": [(2, 3, ["--parallel.towers=2"]), (3, 6, SHARDED), (0, 8, ONE_DEVICE)],
}


@pytest.mark.slow
@pytest.mark.parametrize("changed", ATTEMPTS)
def test_a_run_resumes_in_mid_epoch_on_other_processes(
    changed: str, reference: dict[int, Path], images: Path, tmp_path: Path
) -> None:
    for processes, stop, layout in ATTEMPTS[changed]:
        train(processes, images, tmp_path, "--run.name=run", f"--train.max_steps={stop}", *layout)
    run = tmp_path / "run"
    assert losses(run) == pytest.approx(losses(reference[0]), rel=1e-4)
    assert sample_order(run).items() >= sample_order(reference[0]).items()
    assert {e["images"] for e in events(run, "eval")} == {13}


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "layout"), LAYOUTS)
def test_a_compiled_layout_trains_alike(
    processes: int, layout: str, reference: dict[int, Path], images: Path, tmp_path: Path
) -> None:
    train(processes, images, tmp_path, "--run.name=run", layout, "--runtime.compile=true")
    assert losses(tmp_path / "run") == pytest.approx(losses(reference[0]), rel=1e-3)


@pytest.mark.parametrize("dead", ["a rank", "the launcher"])
def test_a_death_ends_all(dead: str, images: Path, tmp_path: Path) -> None:
    with running(2, images, tmp_path) as launcher:
        os.kill(workers(launcher.pid)[1] if dead == "a rank" else launcher.pid, signal.SIGKILL)
        assert launcher.wait(60) != 0
    wait_for(lambda: not alive(str(tmp_path)), 15)
