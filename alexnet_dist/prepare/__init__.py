"""Prepare ImageNet for training: the command is in __main__.py."""
