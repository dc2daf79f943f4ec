"""Rates as functions of passes."""

import pytest

from alexnet_dist.training.schedules import Schedule


def test_plateau_divides_by_ten_three_times() -> None:
    schedule = Schedule("plateau", lr=0.01, epochs=90, patience=2)
    seen = []
    for error in (50, 40, 41, 42, 39, 39, 40, 40, 40, 40, 40, 40, 40):
        seen.append(schedule.lr_at("weights", 0))
        schedule.step_metric(error)
    wanted = [1e-2] * 4 + [1e-3] * 3 + [1e-4] * 2 + [1e-5] * 4
    assert seen == pytest.approx(wanted)


def test_plateau_goes_on_from_its_state() -> None:
    first = Schedule("plateau", lr=0.01, epochs=90, patience=2)
    for error in (50, 51):
        first.step_metric(error)
    second = Schedule("plateau", lr=0.01, epochs=90, patience=2)
    second.load_state_dict(first.state_dict())
    second.step_metric(52)
    assert second.lr_at("weights", 3) == pytest.approx(0.001)


def test_tables_hold_from_the_first_step_of_a_pass() -> None:
    table = {"weights": [(0.0, 0.01), (24.0, 0.001)], "conv1.weight": [(0.0, 0.01), (2.0, 0.0)]}
    schedule = Schedule("piecewise", lr=9.0, epochs=90, milestones=table, bias_lr_mult=2.0)
    steps = 7
    assert schedule.lr_at("weights", (24 * steps - 1) / steps) == 0.01
    assert schedule.lr_at("weights", (24 * steps) / steps) == 0.001
    assert schedule.lr_at("conv1.weight", 2.0) == 0.0
    assert schedule.lr_at("biases", 0.0, bias=True) == 0.02


def test_one_cycle_rises_to_its_peak_and_falls_to_nothing() -> None:
    schedule = Schedule("one_cycle", lr=0.005, epochs=10, pct_start=0.3)
    rates = [schedule.lr_at("weights", passes / 10) for passes in range(101)]
    assert rates[0] == pytest.approx(0.0002)
    assert max(rates) == pytest.approx(0.005) == rates[30]
    assert rates[:31] == sorted(rates[:31])
    assert rates[30:] == sorted(rates[30:], reverse=True)
    assert rates[100] == pytest.approx(0)


def test_polynomial_falls_as_the_square_of_what_is_left() -> None:
    schedule = Schedule("polynomial", lr=10.0, epochs=100, warmup_epochs=2.0)
    assert schedule.lr_at("weights", 1.0) == pytest.approx(10 * 0.99**2 / 2)
    assert schedule.lr_at("weights", 75.0) == pytest.approx(0.625)
    assert schedule.lr_at("weights", 100.0) == 0


def test_warmup_and_biases() -> None:
    schedule = Schedule("constant", lr=0.01, epochs=5, warmup_epochs=2.0, bias_lr_mult=2.0)
    assert schedule.lr_at("weights", 0.0) == 0
    assert schedule.lr_at("weights", 1.0) == pytest.approx(0.005)
    assert schedule.lr_at("biases", 4.0, bias=True) == pytest.approx(0.02)


def test_a_factor_multiplies_any_schedule() -> None:
    lr_mults = {"fc8.weight": 0.05}
    for name in ("constant", "plateau", "one_cycle", "polynomial", "piecewise"):
        table = {"weights": [(0.0, 0.01), (2.0, 0.004)]}
        schedule = Schedule(
            name, lr=0.02, epochs=4, milestones=table, warmup_epochs=0.5, lr_mults=lr_mults
        )
        for passes in (0.25, 1.0, 2.0, 3.5):
            whole = schedule.lr_at("weights", passes)
            assert schedule.lr_at("fc8.weight", passes) == pytest.approx(0.05 * whole)
