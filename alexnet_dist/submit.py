"""Submit a SLURM job: fill a batch script in, show it, hand it to sbatch.

python -m alexnet_dist.submit --nodes 4 --gpus 8 --config configs/paper2012.yaml --data.root DIR
python -m alexnet_dist.submit array5 --gpus 8 --config configs/paper2012.yaml --data.root DIR
python -m alexnet_dist.submit evaluate --gpus 8 --checkpoint RUN [RUN ...] [--ten_crop]

train, which need not be said, is one run; array5 the paper's five networks, a job each, and one
evaluation of their mean after all have ended. Each takes the options of what it runs
(python -m alexnet_dist.train --help), which are checked before anything is submitted, and these:
"""

import difflib
import re
import shlex
import subprocess
import sys
from pathlib import Path

from alexnet_dist.config import CommandParser, Config, flatten, parse, pop_option, to_dict
from alexnet_dist.errors import UserError, run_command, stderr
from alexnet_dist.tracking.run_dir import read_status

KINDS = ("train", "array5", "evaluate")
NETWORKS = 5
OPTIONS = {
    "nodes": "Nodes (1).",
    "gpus": "GPUs of each node (1); 0: none, the job runs on processors.",
    "processes": "Processes on each node (as many as GPUs, or 1).",
    "cpus": "Processors of each node (8 for each process).",
    "time": "How long a job may run at once, as sbatch reads it (24:00:00; an evaluation 1 hour).",
    "partition": "SLURM's partition.",
    "account": "The account that pays.",
    "name": "The job's name (the config file's, or evaluate); its run's is NAME-JOBID.",
    "sbatch": 'More words for sbatch: --sbatch="--mem=0 --qos=long --signal=B:USR2@600".',
    "dry_run": "Show the script, and submit nothing.",
}


def main(arguments: list[str]) -> None:
    """Submit what the command line says."""
    kind, words = "train", arguments
    if arguments and arguments[0] in KINDS:
        kind, words = arguments[0], arguments[1:]
    if {"-h", "--help"} & set(words):
        print(__doc__ + "\n" + "\n".join(f"  --{n:<11}{text}" for n, text in OPTIONS.items()))
        return
    dry = "--dry_run" in words
    own, words = _take_own([word for word in words if word != "--dry_run"])
    if kind == "evaluate":
        _check_evaluation(words)
        _submit_evaluation({"name": "evaluate"} | own, words, dry)
    else:
        _submit_training(kind, own, words, dry)
    if dry:
        stderr("nothing is submitted; sbatch --parsable would read this from its standard input")


def _submit_training(kind: str, own: dict[str, str], words: list[str], dry: bool) -> None:
    parsed = parse(words)
    defaults = flatten(to_dict(Config()))
    for option in ("run.output_dir", "run.name", "train.seed"):  # the batch script reads no YAML
        value = flatten(to_dict(parsed.config))[option]
        if value != defaults[option] and not pop_option(words, option)[0]:
            words = [*words, f"--{option}={value}"]
    numbers = [f"-{number}" for number in range(NETWORKS)] if kind == "array5" else [""]
    _check_runs(parsed.config, numbers)
    own = {"name": parsed.config_name} | own
    job = _submit(fill(kind, own, words), dry)
    name = parsed.config.run.name or f"{own['name']}-{job}"
    runs = [f"{parsed.config.run.output_dir}/{name}{number}" for number in numbers]
    for number, run in zip(numbers, runs, strict=True):
        output = f"{own['name']}-{job}{number}.out"
        _tell(f"job {job}{number.replace('-', '_')} writes to {output}, its run lies in {run}", dry)
    if kind == "array5":
        after = f"--dependency=afterok:{job} --kill-on-invalid-dep=yes"
        own |= {"nodes": "1", "time": "01:00:00", "name": f"{own['name']}-mean"}
        own["sbatch"] = f"{own.get('sbatch', '')} {after}"
        _submit_evaluation(own, ["--checkpoint", *runs], dry)


def _submit_evaluation(own: dict[str, str], words: list[str], dry: bool) -> None:
    job = _submit(fill("evaluate", own, words), dry)
    _tell(f"job {job} writes to {own['name']}-{job}.out", dry)


def fill(kind: str, own: dict[str, str], words: list[str]) -> str:
    """The batch script of a kind, with all in it that it needs.

    Args:
        own: options of OPTIONS; where one is not given the script's own line stands.
        words: the command line of what the job runs.
    """
    folder = Path(__file__).parent / "slurm"  # where the package is installed
    folder = folder if folder.is_dir() else Path(__file__).parents[1] / "slurm"
    script = (folder / f"{kind}.sbatch").read_text()
    library = (folder / "lib.sh").read_text().partition("\n")[2]

    gpus = own.get("gpus", "1")
    processes = own.get("processes", gpus if gpus != "0" else "1")
    asked = {
        "job-name": own["name"],
        "nodes": own.get("nodes"),
        "gpus-per-node": gpus,
        "cpus-per-task": own.get("cpus", 8 * int(processes)),
        "time": own.get("time"),
        "partition": own.get("partition"),
        "account": own.get("account"),
    }
    directives = [f"--{name}={value}" for name, value in asked.items() if value is not None]
    for directive in (*directives, *shlex.split(own.get("sbatch", ""))):
        script = _direct(script, directive)
    script = script.replace("#SBATCH --gpus-per-node=0\n", "")  # a word that not all clusters know

    library = library.replace(":-python}", f":-{shlex.quote(sys.executable)}}}")
    library = library.replace("${PROCESSES:-${SLURM_GPUS_ON_NODE:-1}}", processes)
    lines = [
        f" \\\n    {word}" if word.startswith("--") else f" {word}"
        for word in map(shlex.quote, words)
    ]
    given = f'set --{"".join(lines)} "$@"\n'
    return re.sub(r"# shellcheck .*\nsource .*\n", lambda _: f"{library}\n{given}", script)


def _direct(script: str, directive: str) -> str:
    """With a line for sbatch, in the place of one of the same name, or after all others."""
    line = f"#SBATCH {directive}\n"
    name = directive.partition("=")[0]
    former = re.compile(rf"^#SBATCH {name}(?![\w-]).*\n", re.MULTILINE)
    if former.search(script):
        return former.sub(lambda _: line, script)
    end = script.index("\n", script.rindex("#SBATCH")) + 1
    return script[:end] + line + script[end:]


def _submit(script: str, dry: bool) -> str:
    """Show a script, and have sbatch read it; the job's number.

    Raises:
        Failure: there is no sbatch, or it does not take the job.
    """
    print(script, end="", flush=True)
    if dry:
        return "JOBID"
    try:
        done = subprocess.run(
            ["sbatch", "--parsable"], input=script, text=True, capture_output=True
        )
    except FileNotFoundError:
        raise UserError(
            "there is no sbatch here: submit from a machine of the cluster that has it, or see "
            "the script by --dry_run"
        ) from None
    if done.returncode:
        reason = " ".join(done.stderr.replace("sbatch: error:", "").split())
        raise UserError(f"sbatch does not take the job: {reason}")
    return done.stdout.strip().partition(";")[0]


def _tell(sentence: str, dry: bool) -> None:
    """One line to people; beside the script, where that is all that is asked for."""
    (stderr if dry else print)(sentence)


def _take_own(words: list[str]) -> tuple[dict[str, str], list[str]]:
    """Options of OPTIONS, and the other words.

    Raises:
        Failure: a value is none, or a word is nearly an option of these.
    """
    own: dict[str, str] = {}
    for name in OPTIONS:
        given = len(words)
        values, words = pop_option(words, name)
        if len(words) < given and not values:
            raise UserError(f"option {name} wants a value")
        if values:
            own[name] = " ".join(values)
    for name, least in {"nodes": 1, "gpus": 0, "processes": 1, "cpus": 1}.items():
        if name in own and not (own[name].isdecimal() and int(own[name]) >= least):
            raise UserError(f"option {name} wants a whole number from {least} on, not {own[name]}")
    if not re.fullmatch(r"[\w.-]+", own.get("name", "x")):
        raise UserError(f"option name wants letters, digits, '_', '.' and '-', not {own['name']}")
    for word in words:
        name = word.removeprefix("--").partition("=")[0]
        near = difflib.get_close_matches(name, OPTIONS, 1, 0.75)
        if word.startswith("--") and near:
            raise UserError(f"there is no option --{name}; did you mean {near[0]}?")
    return own, words


def _check_runs(config: Config, numbers: list[str]) -> None:
    """See that a job that is queued again finds its run where it left it.

    Raises:
        Failure: it would not.
    """
    if config.run.resume != "auto":
        raise UserError(
            f"run.resume is {config.run.resume}, but a job goes on in the folder that it began in: "
            "leave it out, and name that of another run by --run.output_dir and --run.name"
        )
    for number in numbers if config.run.name else []:
        run = Path(config.run.output_dir) / f"{config.run.name}{number}"
        if read_status(run).get("status") == "ended":
            raise UserError(f"the run in {run} has ended already: give another --run.name")


def _check_evaluation(words: list[str]) -> None:
    """See that there is something to evaluate, and that options are right.

    Raises:
        Failure: that is not so.
    """
    parser = CommandParser("evaluate", None)
    parser.add_argument("--checkpoint", nargs="+", required=True)
    parser.add_argument("--ten_crop", action="store_true")
    for path in parser.parse(words).args.checkpoint:
        if not Path(path).is_dir():
            raise UserError(f"there is no checkpoint at {path}: give --checkpoint a run's folder")


if __name__ == "__main__":
    run_command(main)
