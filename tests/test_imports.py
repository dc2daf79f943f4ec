"""Which part of the package may import which."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import alexnet_dist
from tests.conftest import environment

PACKAGE = Path(alexnet_dist.__file__).parent
FOLDERS = {"model", "data", "parallel", "training", "tracking", "prepare"}
COMMANDS = {path.stem for path in PACKAGE.glob("*.py")} - {
    "__init__",
    "checks",
    "config",
    "errors",
    "setup",
}
MAY_IMPORT = {
    "setup": {*FOLDERS, "config", "errors"},
    "checks": {*FOLDERS, "setup", "config", "errors"},
    "model": {"model"},
    "data": {"data", "errors"},
    "prepare": {"prepare", "data", "errors"},
    "parallel": {"parallel", "model", "errors"},
    "training": {"training", "errors"},
    "tracking": {"tracking", "errors"},
    "config": {"errors"},
    "errors": set(),
}
FILES = sorted(PACKAGE.rglob("*.py"))


def _imports(path: Path) -> set[str]:
    """The folders and files of the package that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        parts = [name.split(".") for name in names if name.startswith("alexnet_dist.")]
        found |= {part[1] for part in parts if part[1] in set(MAY_IMPORT) | COMMANDS}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_are_allowed(path: Path) -> None:
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if part in COMMANDS:
        assert not _imports(path) & (COMMANDS - {part})
    elif part != "__init__":
        command = {"config", "tracking"} if path.name == "__main__.py" else set()
        assert _imports(path) <= MAY_IMPORT[part] | command


def test_the_model_does_without_processes() -> None:
    for path in (PACKAGE / "model").glob("*.py"):
        assert "torch.distributed" not in path.read_text()


def test_a_start_imports_no_compiler_and_looks_for_no_garbage() -> None:
    code = (
        "import gc, sys; sys.argv = ['-m']; import alexnet_dist.train; assert not gc.isenabled();"
        "assert 'torch._inductor.compile_fx' not in sys.modules; sys.argv = ['train'];"
        "alexnet_dist.train.run_command(lambda _: print(gc.isenabled(), gc.get_freeze_count()))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    enabled, frozen = done.stdout.split()
    assert enabled == "True"
    assert int(frozen) > 100_000
