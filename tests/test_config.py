"""The command line and the recipes."""

from pathlib import Path

import pytest
import yaml

from alexnet_dist.config import (
    IMMUTABLE_ON_RESUME,
    Config,
    flatten,
    from_dict,
    nest,
    parse,
    pop_option,
    recipes,
    to_dict,
)
from alexnet_dist.errors import UserError


def read(*words: str, **options: object) -> object:
    return parse(list(words), program="train", description="", **options)  # type: ignore[arg-type]


def refusal(*words: str) -> str:
    with pytest.raises(UserError) as failure:
        read(*words)
    assert failure.value.on_all_ranks
    return str(failure.value)


def test_without_words_the_run_is_the_quickstart() -> None:
    parsed = read()
    assert parsed.recipe == "quickstart"
    assert parsed.config.data.root == "digits"


def test_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("optim: {lr: 1e-3, momentum: 0.8}\nmodel: {arch: owt}\n")
    config = read("--config", str(file), "--optim.momentum=0.5", "--data.root", "x").config
    assert (config.optim.lr, config.optim.momentum, config.model.arch) == (0.001, 0.5, "owt")


def test_what_a_run_kept_lies_below_what_is_said() -> None:
    kept = to_dict(read("--optim.lr=0.3", "--train.max_steps=4", "--train.epochs=8").config)
    config = read("--train.epochs=9", "--data.root=x", underneath=kept).config
    assert (config.optim.lr, config.train.epochs) == (0.3, 9)
    assert config.train.max_steps is None  # of one life only


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--optim.lrr=1"], "no option --optim.lrr; did you mean optim.lr?"),
        (["--lr", "1"], "did you mean optim.lr?"),
        (["--model.arc=owt"], "did you mean model.arch?"),
        (["--train.epochs=many"], "option train.epochs wants a number, not many"),
        (["--data.hflip=maybe"], "option data.hflip wants true or false, not maybe"),
        (["--data.train_crop=round"], "wants one of paper, chunked, random_resized, not round"),
        (["--data.batch_size=0"], "data.batch_size is 0; it must be at least 1"),
        (["--config=nowhere.yaml"], "there is no config nowhere.yaml; the package brings"),
        (["--data.image_size=300"], "raise data.resize_size"),
        (["--data.image_size=15"], "data.image_size is 15; it must be at least 16"),
        (["--optim.schedule.name=piecewise"], "no row 'weights'"),
        (["--train.grad_accum_steps=0"], "train.grad_accum_steps is 0; it must be at least 1"),
        (["--optim.trust_coefficient=0"], "optim.trust_coefficient is 0.0; it must be at least"),
    ],
)
def test_refusals_name_the_thing_and_the_mend(words: list[str], sentence: str) -> None:
    assert sentence in refusal(*words)


def test_files_are_held_to_the_same_names(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("optim: {learning_rate: 1}\n")
    assert "mine.yaml named optim.learning_rate; did you mean" in refusal("--config", str(file))
    file.write_text("optim: [lr\n")
    assert "is not YAML" in refusal("--config", str(file))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("data: {train_crop: square}", "data.train_crop wants one of paper, chunked"),
        ("data: {on_corrupt_image: ignore}", "data.on_corrupt_image wants one of stop, skip"),
        ("runtime: {precision: bf61}", "runtime.precision wants one of"),
        ("model: {init: authors}", "model.init wants one of"),
        ("optim: {lr: fast}", "optim.lr wants a number"),
        ("optim: {lr: null}", "optim.lr wants a value, not null"),
        ("train: {epochs: ten}", "train.epochs wants a number"),
        ("data: {batch_size: many}", "data.batch_size wants a whole number"),
    ],
)
def test_files_are_held_to_the_same_types(text: str, sentence: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    said = refusal("--config", str(file))
    assert sentence in said
    assert "mine.yaml" in said


def test_tables_and_pairs() -> None:
    config = read("--optim.schedule.milestones={weights: [[0, 1e-2], [24, 1e-3]]}").config
    assert config.optim.schedule.milestones == {"weights": [(0.0, 0.01), (24.0, 0.001)]}
    assert read("--data.scale=[0.1, 0.5]").config.data.scale == (0.1, 0.5)


def test_flat_and_nested_are_the_same() -> None:
    record = to_dict(Config())
    assert nest(flatten(record)) == record
    assert from_dict(record) == Config()
    assert all(
        any(k == m or k.startswith(f"{m}.") for k in flatten(record)) for m in IMMUTABLE_ON_RESUME
    )


def test_print_config_prints_it_resolved(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        read("--optim.lr=0.25", "--print_config")
    assert yaml.safe_load(capsys.readouterr().out)["optim"]["lr"] == 0.25


def test_help_tells_what_options_mean(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        read("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "Images in a step, over all processes" in text


@pytest.mark.parametrize("recipe", sorted(p.stem for p in recipes().glob("*.yaml")))
def test_every_recipe_resolves(recipe: str) -> None:
    path = str(recipes() / f"{recipe}.yaml")
    assert read("--config", path, "--data.root", "x").recipe == recipe


def test_a_commands_own_option_is_taken_out() -> None:
    def taken(words: str) -> tuple[list[str], list[str]]:
        return pop_option(words.split(), "checkpoint")

    assert taken("--checkpoint R --a=1") == (["R"], ["--a=1"])
    assert taken("--a=1 --checkpoint=R") == (["R"], ["--a=1"])
    assert taken("--checkpoint.keep_last=2") == ([], ["--checkpoint.keep_last=2"])
    assert taken("--a 1 --checkpoint R S T --b 2") == (["R", "S", "T"], ["--a", "1", "--b", "2"])
    assert taken("--checkpoint=R S --checkpoint T -h") == (["R", "S", "T"], ["-h"])
    assert taken("--checkpoint --a=1") == ([], ["--a=1"])
