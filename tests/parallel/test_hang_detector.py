"""Who is named where nobody can be asked; with real processes it is in tests/distributed."""

import sys
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from alexnet_dist.parallel import hang_detector
from alexnet_dist.parallel.hang_detector import HangDetector


def test_a_store_that_never_answers_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    back = threading.Event()
    # as torch's client shows a store on a host that is cut off: nothing ever comes
    store = SimpleNamespace(set=lambda *_: None, get=lambda _: back.wait() and "{}")
    monkeypatch.setattr(hang_detector, "_get_default_store", lambda: store)
    monkeypatch.setattr(hang_detector, "_STORE_TIMEOUT", 0.1)
    monkeypatch.setattr(hang_detector.os, "_exit", sys.exit)
    monkeypatch.setenv("MASTER_ADDR", "10.91.0.1")
    monkeypatch.setenv("LOCAL_RANK", "0")
    mesh: Any = SimpleNamespace(rank=1, world_size=2)
    detector = HangDetector(mesh, 600)
    with pytest.raises(SystemExit):
        detector._find_stragglers()
    detector.close()
    back.set()
    said = "host 10.91.0.1, which keeps the processes' store, does not answer"
    assert said in capsys.readouterr().err
