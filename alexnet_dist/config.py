"""Every option there is, with its default and its meaning; nothing else decides a default.

Options are given as YAML (--config) and as dotted words on the command line (--optim.lr 0.02).
"""

import argparse
import dataclasses
import difflib
import re
import signal
from argparse import ArgumentError
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

import yaml
from jsonargparse import ArgumentParser, set_parsing_settings

from alexnet_dist.errors import UserError

Rows = list[tuple[float, float]]
Table = dict[str, Rows]

set_parsing_settings(docstring_parse_attribute_docstrings=True)


@dataclass
class DataConfig:
    """The images."""

    root: str | None = None
    """Folder with train/ and val/ (or test/), a folder a class in each; or one that `python -m
    alexnet_dist.prepare` made, of shards or pixels; or one with CIFAR-10's own files; "digits" is
    the embedded set. With neither --config nor --data.root the run is configs/quickstart.yaml."""
    cache_dir: str = "~/.cache/alexnet_dist"
    """Where the digits lie, and the indexes of data folders that cannot be written."""
    batch_size: int = 128
    """Images in a step, over all processes (the paper, section 5)."""
    eval_batch_size: int = 256
    """Images in a step of an evaluation, over all processes; views, where an image has ten."""
    loader: Literal["auto", "dali", "torch", "gpu_cache"] = "auto"
    """What makes batches. gpu_cache is for folders of raw pixels, which lie on the GPU where they
    fit; auto takes it there, else DALI where it is installed."""
    dali_decoder: Literal["auto", "roi", "full", "cpu"] = "auto"
    """What DALI decodes on a GPU: the crop only, the whole image, or the crop on the CPU; auto
    tries them in this order, in a process of their own."""
    image_size: int = 224
    """Side of the images that the network sees, in pixels."""
    resize_size: int = 256
    """Shorter side to which image_size refers: a crop covers image_size / resize of the stored
    image's shorter side (the paper, section 2)."""
    train_crop: Literal["paper", "chunked", "random_resized"] = "paper"
    """Training crop: a square of fixed size somewhere in the central square (the paper, section
    4.1); chunked, the same place and flip for 32 images in a row (the authors' program); or a box
    of random area and shape as torchvision draws it."""
    scale: tuple[float, float] = (0.08, 1.0)
    """random_resized: bounds of the box's area, as a part of the image's."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """random_resized: bounds of the box's width over its height."""
    hflip: bool = True
    """Flip every other training image, left to right, at random."""
    pca_noise: Literal["none", "source", "paper"] = "none"
    """Colour noise: as the authors' program has it, or as the paper prints it."""
    pca_noise_std: float = 0.1
    """Standard deviation of the colour noise's coefficients."""
    pca_noise_schedule: Rows = field(default_factory=list)
    """Passes done and the colour_strength that holds from there: [[0, 0.1], [66, 0]]; empty: the
    same throughout."""
    on_corrupt_image: Literal["stop", "skip"] = "stop"
    """An image that cannot be decoded: stop, or take the next one and record it."""
    threads: int = 0
    """Threads that decode, per process; 0: as many as the process has processors."""
    prefetch: int = 2
    """Batches prepared ahead of the training step."""


@dataclass
class ModelConfig:
    """The network."""

    arch: str = "paper"
    """A network of the table that `python -m alexnet_dist.summary` lists."""
    init: Literal["source", "paper", "torch"] | None = None
    """Initial weights: the authors' program's, the paper's (0.01 everywhere) or torch's; null is
    the variant's own."""
    dropout: float = 0.5
    """Probability with which fc6 and fc7 (torchvision: their inputs) drop a unit."""
    num_classes: int | None = None
    """Outputs; null: as many as the data has classes."""
    pretrained: str | None = None
    """Start from the weights of this run, checkpoint or exported .safetensors, or of torchvision's
    AlexNet in a .pth; a last layer for other classes is made anew."""


@dataclass
class ScheduleConfig:
    """How the learning rate moves. A pass is an epoch; passes are real numbers."""

    name: Literal["constant", "plateau", "one_cycle", "polynomial", "piecewise"] = "plateau"
    """plateau: divided by ten when the validation error stops improving, three times, as the
    paper did; polynomial: times the square of the part of the run that is left; piecewise: values
    at given passes."""
    warmup_epochs: float = 0.0
    """Passes over which the rate rises from nothing, before any other schedule."""
    patience: int = 3
    """plateau: evaluations without a better error that are waited for."""
    max_drops: int = 3
    """plateau: how often the rate is divided by ten."""
    pct_start: float = 0.3
    """one_cycle: part of the run in which the rate rises; optim.lr is the peak."""
    milestones: Table = field(default_factory=dict)
    """piecewise: for "weights" and "biases" (or a parameter's own name) the passes done and the
    rate that holds from there: {weights: [[0, 0.01], [24, 0.001]]}."""


@dataclass
class OptimConfig:
    """The optimizer."""

    name: Literal["sgd2012", "sgd", "lars"] = "sgd2012"
    """The paper's update, with the rate inside the velocity; torch's SGD; or LARS, the paper's
    with a rate of its own for each weight tensor (You, Gitman, Ginsburg 2017)."""
    lr: float = 0.01
    """Learning rate."""
    bias_lr_mult: float = 1.0
    """Learning rate of biases, as a multiple of lr (2 in the authors' program)."""
    lr_mults: dict[str, float] = field(default_factory=dict)
    """What multiplies the rate that a schedule gives, for parameters by their names:
    {conv1.weight: 0.1}."""
    momentum: float = 0.9
    """Momentum."""
    weight_decay: float = 0.0005
    """Weight decay; never on biases."""
    trust_coefficient: float = 0.001
    """lars: a step is at most lr * trust of a tensor's norm, before momentum; biases have the plain
    rate, so give them a bias_lr that is small."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)


@dataclass
class TrainConfig:
    """The run's length."""

    epochs: float = 90
    """Passes over the training images (the paper: roughly 90)."""
    epochs_scale: float = 1.0
    """The same life in so many times the passes: epochs, optim.schedule and data.pca_noise_schedule
    shrink or stretch in proportion."""
    max_steps: int | None = None
    """Stop early, as at a normal end; schedules keep to train.epochs, and the run can go on."""
    grad_accum_steps: int = 1
    """Parts in which a process computes its images of a step, one after another, where memory does
    not hold all; gradients add up and travel once. Batch normalisation has the statistics of a
    part, over all processes, not those of the batch."""
    log_interval: int = 20
    """Steps between two records."""
    seed: int = 2012
    """Of weights, order, crops and dropout."""
    on_nonfinite: Literal["stop", "skip", "rollback"] = "stop"
    """A loss or a gradient that is not finite: stop; leave that step's update out (which costs a
    look at every gradient); or go back to the last checkpoint and leave it out then."""


@dataclass
class CheckpointConfig:
    """Checkpoints."""

    interval_steps: int | None = 1000
    """Steps between checkpoints, besides those at the end of each epoch."""
    keep_last: int = 2
    """Newest ones kept, besides the best: where the last is damaged, the one before it is used."""
    keep_every: int | None = None
    """Keep those of every so many steps for good."""
    async_save: bool = True
    """Train on while a checkpoint is written."""


@dataclass
class RunConfig:
    """The run's folder."""

    output_dir: str = "runs"
    """Where run folders lie."""
    name: str | None = None
    """The folder's name; null: the config file's, with -2, -3 once a run of that name has ended."""
    resume: str = "auto"
    """auto: an unfinished run of this name goes on; never; or a run's folder."""
    time_limit: str | None = None
    """Save and leave, to be started again, before this life is so old: seconds, M:S, H:M:S or
    D-H:M:S. The end of a SLURM job is heeded anyway."""
    preempt_signals: list[str] = field(default_factory=lambda: ["SIGUSR2"])
    """Signals at which to save and leave, besides SIGTERM and Ctrl-C (NCCL wants SIGUSR1 for
    itself). A file PREEMPT in the run folder does the same."""
    sigterm_grace: float = 20.0
    """Seconds after SIGTERM when a process ends even if it could not save; torchrun kills it after
    30."""


@dataclass
class ParallelConfig:
    """How the network lies on the processes; never what it computes."""

    towers: Literal[1, 2] = 1
    """2: the paper's two GPUs; a process holds one of the towers, and two neighbours a network."""
    fc: Literal["replicated", "sharded"] = "replicated"
    """sharded: the fully connected layers are split over all processes ("One weird trick")."""
    fc_schedule: Literal["whole", "pipelined"] = "whole"
    """sharded: the global batch at once, or in turns, one's transfer under the other's product."""
    grad_compression: Literal["none", "bf16", "fp16", "powersgd"] = "none"
    """How gradients travel between replicas, where there are several."""
    powersgd_rank: int = 4
    """powersgd: rank of the matrices that stand for a gradient."""
    powersgd_start: int = 1000
    """powersgd: steps of plain sums before it begins, at each start of a run."""


@dataclass
class RuntimeConfig:
    """How it is computed."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: GPUs where there are any."""
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = "auto"
    """auto: bf16 where the device is good at it, else fp32. Weights stay in fp32."""
    compile: bool | Literal["auto"] = False
    """Compile the network with torch.compile; auto: on GPUs."""
    lrn: Literal["auto", "triton", "band", "torch"] = "auto"
    """Response normalisation: by Triton's kernels, which want an NVIDIA GPU, as a product with a
    band, or by torch's own function; auto: by Triton where it is there, else the band."""
    stem: Literal["auto", "folded", "plain"] = "auto"
    """The first convolution on an image folded stride by stride pixels into channels, or plain;
    auto: folded where that is known to be faster, in bf16 on CPUs."""
    pool_first: bool = True
    """ReLU behind the max pooling that follows it, on a quarter of the values; they commute."""
    cuda_graph: bool | Literal["auto"] = False
    """Launch a whole step at once, as a CUDA graph; one process; auto: where that can be."""
    deterministic: bool = False
    """The same bits on a GPU in each run, more slowly; CPUs give them anyway."""
    threads: int = 0
    """Threads that compute, per process; 0: as many as it has processors."""
    hang_timeout: float = 600.0
    """Seconds without a step, or a batch of an evaluation, after which the run ends and names the
    process that all wait for."""


@dataclass
class WandbConfig:
    """Where records go, besides the run folder."""

    mode: Literal["auto", "online", "offline", "off"] = "auto"
    """Weights & Biases; auto: online where a key is found, else offline."""
    project: str = "alexnet_dist"
    """Its project."""
    log_images: bool = True
    """Pictures of kernels and of labelled predictions."""


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
"""What a run means: options that cannot change while it goes on."""

NOT_PERSISTED = ("train.max_steps", "run.resume", "run.output_dir", "run.name", "run.time_limit")
"""Options that hold for one start of a run, and are not kept for the next."""

_BOUNDS: tuple[tuple[str, float, float], ...] = (
    ("data.batch_size", 1, float("inf")),
    ("data.eval_batch_size", 1, float("inf")),
    ("data.image_size", 16, 4096),
    ("data.resize_size", 16, 8192),
    ("data.threads", 0, 1024),
    ("data.prefetch", 1, 64),
    ("model.dropout", 0, 0.99),
    ("optim.momentum", 0, 0.9999),
    ("optim.weight_decay", 0, float("inf")),
    ("optim.trust_coefficient", 1e-9, 1),
    ("train.epochs", 0.001, float("inf")),
    ("train.epochs_scale", 0.0001, 1000),
    ("train.grad_accum_steps", 1, float("inf")),
    ("train.log_interval", 1, float("inf")),
    ("train.seed", 0, 2**63),
    ("checkpoint.keep_last", 1, float("inf")),
    ("parallel.powersgd_rank", 1, 1024),
    ("parallel.powersgd_start", 2, float("inf")),
    ("run.sigterm_grace", 1, 3600),
    ("runtime.threads", 0, 1024),
    ("runtime.hang_timeout", 5, float("inf")),
)


@dataclass(frozen=True)
class ParsedArgs:
    """A command line, understood.

    Attributes:
        config: what it means in full.
        said: the dotted options that it, or its config file, names.
        recipe: the config file's name without ending, the default of run.name.
    """

    config: Config
    said: dict[str, Any]
    recipe: str


def to_dict(config: Any) -> dict[str, Any]:
    """The config as plain values, tuples as lists."""
    plain = dataclasses.asdict(config)

    def lists(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: lists(inner) for key, inner in value.items()}
        return [lists(inner) for inner in value] if isinstance(value, (list, tuple)) else value

    result: dict[str, Any] = lists(plain)
    return result


def flatten(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"optim.lr": 0.01, ...} of {"optim": {"lr": 0.01}}; tables stay whole."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and not name.endswith((".milestones", ".lr_mults")):
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


def changes(before: dict[str, Any], now: dict[str, Any]) -> dict[str, list[Any]]:
    """The options that differ between two resolved configs: {name: [before, now]}."""
    old, new = flatten(before), flatten(now)
    return {name: [old.get(name), new[name]] for name in new if old.get(name) != new[name]}


def check_resume_compatible(before: dict[str, Any], now: dict[str, Any], way_out: str) -> None:
    """Refuse to go on with a run that would become another.

    Raises:
        Failure: an option of MEANING differs; ``way_out`` says what else to do.
    """
    for name, (old, new) in changes(before, now).items():
        if any(name == word or name.startswith(f"{word}.") for word in IMMUTABLE_ON_RESUME):
            raise UserError(
                f"{name} cannot change from {old} to {new}: give --{name} {old} to go on; "
                f"{way_out}",
                on_all_ranks=True,
            )


def recipes() -> Path:
    """The folder of the configs that come with the package."""
    inside = Path(__file__).parent / "recipes"
    return inside if inside.is_dir() else Path(__file__).parents[1] / "configs"


def parse(
    arguments: list[str],
    *,
    program: str,
    description: str,
    default: str | None = "quickstart",
    underneath: dict[str, Any] | None = None,
) -> ParsedArgs:
    """Understand a command line.

    Args:
        default: the recipe where the words name neither a config nor a data.root.
        underneath: a resolved config that lies below what the command line says, as when a run
            goes on.

    Raises:
        Failure: an unknown option, a wrong type, a missing or unreadable config.
        SystemExit: --help or --print_config was asked for.
    """
    parser = ArgumentParser(
        prog=program, description=description, exit_on_error=False, allow_abbrev=False
    )
    parser.add_argument("--config", type=str | None, help="A YAML file of options.")
    parser.add_argument("--print_config", action="store_true", help="Print all options, and stop.")
    parser.add_argument("--debug", action="store_true", help="Show where an error came from.")
    own = {action.dest for action in parser._actions}
    parser.add_class_arguments(Config, None)
    known = [*flatten(to_dict(Config()))]
    command_line = _named(arguments, [*known, *own])

    path = command_line.get("config")
    if path is None and "data.root" not in command_line and underneath is None and default:
        path = str(recipes() / f"{default}.yaml")
    from_file = _read_yaml(path, known) if path else {}
    try:
        # set_defaults believes what it is given, so the values are held to their types before it
        if underneath is not None:
            kept = flatten(to_dict(from_dict(underneath)))
            parser.set_defaults({k: v for k, v in kept.items() if k not in NOT_PERSISTED})
        if from_file:
            typed = flatten(to_dict(from_dict(nest(from_file), str(path))))
            from_file = {name: typed[name] for name in from_file}
            parser.set_defaults(from_file)
        words = [word for word in arguments if word != "--print_config"]
        parsed = parser.parse_args(words)  # jsonargparse has a --print_config of its own
        values = parser.instantiate(parsed)
    except (ArgumentError, TypeError, ValueError, KeyError) as error:
        raise UserError(_first_words(str(error)), on_all_ranks=True) from None
    config = Config(**{f.name: values[f.name] for f in dataclasses.fields(Config)})
    _check(config)
    if "--print_config" in arguments:
        print(yaml.safe_dump(to_dict(config), sort_keys=False), end="")
        raise SystemExit(0)
    said = from_file | {name: None for name in command_line if name in known}
    flat = flatten(to_dict(config))
    recipe = Path(path).stem if path else "run"
    return ParsedArgs(config, {name: flat[name] for name in said}, recipe)


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


def pop_ten_crop(arguments: list[str]) -> tuple[Literal[1, 10], list[str]]:
    """How many views of each image --views asks for, one unless it does, and the other words.

    Raises:
        Failure: neither one nor ten.
    """
    values, rest = pop_option(arguments, "views")
    if len(rest) < len(arguments) and values not in (["1"], ["10"]):
        raise UserError(
            f"views is {' '.join(values) or 'empty'}; it must be 1, the centre of an image, or 10, "
            "its corners, its centre and their reflections",
            on_all_ranks=True,
        )
    return (10 if values == ["10"] else 1), rest


class CommandParser(argparse.ArgumentParser):
    """The options that a command has besides the dotted ones, and its other words."""

    def __init__(self, program: str, description: str | None) -> None:
        super().__init__(
            prog=program,
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.add_argument("--debug", action="store_true", help="show where an error came from")

    def understand(self, arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
        """The command's own words, and the dotted ones with their values.

        Raises:
            Failure: an unknown option, or a wrong value.
        """
        own: list[str] = []
        dotted: list[str] = []
        words = iter(arguments)
        for word in words:
            if not re.match(r"--[a-z]+\.[a-z]", word):
                own.append(word)
                continue
            dotted.append(word)
            if "=" not in word:
                dotted += [value for value in [next(words, None)] if value is not None]
        return self.parse_args(own), dotted

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help shows all options", on_all_ranks=True)


def from_dict(record: dict[str, Any], where: str = "the run's config.yaml") -> Config:
    """A config from plain values, as a file or a run folder has them.

    Raises:
        Failure: a key or a type that this version does not know.
    """
    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False)
    parser.add_class_arguments(Config, None)
    defaults = flatten(to_dict(Config()))
    for name, value in flatten(record).items():
        if value is None and defaults.get(name) is not None:  # jsonargparse lets null pass
            raise UserError(f"{where}: option {name} wants a value, not null", on_all_ranks=True)
    try:
        values = parser.instantiate(parser.parse_object(record))
    except (ArgumentError, TypeError, ValueError, KeyError) as error:
        raise UserError(f"{where}: {_first_words(str(error))}", on_all_ranks=True) from None
    return Config(**{f.name: values[f.name] for f in dataclasses.fields(Config)})


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


def _named(arguments: list[str], known: list[str]) -> dict[str, str | None]:
    """The options that the words name, each checked to exist."""
    named: dict[str, str | None] = {}
    for at, word in enumerate(arguments):
        if not word.startswith("--"):
            if word.startswith("-") and re.match(r"-[a-zA-Z]", word) and word != "-h":
                raise UserError(
                    f"there is no option {word}; options begin with --", on_all_ranks=True
                )
            continue
        name, has_value, value = word[2:].partition("=")
        if name != "help":
            _known(name, known, "option --")
        following = arguments[at + 1] if at + 1 < len(arguments) else None
        named[name] = value if has_value else following
    return named


def _known(name: str, known: list[str], what: str) -> None:
    if name in known:
        return
    near = difflib.get_close_matches(name, known, 1, 0.5)
    same_end = [k for k in known if k.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]]
    best = same_end[0] if same_end else (near[0] if near else None)
    mend = f"; did you mean {best}?" if best else "; --help lists them all"
    raise UserError(f"there is no {what}{name}{mend}", on_all_ranks=True)


def _read_yaml(path: str, known: list[str]) -> dict[str, Any]:
    """The options that a file gives, by dotted name."""
    file = Path(path)
    if not file.is_file():
        there = sorted(recipe.stem for recipe in recipes().glob("*.yaml"))
        raise UserError(
            f"there is no config {path}; the package brings {', '.join(there)} in configs/",
            on_all_ranks=True,
        )
    try:
        content = yaml.safe_load(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is not YAML ({reason}): mend it", on_all_ranks=True) from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no options: it wants lines like 'optim: {{lr: 0.01}}'")
    flat = flatten(content)
    for name in flat:
        _known(name, known, f"option in {path} named ")
    for name, value in flat.items():
        if name.endswith(("name", "variant", "limit")) and isinstance(value, (int, float)):
            flat[name] = str(value)  # YAML reads 150 as a number, and 1:30:00 as 5400
        elif isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value):
            flat[name] = float(value)  # and 1e-3 as a word
    return flat


def _check(config: Config) -> None:
    flat = flatten(to_dict(config))
    for name, low, high in _BOUNDS:
        value = flat[name]
        if value is not None and not low <= value <= high:
            bound = f"at least {low:g}" if value < low else f"at most {high:g}"
            raise UserError(f"{name} is {value}; it must be {bound}", on_all_ranks=True)
    if config.data.image_size > config.data.resize_size:
        raise UserError(
            f"data.image_size {config.data.image_size} is more than data.resize_size "
            f"{config.data.resize_size}, the side it is cut from: raise data.resize_size",
            on_all_ranks=True,
        )
    for name in (
        "train.max_steps",
        "checkpoint.interval_steps",
        "checkpoint.keep_every",
        "model.num_classes",
    ):
        if flat[name] is not None and flat[name] < 1:
            raise UserError(f"{name} is {flat[name]}; it must be at least 1", on_all_ranks=True)
    if config.optim.lr < 0 or config.optim.lr != config.optim.lr:
        raise UserError(
            f"optim.lr is {config.optim.lr}; it must not be negative", on_all_ranks=True
        )
    try:
        time_limit(config.run)
    except ValueError:
        raise UserError(
            f"run.time_limit {config.run.time_limit} is no time: give seconds, M:S, H:M:S or "
            "D-H:M:S, such as 23:50:00",
            on_all_ranks=True,
        ) from None
    for name in config.run.preempt_signals:
        if name not in signal.Signals.__members__ or name in ("SIGKILL", "SIGSTOP"):
            raise UserError(
                f"run.preempt_signals has {name}, which is no signal that can be heard: give names "
                "such as SIGUSR2",
                on_all_ranks=True,
            )
    schedule = config.optim.schedule
    if schedule.name == "piecewise" and "weights" not in schedule.milestones:
        raise UserError(
            "optim.schedule.name is piecewise, but optim.schedule.milestones has no row 'weights': "
            "give {weights: [[0, 0.01], ...]}",
            on_all_ranks=True,
        )


def _first_words(message: str) -> str:
    """jsonargparse's several lines as one sentence."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    key = re.match(r'Parser key "([^"]+)"', lines[0])
    if key:
        name = key.group(1)
        given = re.search(r"(?:Got value|Given value): (.*)", message)
        wants = re.search(r"Expected an? (.*?)(?:\.|$)", message)
        kinds = re.findall(r"<class '(\w+)'>", message)
        kinds = [kind for kind in dict.fromkeys(kinds) if kind not in ("NoneType",)]
        choices = re.search(r"Literal\[(.*?)\]", message)
        if choices:
            want = f"one of {choices.group(1)}".replace("'", "")
        elif kinds:
            names = {"int": "a whole number", "float": "a number", "bool": "true or false"}
            want = names.get(kinds[0], kinds[0])
        else:
            want = wants.group(1) if wants else "something else"
        value = given.group(1).strip() if given else "what was given"
        return f"option {name} wants {want}, not {value}"
    return " ".join(lines)
