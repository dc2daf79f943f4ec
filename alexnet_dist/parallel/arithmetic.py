"""How numbers are computed: precision, and what torch is told of it."""

import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch.amp.grad_scaler import GradScaler
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

Precision = Literal["fp32", "tf32", "bf16", "fp16"]

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def choose_precision(
    wanted: Literal["auto", "fp32", "tf32", "bf16", "fp16"], device: torch.device
) -> Precision:
    """bf16 where the device has instructions for it, unless something is asked for."""
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return "fp32"
    return "bf16" if "avx512_bf16" in flags or "amx_bf16" in flags else "fp32"


def set_arithmetic(precision: str, deterministic: bool) -> None:
    """How torch computes: TF32 only where asked for, and cuDNN's fastest kernels unless the bits
    are to repeat."""
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def device_name(device: torch.device) -> str:
    """What to call the device when speaking to people."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({torch.backends.cpu.get_cpu_capability()})"


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[None]:
    """torch's own lowering to ``precision``; nothing in fp32 and tf32."""
    dtype = _AUTOCAST.get(precision)
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def grad_scaler(
    precision: Precision, device: torch.device, group: dist.ProcessGroup | None
) -> GradScaler:
    """A scaler of the loss, which does something in fp16 only.

    Args:
        group: processes whose gradients differ, and which leave a step out together; None where
            all have the same.
    """
    enabled = precision == "fp16"
    if group is None or not enabled:
        return GradScaler(device.type, enabled=enabled)
    return _SharedScaler(device.type, process_group=group)


class _SharedScaler(ShardedGradScaler):
    """torch adds up how many processes have overflowed; its fused optimizers leave a step out where
    that is exactly one."""

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        super().unscale_(optimizer)
        for found in self._per_optimizer_states[id(optimizer)]["found_inf_per_device"].values():
            found.clamp_(max=1.0)
