"""The command line and the config files."""

import json
from pathlib import Path

import pytest
import yaml

from alexnet_dist.config import (
    GONE,
    IMMUTABLE_ON_RESUME,
    OLD_NAMES,
    OPTIONS,
    CommandParser,
    Config,
    OptimConfig,
    check_resume_compatible,
    flatten,
    from_dict,
    to_dict,
)
from alexnet_dist.errors import UserError
from tests.conftest import error_of

parse = CommandParser().parse


def refused(*words: str) -> str:
    """What is said of a command line, once for all processes."""
    with pytest.raises(UserError) as error:
        parse(list(words))
    assert error.value.on_all_ranks
    return str(error.value)


def test_config_without_words_is_the_quickstart() -> None:
    assert (parse([]).config_name, parse([]).config.data.root) == ("quickstart", "digits")


def test_config_command_line_wins_over_the_file_wherever_it_stands(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("optim: {lr: 1e-3, momentum: 0.8}\nmodel: {arch: owt}\n")
    words = ["--optim.momentum=0.5", "--config", str(file), "--data.root", "x"]
    config = parse(words).config
    assert (config.optim.lr, config.optim.momentum, config.model.arch) == (0.001, 0.5, "owt")


def test_config_of_a_resumed_run_is_below_file_and_command_line() -> None:
    kept = to_dict(parse(["--optim.lr=0.3", "--train.max_steps=4", "--train.epochs=8"]).config)
    config = parse(["--train.epochs=9", "--data.root=x"], kept).config
    assert (config.optim.lr, config.train.epochs) == (0.3, 9)
    assert config.train.max_steps is None  # of one start only
    assert parse([], kept).config.data.root == "digits"  # kept, not the default file's


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("--optim.lrr=1", "there is no option --optim.lrr; did you mean --optim.lr?"),
        ("--lr=1", "did you mean --optim.lr?"),
        ("--optm.lr=1", "did you mean --optim.lr?"),
        ("--optim.lr", "argument --optim.lr: expected one argument"),
        ("optim.lr=1", "unrecognized arguments: optim.lr=1; --help lists all options"),
        ("--train.epochs=many", "option train.epochs must be a number above 0, not many"),
        ("--optim.lr=-1", "option optim.lr must be a number of at least 0, not -1"),
        ("--optim.lr=nan", "option optim.lr must be a number of at least 0, not nan"),
        ("--data.hflip=maybe", "option data.hflip must be true or false, not maybe"),
        ("--runtime.compile=maybe", "must be true, false or auto, not maybe"),
        ("--data.train_crop=round", "must be one of paper, chunked, random_resized, not round"),
        ("--data.batch_size=0", "data.batch_size must be a whole number of at least 1, not 0"),
        ("--checkpoint.keep_every=1.5", "must be a whole number of at least 1, not 1.5"),
        ("--data.pca_noise_std=-1", "must be a number of at least 0 or [epochs done, value] pairs"),
        ("--optim.momentum=1", "must be a number from 0 up to, but not, 1, not 1"),
        ("--data.scale=0.5", "must be two numbers, as [0.1, 1], not 0.5"),
        ("--optim.schedule.milestones={weights: 3}", "must be such pairs by name, as {weights: [["),
        ("--config=nowhere.yaml", "there is no config nowhere.yaml; the package brings cifar10"),
        ("--data.image_size=300", "raise data.resize_size"),
        ("--optim.schedule.name=piecewise", "there is no lr of weights: give optim"),
        ("--run.time_limit=soon", "must be seconds, M:S, H:M:S or D-H:M:S, not soon"),
        ("--run.preempt_signals=[SIGKILL]", "must be a list of SIGHUP, SIGQUIT, SIGUSR1"),
        ("--data.engine=dataloader", "option --data.engine is now --data.loader"),
    ],
)
def test_config_errors_name_the_option_and_the_fix(word: str, message: str) -> None:
    assert message in refused(word)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim: {learning_rate: 1}", "no option optim.learning_rate in"),
        ("optm: {lr: 1}", "mine.yaml; did you mean optim.lr?"),
        ("optim: 3", "there is no option optim in"),
        ("optim:\n\tlr: 1", "'\\t' that cannot start any token in"),
        ("optim: [lr", 'mine.yaml", line 1, column 11'),
        ("optim:\n  lr:\n", "optim.lr must be a number of at least 0, not null"),
        ("[optim]", "holds no options: it needs lines like 'optim: {lr: 0.01}'"),
        ("data: {engine: dali}", "mine.yaml is now data.loader"),
        ("optim:\n  lr: 1\ndata:\noptim:\n", "be read: optim stands in line 1 and in line 4"),
        ("optim: {lr: 1, lr: 2}", "lr stands in line 1 and in line 1: write it once"),
        ("optim:\n  lr: 1\n  momentum: 0\n  lr: 1", "lr stands in line 2 and in line 4"),
        ("optim: {lr: 1}\noptim.lr: 2", "optim.lr is given twice, under a section and by its"),
    ],
)
def test_config_files_are_held_to_the_same_rules(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    found = refused("--config", str(file))
    assert message in found
    assert str(file) in found


def test_config_of_several_files_the_later_win(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("optim: {lr: 1, momentum: 0.8}\ndata: {batch_size: 64}\n")
    (tmp_path / "more.yaml").write_text("optim: {lr: 2}\n")
    parsed = parse(["--config", f"{tmp_path}/base.yaml", f"--config={tmp_path}/more.yaml"])
    assert parsed.config.optim == OptimConfig(lr=2, momentum=0.8)
    assert (parsed.config.data.batch_size, parsed.config_name) == (64, "base-more")


def test_config_paths_begin_with_a_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    values = {"data": {"root": "~/a"}, "run": {"output_dir": "~/b", "resume": "~/c"}}
    values |= {"model": {"pretrained": "~/d"}}
    (tmp_path / "mine.yaml").write_text(json.dumps(values))
    for words in (["--config=~/mine.yaml"], [f"--{n}={p}" for n, p in flatten(values).items()]):
        config = parse(words).config
        run = config.run
        found = (config.data.root, run.output_dir, run.resume, config.model.pretrained)
        assert found == tuple(f"{tmp_path}/{name}" for name in "abcd")
    assert parse(["--data.root=~"]).config.data.root is None  # as YAML has it
    parser = CommandParser("predict", None)
    parser.add_argument("--out", type=Path)
    assert parser.parse(["--out=~/x"]).args.out == tmp_path / "x"


def test_config_files_say_names_and_numbers_as_people_write_them(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "run: {name: 150, time_limit: 1:30:00}\noptim: {lr: 1e-3}\nwandb: {mode: off}\nmodel:\n"
        "checkpoint: {interval_steps: null}\n"
    )
    config = parse(["--config", str(file)]).config
    assert (config.run.name, config.run.time_limit) == ("150", 5400.0)
    assert (config.optim.lr, config.wandb.mode) == (0.001, "off")
    assert config.checkpoint.interval_steps is None
    assert from_dict(to_dict(config)) == config


def test_config_old_names_are_refused_with_the_new_ones() -> None:
    renamed = {old: new for old, new in OLD_NAMES.items() if "." in old}
    for names in (
        *("data.cache data.cache_dir", "data.colour_strength data.pca_noise_std"),
        *("data.flip data.hflip", "data.on_bad_image data.on_corrupt_image"),
        *("data.resize data.resize_size", "data.threads runtime.threads"),
        *("optim.schedule.warmup optim.schedule.warmup_epochs", "track.project wandb.project"),
        *("train.accumulate train.grad_accum_steps", "train.log_every train.log_interval"),
        *("train.on_nan train.on_nonfinite", "checkpoint.every_steps checkpoint.interval_steps"),
        *("checkpoint.keep checkpoint.keep_last", "run.signals run.preempt_signals"),
        *("parallel.compress parallel.grad_compression", "runtime.timeout runtime.hang_timeout"),
    ):
        old, new = names.split()
        renamed[old] = new
    for old, new in renamed.items():
        assert refused(f"--{old}=1").endswith((f" is now --{new}", f"; did you mean --{new}?"))
    for old in GONE:
        assert refused(f"--{old}=1") == f"option --{old} is gone: leave it out"
    assert set(renamed.values()) <= set(OPTIONS)
    assert not {*renamed, *GONE} & set(OPTIONS)


def test_config_kept_by_an_earlier_version_is_refused() -> None:
    message = error_of(from_dict, {"data": {"engine": "dali"}}, "RUN")
    assert message.startswith("RUN was written by alexnet_dist 0.1.0")
    message = error_of(from_dict, {"data": {"loder": "dali"}}, "RUN")
    assert "no option data.loder in RUN; did you mean" in message


def test_config_lists_dicts_and_durations() -> None:
    config = parse(["--optim.schedule.milestones={weights: [[0, 1e-2], [24, 1e-3]]}"]).config
    assert config.optim.schedule.milestones == {"weights": [(0.0, 0.01), (24.0, 0.001)]}
    assert parse(["--data.scale=[0.1, 0.5]"]).config.data.scale == (0.1, 0.5)
    assert parse(["--optim.lr_mults={biases: 2}"]).config.optim.lr_mults == {"biases": 2}
    for text, std in (("0.2", 0.2), ("[[0, 0.1], [66, 0]]", [(0.0, 0.1), (66.0, 0.0)])):
        assert parse([f"--data.pca_noise_std={text}"]).config.data.pca_noise_std == std
    for text, seconds in {"90": 90, "1:30": 90, "1:00:30.5": 3630.5, "2-01:00:00": 176400}.items():
        assert parse([f"--run.time_limit={text}"]).config.run.time_limit == seconds
    for text in ("1:2:3:4", "2-5:00", "-5"):
        assert f"D-H:M:S, not {text}" in refused(f"--run.time_limit={text}")


def test_config_flat_and_nested_are_the_same() -> None:
    record = to_dict(Config())
    assert set(flatten(record)) == set(OPTIONS)
    assert from_dict(record) == Config()
    for fixed in IMMUTABLE_ON_RESUME:
        assert any(f"{name}.".startswith(f"{fixed}.") for name in OPTIONS)


def test_config_that_would_be_another_run_cannot_resume() -> None:
    kept = to_dict(Config())
    other = to_dict(parse(["--data.root=x", "--optim.lr=1", "--model.arch=owt"]).config)
    message = error_of(check_resume_compatible, kept, other, "NEW")
    assert message.startswith("model.arch cannot change from paper to owt: ")
    assert message.endswith("; NEW")
    other = to_dict(parse(["--data.root=x", "--optim.lr=1"]).config)
    check_resume_compatible(kept, other, "NEW")


def test_config_printed_can_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--optim.lr=0.25", "--print_config"])
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed)["optim"]["lr"] == 0.25
    (tmp_path / "mine.yaml").write_text(printed)
    config = parse([f"--config={tmp_path}/mine.yaml"]).config
    assert config == parse(["--optim.lr=0.25"]).config


def test_config_help_says_what_options_mean(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "images per step over all processes (the paper, section 5) (a whole number of" in text
    assert "folder with train/ and val/, or one that prepare wrote" in text  # a comment above
    assert not set(text) & set("<>")  # no Python
    for option, default in flatten(to_dict(Config())).items():
        assert f"--{option} " in text
        assert not isinstance(default, str) or f"--{option} {default} " in text


def test_config_a_commands_own_options_stand_beside_the_trainers() -> None:
    parser = CommandParser("predict", "About.")
    parser.add_argument("images", nargs="+")
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--top", type=int, default=5)
    parser.add_argument("--ten_crop", action="store_true")
    words = ["a", "b", "--checkpoint", "R", "--checkpoint.keep_last", "3", "--ten_crop"]
    parsed = parser.parse(words)
    args = parsed.args
    assert (args.images, args.checkpoint, args.top, args.ten_crop) == (["a", "b"], "R", 5, True)
    assert parsed.config.checkpoint.keep_last == 3
    for more, message in (
        ("--views=10", "option --views is now --ten_crop"),
        ("--ten_corp", "there is no option --ten_corp; did you mean --ten_crop?"),
        ("--top=x", "argument --top: invalid int value: 'x'; --help lists all options"),
        ("--data.rooot=x", "did you mean --data.root?"),
    ):
        assert message in error_of(parser.parse, [*words, more])
    assert "required: images, --checkpoint" in error_of(parser.parse, [])
    without = CommandParser("export", None, trainer_options=False).parse
    assert "there is no option --optim.lr" in error_of(without, ["--optim.lr=1"])
