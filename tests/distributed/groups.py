"""Groups of processes that tests look into, and do things to."""

import signal
import subprocess
import time
from pathlib import Path

from tests.conftest import TINY, command, environment, losses


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
    before = len(losses(runs / "run")) if (runs / "run/metrics.jsonl").exists() else 0
    wait_for(lambda: started(runs / "run", before + 1))
    return launcher


def started(run: Path, steps: int) -> bool:
    """Whether the run has recorded so many steps."""
    return (run / "metrics.jsonl").exists() and len(losses(run)) > steps


def workers(launcher: int) -> list[int]:
    text = Path(f"/proc/{launcher}/task/{launcher}/children").read_text()
    return [int(word) for word in text.split()]


def alive(word: str) -> list[str]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            line = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if word in line:
            found.append(line)
    return found


def wait_for(condition: object, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.2)


def tensors(run: Path) -> dict[str, bytes]:
    """Every tensor of the run's last checkpoint, to the bit."""
    from safetensors import safe_open

    found = {}
    for file in sorted((run / "checkpoints/last").resolve().glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (no mapping)
                found[f"{file.name} {name}"] = tensors.get_tensor(name).numpy().tobytes()
    assert any("velocity." in name for name in found)
    return found
