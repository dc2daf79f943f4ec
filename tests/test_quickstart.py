"""The embedded default, to its result."""

from pathlib import Path

import pytest

from tests.conftest import evaluate, events, launch


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_embedded_default_learns_its_digits(tmp_path: Path) -> None:
    result = launch(2, f"--run.output_dir={tmp_path}", timeout=800)
    assert result.code == 0, result.err[-3000:]
    assert "\nnext: --config configs/imagenette.yaml (Imagenette), " in result.out
    run = tmp_path / "quickstart"
    (end,) = events(run, "finished")
    assert end["top1_error"] <= 3.0
    assert end["images"] == 500
    for name in ("first_batch", "curves", "kernels", "predictions"):
        assert (run / f"{name}.png").stat().st_size > 10_000
    counted = evaluate(0, "--checkpoint", str(run))
    assert counted["top1_error"] == events(run, "best")[-1]["top1_error"]
