"""What the device of a tensor can do."""

import importlib.util

import torch

TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


def is_triton_supported(device: torch.device) -> bool:
    """Whether Triton is installed and compiles for ``device``: an NVIDIA GPU, Ampere or newer."""
    return (
        TRITON_INSTALLED
        and device.type == "cuda"
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def autocast_enabled(device: torch.device) -> bool:
    """Whether autocast is on for ``device``; the meta device has none."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)
