"""Small data that the tests make themselves, and real torchrun groups."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from alexnet_dist.errors import UserError
from alexnet_dist.model import Network
from alexnet_dist.parallel.mesh import Mesh, destroy_distributed, init_distributed
from tests.processes import run_group, run_main

SIDE = 76
TINY = [
    "--data.image_size=67",
    f"--data.resize_size={SIDE}",
    "--data.batch_size=7",
    "--data.eval_batch_size=8",
    "--runtime.precision=fp32",
    "--runtime.threads=1",
    "--train.epochs=2",
    "--train.log_interval=1",
    "--optim.lr=0.001",
    "--optim.schedule.name=constant",
    "--wandb.mode=off",
]
"""Options for a network that is small because its images are: 17 million parameters."""
Saved = tuple[Path, Network]


def write_images(root: Path, *, train: int = 31, val: int = 13, side: int = SIDE) -> Path:
    """A folder of three classes of colored noise, in ImageNet's layout."""
    generator = np.random.default_rng(7)
    colors = {"blue": (40, 60, 200), "green": (40, 190, 60), "red": (200, 50, 40)}
    for split, count in (("train", train), ("val", val)):
        for number in range(count):
            name = list(colors)[number % 3]
            folder = root / split / name
            folder.mkdir(parents=True, exist_ok=True)
            noise = generator.normal(0, 40, (side, side, 3)) + colors[name]
            image = Image.fromarray(noise.clip(0, 255).astype(np.uint8))
            image.save(folder / f"{number:03d}.jpg", quality=95)
    return root


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same images of 128 to a side as JPEGs, in tars, and as raw pixels."""
    from tests.prepare.packed_folder import write_prepared

    root = tmp_path_factory.mktemp("packed")
    plain = write_images(root / "jpegs", side=128)
    kinds = ("shards", "pixels")
    return {"jpegs": plain} | {kind: write_prepared(plain, root / kind, kind) for kind in kinds}


@pytest.fixture(scope="session")
def paper(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """A run with a checkpoint of the paper's network, and the network."""
    from tests.networks import save_network

    return save_network(tmp_path_factory.mktemp("runs") / "paper", "paper")


@pytest.fixture
def mesh() -> Iterator[Mesh]:
    """Of this process alone."""
    yield init_distributed("cpu", 1)
    destroy_distributed()


def error_of(call: Callable[..., object], *args: object) -> str:
    """The message of the UserError that a call ends with."""
    with pytest.raises(UserError) as failure:
        call(*args)
    return str(failure.value)


def write_program(path: Path, script: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(0o755)


def full_disk(*_: object) -> int:
    raise OSError(28, "No space left on device")


@dataclass
class Result:
    """A command that has ended."""

    code: int
    out: str
    err: str

    @property
    def said(self) -> list[str]:
        """The error messages of ours in what it wrote to standard error."""
        ours = (line.partition("alexnet_dist: ") for line in self.err.splitlines())
        return [message for before, mark, message in ours if mark and not before]

    @property
    def ours_in_traceback(self) -> bool:
        return "alexnet_dist/" in self.err and "Traceback" in self.err


def command(processes: int, module: str, *options: str) -> list[str]:
    """The command line for so many processes; 0 is without torchrun."""
    python = [sys.executable, "-m"]
    if processes == 0:
        return [*python, module, *options]
    launcher = [*python, "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [*launcher, "-m", module, *options]


def environment(**more: str) -> dict[str, str]:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT", "WANDB_API_KEY")
    return {k: v for k, v in os.environ.items() if k not in names} | more


def call(words: Sequence[object], timeout: float = 240, **options: Any) -> Result:
    """Run a program to its end."""
    wanted: dict[str, Any] = {"env": environment(), "timeout": timeout, "text": True} | options
    done = subprocess.run(list(map(str, words)), capture_output=True, **wanted)
    return Result(done.returncode, done.stdout, done.stderr)


def launch(
    processes: int,
    *options: str,
    module: str = "alexnet_dist.train",
    timeout: int = 240,
    **env: str,
) -> Result:
    """Run a command of the package to its end, by torchrun unless ``processes`` is 0."""
    if processes == 0:
        return Result(*run_group(0, environment(), timeout, run_main, module, *options))
    return call(command(processes, module, *options), timeout)


def succeed(processes: int, command: str, *options: str, **env: str) -> Result:
    """Run a command of the package without torchrun; fails the test where that fails."""
    words = (f"alexnet_dist.{command}", *options)
    result = Result(*run_group(processes, environment(**env), 240, run_main, *words))
    assert result.code == 0, result.err[-3000:]
    return result


def train(processes: int, root: Path, runs: Path, *options: str, **env: str) -> Result:
    """Train the tiny network without torchrun."""
    where = (f"--data.root={root}", f"--run.output_dir={runs}")
    return succeed(processes, "train", *TINY, *where, *options, **env)


def evaluate(processes: int, *options: str) -> dict[str, Any]:
    """What the command evaluate prints at its end."""
    return json.loads(succeed(processes, "evaluate", *options).out.splitlines()[-1])


def events(run: Path, *kinds: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [event for event in lines if event["event"] in kinds]


def losses(run: Path) -> dict[int, float]:
    """The loss of each step; of steps taken twice the later."""
    return {event["step"]: event["loss"] for event in events(run, "train")}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="torch sees no NVIDIA GPU on this machine"))
