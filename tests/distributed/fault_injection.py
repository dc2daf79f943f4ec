"""Training with a fault that the environment names, FAULT=KIND[:STEPS].

images:6,18     the images of these steps are not finite
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
train_step = setup.train_step


def faulty_train_step(layout: Any, optimizer: Any, images: Any, *others: Any) -> torch.Tensor:
    global count
    count += 1
    if kind == "images" and count in steps:
        images.mul_(float("nan"))
    return train_step(layout, optimizer, images, *others)


class PreemptedEvaluation(train.EvalMetrics):
    def update(self, counts: torch.Tensor) -> None:
        super().update(counts)
        Path(os.environ["RUN"], "PREEMPT").touch()
        time.sleep(1.1)


setup.train_step = faulty_train_step
if kind == "evaluation":
    train.EvalMetrics = PreemptedEvaluation

if __name__ == "__main__":
    run_command(train.main)
