"""Training in which the images of some steps, or the weights after them, are not finite.

SPOIL=IMAGES:3,4 or WEIGHTS:3 names the steps; weights are spoilt once only, as by a flipped bit.
"""

import os
from pathlib import Path
from typing import Any

import torch

from alexnet_dist import setup, train
from alexnet_dist.errors import run_command

what, _, words = os.environ["SPOIL"].partition(":")
steps = {int(word) for word in words.split(",")}
count = 0
plain_step = setup.train_step
plain_restore = train.Trainer._restore_or_initialize


def restore(run: train.Trainer) -> Any:
    global count
    result = plain_restore(run)
    count = run.step
    return result


def train_step(layout: Any, optimizer: Any, batch: Any, masks: Any) -> torch.Tensor:
    global count
    count += 1
    if what == "IMAGES" and count in steps:
        batch.images.mul_(float("nan"))
    result = plain_step(layout, optimizer, batch, masks)
    once = Path(os.environ["SPOIL_ONCE"] + os.environ.get("RANK", "0"))
    if what == "WEIGHTS" and count in steps and not once.exists():
        once.touch()
        with torch.no_grad():
            next(iter(layout.parameters.values())).fill_(float("inf"))
    return result


setup.train_step = train_step
train.Trainer._restore_or_initialize = restore  # type: ignore[method-assign]

if __name__ == "__main__":
    run_command(train.main)
