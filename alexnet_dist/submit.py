"""Submit a SLURM job: check its options, then call sbatch on a script of the package.

python -m alexnet_dist.submit --nodes=4 --gpus-per-node=8 --cpus-per-task=64 -- --config FILE ...
python -m alexnet_dist.submit array5 --gpus-per-node=8 --cpus-per-task=64 -- --config FILE ...
python -m alexnet_dist.submit evaluate -- --checkpoint RUN [RUN ...] [--ten_crop]
python -m alexnet_dist.submit doctor --nodes=4 --gpus-per-node=8 -- --config FILE ...

Before "--": sbatch's own flags; after it: the options of what the job runs. "train", the default,
is one run; "array5" the paper's five networks, a job each, and then an evaluation of their average;
"doctor" looks whether a run would work on such nodes.
--dry_run prints the sbatch command instead.
"""

import argparse
import os
import shlex
import subprocess
import sys

from alexnet_dist.config import CommandParser, check_data_root, packaged_folder
from alexnet_dist.errors import UserError, run_command
from alexnet_dist.tracking.run_dir import resolve_run_dir


def main(arguments: list[str]) -> None:
    """Submit what the command line says."""
    dry_run = "--dry_run" in arguments
    words = [word for word in arguments if word != "--dry_run"]
    scripts = ("train", "array5", "evaluate", "doctor")
    script = words.pop(0) if words and words[0] in scripts else "train"
    at = words.index("--") if "--" in words else -1
    flags, words = words[: max(at, 0)], words[at + 1 :]
    if script == "evaluate":
        parser = CommandParser("evaluate", __doc__)
        parser.add_argument("--checkpoint", nargs="+", required=True)
        parser.add_argument("--ten_crop", action="store_true")
        parser.parse(words)
        print(f"job {_sbatch(flags, script, words, dry_run)} evaluates")
        return
    if script == "doctor":
        CommandParser("doctor", __doc__).parse(words)
        print(f"job {_sbatch(flags, script, words, dry_run)} looks at its nodes")
        return
    parsed = CommandParser("submit", __doc__).parse(words)
    check_data_root(parsed.config)
    run = parsed.config.run
    if run.resume != "auto":
        raise UserError("leave out run.resume: a job resumes its own run (see --run.name)")
    members = [run.name] if script == "train" else [f"{run.name}-{n}" for n in range(5)]
    for member in members if run.name else ():  # one that has ended is refused now, not by the job
        resolve_run_dir(run.output_dir, member, "", run.resume)
    # the scripts read no YAML
    words += [f"--run.output_dir={run.output_dir}", f"--train.seed={parsed.config.train.seed}"]
    words += [f"--run.name={run.name}"] if run.name else []
    names = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    names.add_argument("-J", "--job-name", default=parsed.config_name)
    own, flags = names.parse_known_args(flags)
    job = _sbatch([f"--job-name={own.job_name}", *flags], script, words, dry_run)
    path = f"{run.output_dir}/{run.name or f'{own.job_name}-{job}'}"
    if script == "train":
        print(f"job {job} trains the run {path}")
        return
    print(f"job {job} trains the runs {path}-0 to {path}-4")
    flags += [f"--job-name={own.job_name}-mean", "--nodes=1", "--time=01:00:00"]
    flags += [f"--dependency=afterok:{job}", "--kill-on-invalid-dep=yes"]
    words = ["--checkpoint", *(f"{path}-{index}" for index in range(5))]
    print(f"job {_sbatch(flags, 'evaluate', words, dry_run)} evaluates their average")


def _sbatch(flags: list[str], script: str, words: list[str], dry_run: bool) -> str:
    """Submit slurm/SCRIPT.sbatch, or print the command; the job's id."""
    folder = packaged_folder("slurm")
    command = ["sbatch", "--parsable", *flags, str(folder / f"{script}.sbatch"), *words]
    variables = {"PYTHON": sys.executable} | os.environ | {"ALEXNET_DIST_SLURM": str(folder)}
    if dry_run:
        print(f"ALEXNET_DIST_SLURM={shlex.quote(str(folder))} {shlex.join(command)}")
        return "JOBID"
    try:
        done = subprocess.run(command, env=variables, text=True, capture_output=True)
    except FileNotFoundError:
        raise UserError("there is no sbatch here: submit on a machine of the cluster") from None
    if done.returncode:
        raise UserError("sbatch refuses the job: " + " ".join(done.stderr.split()))
    return done.stdout.strip().partition(";")[0]


if __name__ == "__main__":
    run_command(main)
