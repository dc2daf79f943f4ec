"""Metrics of steps."""

import numpy as np
import pytest
import torch

from alexnet_dist.training.step import TrainMetrics

pytestmark = pytest.mark.usefixtures("mesh")


def test_metrics_do_not_depend_on_how_often_they_are_reduced() -> None:
    results = [[8.0, 1], [6.0, 2], [float("nan"), 0], [4.0, 3]]
    often, once = TrainMetrics(4, 1), TrainMetrics(4, 1)
    nonfinite = []
    for step, result in enumerate(results, 1):
        for metrics in (often, once):
            indices = np.arange(4) + step
            metrics.add(step, torch.tensor(result, dtype=torch.float64), indices)
        nonfinite += often.reduce()
    assert [(one.step, one.indices.tolist()) for one in nonfinite] == [(3, [3, 4, 5, 6])]
    assert nonfinite[0].problem == "the loss is nan"
    assert [one.step for one in once.reduce()] == [3]
    assert often.state_dict() == once.state_dict()
    resumed = TrainMetrics(4, 1)
    resumed.load_state_dict(often.state_dict())
    averages = {"loss": 1.5, "top1_error": 50.0}
    assert resumed.pop_interval().averages(4) == resumed.epoch.averages(4) == averages
    assert resumed.epoch_images == 16
    assert resumed.pop_interval().averages(4) == {"loss": None, "top1_error": None}


def test_metrics_name_a_step_whose_gradient_was_not_finite() -> None:
    metrics = TrainMetrics(4, 1)
    metrics.add(1, torch.tensor([8.0, 1, 1], dtype=torch.float64), np.arange(4))  # skipped
    (nonfinite,) = metrics.reduce()
    assert nonfinite.problem == "a gradient is not finite"
    assert metrics.consecutive_nonfinite == 1
