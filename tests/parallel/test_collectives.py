"""How long a process waits for others, which is added up and handed out once."""

import time

import torch

from alexnet_dist.parallel.collectives import CommTimer


def test_comm_timer_adds_waits_up_and_hands_them_out_once() -> None:
    timer, began = CommTimer(torch.device("cpu")), time.perf_counter()
    for _ in range(2):
        timer.start()
        time.sleep(0.05)
        timer.start()  # more has come: the wait starts only here
        time.sleep(0.02)
        timer.stop()
    others = 2 * 0.05  # before the waits
    assert 0.04 <= timer.pop_seconds() <= time.perf_counter() - began - others
    assert timer.pop_seconds() == 0
    timer.stop()  # without a start
    assert timer.pop_seconds() == 0
