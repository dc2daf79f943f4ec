"""Who the processes are, and what is refused before they meet."""

from pathlib import Path

import pytest
import torch

from alexnet_dist.errors import UserError
from alexnet_dist.parallel import mesh


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(UserError) as failure:
        mesh.init_distributed()
    assert str(failure.value) == (
        "3 processes on this machine, and 2 GPUs: take --nproc_per_node=2, or --runtime.device cpu"
    )
    assert failure.value.on_all_ranks


def test_processors_are_those_that_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mesh.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(Path, "read_text", lambda _: "max 100000\n")
    assert mesh.available_cpus() == 8
    monkeypatch.setattr(Path, "read_text", lambda _: "300000 100000\n")
    assert mesh.available_cpus() == 3
