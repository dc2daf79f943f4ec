"""How much there is to read: lines of each room, and the files that a training step enters."""

import subprocess
import sys
from pathlib import Path

import alexnet_dist
from tests.conftest import TINY, environment

PACKAGE = Path(alexnet_dist.__file__).parent
BUDGETS = {  # lines of Python, docstrings included; they may only fall
    "train.py": 320,
    "evaluate.py": 130,
    "predict.py": 120,
    "export.py": 180,
    "figures.py": 250,
    "summary.py": 70,
    "bench.py": 260,
    "submit.py": 80,
    "replay.py": 80,
    "setup.py": 220,
    "config.py": 320,
    "errors.py": 60,
    "model": 1000,
    "data": 1500,
    "parallel": 1250,
    "training": 1000,
    "tracking": 700,
    "prepare": 1000,
    "__init__.py": 5,
}
IN_ALL = {"alexnet_dist": 8700, "benchmarks": 2300, "tests": 6500}
FILES_OF_A_STEP, LINES_OF_A_STEP = 16, 2800

TRACER = """
import sys, threading
from pathlib import Path
entered, steps = {}, 0
def trace(frame, event, argument):
    global steps
    name = frame.f_code.co_filename
    if event != "call" or "alexnet_dist/" not in name:
        return
    steps += frame.f_code.co_name == "train_step"
    if 3 <= steps < 5:
        entered.setdefault(name, set()).add(frame.f_code.co_name)
threading.setprofile(trace)
sys.setprofile(trace)
from alexnet_dist.train import main
try:
    main(sys.argv[1:])
finally:
    sys.setprofile(None)
    for name in entered:
        print("ENTERED", name, file=sys.stderr)
"""


def lines(path: Path) -> int:
    files = [path] if path.is_file() else path.rglob("*.py")
    return sum(len(file.read_text().splitlines()) for file in files)


def test_rooms_keep_their_budgets() -> None:
    rooms = {path.name for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert rooms - set(BUDGETS) <= {"__pycache__"}, "a room without a budget"
    found = {name: lines(PACKAGE / name) for name in BUDGETS}
    for name, count in found.items():
        print(f"{name:<14}{count:>6} of {BUDGETS[name]}")
    for name, most in IN_ALL.items():
        print(f"{name:<14}{lines(PACKAGE.parent / name):>6} of {most} in all")
    assert {n: c for n, c in found.items() if c > BUDGETS[n]} == {}
    assert {n for n, most in IN_ALL.items() if lines(PACKAGE.parent / n) > most} == set()


def test_what_a_training_step_enters_is_read_in_an_afternoon(images: Path, tmp_path: Path) -> None:
    """One process, fed by DALI: files of the package that its third and fourth steps run through,
    in whichever thread, and all of their lines."""
    options = [*TINY, f"--data.root={images}", f"--run.output_dir={tmp_path}", "--train.max_steps=7"]
    done = subprocess.run(
        [sys.executable, "-c", TRACER, *options, "--data.batch_size=3", "--data.loader=dali"],
        capture_output=True,
        text=True,
        timeout=240,
        env=environment(),
        check=False,
    )
    marked = [line.split()[1] for line in done.stderr.splitlines() if line.startswith("ENTERED")]
    assert marked, done.stderr[-2000:]
    files = {Path(name): lines(Path(name)) for name in marked}
    for path, count in files.items():
        print(f"{path.relative_to(PACKAGE)!s:<32}{count:>5}")
    print(f"{len(files)} of {FILES_OF_A_STEP} files, {sum(files.values())} of {LINES_OF_A_STEP} lines")
    assert len(files) <= FILES_OF_A_STEP
    assert sum(files.values()) <= LINES_OF_A_STEP
