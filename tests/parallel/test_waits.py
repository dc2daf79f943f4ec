"""How long a process waits for others, which is added up and handed out once."""

import time

import torch

from alexnet_dist.parallel.waits import Waits

CPU = torch.device("cpu")


def test_what_is_waited_for_is_added_up_and_taken_once() -> None:
    waits, began = Waits(), time.perf_counter()
    for _ in range(2):
        waits.begin(CPU)
        time.sleep(0.05)
        waits.begin(CPU)  # more has come: the wait begins only here
        time.sleep(0.02)
        waits.end()
    with waits.paused():
        waits.begin(CPU)
        time.sleep(0.05)
        waits.end()
    others = 3 * 0.05  # what lay before the waits, and in the pause
    assert 0.04 <= waits.take() <= time.perf_counter() - began - others
    assert waits.take() == 0
    waits.end()  # of nothing
    assert waits.take() == 0
