"""What each process of a group does for test_layouts.py: jobs, of which rank 0 prints the results,
a line of JSON each.

A LAYOUT is ddp, towers or sharded, perhaps with "*" and a number of microbatches, and "+" and a
gradient compression.

    gradients LAYOUT ARCH CLASSES BATCH     and two LARS updates, against one device, in float64
    evaluation LAYOUT CLASSES BATCH         likewise, for batches that do not divide evenly
    steps LAYOUT STEPS BATCH ARCH           losses of float32 steps with dropout, running averages
    overflow LAYOUT WHERE                   whether fp16 skips the step
    memory LAYOUT                           bytes of parameters and momentum
    write LAYOUT FOLDER                     a checkpoint
    read LAYOUT FOLDER                      how many of its tensors are what they were
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from alexnet_dist.model import (
    MODEL_REGISTRY,
    Network,
    build_model,
    build_on_meta,
    dropout_layers,
    iter_initial_weights,
    make_dropout_masks,
)
from alexnet_dist.parallel import LayoutConfig, parallelize
from alexnet_dist.parallel.mesh import Mesh, init_distributed
from alexnet_dist.training.checkpoint import CheckpointManager, find_checkpoint, load_tensors
from alexnet_dist.training.optim import build_optimizer, momentum_buffers
from alexnet_dist.training.step import train_step

SIDE = 67
SEED = 5
DECAYING = {"momentum": 0.9, "weight_decay": 0.01}


class Trainer:
    """A network under a layout, with an optimizer; its step s takes batch s and its masks."""

    def __init__(
        self,
        mesh: Mesh,
        layout: str,
        batch: int,
        arch: str = "paper",
        classes: int = 10,
        precision: Any = "fp32",
        optimizer: Any = "sgd2012",
        lr: float = 1e-4,
    ) -> None:
        layout, _, compression = layout.partition("+")
        kind, _, microbatches = layout.partition("*")
        self.batch, self.classes = batch, classes
        self.mesh = mesh.with_layout(2 if kind == "towers" else 1)
        self.full = build_on_meta(arch, image_size=SIDE, num_classes=classes)
        options: dict[str, Any] = {"grad_compression": compression or "none"}
        options |= {"powersgd_rank": 2, "powersgd_start": 2, "towers": self.mesh.split_size}
        options["fc"] = "sharded" if kind == "sharded" else "replicated"
        config = LayoutConfig(batch, int(microbatches or 1), precision, **options)
        self.layout = parallelize(self.full, self.mesh, config)
        self.parameters, self.sharding = self.layout.parameters, self.layout.sharding
        torch.manual_seed(SEED)
        self.sharding.load_full_weights(self.parameters, iter_initial_weights(self.full))
        options = {"lr": lr, "all_reduce_norms": self.sharding.all_reduce_partial_sums, **DECAYING}
        self.optimizer = build_optimizer(optimizer, self.parameters, **options)

    def inputs(self, step: int) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        images, labels = batch_of(self.mesh, self.batch, self.classes, step)
        rows = self.mesh.batch_slice
        return images[rows], labels[rows], self.layout.dropout_masks(1, step)

    def forward_backward(self, step: int) -> Tensor:
        return self.layout.forward_backward(*self.inputs(step))

    def train(self, count: int) -> list[float]:
        losses = []
        for step in range(count):
            result = train_step(self.layout, self.optimizer, *self.inputs(step))
            dist.all_reduce(result)
            losses.append(float(result[0]) / self.batch)
        return losses

    def full_tensor(self, name: str, local: Tensor) -> Tensor:
        tensor = self.sharding.to_dtensor(name, local.contiguous())
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def checkpoints(self, folder: str) -> CheckpointManager:
        parts = self.mesh.checkpoint_group, self.layout, self.optimizer
        return CheckpointManager(Path(folder), *parts, lambda *_, **__: None)

    def fill_state(self, scale: float) -> dict[str, Tensor]:
        """Give parameters and momentum values that follow from their names, times ``scale``; what a
        checkpoint has of them."""
        state, shapes = self.checkpoints("").state_tensors(), dict(self.full.named_parameters())
        for key, tensor in state.items():
            name = key.partition(".")[2]
            generator = torch.Generator().manual_seed(sum(key.encode()))
            value = torch.randn(shapes[name].shape, generator=generator) * scale
            local(tensor).copy_(self.sharding.local_shard(name, value))
        return state


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def batch_of(mesh: Mesh, count: int, classes: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, SIDE, SIDE, generator=generator) * 60
    labels = torch.randint(classes, (count,), generator=generator)
    return images.to(mesh.device, memory_format=torch.channels_last), labels.to(mesh.device)


def model_on_one_device(mesh: Mesh, arch: str, classes: int) -> Network:
    torch.manual_seed(SEED)
    model = build_model(arch, num_classes=classes, image_size=SIDE)
    return model.to(mesh.device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def gradients(mesh: Mesh, layout: str, arch: str, classes: int, batch: int) -> dict:
    torch.set_default_dtype(torch.float64)
    lr = 1e-3 if arch.endswith("bn") else 50.0
    ours = Trainer(mesh, layout, batch, arch=arch, classes=classes, optimizer="lars", lr=lr)
    model = model_on_one_device(mesh, arch, classes)
    alone = dict(model.named_parameters())
    optimizer = build_optimizer("lars", alone, lr=lr, **DECAYING)
    answer: dict[str, Any] = {"loss": 0.0, "gradients": 0.0, "updated": 0.0}
    for step in (3, 4):
        images, labels = batch_of(mesh, batch, classes, step)
        rows = {"batch": batch, "rows": slice(None), "device": mesh.device}
        masks = make_dropout_masks(dropout_layers(model), seed=1, step=step, **rows)
        logits = model(images, masks)
        loss = F.cross_entropy(logits, labels)
        loss.backward()
        result = ours.forward_backward(step)
        dist.all_reduce(result)
        answer["loss"] = max(answer["loss"], abs(float(result[0]) / batch / loss.item() - 1))
        answer["correct"] = [int(result[1]), int((logits.argmax(1) == labels).sum())]
        for name, wanted in alone.items():
            # running averages have no gradient, and are what the forward pass made of them
            pair = ours.parameters[name], wanted
            mine, theirs = (p.grad if p.requires_grad else p.detach() for p in pair)
            error = (ours.full_tensor(name, mine) - theirs).abs().max()
            # the gradient of a bias in front of a batch normalization is nothing but rounding
            error = float(error / theirs.abs().max().clamp_min(1e-5))
            answer["gradients"] = max(error, answer["gradients"])
        for one in (ours.optimizer, optimizer):
            one.step()
            one.zero_grad()
    torch.set_default_dtype(torch.float32)
    for name, wanted in alone.items():
        error = (ours.full_tensor(name, ours.parameters[name].detach()) - wanted).abs().max()
        answer["updated"] = max(
            answer["updated"], float(error / wanted.abs().max().clamp_min(1e-5))
        )
    return answer


def evaluation(mesh: Mesh, layout: str, classes: int, batch: int) -> dict:
    """The last batch has fewer images than there are replicas."""
    ours = Trainer(mesh, layout, batch, classes=classes)
    model, rows = model_on_one_device(mesh, "paper", classes).eval(), ours.mesh.batch_slice
    total, expected = torch.zeros(2, 4, dtype=torch.float64, device=mesh.device)
    error = 0.0
    for seed, count in enumerate((batch, batch - 1, 1)):
        images, labels = batch_of(mesh, count, classes, seed)
        total += ours.layout.eval_counts(images[rows], labels[rows])
        with torch.no_grad():
            logits = model(images)
        best = logits.topk(min(5, classes), 1).indices == labels[:, None]
        loss = F.cross_entropy(logits.double(), labels, reduction="sum")
        expected += torch.stack([loss, best[:, 0].sum(), best.sum(), loss * 0 + count])
        error = max(error, float((ours.layout.logits(images) - logits).abs().max()))
    dist.all_reduce(total)
    return {"got": total.tolist(), "expected": expected.tolist(), "logits": error}


def steps(mesh: Mesh, layout: str, count: int, batch: int, arch: str) -> dict:
    recipe = {"optimizer": "sgd", "lr": 0.1} if arch == "alexnet_bn" else {}
    ours = Trainer(mesh, layout, batch, arch=arch, **recipe)
    averages = {k: p for k, p in ours.parameters.items() if not p.requires_grad}
    before = {key: average.clone() for key, average in averages.items()}
    ours.layout.warm_up(SIDE)
    unmoved = all(torch.equal(average, before[key]) for key, average in averages.items())
    losses = ours.train(count)
    values = {key: ours.full_tensor(key, p.detach()).tolist() for key, p in averages.items()}
    return {
        "losses": losses,
        "averages": values,
        "unmoved": all(mesh.all_gather_object(unmoved)),
        "same_bits": all(other == values for other in mesh.all_gather_object(values)),
    }


def overflow(mesh: Mesh, layout: str, where: str) -> dict:
    """Whether a step of fp16 is skipped where gradients overflow, on the first process or on
    "all", and the next one is taken."""
    ours = Trainer(mesh, layout, 6, precision="fp16", optimizer="sgd")
    before = {key: p.detach().clone() for key, p in ours.parameters.items()}
    ours.forward_backward(0)
    if mesh.rank == 0 or where == "all":
        for parameter in ours.parameters.values():
            parameter.grad = torch.full_like(parameter, torch.inf)
    scaler = ours.layout.scaler
    scaler.unscale_(ours.optimizer)
    scaler.step(ours.optimizer)
    scaler.update()
    ours.optimizer.zero_grad()
    same = all(torch.equal(p, before[key]) for key, p in ours.parameters.items())
    ours.train(1)
    finite = all(bool(p.isfinite().all()) for p in ours.parameters.values())
    moved = any(not torch.equal(p, before[key]) for key, p in ours.parameters.items())
    return {"ok": all(mesh.all_gather_object(same and finite and moved))}


def memory(mesh: Mesh, layout: str) -> dict:
    """Resident memory that this process takes for its parameters and their momentum, at the end
    and at most; the largest over the processes, in bytes."""
    before = resident("VmRSS")
    ours = Trainer(mesh, layout, 8)
    for buffer in momentum_buffers(ours.optimizer, ours.parameters).values():
        buffer.fill_(1)
    held = sum(2 * p.numel() * p.element_size() for p in ours.parameters.values())
    answers = mesh.all_gather_object((resident("VmRSS") - before, resident("VmHWM") - before, held))
    now, peak, tensors = (max(one) for one in zip(*answers, strict=True))
    return {"resident": now, "peak": peak, "tensors": tensors}


def resident(what: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))


def write(mesh: Mesh, layout: str, folder: str) -> dict:
    ours = Trainer(mesh, layout, 8, arch="alexnet_bn", classes=4)
    ours.fill_state(1)
    checkpoints = ours.checkpoints(folder)
    checkpoints.save({"step": 1, "last_eval_step": -1})
    checkpoints.wait()
    return {"saved": checkpoints.last_saved}


def read(mesh: Mesh, layout: str, folder: str) -> dict:
    wanted, got = (
        Trainer(mesh, layout, 8, arch="alexnet_bn", classes=4).fill_state(scale) for scale in (1, 0)
    )
    load_tensors(find_checkpoint(f"{folder}/step-00000001"), got)
    equal = [torch.equal(local(got[key]), local(wanted[key])) for key in wanted]
    return {"equal": min(mesh.all_gather_object(sum(equal))), "of": len(equal)}


def shrink() -> None:
    """Cut fc6 and fc7 of every network to 1/32, which layouts do not care about, and add a network
    with batch normalization behind these, too."""
    for name, spec in MODEL_REGISTRY.items():
        layers = [
            replace(row, out_channels=row.out_channels // (32 if row.name in ("fc6", "fc7") else 1))
            for row in spec.layers
        ]
        MODEL_REGISTRY[name] = replace(spec, layers=tuple(layers))
    bn = MODEL_REGISTRY["alexnet_bn"]
    hidden = [replace(row, post_ops="bn relu dropout") for row in bn.layers[-3:-1]]  # fc6, fc7
    MODEL_REGISTRY["fc_bn"] = replace(
        bn, layers=(*bn.layers[:-3], *hidden, bn.layers[-1]), towers=1
    )


def main(jobs: tuple[str, ...], on: str) -> None:
    """Do ``jobs`` on "cpu"; on "cuda", a GPU for each process; or on "one-gpu", over gloo."""
    mesh = init_distributed("cuda" if on == "cuda" else "cpu", 1)
    if on == "one-gpu":
        torch.cuda.set_device(0)
        mesh = replace(mesh, device=torch.device("cuda", 0))
    if not jobs[0].startswith("memory"):
        shrink()
    for job in jobs:
        name, *words = job.split()
        do: Callable[..., dict] = globals()[name]
        answer = do(mesh, *(int(word) if word.isdigit() else word for word in words))
        if mesh.rank == 0:
            print(json.dumps(answer), flush=True)
