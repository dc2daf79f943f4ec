"""The config files of the package: each resolves, and schedules change where the authors noted."""

from pathlib import Path

import pytest
import torch

from alexnet_dist.config import CommandParser, Config, check_data_root, packaged_folder
from alexnet_dist.model import build_on_meta
from alexnet_dist.training.optim import build_optimizer
from alexnet_dist.training.schedules import Schedule, piecewise_value
from alexnet_dist.training.step import lrs_at, set_lr
from tests.conftest import TINY, error_of, events, succeed

FOLDER = packaged_folder("configs")


def resolve(name: str, *words: str) -> Config:
    return CommandParser().parse([f"--config={FOLDER / name}.yaml", *words]).config


def build_schedule(config: Config) -> tuple[Schedule, torch.optim.SGD]:
    """The schedule of a config, and an optimizer with its groups, on the meta device."""
    optim = config.optim
    schedule = Schedule(lr=optim.lr, epochs=config.train.epochs, **vars(optim.schedule))
    model = build_on_meta(config.model.arch, image_size=config.data.image_size)
    parameters, options = dict(model.named_parameters()), {"momentum": 0.9, "weight_decay": 0.0005}
    own = optim.schedule.milestones
    return schedule, build_optimizer("sgd", parameters, lr=optim.lr, separate_groups=own, **options)


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.yaml")))
def test_a_config_resolves(name: str) -> None:
    config = resolve(name)
    schedule, optimizer = build_schedule(config)
    assert lrs_at(optimizer, schedule, 0.5)["weights"] > 0
    if name != "quickstart":  # its digits are embedded
        assert "there are no images: give --data.root" in error_of(check_data_root, config)


def test_a_config_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for path in ("fast", "configs/fast.yaml"):
        parsed = CommandParser().parse([f"--config={path}"])
        assert (parsed.config, parsed.config_name) == (resolve("fast"), "fast")
    (tmp_path / "fast").write_text("optim: {lr: 7}")  # a file comes first
    assert CommandParser().parse(["--config=fast"]).config.optim.lr == 7
    message = error_of(CommandParser().parse, ["--config=other/fast.yaml"])
    assert "there is no config other/fast.yaml" in message


PARAMETERS = ["conv1.weight", "conv1.bias", "conv3.weight", "fc8.weight", "fc8.bias"]

# By the authors' notes, whose epochs count from 1: the learning rates of PARAMETERS, and the std of
# the PCA noise, up to an epoch. Most networks went through these one after another.
STAGES = [
    (1e-2, 2e-2, 1e-2, 1e-2, 2e-2, 0.1),
    (1e-3, 2e-2, 1e-3, 1e-3, 2e-2, 0.1),
    (1e-4, 2e-2, 1e-4, 1e-4, 2e-2, 0.1),
    (1e-5, 2e-2, 1e-4, 1e-4, 2e-2, 0.0),
    (0.0, 0.0, 1e-4, 1e-4, 2e-2, 0.0),
    (0.0, 0.0, 1e-5, 1e-5, 2e-2, 0.0),
]
THIRD = 250 ** (-1 / 3)
SCHEDULES = {
    "original145": [*zip((24, 50, 66, 71, 78, 90), STAGES, strict=True)],
    "original145_continued": [
        *zip((24, 50, 66, 71, 78, 90), STAGES, strict=True),
        (106, (0.0, 0.0, 1e-3, 1e-3, 2e-2, 0.1)),
        (123, (0.0, 0.0, 1e-4, 1e-4, 2e-2, 0.1)),
        (134, (0.0, 0.0, 1e-5, 1e-5, 2e-2, 0.0)),
    ],
    "original146": [
        (5, (1e-3, 2e-2, 1e-3, 1e-2, 2e-2, 0.1)),
        (7.11295, (1e-3, 2e-2, 1e-3, 1e-3, 2e-2, 0.1)),
    ],
    "original146_finetune": [
        (300 / 10009, (1e-4, 2e-2, 1e-3, 1e-3, 2e-2, 0.1)),
        (4, (1e-4, 2e-2, 1e-3, 1e-2, 2e-2, 0.1)),
        (6, (1e-5, 2e-2, 1e-3, 1e-2, 2e-2, 0.1)),
        (8, (0.0, 0.0, 1e-3, 1e-2, 2e-2, 0.1)),
        (21, (0.0, 0.0, 1e-3, 1e-3, 2e-2, 0.1)),
        (37, (0.0, 0.0, 1e-4, 1e-4, 2e-2, 0.1)),
        (41, (0.0, 0.0, 1e-4, 1e-4, 2e-2, 0.0)),
        (53, (0.0, 0.0, 1e-5, 1e-5, 2e-2, 0.0)),
    ],
    "original147": [
        *zip((22, 50, 78), STAGES[:3], strict=True),
        (89, (0.0, 0.0, 1e-5, 1e-5, 2e-2, 0.1)),
    ],
    "original148": [*zip((21, 43, 68, 72, 85, 96), STAGES, strict=True)],
    "original150": [*zip((24, 48, 65, 71, 78, 91), STAGES, strict=True)],
    "half_column": [*zip((19, 47, 65, 71, 95), STAGES[:5], strict=True)],
    "owt2014": [
        (22.5, (1e-2, 2e-2, 1e-2, 1e-2, 2e-2, 0.1)),
        (45, (1e-2 * THIRD, 2e-2, 1e-2 * THIRD, 1e-2 * THIRD, 2e-2, 0.1)),
        (67.5, (1e-2 * THIRD**2, 2e-3, 1e-2 * THIRD**2, 1e-2 * THIRD**2, 2e-3, 0.1)),
        (90, (1e-2 / 250, 2e-3, 1e-2 / 250, 1e-2 / 250, 2e-3, 0.1)),
    ],
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_changes_in_the_epochs_that_its_authors_noted(name: str) -> None:
    config = resolve(name)
    schedule, optimizer = build_schedule(config)
    groups = {group["name"]: group for group in optimizer.param_groups}
    assert config.train.epochs == SCHEDULES[name][-1][0]
    ends = [last for last, _ in SCHEDULES[name]]
    for first, (last, expected) in zip([0.0, *ends[:-1]], SCHEDULES[name], strict=True):
        for epoch in (first, last - 1e-4):
            set_lr(optimizer, schedule, epoch)
            kinds = ["weights" if name.endswith("weight") else "biases" for name in PARAMETERS]
            found = [groups.get(n, groups[k])["lr"] for n, k in zip(PARAMETERS, kinds, strict=True)]
            noise = config.data.pca_noise_std
            if isinstance(noise, list):
                noise = piecewise_value(noise, epoch)
            assert [*found, noise] == pytest.approx(list(expected), rel=1e-5), epoch


@pytest.mark.slow
def test_a_scaled_schedule_has_all_its_changes(images: Path, tmp_path: Path) -> None:
    options = [o for o in TINY if "schedule" not in o and "epochs" not in o]
    options += [f"--data.root={images}", f"--run.output_dir={tmp_path}"]
    succeed(0, "train", "--config=original145", *options, "--train.epochs_scale=0.05")
    records = events(tmp_path / "original145", "train")
    steps = 4  # per epoch
    assert len(records) == 18 == records[-1]["step"] == 90 * 0.05 * steps
    schedule, _ = build_schedule(resolve("original145"))
    for record in records:
        epoch = (record["step"] - 1) / steps / 0.05
        expected = {name: schedule.lr_at(name, epoch) for name in schedule.milestones}
        assert record["lrs"] == pytest.approx(expected)
        assert record["pca_noise_std"] == (0.1 if epoch < 66 else 0)
    assert len({tuple(record["lrs"].values()) for record in records}) == 6
    (end,) = events(tmp_path / "original145", "finished")
    assert end["ended"]
