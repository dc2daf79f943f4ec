"""Every layout computes the network of one device, in real groups of processes."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from alexnet_dist.errors import UserError
from alexnet_dist.model import MODEL_REGISTRY
from alexnet_dist.parallel import LayoutConfig, towers, validate_parallel_config
from alexnet_dist.parallel.mesh import Mesh
from alexnet_dist.parallel.sharded_loss import eval_counts
from alexnet_dist.parallel.sharding import ShardSpec
from tests.conftest import environment
from tests.parallel import worker
from tests.processes import run_group

LAYOUTS = ("ddp", "towers", "sharded")
COMPRESSED = ("ddp", "ddp+bf16", "ddp+fp16", "ddp+powersgd")
OVERFLOW = tuple(
    f"overflow {job}" for job in ("towers 0", "towers all", "sharded 0", "sharded all", "ddp all")
)


def group(processes: int, *jobs: str, on: str = "cpu") -> dict[str, Any]:
    """The answers of so many processes to the ``jobs``, see worker.py."""
    env = environment(PYTHONWARNINGS="ignore")
    code, out, err = run_group(processes, env, 240, worker.main, jobs, on)
    assert code == 0, err[-3000:]
    answers = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    return dict(zip(jobs, answers, strict=True))


def check(answers: dict[str, Any]) -> None:
    """That layouts have computed what one device does."""
    for job, answer in answers.items():
        match job.split()[0]:
            case "gradients":
                assert answer["loss"] < 1e-9, job
                assert answer["correct"][0] == answer["correct"][1], job
                assert answer["gradients"] < 1e-9, job
                assert answer["updated"] < 1e-9, job
            case "evaluation":
                assert answer["got"][1:] == answer["expected"][1:], job
                assert answer["got"][0] == pytest.approx(answer["expected"][0], rel=1e-6), job
                assert answer["logits"] < 1e-5, job
            case "overflow":
                assert answer == {"ok": True}, job
            case "read":
                # parameters and their momentum, and ten running averages
                assert answer == {"equal": 54, "of": 2 * 22 + 10}, job


@pytest.mark.parametrize(
    ("processes", "jobs"),
    [
        (1, ["sharded paper 7 4"]),
        (
            2,
            [
                "ddp paper 7 5",
                "towers paper 7 5",
                "towers original150 3 5",
                "towers original146 3 4",
                "sharded original150 7 6",
                "sharded paper 7 5",
                # microbatches of 1 and 2 images on one process, 1 and 1 on the other
                "ddp*2 paper 7 5",
                "towers*3 paper 7 5",
                "sharded*2 paper 7 7",
                "ddp alexnet_bn 7 5",
                "towers alexnet_bn 7 5",
                "sharded fc_bn 7 5",
            ],
        ),
        # uneven shards of outputs, one without classes; 3, 2, 2 images on the processes
        (3, ["sharded owt 2 7", "ddp alexnet_bn 2 7", "sharded fc_bn 2 7"]),
        (4, ["towers alexnet_bn 10 5", "towers paper 10 6", "sharded paper 10 9"]),
    ],
)
def test_loss_gradient_and_update_are_those_of_one_device(processes: int, jobs: list[str]) -> None:
    check(group(processes, *(f"gradients {job}" for job in jobs)))


@pytest.mark.parametrize(
    ("processes", "jobs"),
    [
        (2, ["ddp 10 6", "towers 10 6", "sharded 10 6"]),
        (3, ["sharded 2 4", "ddp 2 4"]),
        (4, ["towers 7 5", "sharded 10 6"]),
    ],
)
def test_evaluation_counts_every_image_once(processes: int, jobs: list[str]) -> None:
    check(group(processes, *(f"evaluation {job}" for job in jobs)))


def test_batch_norm_has_the_statistics_of_the_global_batch() -> None:
    (alone,) = group(1, "steps ddp 3 7 alexnet_bn").values()
    assert len(alone["averages"]) == 10
    together = group(2, *(f"steps {layout} 3 7 alexnet_bn" for layout in LAYOUTS))
    for answer in (alone, *together.values(), *group(3, "steps ddp 3 7 alexnet_bn").values()):
        assert answer["unmoved"]  # by DDP's warm-up
        assert answer["same_bits"]
        assert answer["losses"] == pytest.approx(alone["losses"], rel=1e-5)
        for name, wanted in alone["averages"].items():
            near = pytest.approx(wanted, rel=1e-4, abs=1e-4 * max(map(abs, wanted)))
            assert answer["averages"][name] == near, name


def test_compressed_gradients_train_nearly_alike() -> None:
    answers = group(2, *(f"steps {layout} 6 6 paper" for layout in COMPRESSED)).values()
    plain, *others = (answer["losses"] for answer in answers)
    for losses in others:
        assert losses[0] == plain[0]
        assert losses != plain
        assert losses == pytest.approx(plain, rel=1e-2)


def test_checkpoint_of_any_layout_is_read_under_any_other(tmp_path: Path) -> None:
    def write_and_read(processes: int, write: dict[str, str], read: tuple[str, ...]) -> None:
        folders.extend(write)
        jobs = [f"write {layout} {tmp_path}/{name}" for name, layout in write.items()]
        jobs += [f"read {layout} {tmp_path}/{name}" for layout in read for name in folders]
        check(group(processes, *jobs))

    folders: list[str] = []
    write_and_read(2, {layout: layout for layout in LAYOUTS}, LAYOUTS)
    write_and_read(3, {"thirds": "sharded"}, ("ddp", "sharded"))  # of four classes 2, 2, 0
    write_and_read(4, {"pairs": "towers"}, LAYOUTS)


def test_fp16_skips_a_step_on_all_processes() -> None:
    check(group(2, *OVERFLOW))


def test_memory_of_layouts_that_split_layers() -> None:
    full, tower, sharded = (group(2, job)[job] for job in (f"memory {one}" for one in LAYOUTS))
    convolutions = 0.1155 * full["tensors"]  # of this network, for images of 67 pixels
    assert tower["tensors"] == pytest.approx(full["tensors"] / 2, rel=0.01)
    assert sharded["tensors"] == pytest.approx((full["tensors"] + convolutions) / 2, rel=0.01)
    sampled = 4 * 4096 * 4096  # one layer is sampled full, of which each takes its shard
    assert tower["peak"] < full["tensors"] / 2 + sampled + 16 * 2**20
    assert full["resident"] > 0.95 * full["tensors"]


@pytest.mark.slow
def test_torchvisions_network_is_sharded() -> None:
    check(group(2, "gradients sharded torchvision 7 4"))


@pytest.mark.gpu
@pytest.mark.parametrize("on", ["one-gpu", "cuda"])
def test_layouts_on_gpus(on: str, tmp_path: Path) -> None:
    if on == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("nccl wants a GPU for each process, and torch sees one")
    jobs = [f"gradients {layout} paper 7 5" for layout in LAYOUTS]
    jobs += [f"evaluation {layout} 10 6" for layout in LAYOUTS]
    jobs += [f"steps {layout} 6 6 paper" for layout in COMPRESSED]
    jobs += [f"write {layout} {tmp_path}/{layout}" for layout in LAYOUTS]
    jobs += [f"read {layout} {tmp_path}/{other}" for layout in LAYOUTS for other in LAYOUTS]
    answers = group(2, *jobs, *OVERFLOW, on=on)
    check(answers)
    plain, *others = (answers[f"steps {layout} 6 6 paper"]["losses"] for layout in COMPRESSED)
    for losses in others:
        assert losses == pytest.approx(plain, rel=1e-2)


@pytest.mark.parametrize(
    ("arch", "processes", "options", "message"),
    [
        ("paper", 3, {"towers": 2}, "wants pairs of processes, and there are 3: take --nproc"),
        ("one_column", 2, {"towers": 2}, "wants a network of two towers"),
        ("torchvision", 2, {"towers": 2}, "wants a network of two towers"),
        ("paper", 2, {"towers": 2, "fc": "sharded"}, "take one of them"),
        ("paper", 2, {"grad_compression": "powersgd", "precision": "fp16"}, "another runtime"),
    ],
)
def test_layouts_refused(arch: str, processes: int, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        validate_parallel_config(MODEL_REGISTRY[arch], processes, LayoutConfig(1, **options))
    assert error.value.on_all_ranks
    validate_parallel_config(MODEL_REGISTRY["paper"], 4, LayoutConfig(1, towers=2))


def test_towers_exchange_activations_while_they_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the start of an exchange and the wait for it lies the product with one's own half,
    and in backward that product's gradients."""
    log: list[str] = []

    class FakeAllGather:
        def __init__(self, x: Tensor, group: object) -> None:
            log.append("send")
            self.output = torch.stack([x, x])

        def wait(self) -> None:
            log.append("wait")

    def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        log.append("product")
        y = F.linear(x, weight, bias)
        y.register_hook(lambda _: log.append("its gradients"))  # are computed next
        return y

    monkeypatch.setattr(towers, "AsyncAllGather", FakeAllGather)
    group: Any = SimpleNamespace(rank=0)
    layer = towers._ExchangeLayer(torch.nn.Linear(6, 4), group)
    layer.product = product
    y = layer(torch.randn(2, 3, requires_grad=True))
    assert log == ["send", "product", "wait", "product"]
    log.clear()
    y.sum().backward()
    assert log == ["its gradients", "send", "its gradients", "wait"]


def test_of_two_towers_one_reports_the_corrupt_images() -> None:
    mesh = Mesh(0, 4, torch.device("cpu"), 1, None, None, 2)  # type: ignore[arg-type]
    leaders = [replace(mesh, rank=rank).is_replica_leader for rank in range(4)]
    assert leaders == [True, False, True, False]


def test_equal_logits_are_ranked_by_class_and_nan_is_never_correct() -> None:
    """And images are counted whatever their loss is."""
    classes, nan, inf = ShardSpec(7), torch.nan, torch.inf
    for logits, label, top1, top5 in (
        ([1.0] * 7, 0, 1, 1),
        ([1.0] * 7, 1, 0, 1),
        ([1.0] * 7, 4, 0, 1),
        ([1.0] * 7, 5, 0, 0),
        ([0, 2, 2, 3, 0, 0, 0], 2, 0, 1),
        ([inf, 0, 0, 0, 0, 0, 0], 0, 1, 1),
        ([0, -inf, 0, 0, 0, 0, 0], 1, 0, 0),
        ([nan] * 7, 1, 0, 0),
        ([nan, 0, 0, 0, 0, 0, 0], 2, 0, 0),
    ):
        counts = eval_counts(torch.tensor([logits]), torch.tensor([label]), classes)
        assert counts[1:].tolist() == [top1, top5, 1]
