"""What every benchmark stores beside its results."""

import json
import platform
import time
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch

from alexnet_dist.parallel.mesh import available_cpus

CPU = torch.device("cpu")


def machine_info(device: torch.device = CPU) -> dict[str, Any]:
    """The processor, the GPU, and the versions of what computes."""
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    fields = dict(line.replace("\t", "").split(":", 1) for line in cpuinfo.splitlines() if line)
    flags = fields.get("flags", "").split()
    versions = {d.metadata["Name"]: d.version for d in distributions()}
    return {
        "processor": fields.get("model name", platform.processor()).strip(),
        "cpus": available_cpus(),
        "cpu_flags": [flag for flag in ("avx2", "avx512_bf16", "amx_bf16") if flag in flags],
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": versions.get("torchvision"),
        "dali": next((v for name, v in versions.items() if name.startswith("nvidia-dali")), None),
    }


def save_record(
    script: str, results: dict[str, Any], out: Path | None, device: torch.device = CPU
) -> None:
    """Print results, and write them with date and machine to ``out``, if it is given."""
    print(json.dumps(results, indent=1))
    if out:
        about = {"what": f"benchmarks/{script}", "date": time.strftime("%Y-%m-%d")}
        record = about | {"machine": machine_info(device)} | results
        out.write_text(json.dumps(record, indent=1) + "\n")
