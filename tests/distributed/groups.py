"""Groups of processes that tests look into, and do things to."""

import contextlib
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from tests.conftest import TINY, command, environment, events, losses


def running(
    processes: int, images: Path, runs: Path, *options: str, torchrun: tuple[str, ...] = ()
) -> "subprocess.Popen[str]":
    """A run, long unless ``options`` say otherwise, that has taken its first steps."""
    wanted = [*TINY, f"--data.root={images}", f"--run.output_dir={runs}", "--train.epochs=10000"]
    words = command(processes, "alexnet_dist.train", *wanted, "--run.name=run", *options)
    at = words.index("--standalone") if processes else 0
    launcher = subprocess.Popen(
        [*words[:at], *torchrun, *words[at:]],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # shells may ignore it
    )
    before = steps(runs / "run")
    wait_for(lambda: steps(runs / "run") > before + 1)
    return launcher


def steps(run: Path) -> int:
    """How many steps the run has recorded."""
    return len(losses(run)) if (run / "metrics.jsonl").exists() else 0


def sample_order(run: Path) -> dict[int, tuple[str, int]]:
    """Hash and number of the samples of each epoch, by its last step; of epochs that were resumed
    the last."""
    return {e["step"]: (e["sample_order_hash"], e["images"]) for e in events(run, "epoch")}


def workers(launcher: int) -> list[int]:
    text = Path(f"/proc/{launcher}/task/{launcher}/children").read_text()
    return [int(word) for word in text.split()]


def alive(word: str) -> dict[int, str]:
    """The command lines of running processes that have ``word`` in them, by their ids."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            line = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            if word in line:
                found[int(process.name)] = line
    return found


def wait_for(condition: Callable[[], bool], seconds: float = 120, said: Any = lambda: "") -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited in vain {said()}"
        time.sleep(0.2)


def tensors(run: Path) -> dict[str, bytes]:
    """Every tensor of the run's last checkpoint, to the bit."""
    found = {
        f"{file.name} {name}": tensor.numpy().tobytes()
        for file in sorted((run / "checkpoints/last").resolve().glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }
    assert any("velocity." in name for name in found)
    return found
