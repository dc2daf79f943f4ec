"""One process of a group that tests of layouts start by torchrun: does the jobs that the words ask
for, with "/" between them, and rank 0 prints a line of JSON for each.

    worker.py gradients LAYOUT VARIANT CLASSES BATCH     against the network on one device, float64
    worker.py lars LAYOUT CLASSES                        two updates against those of one device
    worker.py steps LAYOUT STEPS BATCH                   losses of float32 steps, with dropout
    worker.py normalised LAYOUT STEPS BATCH              the same of alexnet_bn, and its averages
    worker.py resumed LAYOUT FOLDER                      the same, stopped after two of four steps
    worker.py evaluation LAYOUT CLASSES BATCH            loss, hits and scores, in uneven parts
    worker.py memory LAYOUT                              bytes of parameters and momentum
    worker.py overflow LAYOUT WHERE                      whether fp16 leaves the step out
    worker.py held LAYOUT                                elements of its parameters
    worker.py write LAYOUT FOLDER                        a checkpoint
    worker.py read LAYOUT FOLDER                         how many of its tensors are what they were
"""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from alexnet_dist.model import (
    MODEL_REGISTRY,
    build_model,
    build_on_meta,
    iter_initial_weights,
    make_dropout_masks,
)
from alexnet_dist.model.alexnet import AlexNet, TorchvisionAlexNet
from alexnet_dist.parallel import ddp_warmup, parallelize
from alexnet_dist.parallel.ddp import PLAIN, DDPLayout, GradCompression
from alexnet_dist.parallel.mesh import Mesh, init_distributed
from alexnet_dist.parallel.precision import Precision
from alexnet_dist.parallel.sharded_fc import ShardedFCLayout
from alexnet_dist.training.checkpoint import CheckpointManager, find_checkpoint, load_tensors
from alexnet_dist.training.optim import build_optimizer, momentum_buffers
from alexnet_dist.training.step import train_step

SIDE = 67
SEED = 5
ON = os.environ.get("LAYOUT_TEST_ON", "cpu")
"""cpu; cuda, a GPU for each process and nccl; or one-gpu, all on the first one, over gloo."""
COMPRESSIONS = {
    "": PLAIN,
    "bf16": GradCompression("bf16"),
    "fp16": GradCompression("fp16"),
    "powersgd": GradCompression("powersgd", rank=2, start=2),
}
DEVICE = torch.device("cpu" if ON == "cpu" else "cuda")


class Data:
    """A batch that a step takes."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels


def lay_out(
    name: str,
    mesh: Mesh,
    batch: int,
    *,
    num_classes: int,
    variant: str = "paper",
    precision: Precision = "fp32",
) -> DDPLayout | ShardedFCLayout:
    """A layout by its name: ddp, towers, whole or pipelined, and perhaps "*" the parts of a batch,
    and "+" a compression."""
    model = build_on_meta(variant, image_size=SIDE, num_classes=num_classes)
    weights = iter_initial_weights(model)
    name, _, compress = name.partition("+")
    kind, _, accumulate = name.partition("*")
    layout = parallelize(
        model,
        mesh.with_layout(2 if kind == "towers" else 1),
        batch=batch,
        accumulate=int(accumulate or 1),
        num_classes=num_classes,
        precision=precision,
        fc="sharded" if kind in ("whole", "pipelined") else "replicated",
        fc_schedule=kind,
        compression=COMPRESSIONS[compress],
    )
    torch.manual_seed(SEED)
    layout.sharding.load_full_weights(layout.parameters, weights)
    return layout


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def batch_of(count: int, classes: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, SIDE, SIDE, generator=generator) * 60
    labels = torch.randint(classes, (count,), generator=generator)
    return images.to(DEVICE, memory_format=torch.channels_last), labels.to(DEVICE)


def masks_of(
    model: AlexNet | TorchvisionAlexNet, step: int, batch: int, rows: slice
) -> tuple[Tensor, ...]:
    layers = model.dropout_layers()
    return make_dropout_masks(layers, seed=1, step=step, batch=batch, rows=rows, device=DEVICE)


def gradients(mesh: Mesh, name: str, variant: str, classes: int, batch: int) -> dict:
    torch.set_default_dtype(torch.float64)
    try:
        return _gradients(mesh, name, variant, classes, batch)
    finally:
        torch.set_default_dtype(torch.float32)


def _gradients(mesh: Mesh, name: str, variant: str, classes: int, batch: int) -> dict:
    images, labels = batch_of(batch, classes, 0)
    layout = lay_out(name, mesh, batch, variant=variant, num_classes=classes)
    torch.manual_seed(SEED)
    model = build_model(variant, num_classes=classes, image_size=SIDE)
    model = model.to(DEVICE, memory_format=torch.channels_last)  # type: ignore[call-overload]
    scores = model(images, masks_of(model, 3, batch, slice(None)))
    loss = F.cross_entropy(scores, labels)
    loss.backward()

    rows = layout.mesh.batch_slice
    masks = masks_of(model, 3, batch, layout.dropout_rows)
    result = layout.forward_backward(images[rows], labels[rows], masks)
    dist.all_reduce(result)
    worst = {}
    for key, parameter in model.named_parameters():
        local = layout.parameters[key]
        # running averages have no gradient, and are what the pass made of them
        mine, wanted = (p.grad if p.requires_grad else p.detach() for p in (local, parameter))
        assert mine is not None
        assert wanted is not None
        got = whole(layout.sharding.to_dtensor(key, mine.contiguous()))
        # of a bias in front of a batch normalisation there is nothing but rounding
        scale = wanted.abs().max().clamp_min(1e-5)
        worst[key] = float((got - wanted).abs().max() / scale)
    hits = int((scores.argmax(1) == labels).sum())
    return {
        "loss": abs(float(result[0]) / batch / loss.item() - 1),
        "hits": [int(result[1]), hits],
        "gradients": worst,
    }


def lars(mesh: Mesh, name: str, classes: int) -> dict:
    layout = lay_out(name, mesh, 8, num_classes=classes)
    torch.manual_seed(SEED)
    model = build_model("paper", num_classes=classes, image_size=SIDE).to(DEVICE)
    alone, sharding = dict(model.named_parameters()), layout.sharding
    options = {"lr": 50, "momentum": 0.9, "weight_decay": 0.01}
    both = [
        build_optimizer(
            "lars", layout.parameters, **options, all_reduce_norms=sharding.all_reduce_partial_sums
        ),
        build_optimizer("lars", alone, **options),
    ]
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        for key, parameter in alone.items():
            gradient = torch.randn(parameter.shape, generator=generator) / len(parameter)
            parameter.grad = gradient.to(DEVICE)
            own = torch.zeros_like(layout.parameters[key])
            layout.parameters[key].grad = own.copy_(sharding.local_shard(key, gradient))
        for optimizer in both:
            optimizer.step()
    apart = {}
    for key, parameter in alone.items():
        got = whole(sharding.to_dtensor(key, layout.parameters[key].detach()))
        apart[key] = float((got - parameter).abs().max() / parameter.abs().max())
    return {"apart": apart}


def steps(mesh: Mesh, name: str, count: int, batch: int) -> dict:
    layout = lay_out(name, mesh, batch, num_classes=10)
    full = build_on_meta("paper", image_size=SIDE, num_classes=10)
    optimizer = build_optimizer(
        "sgd2012", layout.parameters, lr=1e-4, momentum=0.9, weight_decay=5e-4
    )
    ddp_warmup(layout, *own_rows(layout, batch), masks_of(full, 0, batch, layout.dropout_rows))
    losses = []
    for step in range(count):
        images, labels = batch_of(batch, 10, step)
        rows = layout.mesh.batch_slice
        masks = masks_of(full, step, batch, layout.dropout_rows)
        result = train_step(layout, optimizer, Data(images[rows], labels[rows]), masks)
        dist.all_reduce(result)
        losses.append(float(result[0]) / batch)
    return {"losses": losses}


class Normalised:
    """alexnet_bn under a layout, with an optimizer."""

    def __init__(self, mesh: Mesh, name: str, batch: int) -> None:
        self.layout = lay_out(name, mesh, batch, num_classes=10, variant="alexnet_bn")
        self.full, self.batch = build_on_meta("alexnet_bn", image_size=SIDE, num_classes=10), batch
        parameters = self.layout.parameters
        self.optimizer = build_optimizer("sgd", parameters, lr=0.1, momentum=0.9, weight_decay=0.01)
        self.averages = {key: p for key, p in parameters.items() if not p.requires_grad}

    def warm_up(self) -> None:
        masks = masks_of(self.full, 0, self.batch, self.layout.dropout_rows)
        ddp_warmup(self.layout, *own_rows(self.layout, self.batch), masks)

    def train(self, first: int, last: int) -> list[float]:
        losses = []
        for step in range(first, last):
            images, labels = (
                one[self.layout.mesh.batch_slice] for one in batch_of(self.batch, 10, step)
            )
            masks = masks_of(self.full, step, self.batch, self.layout.dropout_rows)
            result = train_step(self.layout, self.optimizer, Data(images, labels), masks)
            dist.all_reduce(result)
            losses.append(float(result[0]) / self.batch)
        return losses

    def tensors(self) -> dict[str, Tensor]:
        return manager(self.layout, self.optimizer).state_tensors()


def normalised(mesh: Mesh, name: str, count: int, batch: int) -> dict:
    one = Normalised(mesh, name, batch)
    drawn = {key: average.clone() for key, average in one.averages.items()}
    one.warm_up()
    unmoved = all(torch.equal(average, drawn[key]) for key, average in one.averages.items())
    losses = one.train(0, count)
    stored = one.layout.sharding.to_dtensor
    together = {key: whole(stored(key, p.detach())).tolist() for key, p in one.averages.items()}
    return {
        "unmoved": all(mesh.all_gather_object(unmoved)),
        "losses": losses,
        "averages": together,
        "same_bits": all(other == together for other in mesh.all_gather_object(together)),
    }


def resumed(mesh: Mesh, name: str, folder: str) -> dict:
    calm, stopped = Normalised(mesh, name, 7), Normalised(mesh, name, 7)

    def save(step: int) -> Path:
        return save_checkpoint(manager(calm.layout, calm.optimizer, folder), step)

    calm.warm_up()
    calm.train(0, 2)
    load_tensors(save(2), stopped.tensors())
    stopped.warm_up()
    last = [one.train(2, 4) for one in (calm, stopped)]
    pairs = zip(calm.tensors().values(), stopped.tensors().values(), strict=True)
    equal = [torch.equal(_local(one), _local(other)) for one, other in pairs]

    alone = build_model("alexnet_bn", num_classes=10, image_size=SIDE).eval().to(DEVICE)
    mine = {f"model.{key}": p.detach() for key, p in alone.named_parameters()}
    load_tensors(save(4), mine)
    images, labels = batch_of(8, 10, 9)
    hits = calm.layout.eval_counts(images[mesh.batch_slice], labels[mesh.batch_slice])
    dist.all_reduce(hits)
    with torch.no_grad():
        loss = F.cross_entropy(alone(images), labels, reduction="sum")
    return {
        "losses": last,
        "equal": min(mesh.all_gather_object(sum(equal))),
        "tensors": len(equal),
        "evaluated": [float(hits[0]), float(loss)],
    }


def own_rows(layout: DDPLayout | ShardedFCLayout, batch: int) -> tuple[Tensor, Tensor]:
    images, labels = batch_of(batch, 10, 0)
    return images[layout.mesh.batch_slice], labels[layout.mesh.batch_slice]


def evaluation(mesh: Mesh, name: str, classes: int, batch: int) -> dict:
    """The last of the batches has fewer images than there are replicas."""
    layout = lay_out(name, mesh, batch, num_classes=classes)
    torch.manual_seed(SEED)
    model = build_model("paper", num_classes=classes, image_size=SIDE).eval().to(DEVICE)
    total = torch.zeros(4, dtype=torch.float64, device=DEVICE)
    expected = torch.zeros(4, dtype=torch.float64, device=DEVICE)
    apart = 0.0
    for seed, count in enumerate((batch, batch - 1, 1)):
        images, labels = batch_of(count, classes, seed)
        rows = layout.mesh.batch_slice
        total += layout.eval_counts(images[rows], labels[rows])
        with torch.no_grad():
            scores = model(images)
        best = scores.topk(min(5, classes), 1).indices == labels[:, None]
        loss = F.cross_entropy(scores.double(), labels, reduction="sum")
        some = [loss, best[:, 0].sum(), best.sum(), torch.tensor(count, device=DEVICE)]
        expected += torch.stack([one.double() for one in some])
        apart = max(apart, float((layout.logits(images) - scores).abs().max()))
    dist.all_reduce(total)
    return {"got": total.tolist(), "expected": expected.tolist(), "scores": apart}


def memory(mesh: Mesh, name: str) -> dict:
    """Resident memory of this process before and after it has its parameters and their momentum,
    and the most on the way; the largest over the processes, in bytes."""
    before = resident()
    layout = lay_out(name, mesh, 8, num_classes=10)
    optimizer = build_optimizer("sgd2012", layout.parameters, lr=0.1, momentum=0.9, weight_decay=0)
    for velocity in momentum_buffers(optimizer, layout.parameters).values():
        velocity.fill_(1)
    held = sum(2 * p.numel() * p.element_size() for p in layout.parameters.values())
    answers = mesh.all_gather_object((resident() - before, resident("VmHWM") - before, held))
    now, peak, tensors = (max(one) for one in zip(*answers, strict=True))
    return {"resident": now, "peak": peak, "tensors": tensors}


def overflow(mesh: Mesh, name: str, where: str) -> dict:
    """Whether a step of fp16 is left out where gradients overflow, on the first process or on
    "all", and the next one is taken."""
    layout = lay_out(name, mesh, 6, num_classes=10, precision="fp16")
    full = build_on_meta("paper", image_size=SIDE, num_classes=10)
    optimizer = build_optimizer("sgd", layout.parameters, lr=1e-4, momentum=0.9, weight_decay=0)
    images, labels = own_rows(layout, 6)
    masks = masks_of(full, 0, 6, layout.dropout_rows)
    kept = {key: p.detach().clone() for key, p in layout.parameters.items()}
    layout.forward_backward(images, labels, masks)
    if mesh.rank == 0 or where == "all":
        for parameter in layout.parameters.values():
            parameter.grad = torch.full_like(parameter, torch.inf)
    layout.scaler.unscale_(optimizer)
    layout.scaler.step(optimizer)
    layout.scaler.update()
    optimizer.zero_grad()
    same = all(torch.equal(p, kept[key]) for key, p in layout.parameters.items())
    train_step(layout, optimizer, Data(images, labels), masks)
    finite = all(bool(p.isfinite().all()) for p in layout.parameters.values())
    moved = any(not torch.equal(p, kept[key]) for key, p in layout.parameters.items())
    return {"ok": all(mesh.all_gather_object(same and finite and moved))}


def held(mesh: Mesh, name: str) -> dict:
    """Elements of the parameters that a process holds, the most over the processes."""
    layout = lay_out(name, mesh, 8, num_classes=10)
    count = sum(parameter.numel() for parameter in layout.parameters.values())
    return {"elements": max(mesh.all_gather_object(count))}


def write(mesh: Mesh, name: str, folder: str) -> dict:
    layout = lay_out(name, mesh, 8, num_classes=4)
    optimizer = build_optimizer("sgd", layout.parameters, lr=0.1, momentum=0.9, weight_decay=0)
    checkpoints, values = manager(layout, optimizer, folder), _known(layout, values=True)
    for key, tensor in checkpoints.state_tensors().items():
        _local(tensor).copy_(_local(values[key]))
    made = save_checkpoint(checkpoints, 1)
    return {"files": len(list(made.glob("*.safetensors")))}


def manager(
    layout: DDPLayout | ShardedFCLayout, optimizer: torch.optim.SGD, folder: str = ""
) -> CheckpointManager:
    return CheckpointManager(
        Path(folder), layout.mesh.checkpoint_group, layout, optimizer, lambda *_, **__: None
    )


def save_checkpoint(checkpoints: CheckpointManager, step: int) -> Path:
    checkpoints.save({"step": step, "last_eval_step": -1})
    checkpoints.wait()
    assert checkpoints.last_saved == (step, -1)
    return checkpoints.folder / f"step-{step:08d}"


def read(mesh: Mesh, name: str, folder: str) -> dict:
    layout = lay_out(name, mesh, 8, num_classes=4)
    wanted, got = _known(layout, values=True), _known(layout, values=False)
    load_tensors(find_checkpoint(f"{folder}/step-00000001"), got)
    pairs = [(_local(got[key]), _local(wanted[key])) for key in wanted]
    equal = [bool(torch.equal(*pair)) for pair in pairs]
    answers = mesh.all_gather_object((sum(equal), len(equal)))
    return {"equal": min(one for one, _ in answers), "tensors": answers[0][1]}


def _known(layout: DDPLayout | ShardedFCLayout, *, values: bool) -> dict[str, Tensor]:
    """Parameters and velocities of a layout as a checkpoint has them, filled with numbers that
    follow from their names, or with zeros."""
    stored, found = layout.sharding.to_dtensor, {}
    model = build_on_meta("paper", image_size=SIDE, num_classes=4)
    for key, parameter in model.named_parameters():
        for kind in ("model", "velocity"):
            local = torch.zeros_like(layout.parameters[key])
            if values:
                generator = torch.Generator().manual_seed(sum(f"{kind}{key}".encode()))
                full = torch.randn(parameter.shape, generator=generator)
                local.copy_(layout.sharding.local_shard(key, full))
            found[f"{kind}.{key}"] = stored(key, local.detach())
    return found


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shrink() -> None:
    """Cut fc6 and fc7 of every network to 1/32, for layouts do not care and processors do; and add
    one with batch normalisation behind these, too."""
    for name, variant in MODEL_REGISTRY.items():
        layers = tuple(
            replace(row, out_channels=row.out_channels // 32) if row.name in ("fc6", "fc7") else row
            for row in variant.layers
        )
        MODEL_REGISTRY[name] = replace(variant, layers=layers)
    more = {"fc6": "bn relu dropout", "fc7": "bn relu dropout"}
    bn = MODEL_REGISTRY["alexnet_bn"]
    layers = tuple(replace(row, post_ops=more.get(row.name, row.post_ops)) for row in bn.layers)
    MODEL_REGISTRY["bn_everywhere"] = replace(bn, layers=layers, towers=1)


JOBS: dict[str, Callable[..., dict]] = {
    one.__name__: one
    for one in (
        gradients,
        lars,
        steps,
        normalised,
        resumed,
        evaluation,
        memory,
        overflow,
        held,
        write,
        read,
    )
}


def resident(what: str = "VmRSS") -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(what):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {what}")


def main() -> None:
    mesh = init_distributed("cuda" if ON == "cuda" else "cpu", 1)
    if ON == "one-gpu":
        torch.cuda.set_device(0)
        mesh = replace(mesh, device=torch.device("cuda", 0))
    if "memory" not in sys.argv:
        shrink()
    for job in " ".join(sys.argv[1:]).split(" / "):
        kind, *words = job.split()
        numbers = [int(word) if word.isdigit() else word for word in words]
        answer = JOBS[kind](mesh, *numbers)
        if mesh.rank == 0:
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
