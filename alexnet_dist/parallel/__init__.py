"""Processes and layouts: how one network is computed by many processes.

A layout is what the training loop calls; its file says which tensors are sent, when,
in which group, and how many bytes. The network knows nothing of processes.

    ddp.py          each replica computes the full network on its slice of the batch
    towers.py       a replica is two processes with a tower each
    sharded_fc.py   convolutions as in ddp.py, fully connected layers sharded over the replicas
"""

import copy

from alexnet_dist.errors import refuse
from alexnet_dist.model import ModelSpec, Network
from alexnet_dist.parallel.collectives import CommTimer, TimedGroup
from alexnet_dist.parallel.ddp import DDPLayout, LayoutConfig, sync_batch_norms
from alexnet_dist.parallel.mesh import Mesh
from alexnet_dist.parallel.sharded_fc import ShardedFCLayout, shard_classifier
from alexnet_dist.parallel.sharding import Sharding
from alexnet_dist.parallel.towers import split_model

Layout = DDPLayout
"""What ``parallelize`` returns; others are its subclasses."""

__all__ = ["Layout", "LayoutConfig", "parallelize", "validate_parallel_config"]


def parallelize(model: Network, mesh: Mesh, config: LayoutConfig) -> Layout:
    """Lay a copy of ``model``, which is on the meta device, out on the ``mesh``.

    The layout's parameters have no values yet; ``sharding.load_full_weights`` or a checkpoint sets
    them. What ``validate_parallel_config`` refuses is not checked again.
    """
    model, timer = copy.deepcopy(model), CommTimer(mesh.device)
    sync_batch_norms(model, mesh, timer)
    if config.fc == "sharded":
        group = TimedGroup(mesh.group("dp"), timer)
        sharding = Sharding(mesh, shard_classifier(model, group), group, "dp")
        return ShardedFCLayout(model, mesh, config, sharding, timer)
    sharding = Sharding(mesh, {})
    if config.towers == 2:
        group = TimedGroup(mesh.group("mp"), timer)
        sharding = Sharding(mesh, split_model(model, group), group, "mp")
    return DDPLayout(model, mesh, config, sharding, timer)


def validate_parallel_config(spec: ModelSpec, processes: int, config: LayoutConfig) -> None:
    """Refuse what cannot be laid out, before anything is built.

    Raises:
        UserError: the options do not fit each other, the network or the number of processes.
    """
    refuse(
        {
            "parallel.towers 2 and parallel.fc sharded are two ways to split the same layers: take "
            "one of them, the other by --parallel.towers 1 or --parallel.fc replicated": (
                config.towers > 1 and config.fc == "sharded"
            ),
            "parallel.towers 2 wants a network of two towers (paper, original145 and its kin), and "
            "model.arch has one: take --parallel.towers 1, or --parallel.fc sharded": (
                config.towers > 1 and spec.towers != 2
            ),
            f"parallel.towers 2 wants pairs of processes, and there are {processes}: take "
            f"--nproc_per_node={processes + 1}, or --parallel.towers 1": (
                processes % config.towers > 0
            ),
            "parallel.grad_compression powersgd keeps what an overflow of fp16 leaves behind: take "
            "another runtime.precision, or --parallel.grad_compression fp16": (
                config.grad_compression == "powersgd" and config.precision == "fp16"
            ),
        }
    )
