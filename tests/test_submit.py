"""Submitting: the scripts that are made, and what is refused."""

import os
import shutil
import stat
import sys
from pathlib import Path

import pytest

from alexnet_dist.config import config_dir
from alexnet_dist.errors import UserError
from alexnet_dist.submit import main

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to submit from, whose path is in no script, nor the interpreter's."""
    shutil.copytree(config_dir(), tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", "/environment/bin/python")
    return tmp_path


def program(folder: Path, name: str, text: str) -> None:
    """A stand-in for a program of SLURM's."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def refusal(*words: str) -> str:
    with pytest.raises(UserError) as failure:
        main(list(words))
    return str(failure.value)


CASES = {
    "train": "--nodes 4 --gpus 8 --partition gpu --account vision --config configs/paper2012.yaml "
    "--data.root IMAGENET --optim.lr=0.02",
    "array5": "array5 --gpus 0 --processes 2 --time 2:00:00 --name five "
    "--config configs/paper2012.yaml --data.root IMAGENET --train.seed 7",
    "evaluate": "evaluate --checkpoint runs/a runs/b --ten_crop --data.root IMAGENET --cpus 16",
}


@pytest.mark.parametrize("kind", CASES)
def test_dry_runs(kind: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for run in ("a", "b"):
        (place / "runs" / run).mkdir(parents=True)
    main([*CASES[kind].split(), "--dry_run"])
    script = capsys.readouterr().out
    golden = GOLDEN / f"{kind}.sbatch"
    if os.environ.get("GOLDEN") == "write":  # after a change that is meant
        golden.write_text(script)
    assert script == golden.read_text()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--optim.lrr 1", "no option --optim.lrr; did you mean --optim.lr?"),
        ("--train.epochs many", "train.epochs must be a number above 0, not many"),
        ("--config nowhere.yaml", "there is no config nowhere.yaml"),
        ("--node 4", "there is no option --node; did you mean nodes?"),
        ("--nodes four", "nodes wants a whole number from 1 on, not four"),
        ("--gpus=-1", "gpus wants a whole number from 0 on, not -1"),
        ("--name a/b", "name wants letters"),
        ("--partition", "option partition wants a value"),
        ("--nodes 4 8", "nodes wants a whole number from 1 on, not 4 8"),
        ("--run.resume never", "run.resume is never, but a job goes on in the folder"),
        ("--run.name done", "the run in runs/done has ended already: give another --run.name"),
        ("array5 --run.name done", "the run in runs/done-3 has ended already"),
        ("evaluate", "required: --checkpoint"),
        ("evaluate --checkpoint runs/done nowhere", "there is no checkpoint at nowhere"),
        ("evaluate --checkpoint runs/done --dota.root x", "did you mean --data.root?"),
        ("evaluate --checkpoint runs/done --views 5", "--views is now --ten_crop"),
    ],
)
def test_refusals(words: str, sentence: str, place: Path) -> None:
    for run in ("done", "done-3"):
        (place / "runs" / run).mkdir(parents=True)
        (place / "runs" / run / "status.json").write_text('{"status": "ended"}')
    assert sentence in refusal(*words.split(), "--dry_run")


def test_without_sbatch_or_against_it(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(place / "empty"))
    assert "there is no sbatch here: submit from" in refusal()
    monkeypatch.setenv("PATH", f"{place / 'bin'}:{os.defpath}")
    program(place / "bin", "sbatch", "echo 'sbatch: error: invalid partition: x' >&2; exit 1")
    assert refusal("--partition=x") == "sbatch does not take the job: invalid partition: x"


def test_five_networks_and_what_follows_them(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", f"{place / 'bin'}:{os.defpath}")
    answer = "tee -a given | grep -q '^#SBATCH --dependency' && echo 18 || echo '17;cluster'"
    program(place / "bin", "sbatch", answer)
    (place / "mine.yaml").write_text("run: {output_dir: there}\ntrain: {seed: 40}\n")
    main(["array5", "--config", "mine.yaml", "--data.root=x", "--sbatch=--qos=long --mem=0"])
    given = (place / "given").read_text()
    assert "--run.output_dir=there \\\n    --train.seed=40" in given
    assert "#SBATCH --dependency=afterok:17\n#SBATCH --kill-on-invalid-dep=yes\n" in given
    assert given.count("#SBATCH --qos=long\n#SBATCH --mem=0\n") == 2
    assert "--checkpoint there/mine-17-0 there/mine-17-1 there/mine-17-2" in given
    said = capsys.readouterr().out
    assert "job 17_4 writes to mine-17-4.out, its run lies in there/mine-17-4\n" in said
    assert "job 18 writes to mine-mean-18.out\n" in said
