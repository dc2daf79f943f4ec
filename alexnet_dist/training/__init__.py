"""A step, an evaluation, the optimizer and its rates, checkpoints."""
