"""python -m alexnet_dist.submit: the sbatch commands that it runs, and what it refuses."""

import os
import sys
from pathlib import Path

import pytest

from alexnet_dist.config import packaged_folder
from alexnet_dist.submit import main
from tests.conftest import error_of, write_program

SLURM = Path(__file__).parents[1] / "slurm"
RECIPE = f"--config {packaged_folder('configs')}/paper2012.yaml"
PAPER = f"{RECIPE} --data.root /d"
ONE = "sbatch --parsable --job-name=paper2012"
ON_FOUR = f"{ONE} --nodes=4 --partition=gpu"
OWN = "--run.output_dir=runs --train.seed=2012"


@pytest.mark.parametrize(
    ("words", "command"),
    [
        (f"--nodes=4 --partition=gpu -- {PAPER}", f"{ON_FOUR} train.sbatch {PAPER} {OWN}"),
        (f"train --nodes=4 --partition=gpu -- {PAPER}", f"{ON_FOUR} train.sbatch {PAPER} {OWN}"),
        (f"{PAPER} --run.name a", f"{ONE} train.sbatch {PAPER} --run.name a {OWN} --run.name=a"),
        (f"-J other -- {PAPER}", f"sbatch --parsable --job-name=other train.sbatch {PAPER} {OWN}"),
        (
            "evaluate --time=10 -- --checkpoint runs/a runs/b --ten_crop",
            "sbatch --parsable --time=10 evaluate.sbatch --checkpoint runs/a runs/b --ten_crop",
        ),
        (f"doctor --nodes=4 -- {PAPER}", f"sbatch --parsable --nodes=4 doctor.sbatch {PAPER}"),
    ],
)
def test_submit_passes_all_on(words: str, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--dry_run", *words.split()])
    lines = capsys.readouterr().out.replace(f"{SLURM}/", "").splitlines()
    sbatch = [line for line in lines if "sbatch" in line]
    assert sbatch == [f"ALEXNET_DIST_SLURM={SLURM} {command}"]


def test_submit_quotes_flags(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--comment=two words", "--dry_run", "--"])
    assert " --parsable --job-name=quickstart '--comment=two words' " in capsys.readouterr().out


def test_submit_array5_evaluates_the_average_after_the_five(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = f'echo "$PYTHON $ALEXNET_DIST_SLURM $*" >>{tmp_path}/log; echo 17'
    write_program(tmp_path / "sbatch", said)
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
    assert message in error_of(main, words.split())


@pytest.mark.parametrize(("script", "ended"), [("train", "net"), ("array5", "net-3")])
def test_submit_refuses_a_named_run_that_has_ended(script: str, ended: str, tmp_path: Path) -> None:
    (tmp_path / ended).mkdir()
    (tmp_path / ended / "config.yaml").write_text("{}\n")
    (tmp_path / ended / "status.json").write_text('{"format": 2, "status": "ended"}')
    words = [script, "--dry_run", "--", f"--run.output_dir={tmp_path}", "--run.name=net"]
    assert f"the run {tmp_path}/{ended} has ended: give another" in error_of(main, words)
    main([*words[:-1], "--run.name=other"])


def test_submit_without_sbatch_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "there is no sbatch here: submit on a machine" in error_of(main, [])
    write_program(tmp_path / "sbatch", "echo 'invalid partition: x' >&2; exit 1")
    refused = error_of(main, ["--partition=x", "--"])
    assert "sbatch refuses the job: invalid partition: x" in refused
