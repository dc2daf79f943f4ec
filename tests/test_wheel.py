"""The wheel: what is in it, and that it trains where there is no checkout."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import alexnet_dist
from tests.conftest import TINY, call, environment, losses

CHECKOUT = Path(__file__).parents[1]
PARTS = ("alexnet_dist", "configs", "slurm", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing but the package, installed from its wheel."""
    names = ("source", "wheels", "bare")
    source, wheels, folder = (tmp_path_factory.mktemp(name) for name in names)
    for name in PARTS:  # a build leaves files in the folder that it builds
        copy = shutil.copytree if (CHECKOUT / name).is_dir() else shutil.copy
        copy(CHECKOUT / name, source / name)
    pip, offline = [sys.executable, "-m", "pip", "-q"], ["--no-deps", "--no-index"]
    build = [*pip, "wheel", str(source), "-w", str(wheels), "--no-build-isolation", *offline]
    subprocess.run(build, check=True, timeout=120)
    (wheel,) = wheels.glob("alexnet_dist-1.*-py3-none-any.whl")
    install = [*pip, "install", str(wheel), "--target", str(folder), *offline]
    subprocess.run(install, check=True, timeout=120)
    return folder


def run(installed: Path, cwd: Path, *words: str) -> str:
    """Run the wheel's Python, without the .pth file by which a venv finds the checkout."""
    path = os.pathsep.join([str(installed), sysconfig.get_path("purelib")])
    done = call([sys.executable, "-S", *words], cwd=cwd, env=environment(PYTHONPATH=path))
    assert done.code == 0, done.err[-3000:]
    return done.out


@pytest.mark.slow
def test_an_installed_wheel_trains_by_itself(installed: Path, images: Path, tmp_path: Path) -> None:
    script, tiny = str(installed / "bin" / "alexnet-dist"), [*TINY, f"--data.root={images}"]
    code = "import sys, alexnet_dist as a; print(a.__file__, *sys.path, sep='\\n')"
    file, *path = run(installed, tmp_path, "-c", code).splitlines()
    assert file.startswith(f"{installed}/alexnet_dist/")
    assert str(CHECKOUT) not in path  # where its .venv may lie in it
    words = ["train", "--config=configs/paper2012.yaml", *tiny, "--train.epochs=9"]
    run(installed, tmp_path, script, *words, "--train.max_steps=8")
    assert list(losses(tmp_path / "runs/paper2012")) == list(range(1, 9))


@pytest.mark.slow
def test_a_wheel_has_commands_recipes_and_batch_scripts(installed: Path, tmp_path: Path) -> None:
    script = str(installed / "bin" / "alexnet-dist")
    assert run(installed, tmp_path, script, "--version").strip() == alexnet_dist.__version__
    listed = run(installed, tmp_path, script)
    for path in (CHECKOUT / "alexnet_dist").glob("*.py"):
        if "run_command(main)" in path.read_text():
            assert f"  {path.stem} " in listed
    by_module = run(installed, tmp_path, "-m", "alexnet_dist.summary", "owt")
    assert run(installed, tmp_path, script, "summary", "owt") == by_module
    for name in ("configs", "slurm"):
        files = {path.name for path in (CHECKOUT / name).iterdir()}
        assert {path.name for path in (installed / "alexnet_dist" / name).iterdir()} == files
    words = ["submit", "--dry_run", "--nodes=2", "--", "--config=paper2012", "--data.root=x"]
    submitted = run(installed, tmp_path, script, *words)
    assert f" {installed}/alexnet_dist/slurm/train.sbatch " in submitted
