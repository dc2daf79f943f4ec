"""Every option with its default and meaning, and the one parser of all commands.

Options are given as YAML (--config FILE) and as dotted words on the command line (--optim.lr 0.02).
A command's own options (--checkpoint RUN) stand beside them. jsonargparse holds values to the types
and bounds below.
"""

import argparse
import dataclasses
import difflib
import json
import re
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, get_args, get_origin, get_type_hints

import yaml
from annotated_types import Ge, Gt, Lt
from jsonargparse import ArgumentParser, get_loader, set_parsing_settings

from alexnet_dist.errors import UserError

PositiveInt = Annotated[int, Ge(1)]
NonNegativeInt = Annotated[int, Ge(0)]
PositiveFloat = Annotated[float, Gt(0)]
NonNegativeFloat = Annotated[float, Ge(0)]
Pixels = Annotated[int, Ge(16)]
BelowOne = Annotated[float, Ge(0), Lt(1)]
MilestoneList = list[tuple[float, float]]
Milestones = dict[str, MilestoneList]

set_parsing_settings(docstring_parse_attribute_docstrings=True)


@dataclass
class DataConfig:
    """The images."""

    root: str | None = None
    """A folder with train/ and val/ (or test/), each with a folder per class; or a folder that
    `python -m alexnet_dist.prepare` wrote; or CIFAR-10's own files; "digits" is the embedded set.
    Without --config and --data.root the run is configs/quickstart.yaml."""
    cache_dir: str = "~/.cache/alexnet_dist"
    """For the digits, and for the index of a data folder that is read-only."""
    batch_size: PositiveInt = 128
    """Global batch size: images per step, over all processes (the paper, section 5)."""
    eval_batch_size: PositiveInt = 256
    """Global batch size of an evaluation; counts crops where an image has ten."""
    loader: Literal["auto", "dali", "torch", "gpu_cache"] = "auto"
    """What makes batches. gpu_cache keeps a folder of raw pixels in the GPU's memory; auto takes
    it for such a folder, else DALI where it is installed."""
    dali_decoder: Literal["auto", "roi", "full", "cpu"] = "auto"
    """What DALI decodes on a GPU: only the crop, the full image, or the crop on the CPU; auto takes
    the first of these that works."""
    image_size: Pixels = 224
    """Width and height of the network's input, in pixels."""
    resize_size: Pixels = 256
    """Shorter side that image_size refers to: a crop covers image_size / resize_size of the shorter
    side of the stored image (the paper, section 2)."""
    train_crop: Literal["paper", "chunked", "random_resized"] = "paper"
    """Training crop: a square of fixed size somewhere in the central square (the paper, section
    4.1); chunked: the same place and flip for 32 images in a row (the authors' program); or a box
    of random area and aspect ratio, as torchvision's RandomResizedCrop."""
    scale: tuple[float, float] = (0.08, 1.0)
    """random_resized: bounds of the crop's area, as a fraction of the image's."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """random_resized: bounds of the crop's width over its height."""
    hflip: bool = True
    """Flip training images horizontally with probability 0.5."""
    pca_noise: Literal["none", "source", "paper"] = "none"
    """PCA lighting noise, as in the authors' program or as printed in the paper."""
    pca_noise_std: NonNegativeFloat = 0.1
    """Standard deviation of the PCA noise's coefficients."""
    pca_noise_schedule: MilestoneList = field(default_factory=list)
    """Epochs done and the pca_noise_std from there on: [[0, 0.1], [66, 0]]; empty: constant."""
    on_corrupt_image: Literal["stop", "skip"] = "stop"
    """An image that cannot be decoded: stop, or use the next one in its place and log it."""
    threads: NonNegativeInt = 0
    """Decoding threads per process; 0: as many as the process has CPUs."""
    prefetch: PositiveInt = 2
    """Batches prepared ahead of the training step."""


@dataclass
class ModelConfig:
    """The network."""

    arch: str = "paper"
    """A network of the table that `python -m alexnet_dist.summary` lists."""
    init: Literal["source", "paper", "torch"] | None = None
    """Initial weights: the authors' program's, the paper's (std 0.01 everywhere) or torch's; null:
    the network's own."""
    dropout: BelowOne = 0.5
    """Probability with which fc6 and fc7 (in torchvision's network: their inputs) drop a unit."""
    num_classes: PositiveInt | None = None
    """Outputs; null: as many as the data has classes."""
    pretrained: str | None = None
    """Start from the weights of this run, checkpoint or exported .safetensors, or of torchvision's
    AlexNet in a .pth; a last layer for other classes is initialized from scratch."""


@dataclass
class ScheduleConfig:
    """The learning rate's schedule. Epochs are real numbers."""

    name: Literal["constant", "plateau", "one_cycle", "polynomial", "piecewise"] = "plateau"
    """plateau: divide by ten when the validation error stops improving, as the paper did;
    polynomial: times the square of the fraction of the run that is left; piecewise: constant
    between milestones."""
    warmup_epochs: NonNegativeFloat = 0.0
    """Epochs over which the lr rises from zero, before any other schedule."""
    patience: NonNegativeInt = 3
    """plateau: evaluations without a better error to wait for."""
    max_drops: NonNegativeInt = 3
    """plateau: how often the lr is divided by ten."""
    pct_start: float = 0.3
    """one_cycle: fraction of the run in which the lr rises; optim.lr is the peak."""
    milestones: Milestones = field(default_factory=dict)
    """piecewise: for "weights" and "biases" (or a parameter's name) the epochs done and the lr from
    there on: {weights: [[0, 0.01], [24, 0.001]]}."""


@dataclass
class OptimConfig:
    """The optimizer."""

    name: Literal["sgd2012", "sgd", "lars"] = "sgd2012"
    """The paper's update, with the lr inside the velocity; torch's SGD; or LARS: the paper's with a
    local lr for each weight tensor (You, Gitman, Ginsburg 2017)."""
    lr: NonNegativeFloat = 0.01
    """Learning rate."""
    bias_lr_mult: NonNegativeFloat = 1.0
    """Learning rate of biases, as a multiple of lr (2 in the authors' program)."""
    lr_mults: dict[str, float] = field(default_factory=dict)
    """Multiples of the scheduled lr, for parameters by name: {conv1.weight: 0.1}."""
    momentum: BelowOne = 0.9
    """Momentum."""
    weight_decay: NonNegativeFloat = 0.0005
    """Weight decay; never on biases."""
    trust_coefficient: PositiveFloat = 0.001
    """lars: a step is at most lr * trust_coefficient of a tensor's norm, before momentum; biases
    have the plain lr, so give a small bias_lr_mult."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)


@dataclass
class TrainConfig:
    """The training run."""

    epochs: PositiveFloat = 90
    """Epochs (the paper: roughly 90)."""
    epochs_scale: PositiveFloat = 1.0
    """Stretch or shrink the run: multiplies epochs, optim.schedule and data.pca_noise_schedule."""
    max_steps: PositiveInt | None = None
    """Stop early, after so many steps; schedules keep to train.epochs, and the run can resume."""
    grad_accum_steps: PositiveInt = 1
    """Microbatches per step, where memory does not hold a process's images at once; gradients are
    summed, and all-reduced once. Batch normalization uses the statistics of a microbatch."""
    log_interval: PositiveInt = 20
    """Steps between two log records."""
    seed: NonNegativeInt = 2012
    """Of weights, order, crops and dropout."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """A loss or gradient that is not finite: stop, or skip that update (which checks every
    gradient)."""


@dataclass
class CheckpointConfig:
    """Checkpoints."""

    interval_steps: PositiveInt | None = 1000
    """Steps between checkpoints, besides those at the end of each epoch."""
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
    """The folder's name; null: the config file's, with -2, -3 once a run of that name is
    finished."""
    resume: str = "auto"
    """auto: resume an unfinished run of this name; never; or a run's folder."""
    time_limit: str | None = None
    """Save and exit, to be restarted, before this process is so old: seconds, M:S, H:M:S or
    D-H:M:S. The end of a SLURM job is known anyway."""
    preempt_signals: list[str] = field(default_factory=lambda: ["SIGUSR2"])
    """Signals on which to save and exit, besides SIGTERM and Ctrl-C (NCCL uses SIGUSR1). A file
    PREEMPT in the run's folder does the same."""
    sigterm_grace: PositiveFloat = 20.0
    """Seconds after SIGTERM when a process exits even if it could not save; torchrun kills it after
    30."""


@dataclass
class ParallelConfig:
    """How the network is laid out on the processes; never what it computes."""

    towers: Literal[1, 2] = 1
    """2: model parallel as the paper's two GPUs: two neighboring ranks hold a tower each."""
    fc: Literal["replicated", "sharded"] = "replicated"
    """sharded: the fully connected layers are split over all ranks ("One weird trick")."""
    fc_schedule: Literal["whole", "pipelined"] = "whole"
    """sharded: the global batch at once, or in turns, one's transfer under the other's product."""
    grad_compression: Literal["none", "bf16", "fp16", "powersgd"] = "none"
    """Compression of the gradients' all-reduce."""
    powersgd_rank: PositiveInt = 4
    """powersgd: rank of the matrices that approximate a gradient."""
    powersgd_start: NonNegativeInt = 1000
    """powersgd: uncompressed steps before it begins, at each start of a run."""


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
    """Seconds without a step, or a batch of an evaluation, after which the run ends and names the
    process that all wait for."""


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
    "data.batch_size",
    "data.image_size",
    "data.resize_size",
    "data.train_crop",
    "data.scale",
    "data.ratio",
    "data.hflip",
    "data.pca_noise",
    "data.pca_noise_std",
    "model",
    "optim.name",
    "train.seed",
)
"""Options that cannot change when a run resumes."""

NOT_PERSISTED = ("train.max_steps", "run.resume", "run.output_dir", "run.name", "run.time_limit")
"""Options of one start of a run, which do not carry over when it resumes."""

OLD_NAMES: dict[str, str] = dict(
    re.findall(
        r"(\S+)->(\S*)",
        """
    model.variant->model.arch model.weights->model.pretrained
    data.engine->data.loader data.decoder->data.dali_decoder data.resize->data.resize_size
    data.crop->data.train_crop data.flip->data.hflip data.on_bad_image->data.on_corrupt_image
    data.colour->data.pca_noise data.colour_strength->data.pca_noise_std
    data.colour_table->data.pca_noise_schedule data.ahead->data.prefetch data.cache->data.cache_dir
    optim.bias_lr->optim.bias_lr_mult optim.factors->optim.lr_mults
    optim.trust->optim.trust_coefficient optim.schedule.table->optim.schedule.milestones
    optim.schedule.warmup->optim.schedule.warmup_epochs
    optim.schedule.rise->optim.schedule.pct_start optim.schedule.drops->optim.schedule.max_drops
    train.accumulate->train.grad_accum_steps train.log_every->train.log_interval
    train.on_nan->train.on_nonfinite train.stretch->train.epochs_scale
    checkpoint.every_steps->checkpoint.interval_steps checkpoint.keep->checkpoint.keep_last
    checkpoint.asynchronous->checkpoint.async_save
    run.root->run.output_dir run.signals->run.preempt_signals run.grace->run.sigterm_grace
    parallel.compress->parallel.grad_compression parallel.fc_schedule->
    runtime.timeout->runtime.hang_timeout runtime.lrn-> runtime.stem-> runtime.pool_first->
    runtime.update-> runtime.weight_copies->
    track.wandb->wandb.mode track.project->wandb.project track.images->wandb.log_images
    data.loader=dataloader->torch data.loader=resident->gpu_cache data.dali_decoder=region->roi
    optim.name=paper->sgd2012 optim.schedule.name=table->piecewise train.on_nonfinite=rollback->
    views->ten_crop picture->save_image
    """,
    )
)
"""Earlier names of options, and of values (option=value); nothing: no longer there."""


@dataclass(frozen=True)
class ParsedArgs:
    """A parsed command line.

    Attributes:
        config: all options of the trainer.
        explicit_options: dotted options of the command line, with their words.
        config_name: the config file's name without its ending, the default of run.name.
        args: the command's own options.
    """

    config: Config
    explicit_options: dict[str, str]
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
            return ParsedArgs(Config(), {}, "", args)
        path = args.config
        if path is None and base_config is None and "data.root" not in dotted:
            path = self.default_config and str(config_dir() / f"{self.default_config}.yaml")
        kept = flatten(to_dict(from_dict(base_config))) if base_config else {}
        record = {name: value for name, value in kept.items() if name not in NOT_PERSISTED}
        record |= _read_config_file(path) if path else {}
        config = _build(record, path, dotted)
        _check(config)
        if args.print_config:
            print(yaml.safe_dump(to_dict(config), sort_keys=False), end="")
            raise SystemExit(0)
        return ParsedArgs(config, dotted, Path(path).stem if path else "run", args)

    def _split(self, arguments: list[str]) -> tuple[list[str], dict[str, str]]:
        """The command's own words, and the values of dotted options."""
        own_words: list[str] = []
        dotted: dict[str, str] = {}
        words = iter(arguments)
        for word in words:
            name, has_value, value = word.removeprefix("--").partition("=")
            if not word.startswith("--") or f"--{name}" in self._option_string_actions:
                own_words.append(word)
                continue
            own_names = [option.removeprefix("--") for option in self._option_string_actions]
            _check_name(name, own_names + [*OPTIONS] * self.trainer_options, "option ", "--")
            given = value if has_value else next(words, "--")
            if not has_value and given.startswith("--"):
                raise UserError(f"option {name} needs a value", on_all_ranks=True)
            dotted[name] = given
        return own_words, dotted

    def format_help(self) -> str:
        """The command's own options, and for train all others."""
        text = super().format_help()
        if self.prog.endswith(".train"):
            return text + "\n" + _trainer_parser().format_help()
        more = "\nalso: the trainer's options; python -m alexnet_dist.train --help lists them\n"
        return text + more * self.trainer_options

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists all options", on_all_ranks=True)


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
        raise UserError(
            f"{where} was written by alexnet_dist 0.1.0, whose options have other names: use it "
            "with that version",
            on_all_ranks=True,
        )
    for name in flat:
        _check_name(name, [*OPTIONS], f"option in {where} named ")
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


def nest(flat: dict[str, Any]) -> dict[str, Any]:
    """The inverse of ``flatten``."""
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        *path, last = name.split(".")
        inner = nested
        for key in path:
            inner = inner.setdefault(key, {})
        inner[last] = value
    return nested


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
            raise UserError(
                f"{name} cannot change from {old} to {new}: give --{name} {old} to resume; "
                f"{otherwise}",
                on_all_ranks=True,
            )


def config_dir() -> Path:
    """The folder of the config files that come with the package."""
    installed = Path(__file__).parent / "configs"
    return installed if installed.is_dir() else Path(__file__).parents[1] / "configs"


def time_limit(run: RunConfig) -> float | None:
    """run.time_limit in seconds.

    Raises:
        ValueError: it is no duration.
    """
    if run.time_limit is None:
        return None
    form = re.fullmatch(r"(?:(\d+)-)?(?:(?:(\d+):)?(\d+):)?(\d+(?:\.\d+)?)", run.time_limit.strip())
    if form is None:
        raise ValueError(run.time_limit)
    days, hours, minutes, seconds = (float(part or 0) for part in form.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def _option_types(section: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, hint in get_type_hints(section, include_extras=True).items():
        if dataclasses.is_dataclass(hint):
            yield from _option_types(hint, f"{prefix}{name}.")  # type: ignore[arg-type]
        else:
            yield f"{prefix}{name}", hint


OPTIONS: dict[str, Any] = dict(_option_types(Config))
"""The type of each option, by its dotted name."""


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
        raise UserError(
            f"there is no config {path}; the package brings {names} in {config_dir()}",
            on_all_ranks=True,
        )
    try:
        content = get_loader("yaml")(Path(path).read_text())  # unlike YAML, reads 1e-3 as a number
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is not YAML ({reason}): fix it", on_all_ranks=True) from None
    if not isinstance(content or {}, dict):
        raise UserError(
            f"{path} holds no options: it needs lines like 'optim: {{lr: 0.01}}'",
            on_all_ranks=True,
        )
    sections = get_type_hints(Config)
    flat = flatten(content or {})
    flat = {
        name: value for name, value in flat.items() if value is not None or name not in sections
    }
    for name, value in flat.items():
        _check_name(name, [*OPTIONS], f"option in {path} named ")
        kinds = (OPTIONS[name], *get_args(OPTIONS[name]))
        if str in kinds and isinstance(value, (int, float)):
            flat[name] = str(value)  # a run named 150, or 1:30:00, which YAML reads as 5400
        elif "off" in kinds and value is False:
            flat[name] = "off"  # which YAML reads as false
    return flat


def _check_name(name: str, known: list[str], what: str, dashes: str = "") -> None:
    """Refuse an unknown option, with its new name or the nearest one."""
    if name in known:
        return
    if name in OLD_NAMES and OLD_NAMES[name] in ("", *known):
        new = f"is now {dashes}{OLD_NAMES[name]}" if OLD_NAMES[name] else "is gone: leave it out"
        raise UserError(f"{what}{dashes}{name} {new}", on_all_ranks=True)
    same_end = [option for option in known if option.split(".")[-1] == name.split(".")[-1]]
    near = difflib.get_close_matches(name, same_end or known, 1, 0.0 if same_end else 0.5)
    fix = f"; did you mean {dashes}{near[0]}?" if near else "; --help lists all options"
    raise UserError(f"there is no {what}{dashes}{name}{fix}", on_all_ranks=True)


def _build(record: dict[str, Any], where: str | None, dotted: dict[str, str]) -> Config:
    """The config of flat values from ``where``, and of a command line's above them.

    Raises:
        UserError: a value is not of its option's type, or out of bounds.
    """
    for name, value in record.items():
        if value is None and type(None) not in get_args(OPTIONS[name]):  # jsonargparse allows it
            raise UserError(_wrong_value(name, "null", where), on_all_ranks=True)
    parser, given = _trainer_parser(), record
    try:
        values = parser.parse_object(nest(record))
        given, where = dotted, None
        values = parser.parse_args([f"--{n}={v}" for n, v in dotted.items()], namespace=values)
        sections = parser.instantiate(values)
    except (argparse.ArgumentError, TypeError, ValueError, KeyError) as error:
        key = re.search(r'"([\w.]+)"', str(error))
        name = key.group(1) if key else ""
        if name not in OPTIONS:
            raise UserError(" ".join(str(error).split()), on_all_ranks=True) from None
        message = _wrong_value(name, str(given.get(name)), where)
        raise UserError(message, on_all_ranks=True) from None
    config = Config(**{f.name: sections[f.name] for f in dataclasses.fields(Config)})
    return config


def _wrong_value(name: str, value: str, where: str | None) -> str:
    old = OLD_NAMES.get(f"{name}={value}")
    hint = "" if old is None else f" (now {old})" if old else " (which is gone)"
    place = f"{where}: " if where else ""
    return f"{place}option {name} must be {_expected(OPTIONS[name])}, not {value}{hint}"


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
    tuple[float, float]: "two numbers, as [0.1, 1]",
    list[str]: "a list, as [SIGUSR2]",
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


def _check(config: Config) -> None:
    """Refuse options that do not fit each other.

    Raises:
        UserError: they do not.
    """

    def refuse(message: str) -> NoReturn:
        raise UserError(message, on_all_ranks=True)

    data, run, schedule = config.data, config.run, config.optim.schedule
    if data.image_size > data.resize_size:
        refuse(
            f"data.image_size {data.image_size} is more than data.resize_size {data.resize_size}, "
            "the size it is cropped from: raise data.resize_size"
        )
    try:
        time_limit(run)
    except ValueError:
        refuse(
            f"run.time_limit {run.time_limit} is no duration: give seconds, M:S, H:M:S or D-H:M:S, "
            "such as 23:50:00"
        )
    for name in run.preempt_signals:
        if name not in signal.Signals.__members__ or name in ("SIGKILL", "SIGSTOP"):
            refuse(
                f"run.preempt_signals has {name}, which is no signal that a process can handle: "
                "give names such as SIGUSR2"
            )
    if schedule.name == "piecewise" and "weights" not in schedule.milestones:
        refuse(
            "optim.schedule.name is piecewise, but optim.schedule.milestones has no row 'weights': "
            "give {weights: [[0, 0.01], ...]}"
        )


def pop_option(arguments: list[str], name: str) -> tuple[list[str], list[str]]:
    """The values of an option of a command's own, which end with the next option, and the other
    words."""
    values: list[str] = []
    rest: list[str] = []
    taking = False
    for word in arguments:
        option, _, value = word.partition("=")
        begins = word.startswith("-")
        if begins:
            taking = option == f"--{name}"
        if not taking:
            rest.append(word)
        elif not begins:
            values.append(word)
        elif value:
            values.append(value)
    return values, rest
