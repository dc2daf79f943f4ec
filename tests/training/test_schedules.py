"""Learning rates as functions of the epoch."""

from typing import Any

import pytest

from alexnet_dist.training.schedules import Schedule


def test_plateau_divides_by_ten_three_times_and_resumes() -> None:
    schedule = Schedule("plateau", lr=0.01, epochs=90, patience=2)
    lrs = []
    for error in (50, 40, 41, 42, 39, 39, 40, 40, 40, 40, 40, 40, 40):
        lrs.append(schedule.lr_at("weights", 0))
        resumed = Schedule("plateau", lr=0.01, epochs=90, patience=2)
        resumed.load_state_dict(schedule.state_dict())
        schedule = resumed
        schedule.step_metric(error)
    assert lrs == pytest.approx([1e-2] * 4 + [1e-3] * 3 + [1e-4] * 2 + [1e-5] * 4)


def test_one_cycle_rises_to_its_peak_and_falls_to_zero() -> None:
    schedule = Schedule("one_cycle", lr=0.005, epochs=10, pct_start=0.3)
    lrs = [schedule.lr_at("weights", tenth / 10) for tenth in range(101)]
    assert lrs[0] == pytest.approx(0.0002)
    assert max(lrs) == pytest.approx(0.005) == lrs[30]
    assert lrs[:31] == sorted(lrs[:31])
    assert lrs[30:] == sorted(lrs[30:], reverse=True)
    assert lrs[100] == pytest.approx(0)


def test_polynomial_falls_as_the_square_of_what_is_left() -> None:
    schedule = Schedule("polynomial", lr=10.0, epochs=100, warmup_epochs=2.0)
    assert schedule.lr_at("weights", 1.0) == pytest.approx(10 * 0.99**2 / 2)
    assert schedule.lr_at("weights", 75.0) == pytest.approx(0.625)
    assert schedule.lr_at("weights", 100.0) == 0


def test_lr_mults_and_warmup_multiply_any_schedule() -> None:
    for name in ("constant", "plateau", "one_cycle", "polynomial", "piecewise"):
        options: Any = {"milestones": {"weights": [(0.0, 0.01), (2.0, 0.004)]}}
        options["lr_mults"] = {"fc8.weight": 0.05, "biases": 2.0}
        schedule = Schedule(name, lr=0.02, epochs=4, warmup_epochs=0.5, **options)
        for epoch in (0.25, 1.0, 2.0, 3.5):
            lr = schedule.lr_at("weights", epoch)
            assert schedule.lr_at("fc8.weight", epoch) == pytest.approx(0.05 * lr)
            assert schedule.lr_at("biases", epoch) == pytest.approx(2 * lr)
        assert schedule.lr_at("weights", 0.0) == 0
    assert Schedule("constant", 0.01, 5, warmup_epochs=2).lr_at("weights", 1.0) == 0.005
