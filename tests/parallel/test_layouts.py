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

WORKER = Path(__file__).with_name("worker.py")


def group(processes: int, *jobs: str, on: str = "cpu") -> list[Any]:
    """The answers of so many processes to each of the ``jobs``."""
    launcher = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    words = " / ".join(jobs).split()
    done = subprocess.run(
        [*launcher, f"--nproc_per_node={processes}", "-m", "tests.parallel.worker", *words],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=WORKER.parents[2],
        env=environment(PYTHONWARNINGS="ignore", LAYOUT_TEST_ON=on),
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


GRADIENTS = {
    1: ["whole paper 7 4"],
    2: [
        "ddp paper 7 5",
        "towers paper 7 5",
        "towers original150 3 5",
        "towers original146 3 4",
        "whole original150 7 6",
        "whole paper 7 5",
        "pipelined paper 7 5",
        "ddp*2 paper 7 5",  # parts of 1 and 2 images of one process, 1 and 1 of the other
        "towers*3 paper 7 5",
        "pipelined*2 paper 7 7",
        "ddp alexnet_bn 7 5",
        "towers alexnet_bn 7 5",
        "whole bn_everywhere 7 5",
    ],
    # uneven shares of outputs, one of no classes; parts of 3, 2, 2 images
    3: ["whole owt 2 7", "pipelined paper 2 7", "ddp alexnet_bn 2 7", "whole bn_everywhere 2 7"],
    4: ["towers alexnet_bn 10 5", "towers paper 10 6", "whole paper 10 9", "pipelined paper 10 9"],
}
EVALUATION = {
    2: ["ddp 10 6", "towers 10 6", "whole 10 6"],
    3: ["pipelined 2 4", "ddp 2 4"],
    4: ["towers 7 5", "whole 10 6"],
}
ON_TWO, ON_THREE, ON_FOUR = ("ddp", "towers", "whole"), ("pipelined", "ddp"), ("towers", "whole")
CHECKPOINTS = {  # groups run in this order; three shares of four classes are of 2, 2, 0
    2: [f"write {name} FOLDER/{name}" for name in ON_TWO]
    + [f"read {name} FOLDER/{other}" for name in ON_TWO for other in ON_TWO],
    3: ["write pipelined FOLDER/pipelined"]
    + [f"read {name} FOLDER/{other}" for name in ON_THREE for other in (*ON_TWO, "pipelined")],
    4: ["write towers FOLDER/pairs"]
    + [f"read {name} FOLDER/{other}" for name in ON_FOUR for other in ("pairs", "pipelined")]
    + ["read ddp FOLDER/pairs"],
}
STEPS = ("ddp", "towers", "whole", "pipelined")
COMPRESSED = ("ddp", "ddp+bf16", "ddp+fp16", "ddp+powersgd")
Answers = dict[tuple[int, str], Any]
LARS = {2: ["lars towers 7", "lars whole 7"], 3: ["lars whole 2"]}
NORMALISED = {1: ["ddp 3 7"], 2: ["ddp 3 7", "towers 3 7", "pipelined 3 7"], 3: ["ddp 3 7"]}
OVERFLOW = ("towers 0", "towers all", "whole 0", "whole all", "ddp all")


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Answers:
    """What groups of 1, 2, 3 and 4 processes answer to all jobs of the tests below: starting a
    group takes longer than most of them."""
    folder = tmp_path_factory.mktemp("checkpoints")
    jobs = {n: [f"gradients {job}" for job in some] for n, some in GRADIENTS.items()}
    for n, some in LARS.items():
        jobs[n] += some
    for n, some in NORMALISED.items():
        jobs[n] += [f"normalised {job}" for job in some]
    jobs[3] += ["resumed ddp FOLDER/resumed"]
    for n, some in EVALUATION.items():
        jobs[n] += [f"evaluation {job}" for job in some]
    jobs[1] += ["steps ddp 20 6", "held ddp"]
    jobs[2] += [f"steps {layout} 20 6" for layout in STEPS]
    jobs[2] += [f"steps {layout} 6 6" for layout in COMPRESSED]
    jobs[2] += [f"overflow {job}" for job in OVERFLOW]
    jobs[4] += ["held whole"]
    for n, some in CHECKPOINTS.items():
        jobs[n] += some
    found: Answers = {}
    for n, some in jobs.items():
        given = group(n, *(job.replace("FOLDER", str(folder)) for job in some))
        found |= {(n, job): answer for job, answer in zip(some, given, strict=True)}
    return found


def test_loss_and_gradients_are_those_of_one_device(answers: Answers) -> None:
    for n, jobs in GRADIENTS.items():
        for job in jobs:
            answer = answers[n, f"gradients {job}"]
            assert answer["loss"] < 1e-9, job
            assert answer["hits"][0] == answer["hits"][1], job
            assert max(answer["gradients"].values()) < 1e-9, job


def test_batch_normalisation_is_that_of_the_global_batch(answers: Answers) -> None:
    alone = answers[1, "normalised ddp 3 7"]
    assert len(alone["averages"]) == 10
    for n, jobs in NORMALISED.items():
        for job in jobs:
            answer = answers[n, f"normalised {job}"]
            assert answer["unmoved"], job
            assert answer["same_bits"], job
            assert answer["losses"] == pytest.approx(alone["losses"], rel=1e-5), job
            for name, wanted in alone["averages"].items():
                near = pytest.approx(wanted, rel=1e-4, abs=1e-4 * max(map(abs, wanted)))
                assert answer["averages"][name] == near, (job, name)


def test_a_batch_normalisation_that_was_stopped_goes_on_bit_for_bit(answers: Answers) -> None:
    answer = answers[3, "resumed ddp FOLDER/resumed"]
    assert answer["losses"][0] == answer["losses"][1]
    assert answer["equal"] == answer["tensors"] == 32 + 22  # ten averages have no velocity
    together, alone = answer["evaluated"]
    assert together == pytest.approx(alone, rel=1e-5)


def test_lars_has_the_norms_of_whole_tensors(answers: Answers) -> None:
    for n, jobs in LARS.items():
        for job in jobs:
            assert max(answers[n, job]["apart"].values()) < 1e-5, job


@pytest.mark.slow
def test_so_are_those_of_torchvisions_network() -> None:
    (answer,) = group(2, "gradients whole torchvision 7 4")
    assert answer["loss"] < 1e-9
    assert max(answer["gradients"].values()) < 1e-9


@pytest.mark.gpu
@pytest.mark.parametrize("on", ["one-gpu", "cuda"])
def test_layouts_on_gpus(on: str, tmp_path: Path) -> None:
    if on == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("nccl wants a GPU for each process, and torch sees one")
    jobs = [f"gradients {layout} paper 7 5" for layout in STEPS]
    jobs += [f"evaluation {layout} 10 6" for layout in STEPS]
    jobs += [f"steps {layout} 6 6" for layout in COMPRESSED]
    jobs += [f"overflow {job}" for job in OVERFLOW]
    jobs += [f"write {layout} {tmp_path}/{layout}" for layout in ON_TWO]
    jobs += [f"read {layout} {tmp_path}/{other}" for layout in ON_TWO for other in ON_TWO]
    found = dict(zip(jobs, group(2, *jobs, on=on), strict=True))
    for job, answer in found.items():
        if job.startswith("gradients"):
            assert answer["loss"] < 1e-9, job
            assert max(answer["gradients"].values()) < 1e-9, job
        elif job.startswith("evaluation"):
            assert answer["got"][1:] == answer["expected"][1:], job
        elif job.startswith("steps"):
            plain = found["steps ddp 6 6"]["losses"]
            assert answer["losses"] == pytest.approx(plain, rel=1e-2), job
        elif job.startswith("overflow"):
            assert answer == {"ok": True}, job
        elif job.startswith("read"):
            assert answer == {"equal": 32, "tensors": 32}, job


def test_steps_with_dropout_are_those_of_one_device(answers: Answers) -> None:
    alone = answers[1, "steps ddp 20 6"]["losses"]
    for layout in STEPS:
        assert answers[2, f"steps {layout} 20 6"]["losses"] == pytest.approx(alone, rel=1e-4)
    assert len(set(alone)) == 20


def test_compressed_gradients_train_nearly_alike(answers: Answers) -> None:
    plain, *others = (answers[2, f"steps {layout} 6 6"]["losses"] for layout in COMPRESSED)
    for losses in others:
        assert losses[0] == plain[0]
        assert losses != plain
        assert losses == pytest.approx(plain, rel=1e-2)


def test_evaluation_counts_uneven_parts(answers: Answers) -> None:
    for n, jobs in EVALUATION.items():
        for job in jobs:
            answer = answers[n, f"evaluation {job}"]
            assert answer["got"][1:] == answer["expected"][1:], job
            assert answer["got"][0] == pytest.approx(answer["expected"][0], rel=1e-6), job
            assert answer["scores"] < 1e-5, job


def test_a_checkpoint_of_any_layout_is_read_under_any_other(answers: Answers) -> None:
    reads = [(n, job) for n, jobs in CHECKPOINTS.items() for job in jobs if job.startswith("read")]
    assert len(reads) == 22
    for read in reads:
        assert answers[read] == {"equal": 32, "tensors": 32}, read


def test_fp16_leaves_a_step_out_on_all_processes_of_a_layout(answers: Answers) -> None:
    for job in OVERFLOW:
        assert answers[2, f"overflow {job}"] == {"ok": True}, job


def test_a_tower_takes_half_of_the_memory() -> None:
    (whole,), (tower,) = group(2, "memory ddp"), group(2, "memory towers")
    assert tower["tensors"] == pytest.approx(whole["tensors"] / 2, rel=0.01)
    drawn = 4 * 4096 * 4096  # one layer is drawn whole, of which each takes its part
    assert tower["peak"] < whole["tensors"] / 2 + drawn + 16 * 2**20
    assert whole["resident"] > 0.95 * whole["tensors"]


def test_four_processes_hold_a_quarter_of_the_fully_connected_layers(answers: Answers) -> None:
    whole, quarter = answers[1, "held ddp"], answers[4, "held whole"]
    layers = ((256, 128), (128, 128), (128, 10))  # fc6 and fc7 at 1/32, fc8
    everything = sum((inputs + 1) * outputs for inputs, outputs in layers)
    a_quarter = sum((inputs + 1) * -(-outputs // 4) for inputs, outputs in layers)
    assert quarter["elements"] == whole["elements"] - everything + a_quarter


def mesh_of(world: int, towers: int = 1) -> Mesh:
    return Mesh(0, world, 0, world, torch.device("cpu"), 1, None, None, towers)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("variant", "processes", "asked", "sentence"),
    [
        ("paper", 3, {"towers": 2}, "wants pairs of processes, and there are 3: take --nproc"),
        ("one_column", 2, {"towers": 2}, "wants a network of two towers"),
        ("half_column", 2, {"towers": 2}, "wants a network of two towers"),
        ("owt", 2, {"towers": 2}, "wants a network of two towers"),
        ("torchvision", 2, {"towers": 2}, "wants a network of two towers"),
        ("figure1_relu", 2, {"towers": 2}, "wants a network of two towers"),
        ("paper", 2, {"towers": 2, "fc": "sharded"}, "take one of them"),
        ("paper", 2, {"compress": "powersgd", "precision": "fp16"}, "take another runtime"),
    ],
)
def test_what_cannot_be_laid_out_is_refused(
    variant: str, processes: int, asked: dict[str, Any], sentence: str
) -> None:
    plain = {"towers": 1, "fc": "replicated", "compress": "none", "precision": "fp32"}
    with pytest.raises(UserError, match=sentence) as failure:
        validate_parallel_config(MODEL_REGISTRY[variant], processes, **plain | asked)
    assert failure.value.on_all_ranks
    validate_parallel_config(MODEL_REGISTRY["paper"], 4, **plain | {"towers": 2})


def test_batch_normalisation_in_turns_is_refused() -> None:
    layers = (
        *MODEL_REGISTRY["owt"].layers[:-2],
        replace(MODEL_REGISTRY["owt"].layers[-2], post_ops="bn relu"),
    )
    variant, plain = (
        replace(MODEL_REGISTRY["owt"], layers=layers),
        {"towers": 1, "compress": "none"},
    )
    with pytest.raises(UserError, match=r"take --parallel\.fc_schedule whole"):
        validate_parallel_config(
            variant, 2, fc="sharded", fc_schedule="pipelined", precision="fp32", **plain
        )
    for fc, schedule in (("sharded", "whole"), ("replicated", "pipelined")):
        validate_parallel_config(variant, 2, fc=fc, fc_schedule=schedule, precision="fp32", **plain)


def test_a_pair_is_two_neighbours_with_the_same_images() -> None:
    meshes = [replace(mesh_of(4, 2), rank=rank) for rank in range(4)]
    assert [(mesh.dp_rank, mesh.split_rank) for mesh in meshes] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [mesh.batch_slice for mesh in meshes[::2]] == [slice(0, None, 2), slice(1, None, 2)]
    assert meshes[0].batch_slice == meshes[1].batch_slice
    assert [mesh.is_replica_leader for mesh in meshes] == [True, False, True, False]


def test_shares_are_dealt_as_dtensor_deals_them() -> None:
    assert [len(ShardSpec(10, 8, part)) for part in range(8)] == [2, 2, 2, 2, 2, 0, 0, 0]
    for whole in range(1, 20):
        for parts in range(1, 9):
            chunks = [len(chunk) for chunk in torch.arange(whole).chunk(parts)]
            chunks += [0] * (parts - len(chunks))
            assert [len(ShardSpec(whole, parts, part)) for part in range(parts)] == chunks


def test_equal_scores_are_placed_by_number_and_no_number_is_never_right() -> None:
    classes, nan, inf = ShardedClasses(ShardSpec(4, 1, 0)), torch.nan, torch.inf
    scores = [[1.0, 1, 1, 1], [0, 2, 2, 3], [inf, 0, 0, 0], [nan] * 4, [nan, 0, 0, 0]]
    loss, places = classes.label_ranks(torch.tensor(scores), torch.tensor([2, 1, 0, 1, 2]))
    assert places[:3].tolist() == [2, 1, 0]
    assert to_counts(loss, places).tolist()[1:] == [1, 3, 5]  # four classes are all among five


def test_images_are_counted_whatever_their_loss_is() -> None:
    places = torch.tensor([0, 3, 9])
    for loss in (1.5, float("inf"), float("nan")):
        hits = to_counts(torch.tensor(loss, dtype=torch.float64), places)
        assert hits[1:].tolist() == [1, 2, 3]
