"""How much there is to read: lines of each room, and the files that a training step enters."""

import subprocess
import sys
from pathlib import Path

import alexnet_dist
from tests.conftest import TINY, environment

PACKAGE = Path(alexnet_dist.__file__).parent
BUDGETS = {  # lines of Python, docstrings included: the most allowed, and what was planned
    "train.py": (416, 320),
    "evaluate.py": (136, 130),
    "predict.py": (139, 120),
    "export.py": (178, 180),
    "figures.py": (234, 250),
    "summary.py": (63, 70),
    "bench.py": (261, 260),
    "submit.py": (88, 80),
    "replay.py": (81, 80),
    "doctor.py": (262, 100),
    "checks.py": (590, 120),  # what the doctor looks at
    "setup.py": (411, 220),
    "config.py": (517, 320),
    "errors.py": (100, 60),
    "model": (1276, 1000),
    "data": (2344, 1500),
    "parallel": (1550, 1250),
    "training": (1536, 1000),
    "tracking": (857, 700),
    "prepare": (1030, 1000),
    "__init__.py": (9, 5),
    "__main__.py": (45, 45),
}
IN_ALL = {"alexnet_dist": (12123, 8700), "benchmarks": (2300, 2300), "tests": (8318, 6500)}
FILES_OF_A_STEP, LINES_OF_A_STEP = (16, 16), (2800, 2800)

TRACER = """
import sys, threading
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
    found = {PACKAGE / name: budget for name, budget in BUDGETS.items()}
    found |= {PACKAGE.parent / name: budget for name, budget in IN_ALL.items()}
    for path, (most, planned) in found.items():
        print(f"{path.name:<16}{lines(path):>6} lines, at most {most}; the plan: {planned}")
    assert {path.name: most for path, (most, _) in found.items() if lines(path) > most} == {}


def test_what_a_training_step_enters(images: Path, tmp_path: Path) -> None:
    """One process, fed by DALI, between two log records: the files of the package that its third
    and fourth steps run through, in whichever thread, and all of their lines."""
    options = [*TINY, f"--data.root={images}", f"--run.output_dir={tmp_path}"]
    options += ["--train.max_steps=7", "--train.log_interval=100", "--data.batch_size=3"]
    command = [sys.executable, "-c", TRACER, *options, "--data.loader=dali"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=240)
    marked = [line.split()[1] for line in done.stderr.splitlines() if line.startswith("ENTERED")]
    assert marked, done.stderr[-2000:]
    # the loop itself was entered before
    files = {path: lines(path) for path in (PACKAGE / "train.py", *map(Path, marked))}
    for path, count in files.items():
        print(f"{path.relative_to(PACKAGE)!s:<32}{count:>5}")
    total, most, most_lines = sum(files.values()), FILES_OF_A_STEP, LINES_OF_A_STEP
    print(f"{len(files)} files (the plan: {most[1]}), {total} lines (the plan: {most_lines[1]})")
    assert len(files) <= most[0]
    assert total <= most_lines[0]
