"""The documents: their commands are understood and run, their options, files and links exist.

A block of ``sh`` holds commands. One of ``yaml`` or ``bash`` whose first comment is a name becomes
that file; one of ``diff`` is applied to a copy of the package. IMAGENET and DIR are folders of
small images. Commands in running text, like `evaluate --checkpoint RUN`, are only parsed.
"""

import importlib
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from torch.distributed.run import get_args_parser

from alexnet_dist.__main__ import COMMANDS
from alexnet_dist.config import OPTIONS, SECTIONS, CommandParser
from tests.conftest import Result, call, environment, write_images
from tests.conftest import command as launcher
from tests.processes import run_group, run_main

ROOT = Path(__file__).parents[1]
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"]
DOCUMENTS += sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))

ONLY_PARSED = {
    "make": "sets up a venv: the targets exist",
    "python3": "makes a venv",
    "source": "activates it",
    "pip": "downloads packages",
    "doctor": "looks at this machine for half a minute; tests/test_doctor.py runs it",
    "pytest": "would run tests in a test: the files exist",
    "launch": "tests/distributed/test_launch.py runs these scripts",
    "sbatch": "needs a SLURM; tests/slurm runs these scripts on one",
    "chmod": "makes a script of a container executable",
}
"""Commands of ``sh`` blocks that are not run, with the reason."""

SMALL = [
    *("--data.image_size=67", "--data.resize_size=76", "--data.batch_size=8", "--wandb.mode=off"),
    *("--data.eval_batch_size=64", "--train.max_steps=2", "--runtime.threads=1"),
]


class Command(NamedTuple):
    """A command of a document: ``program`` is one of the package's, or another."""

    line: str
    program: str
    words: list[str]
    env: dict[str, str]
    processes: int = 0


def blocks(document: str) -> Iterator[tuple[str, str]]:
    """The fenced blocks of a document: kind and content."""
    yield from re.findall(r"^```(\w+)\n(.*?)^```$", (ROOT / document).read_text(), re.M | re.S)


def parse_line(line: str, env: dict[str, str]) -> Command:
    """A command line as it is typed; ``export`` changes ``env``."""
    words, env = shlex.split(line, comments=True), dict(env)
    while re.match(r"\w+=", words[0]):
        name, _, value = words.pop(0).partition("=")
        env[name] = value
    first, processes = Path(words[0]).name, 0
    if first == "torchrun":
        args = get_args_parser().parse_args(words[1:])
        processes = min(max(int(args.nproc_per_node), int(args.nnodes.split(":")[-1])), 2)
        first, words = "python", ["python", "-m", args.training_script, *args.training_script_args]
    if first == "alexnet-dist":
        first, words = "python", ["python", "-m", f"alexnet_dist.{words[1]}", *words[2:]]
    if first == "python" and words[1] == "-m":
        module = words[2].removeprefix("alexnet_dist.").partition(".")[0]
        known = {*COMMANDS, "pytest", "benchmarks"}
        assert module in known, f"no command of the package: {line}"
        first, words = module, words[2:] if module == "benchmarks" else words[3:]
    elif words[0].startswith("launch/"):
        first = "launch"
    else:
        words = words[1:]
    return Command(line, first, words, env, processes)


def commands(document: str) -> Iterator[Command]:
    """The commands of the ``sh`` blocks, in order; those behind a diff want the changed package."""
    env: dict[str, str] = {}
    for kind, content in blocks(document):
        if kind == "diff":
            env["PYTHONPATH"] = "."
        for line in content.replace("\\\n", " ").splitlines() if kind == "sh" else []:
            words = shlex.split(line, comments=True)
            if words[:1] == ["export"]:
                name, _, value = words[1].partition("=")
                env[name] = value.replace("$PWD", ".")
            elif words:
                yield parse_line(line, env)


def inline_commands(document: str) -> Iterator[Command]:
    """Commands of the package, make's and launch's in running text; "..." and what is in brackets
    may be left out."""
    text = re.sub(r"^```.*?^```$", "", (ROOT / document).read_text(), flags=re.M | re.S)
    for code in re.findall(r"`([^`\n]+ [^`\n]+)`", text):
        line = re.sub(r"\[[A-Z ]+(\.\.\.)?\]|(--\w+ )?\.\.\.", "", code).strip()
        if "NAME" in line or re.match(r"export \w+=", line):
            continue
        if line.split()[0] in COMMANDS:
            yield parse_line(f"alexnet-dist {line}", {})
        elif re.match(r"make |alexnet-dist |launch/|(python|torchrun) .*-m \S+ ", line):
            yield parse_line(line, {})


def module_of(program: str) -> str:
    return f"alexnet_dist.{program}" + ".__main__" * (program == "prepare")


def check(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """That a command is understood: its files and options exist."""
    program, words = command.program, command.words
    if program == "make":
        subprocess.run(["make", "-n", *words, "ARGS="], cwd=ROOT, check=True, capture_output=True)
        return
    if program in ("launch", "sbatch"):
        at = next(i for i, word in enumerate(words) if word.startswith(("launch/", "slurm/")))
        subprocess.run(["bash", "-n", ROOT / words[at]], check=True)
        first = next((i for i, word in enumerate(words[at:], at) if word.startswith("--config")), 0)
        program, words = "train", words[first:] if first else []
    if program == "benchmarks":
        assert ROOT.joinpath(words[0].replace(".", "/") + ".py").is_file()
    elif program == "pytest":
        assert all((ROOT / word).exists() for word in words if not word.startswith("-"))
    elif program in COMMANDS:
        original = CommandParser.parse

        def parse(self: CommandParser, *args: Any) -> None:
            original(self, *args)
            raise SystemExit  # what the command does is not done

        monkeypatch.setattr(CommandParser, "parse", parse)
        with pytest.raises(SystemExit):  # a UserError says what is wrong
            importlib.import_module(module_of(program)).main(words)
        monkeypatch.undo()
    else:
        assert program in ONLY_PARSED, command.line


def sandbox(document: str, folder: Path) -> Path:
    """A folder with the document's files."""
    for kind, content in blocks(document):
        name = re.match(r"(?:#!.*\n)?# ([\w.]+\.(?:yaml|sh))\n", content)
        if kind in ("yaml", "bash") and name:
            (folder / name[1]).write_text(content)
        if kind == "bash":
            subprocess.run(["bash", "-n"], input=content, text=True, check=True)
        if kind == "diff":
            shutil.copytree(ROOT / "alexnet_dist", folder / "alexnet_dist")
            shutil.copytree(ROOT / "configs", folder / "configs")
            subprocess.run(["git", "apply", "-"], input=content, text=True, cwd=folder, check=True)
    return folder


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_are_known(document: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = sandbox(document, tmp_path)
    for command in [*commands(document), *inline_commands(document)]:
        monkeypatch.chdir(folder)
        try:
            check(command, monkeypatch)
        except Exception as error:
            raise AssertionError(f"{document}: {command.line}: {error}") from error


@pytest.mark.parametrize("document", DOCUMENTS)
def test_options_and_files_exist(document: str) -> None:
    text = (ROOT / document).read_text()
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        assert link.startswith("http") or (ROOT / document).parent.joinpath(link).exists(), link
    sections = "|".join(name.replace(".", r"\.") for name in SECTIONS)
    for name in re.findall(rf"`(?:--)?((?:{sections})\.\w[\w.]*)\b", text):
        where = (ROOT / "alexnet_dist" / name).exists() or (ROOT / "slurm" / name).exists()
        assert name in OPTIONS or name in SECTIONS or where, name
    for name in re.findall(r"`((?:\w+/)+\w+\.(?:py|sh|yaml|sbatch))`", text):
        assert any((ROOT / base / name).is_file() for base in (".", "alexnet_dist")), name


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= 1300


def run_in(folder: Path, *words: str) -> None:
    os.chdir(folder)
    run_main(*words)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("document", [n for n in DOCUMENTS if "```sh" in (ROOT / n).read_text()])
def test_commands_run(document: str, tmp_path: Path) -> None:
    folder = sandbox(document, tmp_path)
    for name in ("IMAGENET", "DIR", "photos"):
        write_images(folder / name)
    for command in commands(document):
        if command.program in ONLY_PARSED:
            continue
        words, processes = [module_of(command.program), *command.words], command.processes
        if command.program == "train":
            words += SMALL
        if command.program == "submit":
            words.insert(1, "--dry_run")
        env = environment(**command.env)
        if "PYTHONPATH" in command.env:
            done = call(launcher(processes, *words), cwd=folder, env=env)
        else:
            done = Result(*run_group(processes, env, 120, run_in, folder, *words))
        assert done.code == 0, f"{command.line}\n{done.err[-3000:]}"
