"""Who the processes are, and what is refused before they meet."""

import os
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from alexnet_dist.errors import UserError
from alexnet_dist.parallel import mesh, rendezvous
from tests.conftest import error_of


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(UserError) as failure:
        mesh.init_distributed()
    assert str(failure.value) == (
        "3 processes on this machine, and 2 GPUs: take --nproc_per_node=2, or --runtime.device cpu"
    )
    assert failure.value.on_all_ranks


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ("WORLD_SIZE=4", "the environment has only WORLD_SIZE=4: start this command by torchrun"),
        ("RANK=0", "MASTER_ADDR, MASTER_PORT the environment has only RANK=0: start this"),
        ("RANK=0 WORLD_SIZE=1 MASTER_PORT=1", "has only RANK=0, WORLD_SIZE=1, MASTER_PORT=1"),
        ("RANK=a WORLD_SIZE=1 MASTER_ADDR=a MASTER_PORT=1", "has only RANK=a, WORLD_SIZE=1"),
        ("RANK=2 WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=1", "there is no such process: the"),
        ("SLURM_STEP_NUM_TASKS=2", "srun started 2 copies of this command, which know nothing of"),
    ],
)
def test_what_launchers_say_is_checked_together(
    variables: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (word.split("=") for word in variables.split()):
        monkeypatch.setenv(name, value)
    assert message in error_of(mesh.init_distributed)


@pytest.mark.parametrize(
    ("rank", "reason"), [(0, "1/2 clients joined"), (1, "trying to connect to (localhost, ")]
)
def test_a_process_does_not_come(rank: int, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "_RENDEZVOUS_SECONDS", 1)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", str(20000 + os.getpid() % 9000))
    message = error_of(rendezvous.open_store, rank, 2, timedelta(seconds=60))
    fix = "start all machines of the run together"
    for part in ("not all 2 processes met at localhost:", reason, "within 1 s", fix):
        assert part in message


def test_processors_are_those_that_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mesh.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(Path, "read_text", lambda _: "max 100000\n")
    assert mesh.available_cpus() == 8
    monkeypatch.setattr(Path, "read_text", lambda _: "300000 100000\n")
    assert mesh.available_cpus() == 3
