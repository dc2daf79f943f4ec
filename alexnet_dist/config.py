"""Every option with its default and meaning, and the one parser of all commands.

Options are given as YAML (--config FILE) and as dotted words on the command line (--optim.lr 0.02);
a command's own options (--checkpoint RUN) stand beside them. jsonargparse checks types and bounds.
"""

import argparse
import dataclasses
import difflib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, get_args, get_origin, get_type_hints

import yaml
from annotated_types import Ge, Gt, Lt
from jsonargparse import ArgumentParser, get_loader, set_parsing_settings
from pydantic import StringConstraints

from alexnet_dist.errors import UserError

PositiveInt = Annotated[int, Ge(1)]
NonNegativeInt = Annotated[int, Ge(0)]
PositiveFloat = Annotated[float, Gt(0)]
NonNegativeFloat = Annotated[float, Ge(0)]
BelowOne = Annotated[float, Ge(0), Lt(1)]
Pixels = Annotated[int, Ge(16)]
Duration = Annotated[str, StringConstraints(pattern=r"^((\d+-)?\d+:\d+:\d+|\d+:\d+|\d+)(\.\d+)?$")]
Signal = Literal["SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGALRM"]
MilestoneList = list[tuple[float, float]]
Milestones = dict[str, MilestoneList]

set_parsing_settings(docstring_parse_attribute_docstrings=True)


@dataclass
class DataConfig:
    """The images."""

    root: str | None = None
    """Folder with train/ and val/, or one that prepare wrote, or CIFAR-10's; or "digits"."""
    cache_dir: str = "~/.cache/alexnet_dist"
    """For the digits, and for the indices of data folders that are read-only."""
    batch_size: PositiveInt = 128
    """Images per step over all processes (the paper, section 5)."""
    eval_batch_size: PositiveInt = 256
    """Crops per step of an evaluation over all processes."""
    loader: Literal["auto", "dali", "torch", "gpu_cache"] = "auto"
    """gpu_cache: raw pixels in the GPU's memory; auto: that for raw pixels, else DALI if it is
    installed."""
    dali_decoder: Literal["auto", "roi", "full", "cpu"] = "auto"
    """DALI on a GPU decodes only the crop, the full image, or on the CPU; auto: the first that
    works."""
    image_size: Pixels = 224
    """Width and height of the network's input, in pixels."""
    resize_size: Pixels = 256
    """A crop is image_size / resize_size of an image's shorter side (the paper, section 2)."""
    train_crop: Literal["paper", "chunked", "random_resized"] = "paper"
    """paper: a square of fixed size in the central square (section 4.1); chunked: the same one for
    32 images in a row (the authors' program); random_resized: as torchvision's."""
    scale: tuple[float, float] = (0.08, 1.0)
    """random_resized: bounds of the crop's fraction of the image's area."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """random_resized: bounds of the crop's aspect ratio."""
    hflip: bool = True
    """Flip training images horizontally with probability 0.5."""
    pca_noise: Literal["none", "source", "paper"] = "none"
    """PCA lighting noise, as in the authors' program or as printed in the paper."""
    pca_noise_std: NonNegativeFloat = 0.1
    """Standard deviation of its coefficients."""
    pca_noise_schedule: MilestoneList = field(default_factory=list)
    """[epochs done, pca_noise_std from there on]: [[0, 0.1], [66, 0]]."""
    on_corrupt_image: Literal["stop", "skip"] = "stop"
    """skip: use the next image in its place, and log it."""
    threads: NonNegativeInt = 0
    """Decoding threads per process; 0: as many as it has CPUs."""
    prefetch: PositiveInt = 2
    """Batches prepared ahead of the training step."""


@dataclass
class ModelConfig:
    """The network."""

    arch: str = "paper"
    """A network that `python -m alexnet_dist.summary` lists."""
    init: Literal["source", "paper", "torch"] | None = None
    """Initial weights: the authors' program's, the paper's or torch's; null: the network's own."""
    dropout: BelowOne = 0.5
    """Probability with which fc6 and fc7 (in torchvision's network: their inputs) drop a unit."""
    num_classes: PositiveInt | None = None
    """Outputs; null: as many as the data has classes."""
    pretrained: str | None = None
    """Start from a run, a checkpoint, an exported .safetensors, or torchvision's AlexNet (.pth)."""


@dataclass
class ScheduleConfig:
    """The learning rate's schedule. Epochs are real numbers."""

    name: Literal["constant", "plateau", "one_cycle", "polynomial", "piecewise"] = "plateau"
    """plateau: divide by ten when the validation error stops improving (the paper); polynomial:
    quadratic to zero."""
    warmup_epochs: NonNegativeFloat = 0.0
    """Epochs over which the lr rises from zero, before any other schedule."""
    patience: NonNegativeInt = 3
    """plateau: evaluations without a better error to wait for."""
    max_drops: NonNegativeInt = 3
    """plateau: how often the lr is divided by ten."""
    pct_start: float = 0.3
    """one_cycle: fraction of the run in which the lr rises to optim.lr."""
    milestones: Milestones = field(default_factory=dict)
    """piecewise: {weights: [[epochs done, lr from there on], ...], biases: ..., conv1.bias: ...}"""


@dataclass
class OptimConfig:
    """The optimizer."""

    name: Literal["sgd2012", "sgd", "lars"] = "sgd2012"
    """The paper's SGD (lr inside the velocity), torch's, or LARS (You, Gitman, Ginsburg 2017)."""
    lr: NonNegativeFloat = 0.01
    """Learning rate."""
    bias_lr_mult: NonNegativeFloat = 1.0
    """The biases' lr as a multiple of lr (2 in the authors' program; small with LARS)."""
    lr_mults: dict[str, float] = field(default_factory=dict)
    """Multiples of the scheduled lr by parameter: {conv1.weight: 0.1}."""
    momentum: BelowOne = 0.9
    """Momentum."""
    weight_decay: NonNegativeFloat = 0.0005
    """Weight decay; never on biases."""
    trust_coefficient: PositiveFloat = 0.001
    """lars: a step is at most lr * trust_coefficient of a tensor's norm, before momentum."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)


@dataclass
class TrainConfig:
    """The training run."""

    epochs: PositiveFloat = 90
    """Epochs (the paper: roughly 90)."""
    epochs_scale: PositiveFloat = 1.0
    """Multiplies epochs and the epochs in optim.schedule and data.pca_noise_schedule."""
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
    async_save: bool = True
    """Write checkpoints while training continues."""


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
    """Save and exit before this process is so old: seconds, M:S, H:M:S or D-H:M:S. The limit of a
    SLURM job is known."""
    preempt_signals: list[Signal] = field(default_factory=lambda: ["SIGUSR2"])
    """Save and exit on these, on SIGTERM, on Ctrl-C, and on a file PREEMPT in the run's folder."""
    sigterm_grace: PositiveFloat = 20.0
    """Seconds after SIGTERM until a process exits in any case; torchrun kills it after 30."""


@dataclass
class ParallelConfig:
    """How the network is laid out on the processes; never what it computes."""

    towers: Literal[1, 2] = 1
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
    compile: bool | Literal["auto"] = False
    """Compile the network with torch.compile; auto: on GPUs."""
    cuda_graph: bool | Literal["auto"] = False
    """Launch a step as one CUDA graph; auto: where that is possible."""
    deterministic: bool = False
    """The same bits on a GPU in each run, more slowly; CPUs give them anyway."""
    threads: NonNegativeInt = 0
    """Computing threads per process; 0: as many as it has CPUs."""
    hang_timeout: PositiveFloat = 600.0
    """Seconds without a step after which the run ends, and names the process that hangs."""


@dataclass
class WandbConfig:
    """Weights & Biases."""

    mode: Literal["auto", "online", "offline", "off"] = "auto"
    """auto: online if an API key is found, else offline."""
    project: str = "alexnet_dist"
    """The project."""
    log_images: bool = True
    """Log images of kernels and of labeled predictions."""


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
    *("data.ratio", "data.hflip", "data.pca_noise", "data.pca_noise_std"),
    *("model", "optim.name", "train.seed"),
)
"""Options that cannot change when a run resumes."""

NOT_PERSISTED = ("train.max_steps", "run.resume", "run.output_dir", "run.name", "run.time_limit")
"""Options of one start of a run, which do not carry over when it resumes."""

_OLD_NAMES = """
data.engine>data.loader data.decoder>data.dali_decoder data.resize>data.resize_size
data.crop>data.train_crop data.flip>data.hflip data.on_bad_image>data.on_corrupt_image
data.colour>data.pca_noise data.colour_strength>data.pca_noise_std data.ahead>data.prefetch
data.colour_table>data.pca_noise_schedule data.cache>data.cache_dir
data.loader=dataloader>torch data.loader=resident>gpu_cache data.dali_decoder=region>roi
model.variant>model.arch model.weights>model.pretrained
optim.bias_lr>optim.bias_lr_mult optim.factors>optim.lr_mults optim.name=paper>sgd2012
optim.trust>optim.trust_coefficient optim.schedule.table>optim.schedule.milestones
optim.schedule.warmup>optim.schedule.warmup_epochs optim.schedule.rise>optim.schedule.pct_start
optim.schedule.drops>optim.schedule.max_drops optim.schedule.name=table>piecewise
train.accumulate>train.grad_accum_steps train.log_every>train.log_interval
train.on_nan>train.on_nonfinite train.on_nonfinite=rollback> train.stretch>train.epochs_scale
checkpoint.every_steps>checkpoint.interval_steps checkpoint.keep>checkpoint.keep_last
checkpoint.asynchronous>checkpoint.async_save
run.root>run.output_dir run.signals>run.preempt_signals run.grace>run.sigterm_grace
parallel.compress>parallel.grad_compression parallel.fc_schedule> runtime.lrn> runtime.stem>
runtime.timeout>runtime.hang_timeout runtime.pool_first> runtime.update> runtime.weight_copies>
track.wandb>wandb.mode track.project>wandb.project track.images>wandb.log_images
views>ten_crop picture>save_image
"""
OLD_NAMES: dict[str, str] = dict(re.findall(r"(\S+)>(\S*)", _OLD_NAMES))
"""New names of options, and of values (option=value), of alexnet_dist 0.1.0; "" if it is gone."""


def _option_types(section: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, hint in get_type_hints(section, include_extras=True).items():
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            yield from _option_types(hint, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", hint


OPTIONS: dict[str, Any] = dict(_option_types(Config))
"""The type of each option by its dotted name."""


@dataclass(frozen=True)
class ParsedArgs:
    """A parsed command line.

    Attributes:
        config: all options of the trainer.
        config_name: the config file's name without its ending, the default of run.name.
        args: the command's own options.
    """

    config: Config
    config_name: str
    args: argparse.Namespace


class CommandParser(argparse.ArgumentParser):
    """Parser of a command: its own options, by ``add_argument``, beside those of the trainer.

    Args:
        command: "train" for `python -m alexnet_dist.train`.
        description: the command's docstring.
        trainer_options: take --config, --print_config and the dotted options.
        default_config: config file of the package where neither --config nor --data.root is given.
    """

    def __init__(
        self,
        command: str,
        description: str | None,
        *,
        trainer_options: bool = True,
        default_config: str | None = None,
    ) -> None:
        super().__init__(
            prog=f"python -m alexnet_dist.{command}",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.trainer_options, self.default_config = trainer_options, default_config
        if trainer_options:
            self.add_argument("--config", metavar="FILE", help="a YAML file of dotted options")
            self.add_argument("--print_config", action="store_true", help="print them all and exit")
        self.add_argument("--debug", action="store_true", help="print an error's traceback")

    def parse(self, arguments: list[str], base_config: dict[str, Any] | None = None) -> ParsedArgs:
        """Parse a command line. Needs no process group.

        Args:
            base_config: a resolved config below config file and command line, as of a run that
                resumes.

        Raises:
            UserError: an unknown option, a wrong value, a missing or unreadable config file.
            SystemExit: after --help or --print_config.
        """
        own_words, dotted = self._split(arguments)
        args = self.parse_args(own_words)
        if not self.trainer_options:
            return ParsedArgs(Config(), "", args)
        path = args.config
        if path is None and base_config is None and "data.root" not in dotted:
            path = self.default_config and str(config_dir() / f"{self.default_config}.yaml")
        kept = flatten(to_dict(from_dict(base_config))) if base_config else {}
        record = {name: value for name, value in kept.items() if name not in NOT_PERSISTED}
        record |= _read_config_file(path) if path else {}
        config = _build(record, path, dotted)
        if args.print_config:
            print(yaml.safe_dump(to_dict(config), sort_keys=False), end="")
            raise SystemExit(0)
        return ParsedArgs(config, Path(path).stem if path else "run", args)

    def _split(self, arguments: list[str]) -> tuple[list[str], dict[str, str]]:
        """The command's own words, and the values of dotted options."""
        own_words: list[str] = []
        dotted: dict[str, str] = {}
        own_names = [name.removeprefix("--") for name in self._option_string_actions]
        words = iter(arguments)
        for word in words:
            name, has_value, value = word.removeprefix("--").partition("=")
            if not word.startswith("--") or name in own_names:
                own_words.append(word)
                continue
            _check_name(name, own_names + [*OPTIONS] * self.trainer_options, "--", "")
            dotted[name] = value if has_value else next(words, "--")
            if dotted[name].startswith("--"):
                raise _error(f"option {name} needs a value")
        return own_words, dotted

    def format_help(self) -> str:
        """The command's own options, and for train all others."""
        more = "\nalso: the trainer's options; python -m alexnet_dist.train --help lists them\n"
        if self.prog.endswith(".train"):
            more = "\n" + _trainer_parser().format_help()
        return super().format_help() + more * self.trainer_options

    def error(self, message: str) -> NoReturn:
        """Raise a UserError, where argparse would exit."""
        raise _error(f"{message}; --help lists all options")


def parse(
    arguments: list[str],
    description: str | None = None,
    base_config: dict[str, Any] | None = None,
) -> ParsedArgs:
    """Parse a command line of the trainer; see ``CommandParser.parse``."""
    parser = CommandParser("train", description, default_config="quickstart")
    return parser.parse(arguments, base_config)


def from_dict(record: dict[str, Any], where: str = "the run's config.yaml") -> Config:
    """A config from plain values, as a run folder or a checkpoint keeps them.

    Raises:
        UserError: an option or a value that this version does not know.
    """
    flat = flatten(record)
    if any(name not in OPTIONS and name in OLD_NAMES for name in flat):
        raise _error(f"{where} was written by alexnet_dist 0.1.0: use it with that version")
    for name in flat:
        _check_name(name, [*OPTIONS], "", f" in {where}")
    return _build(flat, where, {})


def to_dict(config: Config) -> dict[str, Any]:
    """The config as plain values, tuples as lists."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return plain


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


def time_limit(run: RunConfig) -> float | None:
    """run.time_limit in seconds."""
    if run.time_limit is None:
        return None
    days, _, clock = run.time_limit.rpartition("-")
    seconds = 0.0
    for part in clock.split(":"):
        seconds = 60 * seconds + float(part)
    return 86400 * int(days or 0) + seconds


@cache
def _trainer_parser() -> ArgumentParser:
    parser = ArgumentParser(
        usage=argparse.SUPPRESS, add_help=False, exit_on_error=False, allow_abbrev=False
    )
    parser.add_class_arguments(Config, None)
    return parser


def _read_config_file(path: str) -> dict[str, Any]:
    """The options in a YAML file, by dotted name."""
    if not Path(path).is_file():
        names = ", ".join(sorted(file.stem for file in config_dir().glob("*.yaml")))
        raise _error(f"there is no config {path}; the package brings {names} in {config_dir()}")
    try:
        content = get_loader("yaml")(Path(path).read_text())  # unlike YAML, reads 1e-3 as a number
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise _error(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content or {}, dict):
        raise _error(f"{path} holds no options: it needs lines like 'optim: {{lr: 0.01}}'")
    sections = get_type_hints(Config)
    flat = flatten(content or {})
    flat = {name: flat[name] for name in flat if flat[name] is not None or name not in sections}
    for name, value in flat.items():
        _check_name(name, [*OPTIONS], "", f" in {path}")
        kinds = {OPTIONS[name], *get_args(OPTIONS[name])}
        if kinds & {str, Duration} and isinstance(value, (int, float)):
            flat[name] = str(value)  # a run named 150, or 1:30:00, which YAML reads as 5400
        elif "off" in kinds and value is False:
            flat[name] = "off"  # which YAML reads as false
    return flat


def _build(record: dict[str, Any], where: str | None, dotted: dict[str, str]) -> Config:
    """The config of flat values from ``where``, and of a command line's above them.

    Raises:
        UserError: a value is not of its option's type, or out of bounds.
    """
    for name, value in record.items():
        if value is None and type(None) not in get_args(OPTIONS[name]):  # jsonargparse allows it
            raise _value_error(name, "null", where)
    parser, given = _trainer_parser(), record
    try:
        values = parser.parse_object(record)
        given, where = dotted, None
        values = parser.parse_args([f"--{n}={v}" for n, v in dotted.items()], namespace=values)
        sections = parser.instantiate(values)
    except (argparse.ArgumentError, TypeError, ValueError, KeyError) as error:
        name = (re.findall(r'"([\w.]+)"', str(error)) or [""])[0]
        if name in OPTIONS:
            raise _value_error(name, given.get(name), where) from None
        raise _error(" ".join(str(error).split())) from None
    config = Config(**{f.name: sections[f.name] for f in dataclasses.fields(Config)})
    data, schedule = config.data, config.optim.schedule
    if data.image_size > data.resize_size:
        raise _error(
            f"data.image_size {data.image_size} is more than data.resize_size {data.resize_size}, "
            "the size it is cropped from: raise data.resize_size"
        )
    if schedule.name == "piecewise" and "weights" not in schedule.milestones:
        fix = "give optim.schedule.milestones {weights: [[0, 0.01], ...]}"
        raise _error(f"optim.schedule.name is piecewise, but there is no lr of weights: {fix}")
    return config


_EXPECTED: dict[Any, str] = {
    bool: "true or false",
    str: "text",
    PositiveInt: "a whole number of at least 1",
    NonNegativeInt: "a whole number of at least 0",
    Pixels: "a whole number of at least 16",
    float: "a number",
    PositiveFloat: "a number above 0",
    NonNegativeFloat: "a number of at least 0",
    BelowOne: "a number from 0 up to, but not, 1",
    Duration: "seconds, M:S, H:M:S or D-H:M:S",
    tuple[float, float]: "two numbers, as [0.1, 1]",
    list[Signal]: f"a list of {', '.join(get_args(Signal))}",
    MilestoneList: "a list of [epochs, value], as [[0, 0.1], [66, 0]]",
    Milestones: "lists of [epochs, lr] by name, as {weights: [[0, 0.01], [24, 0.001]]}",
    dict[str, float]: "numbers by name, as {conv1.weight: 0.1}",
}


def _expected(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(str(value) for value in get_args(hint))
    if hint in _EXPECTED:
        return _EXPECTED[hint]
    return " or ".join(_expected(kind) for kind in get_args(hint) if kind is not type(None))


def _error(message: str) -> UserError:
    return UserError(message, on_all_ranks=True)


def _value_error(name: str, value: Any, where: str | None) -> UserError:
    new = OLD_NAMES.get(f"{name}={value}")
    hint = "" if new is None else f" (now {new})" if new else " (which is gone)"
    place = f"{where}: " if where else ""
    return _error(f"{place}option {name} must be {_expected(OPTIONS[name])}, not {value}{hint}")


def _check_name(name: str, known: list[str], dashes: str, where: str) -> None:
    """Refuse an unknown option, with its new name or the nearest one."""
    if name in known:
        return
    if name in OLD_NAMES and OLD_NAMES[name] in ("", *known):
        new = f"now {dashes}{OLD_NAMES[name]}" if OLD_NAMES[name] else "gone: leave it out"
        raise _error(f"option {dashes}{name}{where} is {new}")
    same_end = [option for option in known if option.split(".")[-1] == name.split(".")[-1]]
    near = difflib.get_close_matches(name, same_end or known, 1, 0.0 if same_end else 0.5)
    fix = f"did you mean {dashes}{near[0]}?" if near else "--help lists all options"
    raise _error(f"there is no option {dashes}{name}{where}; {fix}")
