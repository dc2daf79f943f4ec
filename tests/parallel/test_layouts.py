"""Every layout computes the network of one device, in real groups of processes."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from alexnet_dist.errors import UserError
from alexnet_dist.model import MODEL_REGISTRY
from alexnet_dist.parallel import validate_parallel_config
from alexnet_dist.parallel.mesh import Mesh
from alexnet_dist.parallel.sharded_loss import ShardedClasses, to_counts
from alexnet_dist.parallel.sharding import ShardSpec
from tests.conftest import environment


def group(processes: int, *jobs: str, on: str = "cpu") -> list[Any]:
    """The answers of so many processes to each of the ``jobs``, see worker.py."""
    launcher = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    words = " / ".join(jobs).split()
    done = subprocess.run(
        [*launcher, f"--nproc_per_node={processes}", "-m", "tests.parallel.worker", *words],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=Path(__file__).parents[2],
        env=environment(PYTHONWARNINGS="ignore", LAYOUT_TEST_ON=on),
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


LAYOUTS = ("ddp", "towers", "sharded")
GRADIENTS = {
    1: ["sharded paper 7 4"],
    2: [
        "ddp paper 7 5",
        "towers paper 7 5",
        "towers original150 3 5",
        "towers original146 3 4",
        "sharded original150 7 6",
        "sharded paper 7 5",
        "ddp*2 paper 7 5",  # microbatches of 1 and 2 images on one process, 1 and 1 on the other
        "towers*3 paper 7 5",
        "sharded*2 paper 7 7",
        "ddp alexnet_bn 7 5",
        "towers alexnet_bn 7 5",
        "sharded bn_everywhere 7 5",
    ],
    # uneven shards of outputs, one without classes; 3, 2, 2 images on the processes
    3: ["sharded owt 2 7", "ddp alexnet_bn 2 7", "sharded bn_everywhere 2 7"],
    4: ["towers alexnet_bn 10 5", "towers paper 10 6", "sharded paper 10 9"],
}
EVALUATION = {
    2: ["ddp 10 6", "towers 10 6", "sharded 10 6"],
    3: ["sharded 2 4", "ddp 2 4"],
    4: ["towers 7 5", "sharded 10 6"],
}
LARS = {2: ["lars towers 7", "lars sharded 7"], 3: ["lars sharded 2"]}
BATCH_NORM = {
    1: ["steps ddp 3 7 alexnet_bn"],
    2: [f"steps {layout} 3 7 alexnet_bn" for layout in LAYOUTS],
    3: ["steps ddp 3 7 alexnet_bn"],
}
CHECKPOINTS = {  # groups run in this order; three shards of four classes are of 2, 2, 0
    2: [f"write {name} FOLDER/{name}" for name in LAYOUTS]
    + [f"read {name} FOLDER/{other}" for name in LAYOUTS for other in LAYOUTS],
    3: ["write sharded FOLDER/thirds"]
    + [f"read {name} FOLDER/{other}" for name in ("ddp", "sharded") for other in LAYOUTS]
    + ["read ddp FOLDER/thirds"],
    4: ["write towers FOLDER/pairs"]
    + [f"read {name} FOLDER/{other}" for name in LAYOUTS for other in ("pairs", "thirds")],
}
COMPRESSED = ("ddp", "ddp+bf16", "ddp+fp16", "ddp+powersgd")
OVERFLOW = ("towers 0", "towers all", "sharded 0", "sharded all", "ddp all")
Answers = dict[tuple[int, str], Any]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Answers:
    """What groups of 1, 2, 3 and 4 processes answer to all jobs of the tests below: starting a
    group takes longer than most of them."""
    folder = tmp_path_factory.mktemp("checkpoints")
    jobs: dict[int, list[str]] = {
        1: ["steps ddp 20 6 paper"],
        2: [f"steps {layout} 20 6 paper" for layout in LAYOUTS]
        + [f"steps {layout} 6 6 paper" for layout in COMPRESSED]
        + [f"overflow {job}" for job in OVERFLOW],
        3: ["resumed ddp FOLDER/resumed"],
        4: [],
    }
    for table, kind in ((GRADIENTS, "gradients "), (EVALUATION, "evaluation "), (LARS, "")):
        for n, some in table.items():
            jobs[n] += [kind + job for job in some]
    for table in (BATCH_NORM, CHECKPOINTS):
        for n, some in table.items():
            jobs[n] += some
    found: Answers = {}
    for n, some in jobs.items():
        given = group(n, *(job.replace("FOLDER", str(folder)) for job in some))
        found |= {(n, job): answer for job, answer in zip(some, given, strict=True)}
    return found


def check_gradients(answer: dict[str, Any], job: str) -> None:
    assert answer["loss"] < 1e-9, job
    assert answer["correct"][0] == answer["correct"][1], job
    assert max(answer["gradients"].values()) < 1e-9, job


def check_counts(answer: dict[str, Any], job: str) -> None:
    assert answer["got"][1:] == answer["expected"][1:], job


def test_loss_and_gradients_are_those_of_one_device(answers: Answers) -> None:
    for n, jobs in GRADIENTS.items():
        for job in jobs:
            check_gradients(answers[n, f"gradients {job}"], job)


def test_steps_with_dropout_are_those_of_one_device(answers: Answers) -> None:
    alone = answers[1, "steps ddp 20 6 paper"]["losses"]
    for layout in LAYOUTS:
        assert answers[2, f"steps {layout} 20 6 paper"]["losses"] == pytest.approx(alone, rel=1e-4)
    assert len(set(alone)) == 20


def test_batch_norm_has_the_statistics_of_the_global_batch(answers: Answers) -> None:
    alone = answers[1, "steps ddp 3 7 alexnet_bn"]
    assert len(alone["averages"]) == 10
    for n, jobs in BATCH_NORM.items():
        for job in jobs:
            answer = answers[n, job]
            assert answer["unmoved"], job  # by DDP's warm-up
            assert answer["same_bits"], job
            assert answer["losses"] == pytest.approx(alone["losses"], rel=1e-5), job
            for name, wanted in alone["averages"].items():
                near = pytest.approx(wanted, rel=1e-4, abs=1e-4 * max(map(abs, wanted)))
                assert answer["averages"][name] == near, (job, name)


def test_resume_on_three_processes_has_the_same_bits(answers: Answers) -> None:
    answer = answers[3, "resumed ddp FOLDER/resumed"]
    assert answer["losses"][0] == answer["losses"][1]
    assert answer["equal"] == answer["of"] == 32 + 22  # ten running averages have no momentum


def test_lars_has_the_norms_of_full_tensors(answers: Answers) -> None:
    for n, jobs in LARS.items():
        for job in jobs:
            assert max(answers[n, job]["errors"].values()) < 1e-5, job


def test_compressed_gradients_train_nearly_alike(answers: Answers) -> None:
    plain, *others = (answers[2, f"steps {layout} 6 6 paper"]["losses"] for layout in COMPRESSED)
    for losses in others:
        assert losses[0] == plain[0]
        assert losses != plain
        assert losses == pytest.approx(plain, rel=1e-2)


def test_evaluation_counts_every_image_once(answers: Answers) -> None:
    for n, jobs in EVALUATION.items():
        for job in jobs:
            answer = answers[n, f"evaluation {job}"]
            check_counts(answer, job)
            assert answer["got"][0] == pytest.approx(answer["expected"][0], rel=1e-6), job
            assert answer["logits"] < 1e-5, job


def test_checkpoint_of_any_layout_is_read_under_any_other(answers: Answers) -> None:
    reads = [(n, job) for n, jobs in CHECKPOINTS.items() for job in jobs if job.startswith("read")]
    assert len(reads) == 22
    for read in reads:
        assert answers[read] == {"equal": 32, "of": 32}, read


def test_fp16_skips_a_step_on_all_processes(answers: Answers) -> None:
    for job in OVERFLOW:
        assert answers[2, f"overflow {job}"] == {"ok": True}, job


def test_memory_of_layouts_that_split_layers() -> None:
    (full,), (tower,), (sharded,) = (group(2, f"memory {layout}") for layout in LAYOUTS)
    convolutions = 0.1155 * full["tensors"]  # of this network, for images of 67 pixels
    assert tower["tensors"] == pytest.approx(full["tensors"] / 2, rel=0.01)
    assert sharded["tensors"] == pytest.approx((full["tensors"] + convolutions) / 2, rel=0.01)
    sampled = 4 * 4096 * 4096  # one layer is sampled full, of which each takes its shard
    assert tower["peak"] < full["tensors"] / 2 + sampled + 16 * 2**20
    assert full["resident"] > 0.95 * full["tensors"]


@pytest.mark.slow
def test_torchvisions_network_is_sharded() -> None:
    (answer,) = group(2, "gradients sharded torchvision 7 4")
    check_gradients(answer, "torchvision")


@pytest.mark.gpu
@pytest.mark.parametrize("on", ["one-gpu", "cuda"])
def test_layouts_on_gpus(on: str, tmp_path: Path) -> None:
    if on == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("nccl wants a GPU for each process, and torch sees one")
    jobs = [f"gradients {layout} paper 7 5" for layout in LAYOUTS]
    jobs += [f"evaluation {layout} 10 6" for layout in LAYOUTS]
    jobs += [f"steps {layout} 6 6 paper" for layout in COMPRESSED]
    jobs += [f"overflow {job}" for job in OVERFLOW]
    jobs += [f"write {layout} {tmp_path}/{layout}" for layout in LAYOUTS]
    jobs += [f"read {layout} {tmp_path}/{other}" for layout in LAYOUTS for other in LAYOUTS]
    found = dict(zip(jobs, group(2, *jobs, on=on), strict=True))
    for job, answer in found.items():
        if job.startswith("gradients"):
            check_gradients(answer, job)
        elif job.startswith("evaluation"):
            check_counts(answer, job)
        elif job.startswith("steps"):
            plain = found["steps ddp 6 6 paper"]["losses"]
            assert answer["losses"] == pytest.approx(plain, rel=1e-2), job
        elif job.startswith("overflow"):
            assert answer == {"ok": True}, job
        elif job.startswith("read"):
            assert answer == {"equal": 32, "of": 32}, job


@pytest.mark.parametrize(
    ("arch", "processes", "options", "message"),
    [
        ("paper", 3, {"towers": 2}, "wants pairs of processes, and there are 3: take --nproc"),
        ("one_column", 2, {"towers": 2}, "wants a network of two towers"),
        ("torchvision", 2, {"towers": 2}, "wants a network of two towers"),
        ("paper", 2, {"towers": 2, "fc": "sharded"}, "take one of them"),
        (
            "paper",
            2,
            {"grad_compression": "powersgd", "precision": "fp16"},
            "take another runtime",
        ),
    ],
)
def test_what_cannot_be_laid_out_is_refused(
    arch: str, processes: int, options: dict[str, Any], message: str
) -> None:
    plain = {"towers": 1, "fc": "replicated", "grad_compression": "none", "precision": "fp32"}
    with pytest.raises(UserError, match=message) as error:
        validate_parallel_config(MODEL_REGISTRY[arch], processes, **plain | options)
    assert error.value.on_all_ranks
    validate_parallel_config(MODEL_REGISTRY["paper"], 4, **plain | {"towers": 2})


def test_two_neighbors_with_a_tower_each_have_the_same_images() -> None:
    mesh = Mesh(0, 4, 0, 4, torch.device("cpu"), 1, None, None, 2)  # type: ignore[arg-type]
    ranks = [replace(mesh, rank=rank) for rank in range(4)]
    assert [(one.dp_rank, one.split_rank) for one in ranks] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    even, odd = slice(0, None, 2), slice(1, None, 2)
    assert [one.batch_slice for one in ranks] == [even, even, odd, odd]
    assert [one.is_replica_leader for one in ranks] == [True, False, True, False]


def test_shards_are_those_of_dtensor() -> None:
    assert [len(ShardSpec(10, 8, rank)) for rank in range(8)] == [2, 2, 2, 2, 2, 0, 0, 0]
    for size in range(1, 20):
        for shards in range(1, 9):
            chunks = [len(chunk) for chunk in torch.arange(size).chunk(shards)]
            chunks += [0] * (shards - len(chunks))
            assert [len(ShardSpec(size, shards, rank)) for rank in range(shards)] == chunks


def test_equal_logits_are_ranked_by_class_and_nan_is_never_correct() -> None:
    classes, nan, inf = ShardedClasses(4), torch.nan, torch.inf
    logits = [[1.0, 1, 1, 1], [0, 2, 2, 3], [inf, 0, 0, 0], [nan] * 4, [nan, 0, 0, 0]]
    loss, ranks = classes.label_ranks(torch.tensor(logits), torch.tensor([2, 1, 0, 1, 2]))
    assert ranks[:3].tolist() == [2, 1, 0]
    assert to_counts(loss, ranks).tolist()[1:] == [1, 3, 5]  # four classes are all among five


def test_images_are_counted_whatever_their_loss_is() -> None:
    for loss in (1.5, float("inf"), float("nan")):
        counts = to_counts(torch.tensor(loss, dtype=torch.float64), torch.tensor([0, 3, 9]))
        assert counts[1:].tolist() == [1, 2, 3]
