"""A process that only launches work does not run away from its device."""

import pytest
import torch

from alexnet_dist.training.step import StepThrottle


class Event:
    """One of a device whose steps end when somebody waits for them."""

    done: list["Event"]

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        Event.done.append(self)


class Batch:
    """Tells when it is let go."""

    alive = 0

    def __init__(self) -> None:
        Batch.alive += 1

    def __del__(self) -> None:
        Batch.alive -= 1


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[Event]:
    Event.done = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    return Event.done


def test_two_steps_are_under_way_and_their_batches_alive(events: list[Event]) -> None:
    pace = StepThrottle(torch.device("cuda"))
    for step in range(1, 6):
        pace.started(Batch())  # type: ignore[arg-type]
        assert len(events) == max(step - StepThrottle.AHEAD, 0)
        assert Batch.alive == min(step, StepThrottle.AHEAD)
    pace.finish()
    assert len(events) == 5
    assert Batch.alive == 0


def test_on_a_processor_steps_are_done_when_they_return(events: list[Event]) -> None:
    pace = StepThrottle(torch.device("cpu"))
    pace.started(Batch())  # type: ignore[arg-type]
    assert Batch.alive == 0
    pace.finish()
    assert events == []
