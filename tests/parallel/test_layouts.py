"""Every layout computes the network of one device, in real groups of processes."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from alexnet_dist.errors import Failure
from alexnet_dist.model import outline
from alexnet_dist.parallel import build_layout
from alexnet_dist.parallel.classes import Classes
from alexnet_dist.parallel.ddp import PLAIN
from alexnet_dist.parallel.mesh import Mesh
from alexnet_dist.parallel.shards import Share
from alexnet_dist.parallel.towers import tower_of
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


@pytest.mark.parametrize(
    ("processes", "jobs"),
    [
        (1, ["gradients whole paper 7 4"]),
        (
            2,
            [
                "gradients ddp paper 7 5",
                "gradients towers paper 7 5",
                "gradients towers original150 3 5",
                "gradients towers original146 3 4",
                "gradients whole original150 7 6",
            ],
        ),
        # uneven shares of outputs, one of no classes; parts of 3, 2, 2 images
        (3, ["gradients whole owt 2 7", "gradients pipelined paper 2 7"]),
        (4, ["gradients towers paper 10 6", "gradients pipelined paper 10 9"]),
        pytest.param(2, ["gradients whole torchvision 7 4"], marks=pytest.mark.slow),
    ],
)
def test_loss_and_gradients_are_those_of_one_device(processes: int, jobs: list[str]) -> None:
    for job, answer in zip(jobs, group(processes, *jobs), strict=True):
        assert answer["loss"] < 1e-9, job
        assert answer["hits"][0] == answer["hits"][1], job
        assert max(answer["gradients"].values()) < 1e-9, job


@pytest.mark.gpu
@pytest.mark.parametrize("on", ["one-gpu", "cuda"])
def test_layouts_on_gpus(on: str) -> None:
    if on == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("nccl wants a GPU for each process, and torch sees one")
    layouts = ("ddp", "towers", "whole", "pipelined")
    jobs = [f"gradients {layout} paper 7 5" for layout in layouts]
    jobs += [f"evaluation {layout} 10 6" for layout in layouts]
    for job, answer in zip(jobs, group(2, *jobs, on=on), strict=True):
        if job.startswith("gradients"):
            assert answer["loss"] < 1e-9, job
            assert max(answer["gradients"].values()) < 1e-9, job
        else:
            assert answer["got"][1:] == answer["expected"][1:], job


def test_steps_with_dropout_are_those_of_one_device() -> None:
    (alone,) = group(1, "steps ddp 20 6")
    jobs = [f"steps {layout} 20 6" for layout in ("ddp", "towers", "whole", "pipelined")]
    for answer in group(2, *jobs):
        assert answer["losses"] == pytest.approx(alone["losses"], rel=1e-4)
    assert len(set(alone["losses"])) == 20


def test_compressed_gradients_train_nearly_alike() -> None:
    plain, *others = group(
        2, *(f"steps {layout} 6 6" for layout in ("ddp", "ddp+bf16", "ddp+fp16", "ddp+powersgd"))
    )
    for answer in others:
        assert answer["losses"][0] == plain["losses"][0]
        assert answer["losses"] != plain["losses"]
        assert answer["losses"] == pytest.approx(plain["losses"], rel=1e-2)


def test_evaluation_counts_uneven_parts() -> None:
    answers = group(2, *(f"evaluation {layout} 10 6" for layout in ("ddp", "towers", "whole")))
    answers += group(3, "evaluation whole 2 4", "evaluation ddp 2 4")
    for answer in answers:
        assert answer["got"][1:] == answer["expected"][1:]
        assert answer["got"][0] == pytest.approx(answer["expected"][0], rel=1e-6)
        assert answer["scores"] < 1e-5


def test_a_checkpoint_of_any_layout_is_read_under_any_other(tmp_path: Path) -> None:
    folders = {name: f"{tmp_path}/{name}" for name in ("ddp", "towers", "whole", "pipelined")}
    on_two = ("ddp", "towers", "whole")
    writes = [f"write {name} {folders[name]}" for name in on_two]
    reads = [f"read {name} {folders[other]}" for name in on_two for other in on_two]
    answers = group(2, *writes, *reads)[len(writes) :]
    reads_of_all = [f"read whole {folder}" for folder in folders.values()]
    answers += group(3, f"write pipelined {folders['pipelined']}", *reads_of_all)[1:]
    answers += group(2, *(f"read {name} {folders['pipelined']}" for name in on_two))
    assert answers == [{"equal": 32, "tensors": 32}] * 16


def test_a_tower_takes_half_of_the_memory() -> None:
    (whole,), (tower,) = group(2, "memory ddp"), group(2, "memory towers")
    assert tower["tensors"] == pytest.approx(whole["tensors"] / 2, rel=0.01)
    drawn = 4 * 4096 * 4096  # one layer is drawn whole, of which each takes its part
    assert tower["peak"] < whole["tensors"] / 2 + drawn + 16 * 2**20
    assert whole["resident"] > 0.95 * whole["tensors"]


def test_four_processes_hold_a_quarter_of_the_fully_connected_layers() -> None:
    ((whole,), (quarter,)) = group(1, "held ddp"), group(4, "held whole")
    layers = ((256, 128), (128, 128), (128, 10))  # fc6 and fc7 at 1/32, fc8
    everything = sum((inputs + 1) * outputs for inputs, outputs in layers)
    a_quarter = sum((inputs + 1) * -(-outputs // 4) for inputs, outputs in layers)
    assert quarter["elements"] == whole["elements"] - everything + a_quarter


def mesh_of(world: int, towers: int = 1) -> Mesh:
    return Mesh(0, world, 0, world, torch.device("cpu"), 1, None, towers)  # type: ignore[arg-type]


def test_towers_want_pairs_of_processes() -> None:
    with pytest.raises(Failure, match="pairs of processes, and there are 3: take") as failure:
        mesh_of(3).arrange(2)
    assert failure.value.everywhere


@pytest.mark.parametrize("variant", ["one_column", "half_column", "owt", "torchvision"])
def test_towers_want_a_network_that_has_them(variant: str) -> None:
    with pytest.raises(Failure, match="wants a network of two towers") as failure:
        tower_of(outline(variant), mesh_of(2, 2))
    assert failure.value.everywhere


def test_towers_and_shards_are_two_ways_to_split() -> None:
    with pytest.raises(Failure, match="take one of them") as failure:
        build_layout(
            outline("paper"),
            mesh_of(2, 2),
            batch=8,
            num_classes=10,
            precision="fp32",
            fc="sharded",
            compression=PLAIN,
        )
    assert failure.value.everywhere


def test_a_pair_is_two_neighbours_with_the_same_images() -> None:
    meshes = [replace(mesh_of(4, 2), rank=rank) for rank in range(4)]
    assert [(mesh.replica, mesh.tower) for mesh in meshes] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [mesh.rows for mesh in meshes[::2]] == [slice(0, None, 2), slice(1, None, 2)]
    assert meshes[0].rows == meshes[1].rows
    assert [mesh.speaks for mesh in meshes] == [True, False, True, False]


def test_shares_are_dealt_as_dtensor_deals_them() -> None:
    assert [len(Share(10, 8, part)) for part in range(8)] == [2, 2, 2, 2, 2, 0, 0, 0]
    for whole in range(1, 20):
        for parts in range(1, 9):
            chunks = [len(chunk) for chunk in torch.arange(whole).chunk(parts)]
            chunks += [0] * (parts - len(chunks))
            assert [len(Share(whole, parts, part)) for part in range(parts)] == chunks


def test_equal_scores_are_placed_by_number_and_no_number_is_never_right() -> None:
    classes = Classes(Share(4, 1, 0))
    scores = torch.tensor([[1.0, 1, 1, 1], [0, 2, 2, 3], [torch.nan] * 4])
    _, places = classes.places(scores, torch.tensor([2, 1, 0]))
    assert places.tolist() == [2, 1, 4]
