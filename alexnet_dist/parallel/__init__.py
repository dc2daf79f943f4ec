"""Processes and layouts: how one network is computed by many.

A layout is what the training loop calls; its file says which tensors move, when, in which group,
and how many bytes. The network knows none of it.

    ddp.py       each replica computes the whole network on its rows
    towers.py    a replica is two processes with a tower each
    hybrid.py    convolutions as in ddp.py, fully connected layers split over the replicas
"""

import torch
from torch import Tensor, nn

from alexnet_dist.errors import UserError
from alexnet_dist.model.alexnet import AlexNet, ModelSpec, TorchvisionAlexNet
from alexnet_dist.parallel.ddp import WARM_UP, DDPLayout, GradCompression
from alexnet_dist.parallel.mesh import Mesh
from alexnet_dist.parallel.precision import Precision
from alexnet_dist.parallel.sharded_fc import ShardedFCLayout
from alexnet_dist.parallel.sharded_loss import ShardedClasses
from alexnet_dist.parallel.sharding import Sharding, ShardSpec
from alexnet_dist.parallel.towers import tower_of

__all__ = ["ddp_warmup", "parallelize", "validate_parallel_config"]


def validate_parallel_config(
    variant: ModelSpec,
    processes: int,
    *,
    towers: int,
    fc: str,
    fc_schedule: str = "whole",
    compress: str,
    precision: Precision,
) -> None:
    """Refuse what cannot be laid out, before anything is begun.

    Raises:
        Failure: in one sentence.
    """
    refusal = ""
    if towers > 1 and fc == "sharded":
        refusal = (
            "parallel.towers 2 and parallel.fc sharded are two ways to split the same layers: take "
            "one of them, the other by --parallel.towers 1 or --parallel.fc replicated"
        )
    elif towers > 1 and variant.towers != 2:
        refusal = (
            "parallel.towers 2 wants a network of two towers (paper, original145 and its kin), and "
            "model.arch has one: take --parallel.towers 1, or --parallel.fc sharded"
        )
    elif processes % towers:
        refusal = (
            f"parallel.towers 2 wants pairs of processes, and there are {processes}: take "
            f"--nproc_per_node={processes + 1}, or --parallel.towers 1"
        )
    elif (fc, fc_schedule) == ("sharded", "pipelined") and any(
        not row.kernel and "bn" in row.post_ops for row in variant.layers
    ):
        refusal = (
            "parallel.fc_schedule pipelined computes fully connected layers in turns, and their "
            "batch normalisation wants the whole batch: take --parallel.fc_schedule whole"
        )
    elif compress == "powersgd" and precision == "fp16":
        refusal = (
            "parallel.grad_compression powersgd keeps what an overflow of fp16 leaves behind: "
            "take another runtime.precision, or --parallel.grad_compression fp16"
        )
    if refusal:
        raise UserError(refusal, on_all_ranks=True)


def parallelize(
    model: AlexNet | TorchvisionAlexNet,
    mesh: Mesh,
    *,
    batch: int,
    accumulate: int = 1,
    num_classes: int,
    precision: Precision,
    fc: str = "replicated",
    fc_schedule: str = "whole",
    compression: GradCompression,
    compile_model: bool = False,
    weight_copies: bool = False,
) -> DDPLayout | ShardedFCLayout:
    """Lay ``model``, as ``outline`` gives it, out on the ``mesh``, as it is arranged.

    Its parameters have no values yet; ``sharding.fill`` or a checkpoint gives them. What
    ``check_layout`` refuses is not asked again.
    """
    if fc == "sharded":
        return ShardedFCLayout(
            model,
            mesh,
            batch=batch,
            accumulate=accumulate,
            precision=precision,
            schedule="pipelined" if fc_schedule == "pipelined" else "whole",
            compile_model=compile_model,
            compression=compression,
        )
    classes = sharding = None
    network: nn.Module = model
    if mesh.split_size > 1:
        assert isinstance(model, AlexNet)
        network = tower_of(model, mesh)
        classes = ShardedClasses(
            ShardSpec(num_classes, mesh.split_size, mesh.split_rank), mesh.group("mp")
        )
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        sharding = Sharding(mesh, shapes, "mp")
    return DDPLayout(
        network,
        mesh,
        batch=batch,
        accumulate=accumulate,
        precision=precision,
        compile_model=compile_model,
        compression=compression,
        classes=classes,
        sharding=sharding,
        weight_copies=weight_copies,
    )


def ddp_warmup(
    layout: DDPLayout | ShardedFCLayout, images: Tensor, labels: Tensor, masks: tuple[Tensor, ...]
) -> None:
    """The passes of WARM_UP, on any images; no parameter changes."""
    averages = [p for p in layout.parameters.values() if not p.requires_grad]  # these move forward
    before = [average.detach().clone() for average in averages]
    for _ in range(WARM_UP):
        layout.forward_backward(images, labels, masks)
    with torch.no_grad():
        for average, value in zip(averages, before, strict=True):
            average.copy_(value)
    for parameter in layout.parameters.values():
        parameter.grad = None
