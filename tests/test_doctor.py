"""The doctor: a page where all is well, and for each line that can fail something that makes it."""

import json
import os
import resource
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from PIL import ImageOps

from alexnet_dist import checks, doctor
from alexnet_dist.checks import Check, Context, Finding
from alexnet_dist.config import Config, DataConfig
from alexnet_dist.data import torch_loader
from tests.conftest import TINY, Result, command, environment, write_images, write_program
from tests.prepare.imagenet import write
from tests.processes import run_group, run_main, torchrun_env

AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="mounts are made by root")
Page = dict[str, dict[str, Any]]


def be_doctor(*options: str) -> None:
    run_main("alexnet_dist.doctor", *options)


def impatient(*options: str) -> None:
    """Be the doctor, and wait no longer than seconds."""
    doctor.ALONE, doctor.MEET = 6, 8
    doctor.CHECKS = tuple(check._replace(seconds=3) for check in doctor.CHECKS)
    be_doctor(*options)


def page(code: int, out: str, err: str) -> Page:
    """The lines of --json of a doctor who finds what fails, by check; of several the last."""
    assert code == 1, err[-3000:]
    assert not Result(code, out, err).ours_in_traceback, err[-3000:]
    return {line["check"]: line for line in json.loads(out)["lines"]}


def failed(page: Page) -> set[str]:
    return {name for name, line in page.items() if line["status"] == "fails"}


def words(images: Path, runs: Path, *options: str) -> list[str]:
    return [*TINY, f"--data.root={images}", f"--run.output_dir={runs}", "--json", *options]


@pytest.mark.slow
def test_what_fails_on_a_host(tmp_path: Path) -> None:
    """A val class that train lacks, a job that ends, and W&B that does not answer."""
    root = write_images(tmp_path / "i")
    env = {"WANDB_API_KEY": "k", "WANDB_BASE_URL": "http://127.0.0.1:1", "SLURM_JOB_ID": "7"}
    env |= {"SLURM_JOB_END_TIME": str(int(time.time())), "WANDB_MODE": "online"}
    write(tmp_path / "runs/old/wandb/offline-run-1/run-1.wandb", b"")
    quick = words(root, tmp_path / "runs", "--wandb.mode=auto", "--quick")
    found = page(*run_group(0, environment(**env), 60, be_doctor, *quick))
    assert failed(found) == {"SLURM"}
    assert "give the job more --time" in found["SLURM"]["fix"]
    unsynced = "online, a key, 1 offline runs not synced; http://127.0.0.1:1 does not"
    assert unsynced in found["W&B"]["seen"]
    assert found["W&B"]["status"] == "warning"
    assert not list((tmp_path / "runs").glob(".doctor*"))

    (root / "val/red").rename(root / "val/rouge")
    found = page(*run_group(0, environment(), 60, be_doctor, *quick))
    assert failed(found) == {"images"}
    assert "differ (red, rouge)" in found["images"]["seen"]


@AS_ROOT
def test_what_fails_in_a_small_container(tmp_path: Path) -> None:
    root, runs = write_images(tmp_path / "i"), tmp_path / "runs"
    for file in (root / "train/red").glob("*.jpg"):
        file.write_bytes(file.read_bytes()[:-2])
    runs.mkdir()
    write_program(tmp_path / "bin/nvidia-smi", "echo 0, 400.10, 10, 80000, 0, 0x0")
    script = (
        f"mount -t tmpfs -o size=1m tmpfs /dev/shm; mount -t tmpfs -o size=20m tmpfs {runs};"
        "mount -t tmpfs tmpfs /sys/fs/cgroup; cd /sys/fs/cgroup; echo 1000000 > memory.max;"
        'echo 150000 100000 > cpu.max; cd "$OLDPWD"; ulimit -n 200; exec "$@"'
    )
    options = words(root, runs, "--runtime.device=cuda", "--wandb.mode=online")
    env = environment(LOCAL_WORLD_SIZE="2", PATH=f"{tmp_path}/bin:{os.environ['PATH']}")
    env["NETRC"] = "/dev/null"
    doctor = command(0, "alexnet_dist.doctor", *options)
    container = ["unshare", "-m", "sh", "-c", script, "sh", *doctor]
    done = subprocess.run(container, capture_output=True, text=True, env=env, timeout=120)
    found = page(done.returncode, done.stdout, done.stderr)
    for name, seen in {
        "GPUs": "torch sees 0, nvidia-smi 1",
        "images": "train/red/",
        "processors": "1 of 2 may be used; processes: 2",
        "memory": "0.0 GB free",
        "open files": "may have 200",
        "run folder": "0.0 GB in",
        "W&B": "online, no key",
        "processes": "runtime.device is cuda, but torch sees no GPU here",
    }.items():
        assert found[name]["status"] == "fails", found[name]
        assert seen in found[name]["seen"]
        assert found[name]["fix"]
    assert found["/dev/shm"]["status"] == "warning"
    assert found["/dev/shm"]["seen"] == "1 MiB free"
    assert "a JPEG without its end marker" in found["images"]["seen"]


@pytest.mark.slow
def test_storage_that_hangs_and_a_process_that_does_not_come(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "prepared.json")  # nobody writes to it
    first, second = torchrun_env(2)
    options = words(tmp_path, tmp_path / "runs", "--quick")
    found = page(*run_group(0, environment(**first), 60, impatient, *options))
    assert failed(found) == {"images", "processes"}
    assert found["images"]["seen"] == "no answer within 3 s"
    gone = "process 1, host unknown did not come, or has gone; process 0, host "
    assert gone in found["processes"]["seen"]
    result = Result(*run_group(0, environment(**second), 60, impatient, *options))
    assert result.code == 1
    assert "process 1 (host " in result.said[0]
    assert f"cannot use 127.0.0.1:{second['MASTER_PORT']}" in result.said[0]


def context(tmp_path: Path) -> Context:
    return Context(Config(), tmp_path / "run", tmp_path / ".doctor", True, 1, 1)


def test_a_check_that_hangs_crashes_or_raises_does_not_keep_others(tmp_path: Path) -> None:
    def crash(here: Context) -> Finding:
        os.kill(os.getpid(), signal.SIGKILL)
        return Finding("ok", "")

    runs: dict[str, Callable[[Context], Finding | None]] = {
        "hangs": lambda here: time.sleep(60),
        "crashes": crash,
        "raises": lambda here: Finding("ok", str({}["key"])),
        "knows": lambda here: Finding("ok", ", ".join(sorted(here.failed))),
        "is silent": lambda here: None,
    }
    table = [Check(name, run, "all", "fix it", 1) for name, run in runs.items()]
    found = doctor.run_checks(table, context(tmp_path), time.monotonic() + 30)
    assert found == {
        "hangs": Finding("fails", "no answer within 1 s", "fix it"),
        "crashes": Finding("fails", "its process has crashed (exit code -9)", "fix it"),
        "raises": Finding("fails", "KeyError: 'key'", "fix it"),
        "knows": Finding("ok", "crashes, hangs, raises"),
    }


def test_lines_name_processes_where_these_differ() -> None:
    hosts = {0: "a", 1: "a", 2: "b", 3: "b"}
    check = Check("versions", checks.versions, "all", "give all the same", same=True)
    old, new = Finding("ok", "torch 2.11"), Finding("ok", "torch 2.14")
    (line,) = doctor.merge(check, dict.fromkeys(hosts, new), hosts)
    assert (line["status"], line["seen"]) == ("ok", "torch 2.14")
    lines = doctor.merge(check, dict.fromkeys(hosts, new) | {3: old}, hosts)
    assert [line["status"] for line in lines] == ["fails", "fails"]
    assert lines[1]["seen"] == "torch 2.11 (process 3, host b)"
    assert lines[1]["fix"] == "give all the same"
    full = Finding("fails", "0 GB", "make room")
    (line,) = doctor.merge(check._replace(same=False), {0: new, 2: full, 3: full}, hosts)
    assert line["seen"] == "0 GB (processes 2, 3, host b)"


def test_what_nvidia_smi_tells() -> None:
    assert checks._troubles("400", "80000", "0", "0x0000000000000004") == []
    assert checks._troubles("9000", "80000", "12", "0x0000000000000008") == [
        "has 9000 of 80000 MiB in use",
        "has 12 memory errors that ECC could not correct",
        "is throttled (0x0000000000000008)",
    ]
    assert checks._troubles("[N/A]", "[N/A]", "[N/A]", "[N/A]") == []


def test_too_few_gpus_and_too_little_shm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers: dict[str, Any] = {"device_count": 4, "synchronize": None, "get_device_name": "H100"}
    for name, answer in (answers | {"get_device_capability": (9, 0)}).items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *shape, device: ones(*shape))
    here = replace(context(tmp_path), local_world_size=8)
    assert checks.gpus(here).status == "fails"
    assert checks.gpus(here).seen == "torch sees 4, nvidia-smi 0: H100, capability 9.0"
    assert "take --nproc_per_node=4" in checks.gpus(here).fix
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda _: SimpleNamespace(free=64 * 2**20))
    found = checks.shared_memory(here)
    assert found is not None
    assert found.status == "fails"
    assert "--shm-size=1g" in found.fix


def sick(*options: str) -> None:
    """Be the doctor where Pillow shows negatives, and no file may be larger than a megabyte."""
    decode = torch_loader.decode
    torch_loader.decode = lambda data: ImageOps.invert(decode(data))
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
    be_doctor(*options)


@pytest.mark.slow
def test_a_full_page(images: Path, tmp_path: Path) -> None:
    options = words(images, tmp_path / "runs")
    found = page(*run_group(2, environment(), 120, sick, *options))
    assert failed(found) == {"checkpoint", "decoder"}
    assert "could not be written (File too large" in found["checkpoint"]["fix"]
    assert set(found) == {check.name for check in doctor.CHECKS} - {"SLURM"}
    assert " a second, the network takes " in found["loading"]["seen"]
    assert "gloo, lo" in found["processes"]["seen"]
    assert not (tmp_path / "runs").exists()


def three_hosts() -> None:
    """Be one of three hosts, of which the second is slow, and its clock an hour ahead."""
    rank, receive, seconds = int(os.environ["RANK"]), dist.recv, checks._time

    def slowly(tensor: torch.Tensor, source: int) -> None:
        time.sleep(0.5 * (1 in (rank, source)))
        receive(tensor, source)

    checks.dist.recv = slowly
    checks.socket.gethostname = lambda: f"host{rank}"
    off, clock = rank == 1, time.time
    checks.time.time = lambda: clock() + 3600 * off
    checks._time = lambda work, device: seconds(work, device) * (1 + 9 * off)
    here = replace(context(Path()), config=Config(DataConfig(root="digits")))
    print(checks.processes(here), checks.computing(here), checks._slow_host(here.mesh, 4096))


@pytest.mark.slow
def test_a_slow_host_is_named() -> None:
    code, out, err = run_group(3, environment(), 60, three_hosts)
    assert code == 0, err
    assert out.count("set the clock of host host1 by NTP") == 3
    assert out.count("process 1 (host host1) has 0.") == 3
    assert out.count("host host1 (process 1) has the slowest link, ") == 3


@AS_ROOT
@pytest.mark.slow
def test_hosts_that_differ(images: Path, tmp_path: Path) -> None:
    """Two processes that see another folder, and other versions; and no network is fast enough."""
    fake, runs = tmp_path / "fake", tmp_path / "runs"
    write(fake / "torchvision-0.1.dist-info/METADATA", b"Name: torchvision\nVersion: 0.1\n")
    runs.mkdir()
    options = words(images, runs, "--quick", "--runtime.hang_timeout=1e-6")
    prefix = ["unshare", "-m", "sh", "-c", f'mount -t tmpfs tmpfs {runs}; exec "$@"', "sh"]
    started = []
    for env, before, path in zip(torchrun_env(2), ([], prefix), ("", f"{fake}:"), strict=True):
        env = environment(**env) | {"LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        env["PYTHONPATH"] = path + str(Path(__file__).parents[1])
        line, out = [*before, *command(0, "alexnet_dist.doctor", *options)], subprocess.PIPE
        started.append(subprocess.Popen(line, stdout=out, stderr=out, text=True, env=env))
    outputs = [one.communicate(timeout=150) for one in started]
    assert [one.returncode for one in started] == [1, 1], outputs
    found = page(1, *outputs[0])
    assert failed(found) == {"versions", "same folder", "network"}
    assert "torchvision 0.1, " in found["versions"]["seen"]
    assert found["same folder"]["processes"] == [1]
    assert "no step ends before runtime.hang_timeout" in found["network"]["fix"]


def test_the_page_is_for_people(images: Path, tmp_path: Path) -> None:
    options = words(images, tmp_path / "runs", "--quick")
    options.remove("--json")
    code, out, err = run_group(0, environment(), 60, be_doctor, *options)
    assert code == 0, err
    assert out.splitlines()[1].startswith("ok       versions     alexnet-dist ")
    assert "fails: 0, warnings: 0" in out.splitlines()[-1]
    assert "\x1b" not in out
