"""Which decoder is chosen on a GPU by what its trials say; whether they are true: tests/gpu."""

import importlib.metadata
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from alexnet_dist.data import dali_probe

GPU = torch.device("cuda", 1)


@pytest.mark.parametrize(
    ("roi", "full", "decoder"),
    [
        ("0.2", "0.5", "roi"),
        ("0.5", "0.2", "full"),  # regions are decoded on the CPU
        (-11, "0.2", "full"),
        (None, "0.2", "full"),  # it hangs
        (-11, 1, "cpu"),
    ],
)
def test_the_fastest_decoder_that_works_is_remembered(
    roi: Any, full: Any, decoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trials: list[str] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        trials.append(command[-2])
        assert command[-1] == "1"
        answer = {"roi": roi, "full": full}[command[-2]]
        if answer is None:
            raise subprocess.TimeoutExpired(command, 120)
        code = answer if isinstance(answer, int) else 0
        return subprocess.CompletedProcess(command, code, f"{answer}\n", "")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: gpus[-1])
    monkeypatch.setattr(importlib.metadata, "distribution", {}.get)  # DALI has many
    gpus = []
    for gpu, tried in (("H100", 2), ("H100", 2), ("A100", 4)):
        gpus.append(gpu)
        dali_probe.probe_decoder.cache_clear()  # as another process has it
        assert dali_probe.probe_decoder(GPU) == decoder
        assert len(trials) == tried
    dali_probe.probe_decoder.cache_clear()


def test_a_read_only_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "file"))
    monkeypatch.setattr(dali_probe, "_time", lambda decoder, _: {"roi": 1.0, "full": 2.0}[decoder])
    dali_probe.probe_decoder.cache_clear()
    assert dali_probe.probe_decoder(GPU) == "roi"
    dali_probe.probe_decoder.cache_clear()
