"""Numerical precision: which one, and how torch is told of it."""

import os
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from alexnet_dist.parallel.collectives import TimedGroup

Precision = Literal["fp32", "tf32", "bf16", "fp16"]
Wanted = Precision | Literal["auto"]

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_precision(wanted: Wanted, device: torch.device) -> Precision:
    """What "auto" stands for: bf16 where the device is fast at it, else fp16 on GPUs, fp32 on CPUs.

    An Intel CPU with bf16's instructions but no AMX took 1.45 times as long in bf16 as in fp32.
    """
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    try:
        processor = Path("/proc/cpuinfo").read_text()
    except OSError:
        return "fp32"
    fast = "amx_bf16" in processor or ("avx512_bf16" in processor and "AuthenticAMD" in processor)
    return "bf16" if fast else "fp32"


def use_precision(wanted: Wanted, device: torch.device, deterministic: bool) -> Precision:
    """Have torch take TF32 only where asked for; cuDNN its fastest kernels if it may."""
    precision = resolve_precision(wanted, device)
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    return precision


def device_name(device: torch.device) -> str:
    """The device's name for people."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({torch.backends.cpu.get_cpu_capability()})"


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    """torch.autocast to ``precision``; disabled in fp32 and tf32."""
    dtype = _AUTOCAST.get(precision)
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def compile_module(module: nn.Module) -> nn.Module:
    """``module`` under torch.compile, but max pooling's backward as eager: torch 2.14 decomposes it
    into atomic additions, whose sums have other bits each time (pytorch issue 167318)."""
    from torch._inductor.decomposition import select_decomp_table  # takes a second

    select_decomp_table().pop(torch.ops.aten.max_pool2d_with_indices_backward.default, None)
    compiled = torch.compile(module)
    assert isinstance(compiled, nn.Module)
    return compiled


class SyncedGradScaler(GradScaler):
    """Skips updates whose gradients are not finite, without waiting for the device to report it.

    In fp16 it scales losses, too. In other precisions it takes a pass over the gradients, and does
    not change the bits of other updates.

    Args:
        group: processes whose gradients differ, and which skip a step together; None where all
            have the same.
        fp16: whether the precision is fp16.
        skip: whether steps are to be skipped, and reported, for other reasons than fp16.

    Attributes:
        skipped: 1 on the device where ``skip`` skipped the last step, else 0. An overflow of fp16
            does not count: it is how the scale is found.
    """

    def __init__(
        self, device: torch.device, group: TimedGroup | None, *, fp16: bool, skip: bool
    ) -> None:
        super().__init__(device.type, init_scale=2.0**16 if fp16 else 1.0)
        self.fp16, self.skip, self._group = fp16, skip, group
        self.skipped = torch.zeros((), device=device)

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        super().unscale_(optimizer)
        for found in self._per_optimizer_states[id(optimizer)]["found_inf_per_device"].values():
            if self._group is not None:
                dist.all_reduce(found, dist.ReduceOp.MAX, self._group.group)
            if not self.fp16:
                self.skipped = found

    def update(self, new_scale: float | Tensor | None = None) -> None:
        if self.fp16:
            super().update(new_scale)
        self._per_optimizer_states.clear()

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() if self.fp16 else {}
