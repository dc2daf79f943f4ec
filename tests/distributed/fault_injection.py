"""Training with a fault that the environment names, FAULT=KIND[:STEPS].

images:6,18     the images of these steps are not finite
weights:8       nor is a weight after this step
evaluation      a file PREEMPT appears in RUN during the first evaluation
"""

import os
import time
from pathlib import Path
from typing import Any

import torch

from alexnet_dist import setup, train
from alexnet_dist.errors import run_command

kind, _, words = os.environ["FAULT"].partition(":")
steps = [int(word) for word in words.split(",") if word]
count = 0
train_step, evaluate = setup.train_step, train.evaluate


def faulty_train_step(layout: Any, optimizer: Any, batch: Any, masks: Any) -> torch.Tensor:
    global count
    count += 1
    if kind == "images" and count in steps:
        batch.images.mul_(float("nan"))
    result = train_step(layout, optimizer, batch, masks)
    if kind == "weights" and count in steps:
        with torch.no_grad():
            next(iter(layout.parameters.values())).fill_(float("inf"))
    return result


def preempted_evaluate(layout: Any, batches: Any, device: Any, after_batch: Any) -> Any:
    def touch() -> None:
        Path(os.environ["RUN"], "PREEMPT").touch()
        time.sleep(1.1)
        after_batch()

    return evaluate(layout, batches, device, touch)


setup.train_step = faulty_train_step
if kind == "evaluation":
    train.evaluate = preempted_evaluate

if __name__ == "__main__":
    run_command(train.main)
