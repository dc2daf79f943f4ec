"""Every option with its default and meaning, and the one parser of all commands.

Options are given as YAML (--config FILE) and as dotted words on the command line (--optim.lr 0.02);
a command's own options (--checkpoint RUN) stand beside them. argparse reads the command line,
pydantic checks types and bounds, and --help shows the comments at the options.
"""

import argparse
import dataclasses
import difflib
import inspect
import json
import os
import re
import typing
from dataclasses import dataclass, field
from functools import cache, partial, reduce
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, NoReturn

import yaml
from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from alexnet_dist.errors import UserError, refuse

_error = partial(UserError, on_all_ranks=True)


class _TextLoader(yaml.BaseLoader):
    """Reads all values as text. What they are says an option's type, not YAML, to which off is
    false, 1:30:00 is 5400 and 1e-3 no number; and it would let the last of two equal keys win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in lines:
                problem = f"{name} stands in line {lines[name]} and in line {line}: write it once"
                raise yaml.constructor.ConstructorError(None, None, problem)
            lines[name] = line
        return super().construct_mapping(node, deep)


def _from_yaml(value: object) -> object:
    return yaml.load(value, _TextLoader) if isinstance(value, str) else value


def _expand_home(word: object) -> object:
    """What a shell makes of ~/x, also in --out=~/x, where a shell leaves it; ~ alone is null."""
    if not isinstance(word, str) or "/" not in word:
        return word
    option, equals, path = word.partition("=") if word.startswith("--") else ("", "", word)
    return option + equals + os.path.expanduser(path)


def _seconds(duration: object) -> float:
    days, dash, clock = str(duration).rpartition("-")
    parts = [float(part) for part in clock.split(":")]
    if len(parts) > 3 or (dash and len(parts) < 3):
        raise ValueError
    return 86400 * int(days if dash else 0) + reduce(lambda total, part: 60 * total + part, parts)


# types of options, each with what --help and errors say a value must be
PositiveInt = Annotated[int, Field(ge=1), "a whole number of at least 1"]
NonNegativeInt = Annotated[int, Field(ge=0), "a whole number of at least 0"]
PositiveFloat = Annotated[float, Field(gt=0), "a number above 0"]
NonNegativeFloat = Annotated[float, Field(ge=0), "a number of at least 0"]
BelowOne = Annotated[float, Field(ge=0, lt=1), "a number from 0 up to, but not, 1"]
Switch = Annotated[bool | Literal["auto"], "true, false or auto"]
Duration = Annotated[float, BeforeValidator(_seconds), "seconds, M:S, H:M:S or D-H:M:S"]
FilePath = Annotated[str, BeforeValidator(_expand_home), "a path"]
_Yaml = BeforeValidator(_from_yaml)
Range = Annotated[tuple[float, float], _Yaml, "two numbers, as [0.1, 1]"]
Signal = Literal["SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGALRM"]
Signals = Annotated[list[Signal], _Yaml, f"a list of {', '.join(typing.get_args(Signal))}"]
Multiples = Annotated[dict[str, float], _Yaml, "numbers by name, as {biases: 2, fc8.bias: 1}"]
Pairs = list[tuple[float, float]]
MilestoneList = Annotated[Pairs, _Yaml, "[epochs done, value] pairs, as [[0, 0.1], [66, 0]]"]
Milestones = Annotated[
    dict[str, Pairs], _Yaml, "such pairs by name, as {weights: [[0, 0.01], [24, 0.001]]}"
]


@dataclass
class DataConfig:
    # folder with train/ and val/, or one that prepare wrote, or CIFAR-10's; or "digits"
    root: FilePath | None = None
    cache_dir: str = "~/.cache/alexnet_dist"  # for digits, indices and statistics of data folders
    batch_size: PositiveInt = 128  # images per step over all processes (the paper, section 5)
    eval_batch_size: PositiveInt = 256  # crops per step of an evaluation over all processes
    # gpu_cache: raw pixels cropped by the GPU; auto: that for raw pixels, else DALI if installed
    loader: Literal["auto", "dali", "torch", "gpu_cache"] = "auto"
    image_size: PositiveInt = 224  # width and height of the network's input, in pixels
    resize_size: PositiveInt = 256  # a crop is image_size / resize_size of the shorter side
    # paper: a square of fixed size in the central square (section 4.1); chunked: the same one for
    # 32 images in a row (the authors' program); random_resized: as torchvision's
    train_crop: Literal["paper", "chunked", "random_resized"] = "paper"
    scale: Range = (0.08, 1.0)  # random_resized: bounds of the crop's fraction of the image's area
    ratio: Range = (3 / 4, 4 / 3)  # random_resized: bounds of the crop's aspect ratio
    hflip: bool = True  # flip training images horizontally with probability 0.5
    # PCA lighting noise, as in the authors' program or as printed in the paper
    pca_noise: Literal["none", "source", "paper"] = "none"
    pca_noise_std: NonNegativeFloat | MilestoneList = 0.1  # standard deviation of its coefficients
    on_corrupt_image: Literal["stop", "skip"] = "stop"  # skip: take the next one, and log it


@dataclass
class ModelConfig:
    arch: str = "paper"  # a network that `python -m alexnet_dist.summary` lists
    # initial weights: the authors' program's, the paper's or torch's; null: the network's own
    init: Literal["source", "paper", "torch"] | None = None
    dropout: BelowOne = 0.5  # probability of a unit of fc6, fc7 (torchvision's: their inputs)
    # start from a run, a checkpoint, an exported .safetensors, or torchvision's AlexNet (.pth)
    pretrained: FilePath | None = None


@dataclass
class ScheduleConfig:
    # plateau: divide by ten when the validation error stops improving, three times at most (the
    # paper); polynomial: quadratic to zero
    name: Literal["constant", "plateau", "one_cycle", "polynomial", "piecewise"] = "plateau"
    warmup_epochs: NonNegativeFloat = 0.0  # in which the lr rises from zero, before any schedule
    patience: NonNegativeInt = 3  # plateau: evaluations without a better error to wait for
    pct_start: BelowOne = 0.3  # one_cycle: fraction of the run in which the lr rises to optim.lr
    # piecewise: the lr of weights, of biases, and of single parameters like conv1.bias
    milestones: Milestones = field(default_factory=dict)


@dataclass
class OptimConfig:
    # the paper's SGD (lr inside the velocity), torch's, or LARS (You, Gitman, Ginsburg 2017)
    name: Literal["sgd2012", "sgd", "lars"] = "sgd2012"
    lr: NonNegativeFloat = 0.01  # learning rate
    # multiples of the scheduled lr, of biases (2 in the authors' program) or single parameters
    lr_mults: Multiples = field(default_factory=dict)
    momentum: BelowOne = 0.9  # momentum
    weight_decay: NonNegativeFloat = 0.0005  # weight decay; never on biases
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)  # of the learning rate


@dataclass
class TrainConfig:
    epochs: PositiveFloat = 90  # epochs (the paper: roughly 90)
    epochs_scale: PositiveFloat = 1.0  # multiplies all epochs, those of optim.schedule as well
    max_steps: PositiveInt | None = None  # stop early; schedules do not change, the run can resume
    grad_accum_steps: PositiveInt = 1  # microbatches per step and process, each with its batch norm
    log_interval: PositiveInt = 20  # steps between two log records
    seed: NonNegativeInt = 2012  # of weights, order, crops and dropout
    # skip: leave out an update with a nonfinite loss or gradient (which checks every gradient)
    on_nonfinite: Literal["stop", "skip"] = "stop"


@dataclass
class CheckpointConfig:
    interval_steps: PositiveInt | None = 1000  # steps between them; epochs end with one anyway
    keep_last: PositiveInt = 2  # newest ones kept, besides the best
    keep_every: PositiveInt | None = None  # keep the checkpoint of every so many steps forever


@dataclass
class RunConfig:
    output_dir: FilePath = "runs"  # where run folders are
    name: str | None = None  # of the folder; null: the config file's (-2, -3 once it has ended)
    resume: FilePath = "auto"  # auto: an unfinished run of this name; never; or a run's folder
    time_limit: Duration | None = None  # save and exit before it; that of a SLURM job is known
    # save and exit on these, on SIGTERM, on Ctrl-C, and on a file PREEMPT in the run's folder
    preempt_signals: Signals = field(default_factory=lambda: ["SIGUSR2"])
    sigterm_grace: PositiveFloat = 20.0  # seconds from SIGTERM to the exit; torchrun kills after 30


@dataclass
class ParallelConfig:
    # 2: model parallel as on the paper's two GPUs: two neighboring ranks hold a tower each
    towers: Annotated[int, Field(ge=1, le=2), "1 or 2"] = 1
    # sharded: the fully connected layers are split over all ranks ("One weird trick")
    fc: Literal["replicated", "sharded"] = "replicated"
    grad_compression: Literal["none", "bf16", "fp16", "powersgd"] = "none"  # of their all-reduce
    powersgd_rank: PositiveInt = 4  # rank of the matrices that approximate a gradient
    powersgd_start: NonNegativeInt = 1000  # steps without compression at each start of a run


@dataclass
class RuntimeConfig:
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: GPUs where there are any
    # auto: bf16 where the device is fast at it, else fp32; weights stay in fp32
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = "auto"
    compile: Switch = False  # compile the network with torch.compile; auto: on GPUs
    cuda_graph: Switch = "auto"  # launch a step as one CUDA graph; auto: where that is possible
    deterministic: bool = False  # the same bits in each run on a GPU, too, but more slowly
    threads: NonNegativeInt = 0  # per process, to compute and to load; 0: as many as it has CPUs
    hang_timeout: PositiveFloat = 600.0  # seconds without a step after which the run ends


@dataclass
class WandbConfig:
    # auto: online if an API key is found, else offline
    mode: Literal["auto", "online", "offline", "off"] = "auto"
    project: str = "alexnet_dist"  # the project


@dataclass
class Config:
    """A run."""

    data: DataConfig = field(default_factory=DataConfig)  # the images
    model: ModelConfig = field(default_factory=ModelConfig)  # the network
    optim: OptimConfig = field(default_factory=OptimConfig)  # the optimizer
    train: TrainConfig = field(default_factory=TrainConfig)  # the training run
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)  # when, and how many
    run: RunConfig = field(default_factory=RunConfig)  # its folder, and when it stops
    parallel: ParallelConfig = field(default_factory=ParallelConfig)  # layout on the processes
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)  # device, precision, compilation
    wandb: WandbConfig = field(default_factory=WandbConfig)  # Weights & Biases


# options, and sections of them, that cannot change when a run resumes
IMMUTABLE_ON_RESUME = (
    *("data.batch_size", "data.image_size", "data.resize_size", "data.train_crop", "data.scale"),
    *("data.ratio", "data.hflip", "data.pca_noise", "model", "optim.name", "train.seed"),
)

# options of one start of a run, which do not carry over when it resumes
NOT_PERSISTED = ("train.max_steps", "run.resume", "run.output_dir", "run.name", "run.time_limit")

# new names of options of 0.1.0, where the nearest name is another; and those without one
OLD_NAMES = {
    "data.engine": "data.loader",
    "data.crop": "data.train_crop",
    "data.colour": "data.pca_noise",
    "data.colour_table": "data.pca_noise_std",
    "model.variant": "model.arch",
    "model.weights": "model.pretrained",
    "optim.bias_lr": "optim.lr_mults",
    "optim.factors": "optim.lr_mults",
    "optim.schedule.rise": "optim.schedule.pct_start",
    "optim.schedule.table": "optim.schedule.milestones",
    "run.root": "run.output_dir",
    "run.grace": "run.sigterm_grace",
    "track.wandb": "wandb.mode",
    "views": "ten_crop",
    "picture": "save_image",
}
GONE = (
    *("data.ahead", "data.decoder", "model.num_classes", "optim.schedule.drops", "optim.trust"),
    *("checkpoint.asynchronous", "parallel.fc_schedule", "runtime.lrn", "runtime.pool_first"),
    *("runtime.stem", "runtime.update", "runtime.weight_copies", "track.images"),
)

# the dataclass of each section of options
SECTIONS: dict[str, type] = typing.get_type_hints(Config)
SECTIONS["optim.schedule"] = ScheduleConfig

# the type of each option by its dotted name
OPTIONS: dict[str, Any] = {
    f"{section}.{name}": hint
    for section, kind in SECTIONS.items()
    for name, hint in typing.get_type_hints(kind, include_extras=True).items()
    if not dataclasses.is_dataclass(hint)
}


@cache
def _comments() -> dict[str, str]:
    """What each option and each section means: the comments above and beside it."""
    found = {}
    for section, kind in {"": Config, **SECTIONS}.items():
        fields = re.findall(r"((?: +# .*\n)*) +(\w+): .*?(?:  # (.*))?\n", inspect.getsource(kind))
        for above, name, beside in fields:
            text = " ".join(above.replace("#", "").split()) or beside
            found[f"{section}.{name}".lstrip(".")] = text
    return found


class ParsedArgs(NamedTuple):
    """A parsed command line."""

    config: Config  # all options of the trainer
    config_name: str  # the config files' names without their endings, the default of run.name
    args: argparse.Namespace  # the command's own options


class CommandParser(argparse.ArgumentParser):
    """Parser of a command: its own options, by ``add_argument``, beside those of the trainer.

    Args:
        command: "train" for `python -m alexnet_dist.train`, whose help shows the trainer's options.
        about: the command's docstring.
        trainer_options: take --config, --print_config and the dotted options.
    """

    def __init__(
        self, command: str = "train", about: str | None = None, *, trainer_options: bool = True
    ) -> None:
        super().__init__(
            prog=f"python -m alexnet_dist.{command}",
            description=about,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.add_argument("--debug", action="store_true", help="print an error's traceback")
        self.trainer_options = trainer_options
        if not trainer_options:
            return
        about_config = "a YAML file of trainer options, or its name in configs/; the later win"
        self.add_argument("--config", action="append", metavar="FILE", help=about_config)
        self.add_argument("--print_config", action="store_true", help="print them and exit")
        if command == "train":
            self.usage = "%(prog)s [--config FILE] [--OPTION VALUE ...]"
        else:
            self.epilog = "also: the trainer's options (python -m alexnet_dist.train --help)"
        texts = _comments()
        groups = {name: self.add_argument_group(f"{name}: {texts[name]}") for name in SECTIONS}
        for name, default in flatten(to_dict(Config())).items():
            text = f"{texts[name]} ({_expected(OPTIONS[name])})"
            groups[name.rpartition(".")[0]].add_argument(
                f"--{name}",
                metavar=_as_text(default),
                help=text if command == "train" else argparse.SUPPRESS,
                default=argparse.SUPPRESS,
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
        args = self.parse_args([str(_expand_home(word)) for word in arguments])
        if not self.trainer_options:
            return ParsedArgs(Config(), "", args)
        dotted = {name: text for name, text in vars(args).items() if name in OPTIONS}
        paths = args.config or []
        if not paths and base_config is None and "data.root" not in dotted:
            paths = [str(packaged_folder("configs") / "quickstart.yaml")]
        kept = flatten(base_config or {})
        config = from_dict({name: kept[name] for name in kept if name not in NOT_PERSISTED})
        for path in map(_find_config_file, paths):
            _set_options(config, _read_config_file(path), path)
        _set_options(config, dotted, None)
        _check_combinations(config)
        if args.print_config:
            print(yaml.safe_dump(to_dict(config), sort_keys=False), end="")
            raise SystemExit(0)
        return ParsedArgs(config, "-".join(Path(path).stem for path in paths) or "run", args)

    def error(self, message: str) -> NoReturn:
        """Raise a UserError, where argparse would exit."""
        raise _error(f"{message}; --help lists all options")


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
    if any(name in OLD_NAMES or name in GONE for name in values):
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
        inner = isinstance(value, dict) and name not in OPTIONS
        values = flatten(value, f"{name}.") if inner else {name: value}
        for twice in flat.keys() & values:
            raise ValueError(f"{twice} is given twice, under a section and by its full name")
        flat |= values
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


def check_data_root(config: Config) -> None:
    """Refuse a run without images; raises UserError. The digits' recipe alone names them itself."""
    problem = "there are no images: give --data.root the folder that holds train/ and val/"
    refuse({problem: config.data.root is None})


def packaged_folder(name: Literal["configs", "slurm"]) -> Path:
    """A folder that is installed inside the package, and lies beside it in a checkout."""
    installed = Path(__file__).parent / name
    return installed if installed.is_dir() else Path(__file__).parents[1] / name


def _find_config_file(path: str) -> str:
    """A file, or one of the package's by its name: paper2012, or configs/paper2012.yaml in a folder
    that has no such file."""
    if Path(path).is_file():
        return path
    folder, name = packaged_folder("configs"), Path(path).stem
    packaged = {file.stem: str(file) for file in sorted(folder.glob("*.yaml"))}
    if name in packaged and path in (name, f"configs/{name}.yaml"):
        return packaged[name]
    raise _error(f"there is no config {path}; the package brings {', '.join(packaged)} in {folder}")


def _read_config_file(path: str) -> dict[str, Any]:
    """The options in a YAML file, by dotted name."""
    try:
        with open(path) as file:  # which errors name, with the line
            content = yaml.load(file, _TextLoader) or {}
        values = flatten(content) if isinstance(content, dict) else None
    except (yaml.YAMLError, ValueError) as error:
        raise _error(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    if values is None:
        raise _error(f"{path} holds no options: it needs lines like 'optim: {{lr: 0.01}}'")
    return {name: value for name, value in values.items() if value or name not in SECTIONS}


def _set_options(config: Config, values: dict[str, Any], where: str | None) -> None:
    """Set options by dotted name, from a file or a record ``where``, or from the command line.

    Raises:
        UserError: there is no such option, or a value is not of its type, or out of bounds.
    """
    rules = ConfigDict(allow_inf_nan=False)
    for name, value in values.items():
        _check_name(name, [*OPTIONS], where)
        try:
            known = None if value in ("null", "~", "") else value
            checked = TypeAdapter(OPTIONS[name], config=rules).validate_python(known)
        except (ValidationError, yaml.YAMLError):
            message = f"option {name} must be {_expected(OPTIONS[name])}, not {_as_text(value)}"
            raise _error(f"{where}: " * bool(where) + message) from None
        *sections, option = name.split(".")
        setattr(reduce(getattr, sections, config), option, checked)


def _check_combinations(config: Config) -> None:
    data, schedule = config.data, config.optim.schedule
    refuse(
        {
            f"data.image_size {data.image_size} is more than data.resize_size {data.resize_size}, "
            "the size it is cropped from: raise data.resize_size": (
                data.image_size > data.resize_size
            ),
            "optim.schedule.name is piecewise, but there is no lr of weights: give "
            "optim.schedule.milestones {weights: [[0, 0.01], ...]}": (
                schedule.name == "piecewise" and "weights" not in schedule.milestones
            ),
        }
    )


def _check_name(name: str, known: list[str], where: str | None) -> None:
    """Refuse an unknown option, with its new name or the nearest one."""
    if name in known:
        return
    dashes, place = ("", f" in {where}") if where else ("--", "")
    if OLD_NAMES.get(name) in known:
        raise _error(f"option {dashes}{name}{place} is now {dashes}{OLD_NAMES[name]}")
    if name in GONE:
        raise _error(f"option {dashes}{name}{place} is gone: leave it out")
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
    return (value or "null") if isinstance(value, str) else json.dumps(value)
