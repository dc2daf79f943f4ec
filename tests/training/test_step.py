"""Metrics of steps, and how far a host may run ahead of its GPU."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.distributed as dist

from alexnet_dist.training.step import StepThrottle, TrainMetrics


@pytest.fixture
def _process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_process_group")
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
    assert nonfinite[0].description == "the loss is nan"
    assert [one.step for one in once.reduce()] == [3]
    assert often.state_dict() == once.state_dict()
    resumed = TrainMetrics(4, 1)
    resumed.load_state_dict(often.state_dict())
    assert resumed.pop_averages() == (1.5, 50.0)
    assert (resumed.epoch_images, resumed.epoch_num_correct, resumed.epoch_steps) == (16, 6, 3)
    assert resumed.pop_averages() == (None, None)


@pytest.mark.usefixtures("_process_group")
def test_metrics_name_a_step_whose_gradient_was_not_finite() -> None:
    metrics = TrainMetrics(4, 1)
    metrics.add(1, torch.tensor([8.0, 1, 1], dtype=torch.float64), np.arange(4))  # skipped
    (nonfinite,) = metrics.reduce()
    assert nonfinite.description == "a gradient is not finite"
    assert metrics.consecutive_nonfinite == 1


class Event:
    """An event of a device whose steps end when somebody waits for them."""

    done: list["Event"]

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        Event.done.append(self)


class Batch:
    alive = 0

    def __init__(self) -> None:
        Batch.alive += 1

    def __del__(self) -> None:
        Batch.alive -= 1


def test_throttle_keeps_two_steps_in_flight_and_their_batches_alive(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Event.done = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    throttle = StepThrottle(torch.device("cuda"))
    for step in range(1, 6):
        throttle.step_launched(Batch())  # type: ignore[arg-type]
        assert len(Event.done) == max(step - StepThrottle.MAX_STEPS_AHEAD, 0)
        assert Batch.alive == min(step, StepThrottle.MAX_STEPS_AHEAD)
    del throttle
    assert Batch.alive == 0
    StepThrottle(torch.device("cpu")).step_launched(Batch())  # type: ignore[arg-type]
    assert Batch.alive == 0
