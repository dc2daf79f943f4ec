"""What many processes do together: the same as one, and the same after a stop."""

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.conftest import TINY, command, environment, events, launch, losses, train
from tests.distributed.groups import alive, running, tensors, wait_for, workers


@pytest.fixture(scope="module")
def calm(images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Runs that nothing happened to, on 0 (no torchrun), 2 and 3 processes."""
    runs = tmp_path_factory.mktemp("calm")
    for processes in (0, 2, 3):
        train(processes, images, runs, f"--run.name=on{processes}")
    return {processes: runs / f"on{processes}" for processes in (0, 2, 3)}


def test_any_number_of_processes_trains_alike(calm: dict[int, Path]) -> None:
    alone = losses(calm[0])
    assert sorted(alone) == list(range(1, 9))
    assert len(set(alone.values())) == 8
    for processes in (2, 3):
        together = losses(calm[processes])
        assert together == pytest.approx(alone, rel=1e-4)
        rates = [e["top1_error"] for e in events(calm[processes], "eval")]
        assert rates == pytest.approx([e["top1_error"] for e in events(calm[0], "eval")])


def test_the_records_say_where_the_time_went(calm: dict[int, Path]) -> None:
    for processes, run in calm.items():
        for event in events(run, "train"):
            waits = event["data_time_fraction"], event["comm_time_fraction"]
            assert all(0 <= share <= 1 for share in waits)
            assert sum(waits) < 1
            assert (waits[1] > 0) == (processes > 0)


def test_any_number_of_processes_sees_the_same_images_in_the_same_order(
    calm: dict[int, Path],
) -> None:
    digests = {
        processes: [(e["sample_order_hash"], e["images"]) for e in events(run, "epoch")]
        for processes, run in calm.items()
    }
    assert digests[0] == digests[2] == digests[3]
    assert digests[0][0][0] != digests[0][1][0]
    assert [images for _, images in digests[0]] == [28, 28]
    for run in calm.values():
        assert [e["images"] for e in events(run, "eval")] == [13, 13]


def test_evaluate_counts_what_training_counted(calm: dict[int, Path]) -> None:
    wanted = events(calm[2], "best")[-1]
    for processes in (0, 3):
        result = launch(processes, "--checkpoint", str(calm[2]), module="alexnet_dist.evaluate")
        assert result.code == 0, result.err
        counted = json.loads(result.out.splitlines()[-1])
        assert counted["images"] == 13
        assert counted["top1_error"] == wanted["top1_error"]
        assert counted["loss"] == pytest.approx(wanted["loss"], rel=1e-5)


def test_steps_since_the_last_record_are_recorded_before_an_evaluation(
    images: Path, tmp_path: Path
) -> None:
    train(0, images, tmp_path, "--run.name=run", "--train.max_steps=6", "--train.log_interval=20")
    recorded = [(e["step"], e["steps"]) for e in events(tmp_path / "run", "train")]
    assert recorded == [(4, 4), (6, 2)]  # at the end of the first epoch, and of training


def test_a_resumed_run_obeys_the_runtime_options_that_its_folder_keeps(
    images: Path, tmp_path: Path
) -> None:
    options = [option for option in TINY if not option.startswith("--runtime.threads")]
    options += [f"--data.root={images}", f"--run.output_dir={tmp_path}", "--run.name=run"]
    for more in (["--runtime.threads=3", "--train.max_steps=1"], ["--train.max_steps=2"]):
        assert launch(0, *options, *more).code == 0
    first, second = events(tmp_path / "run", "start", "resume")
    assert (first["threads"], second["threads"]) == (3, 3)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [0, 3])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(
    processes: int, calm: dict[int, Path], images: Path, tmp_path: Path
) -> None:
    for stop in ("3", "6"):
        train(processes, images, tmp_path, "--run.name=run", f"--train.max_steps={stop}")
    train(processes, images, tmp_path, "--run.name=run")
    run, whole = tmp_path / "run", calm[processes]
    assert losses(run) == losses(whole)
    assert [e["step"] for e in events(run, "resume")] == [3, 6]
    last = {e["step"]: e["sample_order_hash"] for e in events(run, "epoch")}
    for event in events(whole, "epoch"):
        assert last[event["step"]] == event["sample_order_hash"]
    assert tensors(run) == tensors(whole)


@pytest.mark.parametrize("processes", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_a_run_that_was_killed_goes_on_bit_for_bit(
    processes: int, calm: dict[int, Path], images: Path, tmp_path: Path
) -> None:
    run = _killed_and_started_again(processes, images, tmp_path)
    assert losses(run) == losses(calm[processes])
    assert tensors(run) == tensors(calm[processes])


@pytest.mark.slow
def test_means_of_several_steps_are_bit_equal_too(images: Path, tmp_path: Path) -> None:
    """The sums over three processes must not depend on how many steps are read at once."""
    options = ["--train.log_interval=3", "--train.epochs=3"]
    train(3, images, tmp_path, "--run.name=whole", *options)
    train(3, images, tmp_path, "--run.name=run", "--checkpoint.interval_steps=2", *options[:1],
          options[1], "--train.max_steps=5")  # fmt: skip
    train(3, images, tmp_path, "--run.name=run", "--checkpoint.interval_steps=2", *options)
    means = {name: losses(tmp_path / name) for name in ("run", "whole")}
    assert sorted(means["run"]) == sorted([5, *means["whole"]])  # where it was stopped, and not
    for step in set(means["whole"]) - {6}:
        assert means["run"][step] == means["whole"][step]
    whole = {e["step"]: e["loss"] for e in events(tmp_path / "whole", "epoch")}
    again = {e["step"]: e["loss"] for e in events(tmp_path / "run", "epoch")}
    assert whole == {step: again[step] for step in whole}


@pytest.mark.slow
def test_precision_may_change_and_evaluation_may_be_in_small_batches(
    images: Path, tmp_path: Path
) -> None:
    options = ["--run.name=run", "--data.eval_batch_size=2", "--train.epochs=1"]
    train(3, images, tmp_path, *options, "--train.max_steps=1")
    train(3, images, tmp_path, *options, "--train.max_steps=2", "--runtime.precision=fp16")
    assert [e["images"] for e in events(tmp_path / "run", "eval")] == [13, 13]


@pytest.mark.slow
def test_other_numbers_of_processes_go_on_in_mid_epoch(
    calm: dict[int, Path], images: Path, tmp_path: Path
) -> None:
    for processes, stop in ((2, 3), (3, 6), (0, 99)):
        train(processes, images, tmp_path, "--run.name=run", f"--train.max_steps={stop}")
    run = tmp_path / "run"
    assert losses(run) == pytest.approx(losses(calm[0]), rel=1e-4)
    last = {e["step"]: e["sample_order_hash"] for e in events(run, "epoch")}
    assert [last[e["step"]] for e in events(calm[0], "epoch")] == [
        e["sample_order_hash"] for e in events(calm[0], "epoch")
    ]


@pytest.mark.slow
def test_a_name_is_taken_again_once_its_run_has_ended(images: Path, tmp_path: Path) -> None:
    short = ["--train.epochs=1", "--run.name=run"]
    train(0, images, tmp_path, *short)
    train(0, images, tmp_path, *short)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "run-2"]
    assert losses(tmp_path / "run") == losses(tmp_path / "run-2")


LAYOUTS = [(2, "--parallel.towers=2"), (3, "--parallel.fc=sharded")]


@pytest.mark.slow
def test_a_run_goes_on_under_another_layout(
    calm: dict[int, Path], images: Path, tmp_path: Path
) -> None:
    stops = ((*LAYOUTS[0], 3), (*LAYOUTS[1], 6), (0, "--parallel.towers=1", 99))
    for processes, layout, stop in stops:
        both = [layout, *(["--parallel.towers=1"] if processes == 3 else [])]
        both += ["--parallel.fc=replicated"] if processes == 0 else []
        train(processes, images, tmp_path, "--run.name=run", f"--train.max_steps={stop}", *both)
    run = tmp_path / "run"
    assert losses(run) == pytest.approx(losses(calm[0]), rel=1e-4)
    digests = {e["step"]: (e["sample_order_hash"], e["images"]) for e in events(run, "epoch")}
    for event in events(calm[0], "epoch"):
        assert digests[event["step"]] == (event["sample_order_hash"], event["images"])
    assert {e["images"] for e in events(run, "eval")} == {13}
    assert "parallel.towers" in events(run, "resume")[0]["changed"]


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "layout"), LAYOUTS)
def test_a_killed_run_of_any_layout_goes_on_bit_for_bit(
    processes: int, layout: str, images: Path, tmp_path: Path
) -> None:
    train(processes, images, tmp_path, "--run.name=calm", layout)
    run = _killed_and_started_again(processes, images, tmp_path, layout)
    assert losses(run) == losses(tmp_path / "calm")
    assert tensors(run) == tensors(tmp_path / "calm")


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "layout"), LAYOUTS)
def test_a_compiled_layout_trains_alike(
    processes: int, layout: str, calm: dict[int, Path], images: Path, tmp_path: Path
) -> None:
    train(processes, images, tmp_path, "--run.name=run", layout, "--runtime.compile=true")
    assert losses(tmp_path / "run") == pytest.approx(losses(calm[0]), rel=1e-3)


def test_a_rank_that_dies_ends_all(images: Path, tmp_path: Path) -> None:
    with running(2, images, tmp_path) as launcher:
        os.kill(workers(launcher.pid)[1], signal.SIGKILL)
        assert launcher.wait(60) != 0
    wait_for(lambda: not alive(str(tmp_path)), 15)


def test_a_launcher_that_dies_leaves_no_orphan(images: Path, tmp_path: Path) -> None:
    with running(2, images, tmp_path) as launcher:
        launcher.kill()
    wait_for(lambda: not alive(str(tmp_path)), 15)


def _killed_and_started_again(processes: int, images: Path, runs: Path, *more: str) -> Path:
    """A run whose processes all die at once after a checkpoint, and which then goes on to its end
    by what its folder keeps."""
    options = [*TINY, f"--data.root={images}", f"--run.output_dir={runs}", "--run.name=run", *more]
    run = runs / "run"
    with subprocess.Popen(
        command(processes, "alexnet_dist.train", *options, "--checkpoint.interval_steps=2"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env=environment(),
    ) as launcher:
        wait_for(lambda: (run / "checkpoints/last").exists() and len(losses(run)) >= 3)
        os.killpg(launcher.pid, signal.SIGKILL)
    train(processes, images, runs, "--run.name=run", "--checkpoint.interval_steps=2")
    assert events(run, "resume")[0]["step"] >= 2
    return run
