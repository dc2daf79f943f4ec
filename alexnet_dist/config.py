"""Every option with its default and meaning, and the one parser of all commands.

Options are given as YAML (--config FILE) and as dotted words on the command line (--optim.lr 0.02);
a command's own options (--checkpoint RUN) stand beside them. argparse reads the command line, and
pydantic checks types and bounds.
"""

import argparse
import dataclasses
import difflib
import json
import re
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache, partial, reduce
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, NoReturn

import docstring_parser
import yaml
from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from alexnet_dist.errors import UserError

_error = partial(UserError, on_all_ranks=True)

TEXT_LOADER = yaml.BaseLoader
"""Reads all values as text. What they are says an option's type, not YAML, to which off is false,
1:30:00 is 5400 and 1e-3 no number."""
NULLS = ("null", "~", "")


def _from_yaml(value: object) -> object:
    return yaml.load(value, TEXT_LOADER) if isinstance(value, str) else value


def _seconds(duration: object) -> float:
    days, dash, clock = str(duration).rpartition("-")
    parts = [float(part) for part in clock.split(":")]
    if len(parts) > 3 or (dash and len(parts) < 3):
        raise ValueError
    return 86400 * int(days if dash else 0) + reduce(lambda total, part: 60 * total + part, parts)


FROM_YAML = BeforeValidator(_from_yaml)
# types of options, each with what --help and errors say a value must be
PositiveInt = Annotated[int, Field(ge=1), "a whole number of at least 1"]
NonNegativeInt = Annotated[int, Field(ge=0), "a whole number of at least 0"]
Pixels = Annotated[int, Field(ge=16), "a whole number of at least 16"]
PositiveFloat = Annotated[float, Field(gt=0), "a number above 0"]
NonNegativeFloat = Annotated[float, Field(ge=0), "a number of at least 0"]
BelowOne = Annotated[float, Field(ge=0, lt=1), "a number from 0 up to, but not, 1"]
Range = Annotated[tuple[float, float], FROM_YAML, "two numbers, as [0.1, 1]"]
Switch = Annotated[bool | Literal["auto"], "true, false or auto"]
Duration = Annotated[float, BeforeValidator(_seconds), "seconds, M:S, H:M:S or D-H:M:S"]
Signal = Literal["SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGALRM"]
Signals = Annotated[list[Signal], FROM_YAML, f"a list of {', '.join(typing.get_args(Signal))}"]
Multiples = Annotated[dict[str, float], FROM_YAML, "numbers by name, as {biases: 2, fc8.bias: 1}"]
Pairs = list[tuple[float, float]]
MilestoneList = Annotated[
    Pairs, FROM_YAML, "a list of [epochs done, value from then on], as [[0, 0.1], [66, 0]]"
]
Milestones = Annotated[
    dict[str, Pairs],
    FROM_YAML,
    "lists of [epochs done, lr from then on] by name, as {weights: [[0, 0.01], [24, 0.001]]}",
]


@dataclass
class DataConfig:
    """The images."""

    root: str | None = None
    """Folder with train/ and val/, or one that prepare wrote, or CIFAR-10's; or "digits"."""
    cache_dir: str = "~/.cache/alexnet_dist"
    """For the digits, and for the indices and statistics of data folders."""
    batch_size: PositiveInt = 128
    """Images per step over all processes (the paper, section 5)."""
    eval_batch_size: PositiveInt = 256
    """Crops per step of an evaluation over all processes."""
    loader: Literal["auto", "dali", "torch", "gpu_cache"] = "auto"
    """gpu_cache: raw pixels in GPU memory; auto: that for raw pixels, else DALI if installed."""
    image_size: Pixels = 224
    """Width and height of the network's input, in pixels."""
    resize_size: Pixels = 256
    """A crop is image_size / resize_size of an image's shorter side (the paper, section 2)."""
    train_crop: Literal["paper", "chunked", "random_resized"] = "paper"
    """paper: a square of fixed size in the central square (section 4.1); chunked: the same one for
    32 images in a row (the authors' program); random_resized: as torchvision's."""
    scale: Range = (0.08, 1.0)
    """random_resized: bounds of the crop's fraction of the image's area."""
    ratio: Range = (3 / 4, 4 / 3)
    """random_resized: bounds of the crop's aspect ratio."""
    hflip: bool = True
    """Flip training images horizontally with probability 0.5."""
    pca_noise: Literal["none", "source", "paper"] = "none"
    """PCA lighting noise, as in the authors' program or as printed in the paper."""
    pca_noise_std: NonNegativeFloat | MilestoneList = 0.1
    """Standard deviation of its coefficients."""
    on_corrupt_image: Literal["stop", "skip"] = "stop"
    """skip: use the next image in its place, and log it."""


@dataclass
class ModelConfig:
    """The network."""

    arch: str = "paper"
    """A network that `python -m alexnet_dist.summary` lists."""
    init: Literal["source", "paper", "torch"] | None = None
    """Initial weights: the authors' program's, the paper's or torch's; null: the network's own."""
    dropout: BelowOne = 0.5
    """Probability with which fc6 and fc7 (in torchvision's network: their inputs) drop a unit."""
    pretrained: str | None = None
    """Start from a run, a checkpoint, an exported .safetensors, or torchvision's AlexNet (.pth)."""


@dataclass
class ScheduleConfig:
    """The schedule of the learning rate; epochs are real numbers."""

    name: Literal["constant", "plateau", "one_cycle", "polynomial", "piecewise"] = "plateau"
    """plateau: divide by ten when the validation error stops improving, three times at most (the
    paper); polynomial: quadratic to zero."""
    warmup_epochs: NonNegativeFloat = 0.0
    """Epochs over which the lr rises from zero, before any other schedule."""
    patience: NonNegativeInt = 3
    """plateau: evaluations without a better error to wait for."""
    pct_start: BelowOne = 0.3
    """one_cycle: fraction of the run in which the lr rises to optim.lr."""
    milestones: Milestones = field(default_factory=dict)
    """piecewise: the lr of weights, of biases, and of single parameters like conv1.bias."""


@dataclass
class OptimConfig:
    """The optimizer."""

    name: Literal["sgd2012", "sgd", "lars"] = "sgd2012"
    """The paper's SGD (lr inside the velocity), torch's, or LARS (You, Gitman, Ginsburg 2017)."""
    lr: NonNegativeFloat = 0.01
    """Learning rate."""
    lr_mults: Multiples = field(default_factory=dict)
    """Multiples of the scheduled lr, of biases (2 in the authors' program) or single parameters."""
    momentum: BelowOne = 0.9
    """Momentum."""
    weight_decay: NonNegativeFloat = 0.0005
    """Weight decay; never on biases."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)


@dataclass
class TrainConfig:
    """The training run."""

    epochs: PositiveFloat = 90
    """Epochs (the paper: roughly 90)."""
    epochs_scale: PositiveFloat = 1.0
    """Multiplies epochs and the epochs in optim.schedule and data.pca_noise_std."""
    max_steps: PositiveInt | None = None
    """Stop early; schedules keep to train.epochs, and the run can resume."""
    grad_accum_steps: PositiveInt = 1
    """Microbatches per step and process; batch norm has the statistics of a microbatch."""
    log_interval: PositiveInt = 20
    """Steps between two log records."""
    seed: NonNegativeInt = 2012
    """Of weights, order, crops and dropout."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """skip: leave out an update with a nonfinite loss or gradient (which checks every gradient)."""


@dataclass
class CheckpointConfig:
    """Checkpoints, besides those at the end of each epoch."""

    interval_steps: PositiveInt | None = 1000
    """Steps between checkpoints."""
    keep_last: PositiveInt = 2
    """Newest ones kept, besides the best; if the last is corrupt, the one before it is used."""
    keep_every: PositiveInt | None = None
    """Keep the checkpoint of every so many steps forever."""


@dataclass
class RunConfig:
    """The run's folder, and when it stops."""

    output_dir: str = "runs"
    """Where run folders are."""
    name: str | None = None
    """The folder's name; null: the config file's (with -2, -3 once such a run is finished)."""
    resume: str = "auto"
    """auto: an unfinished run of this name; never; or a run's folder."""
    time_limit: Duration | None = None
    """Save and exit before this process is so old. The limit of a SLURM job is known."""
    preempt_signals: Signals = field(default_factory=lambda: ["SIGUSR2"])
    """Save and exit on these, on SIGTERM, on Ctrl-C, and on a file PREEMPT in the run's folder."""
    sigterm_grace: PositiveFloat = 20.0
    """Seconds after SIGTERM until a process exits in any case; torchrun kills it after 30."""


@dataclass
class ParallelConfig:
    """How the network is laid out on the processes; never what it computes."""

    towers: Annotated[int, Field(ge=1, le=2), "1 or 2"] = 1
    """2: model parallel as on the paper's two GPUs: two neighboring ranks hold a tower each."""
    fc: Literal["replicated", "sharded"] = "replicated"
    """sharded: the fully connected layers are split over all ranks ("One weird trick")."""
    grad_compression: Literal["none", "bf16", "fp16", "powersgd"] = "none"
    """Compression of the gradients' all-reduce."""
    powersgd_rank: PositiveInt = 4
    """Rank of the matrices that approximate a gradient."""
    powersgd_start: NonNegativeInt = 1000
    """Steps without compression at each start of a run."""


@dataclass
class RuntimeConfig:
    """Device, precision, compilation."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: GPUs where there are any."""
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = "auto"
    """auto: bf16 where the device is fast at it, else fp32. Weights stay in fp32."""
    compile: Switch = False
    """Compile the network with torch.compile; auto: on GPUs."""
    cuda_graph: Switch = False
    """Launch a step as one CUDA graph; auto: where that is possible."""
    deterministic: bool = False
    """The same bits on a GPU in each run, more slowly; CPUs give them anyway."""
    threads: NonNegativeInt = 0
    """Threads per process to compute and to load images; 0: as many as it has CPUs."""
    hang_timeout: PositiveFloat = 600.0
    """Seconds without a step after which the run ends, and names the process that hangs."""


@dataclass
class WandbConfig:
    """Weights & Biases."""

    mode: Literal["auto", "online", "offline", "off"] = "auto"
    """auto: online if an API key is found, else offline."""
    project: str = "alexnet_dist"
    """The project."""


@dataclass
class Config:
    """A run."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    run: RunConfig = field(default_factory=RunConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)


IMMUTABLE_ON_RESUME = (
    *("data.batch_size", "data.image_size", "data.resize_size", "data.train_crop", "data.scale"),
    *("data.ratio", "data.hflip", "data.pca_noise", "model", "optim.name", "train.seed"),
)
"""Options, and sections of them, that cannot change when a run resumes."""

NOT_PERSISTED = ("train.max_steps", "run.resume", "run.output_dir", "run.name", "run.time_limit")
"""Options of one start of a run, which do not carry over when it resumes."""

_OLD_NAMES = """
data.engine>data.loader data.loader=dataloader>torch data.loader=resident>gpu_cache
data.crop>data.train_crop data.colour>data.pca_noise data.colour_table>data.pca_noise_std
data.decoder> data.dali_decoder> data.ahead> data.prefetch>
model.variant>model.arch model.weights>model.pretrained model.num_classes>
optim.name=paper>sgd2012 optim.bias_lr>optim.lr_mults optim.factors>optim.lr_mults
optim.trust> optim.trust_coefficient> optim.schedule.drops> optim.schedule.max_drops>
optim.schedule.table>optim.schedule.milestones optim.schedule.name=table>piecewise
optim.schedule.rise>optim.schedule.pct_start train.stretch>train.epochs_scale
train.on_nonfinite=rollback> checkpoint.asynchronous> checkpoint.async_save>
run.root>run.output_dir run.grace>run.sigterm_grace parallel.fc_schedule> runtime.lrn>
runtime.stem> runtime.pool_first> runtime.update> runtime.weight_copies>
track.wandb>wandb.mode track.images> wandb.log_images> views>ten_crop picture>save_image
"""
OLD_NAMES: dict[str, str] = dict(re.findall(r"(\S+)>(\S*)", _OLD_NAMES))
"""New names of options, and of values (option=value), of earlier versions, where the nearest name
is another; "" if it is gone."""


def _sections(section: Any, prefix: str = "") -> Iterator[tuple[str, type]]:
    yield prefix, section
    for name, hint in typing.get_type_hints(section).items():
        if dataclasses.is_dataclass(hint):
            yield from _sections(hint, f"{prefix}{name}.")


SECTIONS: dict[str, type] = dict(_sections(Config))
"""The dataclass of each section by the prefix of its options: "optim.schedule."."""

OPTIONS: dict[str, Any] = {
    f"{prefix}{name}": hint
    for prefix, section in SECTIONS.items()
    for name, hint in typing.get_type_hints(section, include_extras=True).items()
    if not dataclasses.is_dataclass(hint)
}
"""The type of each option by its dotted name."""


@cache
def _option_help() -> dict[str, str]:
    """What each option means, and what its value must be."""
    docs = {
        f"{prefix}{option.arg_name}": option.description
        for prefix, section in SECTIONS.items()
        for option in docstring_parser.parse_from_object(section).params
    }
    return {name: f"{docs[name]} ({_expected(hint)})" for name, hint in OPTIONS.items()}


class ParsedArgs(NamedTuple):
    """A parsed command line."""

    config: Config
    """All options of the trainer."""
    config_name: str
    """The config file's name without its ending, the default of run.name."""
    args: argparse.Namespace
    """The command's own options."""


class CommandParser(argparse.ArgumentParser):
    """Parser of a command: its own options, by ``add_argument``, beside those of the trainer.

    Args:
        command: "train" for `python -m alexnet_dist.train`, whose help shows the trainer's options.
        description: the command's docstring.
        trainer_options: take --config, --print_config and the dotted options.
    """

    def __init__(
        self, command: str, description: str | None, *, trainer_options: bool = True
    ) -> None:
        super().__init__(
            prog=f"python -m alexnet_dist.{command}",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.add_argument("--debug", action="store_true", help="print an error's traceback")
        self.trainer_options = trainer_options
        if trainer_options:
            self.add_argument("--config", metavar="FILE", help="a YAML file of trainer options")
            self.add_argument("--print_config", action="store_true", help="print them and exit")
            self._add_trainer_options(with_help=command == "train")

    def _add_trainer_options(self, *, with_help: bool) -> None:
        if with_help:
            self.usage = "%(prog)s [--config FILE] [--OPTION VALUE ...]"
        else:
            self.epilog = "also: the trainer's options (python -m alexnet_dist.train --help)"
        texts, defaults = _option_help() if with_help else {}, flatten(to_dict(Config()))
        for prefix, section in SECTIONS.items():
            group = self.add_argument_group(str(section.__doc__).rstrip("."))
            for name in (f"{prefix}{option.name}" for option in dataclasses.fields(section)):
                if name in OPTIONS:
                    text, shown = texts.get(name, argparse.SUPPRESS), _as_text(defaults[name])
                    group.add_argument(
                        f"--{name}", metavar=shown, help=text, default=argparse.SUPPRESS
                    )

    def parse(self, arguments: list[str], base_config: dict[str, Any] | None = None) -> ParsedArgs:
        """Parse a command line. Needs no process group.

        Args:
            base_config: a resolved config below config file and command line, as of a run that
                resumes.

        Raises:
            UserError: an unknown option, a wrong value, a missing or unreadable config file.
            SystemExit: after --help or --print_config.
        """
        known = [name.removeprefix("--") for name in self._option_string_actions]
        for word in arguments:
            if word.startswith("--"):  # argparse has no suggestion
                _check_name(word[2:].partition("=")[0], known, None)
        args = self.parse_args(arguments)
        if not self.trainer_options:
            return ParsedArgs(Config(), "", args)
        dotted = {name: text for name, text in vars(args).items() if name in OPTIONS}
        path = args.config
        if path is None and base_config is None and "data.root" not in dotted:
            path = str(config_dir() / "quickstart.yaml")
        kept = flatten(base_config or {})
        config = from_dict({name: kept[name] for name in kept if name not in NOT_PERSISTED})
        if path:
            _set_options(config, _read_config_file(path), path)
        _set_options(config, dotted, None)
        _check_combinations(config)
        if args.print_config:
            print(yaml.safe_dump(to_dict(config), sort_keys=False), end="")
            raise SystemExit(0)
        return ParsedArgs(config, Path(path).stem if path else "run", args)

    def error(self, message: str) -> NoReturn:
        """Raise a UserError, where argparse would exit."""
        raise _error(f"{message}; --help lists all options")


def parse(arguments: list[str]) -> ParsedArgs:
    """Parse a command line of the trainer; see ``CommandParser.parse``."""
    return CommandParser("train", None).parse(arguments)


def positive_int(text: str) -> int:
    """The type of a command's own option that counts something."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"it must be {_expected(PositiveInt)}, not {text}")
    return int(text)


def from_dict(record: dict[str, Any], where: str = "the run's config.yaml") -> Config:
    """A config from plain values, as a run folder or a checkpoint keeps them.

    Raises:
        UserError: an option or a value that this version does not know.
    """
    values = flatten(record)
    if any(name in OLD_NAMES for name in values):
        raise _error(f"{where} was written by alexnet_dist 0.1.0: use it with that version")
    config = Config()
    _set_options(config, values, where)
    _check_combinations(config)
    return config


def to_dict(config: Config) -> dict[str, Any]:
    """The config as plain values, tuples as lists."""
    return dict(json.loads(json.dumps(dataclasses.asdict(config))))


def flatten(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"optim.lr": 0.01, ...} of {"optim": {"lr": 0.01}}; values that are dicts stay."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and name not in OPTIONS:
            flat |= flatten(value, f"{name}.")
        else:
            flat[name] = value
    return flat


def diff_configs(before: dict[str, Any], now: dict[str, Any]) -> dict[str, list[Any]]:
    """The options that differ between two resolved configs: {name: [before, now]}."""
    old, new = flatten(before), flatten(now)
    return {name: [old.get(name), new[name]] for name in new if old.get(name) != new[name]}


def check_resume_compatible(before: dict[str, Any], now: dict[str, Any], otherwise: str) -> None:
    """Refuse to resume a run under options that would make it another run.

    Raises:
        UserError: an option of IMMUTABLE_ON_RESUME differs; ``otherwise`` says what else to do.
    """
    for name, (old, new) in diff_configs(before, now).items():
        if any(f"{name}.".startswith(f"{fixed}.") for fixed in IMMUTABLE_ON_RESUME):
            fix = f"give --{name} {old} to resume; {otherwise}"
            raise _error(f"{name} cannot change from {old} to {new}: {fix}")


def config_dir() -> Path:
    """The folder of the config files that come with the package."""
    installed = Path(__file__).parent / "configs"
    return installed if installed.is_dir() else Path(__file__).parents[1] / "configs"


def _read_config_file(path: str) -> dict[str, Any]:
    """The options in a YAML file, by dotted name."""
    if not Path(path).is_file():
        names = ", ".join(sorted(file.stem for file in config_dir().glob("*.yaml")))
        raise _error(f"there is no config {path}; the package brings {names} in {config_dir()}")
    try:
        content = yaml.load(Path(path).read_text(), TEXT_LOADER) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise _error(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise _error(f"{path} holds no options: it needs lines like 'optim: {{lr: 0.01}}'")
    values = flatten(content)
    return {name: value for name, value in values.items() if value or f"{name}." not in SECTIONS}


def _set_options(config: Config, values: dict[str, Any], where: str | None) -> None:
    """Set options by dotted name, from a file or a record ``where``, or from the command line.

    Raises:
        UserError: there is no such option, or a value is not of its type, or out of bounds.
    """
    rules = ConfigDict(allow_inf_nan=False)
    for name, value in values.items():
        _check_name(name, [*OPTIONS], where)
        try:
            known = None if value in NULLS else value
            checked = TypeAdapter(OPTIONS[name], config=rules).validate_python(known)
        except (ValidationError, yaml.YAMLError):
            new = OLD_NAMES.get(f"{name}={value}")
            hint = "" if new is None else f" (now {new})" if new else " (which is gone)"
            message = f"option {name} must be {_expected(OPTIONS[name])}, not {_as_text(value)}"
            raise _error(f"{where}: " * bool(where) + message + hint) from None
        *sections, option = name.split(".")
        setattr(reduce(getattr, sections, config), option, checked)


def _check_combinations(config: Config) -> None:
    data, schedule = config.data, config.optim.schedule
    if data.image_size > data.resize_size:
        raise _error(
            f"data.image_size {data.image_size} is more than data.resize_size {data.resize_size}, "
            "the size it is cropped from: raise data.resize_size"
        )
    if schedule.name == "piecewise" and "weights" not in schedule.milestones:
        fix = "give optim.schedule.milestones {weights: [[0, 0.01], ...]}"
        raise _error(f"optim.schedule.name is piecewise, but there is no lr of weights: {fix}")


def _check_name(name: str, known: list[str], where: str | None) -> None:
    """Refuse an unknown option, with its new name or the nearest one."""
    if name in known:
        return
    dashes, place = ("", f" in {where}") if where else ("--", "")
    if name in OLD_NAMES and OLD_NAMES[name] in ("", *known):
        new = f"now {dashes}{OLD_NAMES[name]}" if OLD_NAMES[name] else "gone: leave it out"
        raise _error(f"option {dashes}{name}{place} is {new}")
    same_end = [option for option in known if option.split(".")[-1] == name.split(".")[-1]]
    near = difflib.get_close_matches(name, same_end or known, 1, 0.0 if same_end else 0.5)
    fix = f"did you mean {dashes}{near[0]}?" if near else "--help lists all options"
    raise _error(f"there is no option {dashes}{name}{place}; {fix}")


def _expected(hint: Any) -> str:
    """What a value of this type must be."""
    if hasattr(hint, "__metadata__"):
        return str(hint.__metadata__[-1])
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(str(value) for value in typing.get_args(hint))
    kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
    return {str: "text", bool: "true or false"}.get(hint) or " or ".join(map(_expected, kinds))


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
