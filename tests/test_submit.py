"""python -m alexnet_dist.submit: the sbatch commands that it runs, and what it refuses."""

import os
import sys
from pathlib import Path

import pytest

from alexnet_dist.config import packaged_folder
from alexnet_dist.errors import UserError
from alexnet_dist.submit import main

SLURM = Path(__file__).parents[1] / "slurm"
RECIPE = f"--config {packaged_folder('configs')}/paper2012.yaml"
PAPER = f"{RECIPE} --data.root /d"


def submitted(capsys: pytest.CaptureFixture[str], words: str) -> list[str]:
    """The sbatch commands of a command line, without where the scripts are."""
    main(words.split())
    lines = capsys.readouterr().out.replace(f"{SLURM}/", "").splitlines()
    prefix = f"ALEXNET_DIST_SLURM={SLURM} "
    return [line.removeprefix(prefix) for line in lines if line.startswith(prefix)]


def test_submit_train_passes_flags_to_sbatch_and_options_to_the_trainer(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for words in (
        f"--nodes=4 --partition=gpu --dry_run -- {PAPER} --optim.lr 0.02",
        f"--dry_run train --nodes=4 --partition=gpu -- {PAPER} --optim.lr 0.02",
    ):
        assert submitted(capsys, words) == [
            "sbatch --parsable --job-name=paper2012 --nodes=4 --partition=gpu train.sbatch "
            f"{PAPER} --optim.lr 0.02 --run.output_dir=runs --train.seed=2012"
        ]
    (command,) = submitted(capsys, f"--dry_run {PAPER} --run.name mine")
    assert command.endswith(
        "--run.name mine --run.output_dir=runs --train.seed=2012 --run.name=mine"
    )
    (command,) = submitted(capsys, f"-J other --dry_run -- {PAPER}")
    assert command.startswith("sbatch --parsable --job-name=other train.sbatch")
    main(["--comment=two words", "--dry_run", "--"])
    assert " --parsable --job-name=quickstart '--comment=two words' " in capsys.readouterr().out


def test_submit_evaluate(capsys: pytest.CaptureFixture[str]) -> None:
    words = "--dry_run evaluate --time=10 -- --checkpoint runs/a runs/b --ten_crop"
    assert submitted(capsys, words) == [
        "sbatch --parsable --time=10 evaluate.sbatch --checkpoint runs/a runs/b --ten_crop"
    ]


def test_submit_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert submitted(capsys, f"--dry_run doctor --nodes=4 -- {PAPER}") == [
        f"sbatch --parsable --nodes=4 doctor.sbatch {PAPER}"
    ]


def test_submit_array5_evaluates_the_average_after_the_five(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sbatch = tmp_path / "sbatch"
    sbatch.write_text(
        f'#!/bin/sh\necho "$PYTHON $ALEXNET_DIST_SLURM $*" >>{tmp_path}/log; echo 17\n'
    )
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.defpath}")
    monkeypatch.delenv("PYTHON", raising=False)
    (tmp_path / "mine.yaml").write_text("run: {output_dir: there}\ntrain: {seed: 40}\n")
    main(["array5", "--qos=long", "--", f"--config={tmp_path}/mine.yaml", "--data.root=x"])
    training, evaluation = (tmp_path / "log").read_text().splitlines()
    assert training == (
        f"{sys.executable} {SLURM} --parsable --job-name=mine --qos=long {SLURM}/array5.sbatch "
        f"--config={tmp_path}/mine.yaml --data.root=x --run.output_dir=there --train.seed=40"
    )
    assert " --qos=long --job-name=mine-mean --nodes=1 " in evaluation
    assert " --dependency=afterok:17 --kill-on-invalid-dep=yes " in evaluation
    runs = " ".join(f"there/mine-17-{index}" for index in range(5))
    assert evaluation.endswith(f"{SLURM}/evaluate.sbatch --checkpoint {runs}")
    assert capsys.readouterr().out == (
        "job 17 trains the runs there/mine-17-0 to there/mine-17-4\n"
        "job 17 evaluates their average\n"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--optim.lrr 1", "no option --optim.lrr; did you mean --optim.lr?"),
        ("--nodes=4 -- --train.epochs many", "train.epochs must be a number above 0, not many"),
        ("--config nowhere.yaml", "there is no config nowhere.yaml"),
        (RECIPE, "there are no images: give --data.root the folder that holds train/ and val/"),
        ("array5 -- --run.resume never", "leave out run.resume: a job resumes its own run"),
        ("evaluate", "required: --checkpoint"),
        ("evaluate -- --checkpoint runs/done --dota.root x", "did you mean --data.root?"),
    ],
)
def test_submit_refuses_before_anything_waits_in_a_queue(words: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        main([*words.split()])
    assert message in str(error.value)


@pytest.mark.parametrize(("script", "ended"), [("train", "net"), ("array5", "net-3")])
def test_submit_refuses_a_named_run_that_has_ended(script: str, ended: str, tmp_path: Path) -> None:
    (tmp_path / ended).mkdir()
    (tmp_path / ended / "config.yaml").write_text("{}\n")
    (tmp_path / ended / "status.json").write_text('{"format": 2, "status": "ended"}')
    words = [script, "--dry_run", "--", f"--run.output_dir={tmp_path}", "--run.name=net"]
    with pytest.raises(UserError, match=f"the run {tmp_path}/{ended} has ended: give another"):
        main(words)
    main([*words[:-1], "--run.name=other"])


def test_submit_without_sbatch_or_against_its_will(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="there is no sbatch here: submit on a machine"):
        main([])
    (tmp_path / "sbatch").write_text("#!/bin/sh\necho 'invalid partition: x' >&2; exit 1\n")
    (tmp_path / "sbatch").chmod(0o755)
    with pytest.raises(UserError, match="sbatch refuses the job: invalid partition: x"):
        main(["--partition=x", "--"])
