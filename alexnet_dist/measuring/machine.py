"""What a figure was measured on."""

import os
import platform
from pathlib import Path
from typing import Any

import torch
import torchvision


def machine(device: torch.device) -> dict[str, Any]:
    """The processor, the GPU and the versions, as they stand beside each figure."""
    flags, name = "", platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), name)
        flags = next((x for x in lines if x.startswith("flags")), "")
    record: dict[str, Any] = {
        "processor": name,
        "processors": len(os.sched_getaffinity(0)),
        "amx_bf16": "amx_bf16" in flags,
        "avx512_bf16": "avx512_bf16" in flags,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "python": platform.python_version(),
    }
    try:
        from nvidia import dali

        record["dali"] = dali.__version__
    except ImportError:
        record["dali"] = None
    if device.type == "cuda":
        record["gpu"] = torch.cuda.get_device_name(device)
    return record
