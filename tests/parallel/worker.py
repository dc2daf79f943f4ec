"""One process of a group that the tests of layouts start by torchrun: does the jobs on its command
line, with "/" between them; rank 0 prints a line of JSON for each.

A LAYOUT is ddp, towers or sharded, perhaps with "*" and a number of microbatches, and "+" and a
gradient compression.

    gradients LAYOUT ARCH CLASSES BATCH     compared with the network on one device, float64
    evaluation LAYOUT CLASSES BATCH         likewise, for batches that do not divide evenly
    lars LAYOUT CLASSES                     two updates compared with those of one device
    steps LAYOUT STEPS BATCH ARCH           losses of float32 steps with dropout, running averages
    resumed LAYOUT FOLDER                   four steps, and the same stopped after two
    overflow LAYOUT WHERE                   whether fp16 skips the step
    memory LAYOUT                           bytes of parameters and momentum
    write LAYOUT FOLDER                     a checkpoint
    read LAYOUT FOLDER                      how many of its tensors are what they were
"""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

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
    iter_initial_weights,
    make_dropout_masks,
)
from alexnet_dist.parallel import LayoutConfig, parallelize
from alexnet_dist.parallel.mesh import Mesh, init_distributed
from alexnet_dist.parallel.precision import Precision
from alexnet_dist.training.checkpoint import CheckpointManager, find_checkpoint, load_tensors
from alexnet_dist.training.optim import build_optimizer, momentum_buffers
from alexnet_dist.training.step import train_step

SIDE = 67
SEED = 5
ON = os.environ.get("LAYOUT_TEST_ON", "cpu")
"""cpu; cuda, a GPU for each process and nccl; or one-gpu, all on the first one, over gloo."""
DEVICE = torch.device("cpu" if ON == "cpu" else "cuda")


@dataclass
class Batch:
    images: Tensor
    labels: Tensor


class Trainer:
    """A network under a layout, with an optimizer; its step s takes batch s and its masks."""

    def __init__(
        self,
        mesh: Mesh,
        layout: str,
        batch: int,
        *,
        arch: str = "paper",
        classes: int = 10,
        precision: Precision = "fp32",
        optimizer: str = "sgd2012",
        lr: float = 1e-4,
    ) -> None:
        layout, _, compression = layout.partition("+")
        kind, _, microbatches = layout.partition("*")
        self.batch, self.classes = batch, classes
        self.mesh = mesh.with_layout(2 if kind == "towers" else 1)
        self.full = build_on_meta(arch, image_size=SIDE, num_classes=classes)
        config = LayoutConfig(
            batch,
            int(microbatches or 1),
            precision,
            "sharded" if kind == "sharded" else "replicated",
            compression or "none",  # type: ignore[arg-type]
            powersgd_rank=2,
            powersgd_start=2,
        )
        self.layout = parallelize(self.full, self.mesh, config)
        weights = iter_initial_weights(self.full)
        torch.manual_seed(SEED)
        self.layout.sharding.load_full_weights(self.layout.parameters, weights)
        self.optimizer = build_optimizer(
            optimizer,  # type: ignore[arg-type]
            self.layout.parameters,
            lr=lr,
            momentum=0.9,
            weight_decay=0.01,
        )

    def inputs(self, step: int) -> tuple[Batch, tuple[Tensor, ...]]:
        images, labels = batch_of(self.batch, self.classes, step)
        rows = self.mesh.batch_slice
        return Batch(images[rows], labels[rows]), self.layout.dropout_masks(1, step)

    def train(self, first: int, last: int) -> list[float]:
        losses = []
        for step in range(first, last):
            result = train_step(self.layout, self.optimizer, *self.inputs(step))
            dist.all_reduce(result)
            losses.append(float(result[0]) / self.batch)
        return losses

    def checkpoints(self, folder: str) -> CheckpointManager:
        group = self.mesh.checkpoint_group
        return CheckpointManager(
            Path(folder), group, self.layout, self.optimizer, lambda *_, **__: None
        )

    def tensors(self) -> dict[str, Tensor]:
        """As a checkpoint has them."""
        return self.checkpoints("").state_tensors()

    def save(self, folder: str, step: int) -> Path:
        checkpoints = self.checkpoints(folder)
        checkpoints.save({"step": step, "last_eval_step": -1})
        checkpoints.wait()
        assert checkpoints.last_saved == (step, -1)
        return checkpoints.folder / f"step-{step:08d}"


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def batch_of(count: int, classes: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, SIDE, SIDE, generator=generator) * 60
    labels = torch.randint(classes, (count,), generator=generator)
    return images.to(DEVICE, memory_format=torch.channels_last), labels.to(DEVICE)


def masks_of(model: Network, step: int, batch: int) -> tuple[Tensor, ...]:
    options = {"seed": 1, "step": step, "batch": batch, "rows": slice(None), "device": DEVICE}
    return make_dropout_masks(model.dropout_layers(), **options)


def model_on_one_device(arch: str, classes: int) -> Network:
    torch.manual_seed(SEED)
    model = build_model(arch, num_classes=classes, image_size=SIDE)
    return model.to(DEVICE, memory_format=torch.channels_last)  # type: ignore[call-overload]


def gradients(mesh: Mesh, name: str, arch: str, classes: int, batch: int) -> dict:
    torch.set_default_dtype(torch.float64)
    trainer = Trainer(mesh, name, batch, arch=arch, classes=classes)
    model = model_on_one_device(arch, classes)
    images, labels = batch_of(batch, classes, 3)
    logits = model(images, masks_of(model, 3, batch))
    loss = F.cross_entropy(logits, labels)
    loss.backward()

    layout, (own, masks) = trainer.layout, trainer.inputs(3)
    result = layout.forward_backward(own.images, own.labels, masks)
    torch.set_default_dtype(torch.float32)
    dist.all_reduce(result)
    errors = {}
    for key, parameter in model.named_parameters():
        # running averages have no gradient, and are what the forward pass made of them
        pair = layout.parameters[key], parameter
        mine, wanted = (p.grad if p.requires_grad else p.detach() for p in pair)
        got = full(layout.sharding.to_dtensor(key, mine.contiguous()))
        # the gradient of a bias in front of a batch normalization is nothing but rounding
        errors[key] = float((got - wanted).abs().max() / wanted.abs().max().clamp_min(1e-5))
    return {
        "loss": abs(float(result[0]) / batch / loss.item() - 1),
        "correct": [int(result[1]), int((logits.argmax(1) == labels).sum())],
        "gradients": errors,
    }


def evaluation(mesh: Mesh, name: str, classes: int, batch: int) -> dict:
    """The last batch has fewer images than there are replicas."""
    trainer, model = (
        Trainer(mesh, name, batch, classes=classes),
        model_on_one_device("paper", classes),
    )
    layout, rows = trainer.layout, trainer.mesh.batch_slice
    total, expected = (torch.zeros(4, dtype=torch.float64, device=DEVICE) for _ in range(2))
    error = 0.0
    for seed, count in enumerate((batch, batch - 1, 1)):
        images, labels = batch_of(count, classes, seed)
        total += layout.eval_counts(images[rows], labels[rows])
        with torch.no_grad():
            logits = model.eval()(images)
        best = logits.topk(min(5, classes), 1).indices == labels[:, None]
        loss = F.cross_entropy(logits.double(), labels, reduction="sum")
        expected += torch.stack([loss, best[:, 0].sum(), best.sum(), loss * 0 + count])
        error = max(error, float((layout.logits(images) - logits).abs().max()))
    dist.all_reduce(total)
    return {"got": total.tolist(), "expected": expected.tolist(), "logits": error}


def lars(mesh: Mesh, name: str, classes: int) -> dict:
    layout, model = (
        Trainer(mesh, name, 8, classes=classes).layout,
        model_on_one_device("paper", classes),
    )
    alone, sharding = dict(model.named_parameters()), layout.sharding
    options = {"lr": 50, "momentum": 0.9, "weight_decay": 0.01}
    norms = sharding.all_reduce_partial_sums
    both = [
        build_optimizer("lars", layout.parameters, **options, all_reduce_norms=norms),
        build_optimizer("lars", alone, **options),
    ]
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        for key, parameter in alone.items():
            gradient = torch.randn(parameter.shape, generator=generator) / len(parameter)
            own = sharding.local_shard(key, gradient)
            for p, value in ((parameter, gradient), (layout.parameters[key], own)):
                p.grad = torch.zeros_like(p).copy_(value)  # with the strides of p
        for optimizer in both:
            optimizer.step()
    errors = {}
    for key, parameter in alone.items():
        got = full(sharding.to_dtensor(key, layout.parameters[key].detach()))
        errors[key] = float((got - parameter).abs().max() / parameter.abs().max())
    return {"errors": errors}


def steps(mesh: Mesh, name: str, count: int, batch: int, arch: str) -> dict:
    recipe = {"optimizer": "sgd", "lr": 0.1} if arch == "alexnet_bn" else {}
    trainer = Trainer(mesh, name, batch, arch=arch, **recipe)  # type: ignore[arg-type]
    averages = {k: p for k, p in trainer.layout.parameters.items() if not p.requires_grad}
    before = {key: average.clone() for key, average in averages.items()}
    trainer.layout.warm_up(SIDE)
    unmoved = all(torch.equal(average, before[key]) for key, average in averages.items())
    losses = trainer.train(0, count)
    to_dtensor = trainer.layout.sharding.to_dtensor
    values = {key: full(to_dtensor(key, p.detach())).tolist() for key, p in averages.items()}
    return {
        "losses": losses,
        "averages": values,
        "unmoved": all(mesh.all_gather_object(unmoved)),
        "same_bits": all(other == values for other in mesh.all_gather_object(values)),
    }


def resumed(mesh: Mesh, name: str, folder: str) -> dict:
    reference, stopped = (
        Trainer(mesh, name, 7, arch="alexnet_bn", optimizer="sgd", lr=0.1) for _ in range(2)
    )
    reference.layout.warm_up(SIDE)
    reference.train(0, 2)
    load_tensors(reference.save(folder, 2), stopped.tensors())
    stopped.layout.warm_up(SIDE)
    losses = [one.train(2, 4) for one in (reference, stopped)]
    pairs = zip(reference.tensors().values(), stopped.tensors().values(), strict=True)
    equal = [torch.equal(local(one), local(other)) for one, other in pairs]
    return {"losses": losses, "equal": min(mesh.all_gather_object(sum(equal))), "of": len(equal)}


def overflow(mesh: Mesh, name: str, where: str) -> dict:
    """Whether a step of fp16 is skipped where gradients overflow, on the first process or on
    "all", and the next one is taken."""
    trainer = Trainer(mesh, name, 6, precision="fp16", optimizer="sgd")
    layout, (batch, masks) = trainer.layout, trainer.inputs(0)
    before = {key: p.detach().clone() for key, p in layout.parameters.items()}
    layout.forward_backward(batch.images, batch.labels, masks)
    if mesh.rank == 0 or where == "all":
        for parameter in layout.parameters.values():
            parameter.grad = torch.full_like(parameter, torch.inf)
    layout.scaler.unscale_(trainer.optimizer)
    layout.scaler.step(trainer.optimizer)
    layout.scaler.update()
    trainer.optimizer.zero_grad()
    same = all(torch.equal(p, before[key]) for key, p in layout.parameters.items())
    trainer.train(0, 1)
    finite = all(bool(p.isfinite().all()) for p in layout.parameters.values())
    moved = any(not torch.equal(p, before[key]) for key, p in layout.parameters.items())
    return {"ok": all(mesh.all_gather_object(same and finite and moved))}


def memory(mesh: Mesh, name: str) -> dict:
    """Resident memory that this process takes for its parameters and their momentum, at the end
    and at most; the largest over the processes, in bytes."""
    before = resident()
    trainer = Trainer(mesh, name, 8)
    parameters = trainer.layout.parameters
    for buffer in momentum_buffers(trainer.optimizer, parameters).values():
        buffer.fill_(1)
    held = sum(2 * p.numel() * p.element_size() for p in parameters.values())
    answers = mesh.all_gather_object((resident() - before, resident("VmHWM") - before, held))
    now, peak, tensors = (max(one) for one in zip(*answers, strict=True))
    return {"resident": now, "peak": peak, "tensors": tensors}


def write(mesh: Mesh, name: str, folder: str) -> dict:
    known(mesh, name, values=True).save(folder, 1)
    return {}


def read(mesh: Mesh, name: str, folder: str) -> dict:
    wanted, got = (known(mesh, name, values=values).tensors() for values in (True, False))
    load_tensors(find_checkpoint(f"{folder}/step-00000001"), got)
    equal = [torch.equal(local(got[key]), local(wanted[key])) for key in wanted]
    return {"equal": min(mesh.all_gather_object(sum(equal))), "of": len(equal)}


def known(mesh: Mesh, name: str, *, values: bool) -> Trainer:
    """One whose tensors have values that follow from their names, or zeros."""
    trainer = Trainer(mesh, name, 8, classes=4)
    sharding, shapes = trainer.layout.sharding, dict(trainer.full.named_parameters())
    for key, tensor in trainer.tensors().items():
        parameter = key.partition(".")[2]
        generator = torch.Generator().manual_seed(sum(key.encode()))
        value = torch.randn(shapes[parameter].shape, generator=generator) * values
        local(tensor).copy_(sharding.local_shard(parameter, value))
    return trainer


def resident(what: str = "VmRSS") -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))


def shrink() -> None:
    """Cut fc6 and fc7 of every network to 1/32, which layouts do not care about, and add a network
    with batch normalization behind these, too."""
    for name, spec in MODEL_REGISTRY.items():
        layers = tuple(
            replace(row, out_channels=row.out_channels // 32) if row.name in ("fc6", "fc7") else row
            for row in spec.layers
        )
        MODEL_REGISTRY[name] = replace(spec, layers=layers)
    bn = MODEL_REGISTRY["alexnet_bn"]
    layers = tuple(
        replace(row, post_ops="bn relu dropout") if row.name in ("fc6", "fc7") else row
        for row in bn.layers
    )
    MODEL_REGISTRY["bn_everywhere"] = replace(bn, layers=layers, towers=1)


def main() -> None:
    mesh = init_distributed("cuda" if ON == "cuda" else "cpu", 1)
    if ON == "one-gpu":
        torch.cuda.set_device(0)
        mesh = replace(mesh, device=torch.device("cuda", 0))
    if "memory" not in sys.argv:
        shrink()
    for job in " ".join(sys.argv[1:]).split(" / "):
        name, *words = job.split()
        run: Callable[..., dict] = globals()[name]
        answer = run(mesh, *(int(word) if word.isdigit() else word for word in words))
        if mesh.rank == 0:
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
