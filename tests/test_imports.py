"""The house's rules: which room may know of which."""

import ast
from pathlib import Path

import pytest

import alexnet_dist

HOUSE = Path(alexnet_dist.__file__).parent
ROOMS = {"model", "data", "parallel", "training", "tracking", "prepare"}
COMMANDS = {path.stem for path in HOUSE.glob("*.py")} - {
    "__init__",
    "config",
    "errors",
    "setup",
    "loaded_model",
}
MAY_KNOW = {
    "setup": {*ROOMS, "config", "errors"},
    "loaded_model": {*ROOMS, "config", "errors", "setup"},
    "model": {"model"},
    "data": {"data", "errors"},
    "prepare": {"prepare", "data", "errors"},
    "parallel": {"parallel", "model", "errors"},
    "training": {"training", "errors"},
    "tracking": {"tracking", "errors"},
    "config": {"errors"},
    "errors": set(),
}
FILES = sorted(HOUSE.rglob("*.py"))


def _knows(path: Path) -> set[str]:
    """The rooms and files of ours that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        parts = [name.split(".") for name in names if name.startswith("alexnet_dist.")]
        found |= {part[1] for part in parts if part[1] in set(MAY_KNOW) | COMMANDS}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(HOUSE)))
def test_rooms_know_only_whom_they_may(path: Path) -> None:
    room = path.relative_to(HOUSE).parts[0].removesuffix(".py")
    if room in COMMANDS:
        assert not _knows(path) & (COMMANDS - {room})
    elif room != "__init__":
        command = {"config", "tracking"} if path.name == "__main__.py" else set()
        assert _knows(path) <= MAY_KNOW[room] | command


def test_the_model_knows_nothing_of_processes() -> None:
    for path in (HOUSE / "model").glob("*.py"):
        assert "torch.distributed" not in path.read_text()
