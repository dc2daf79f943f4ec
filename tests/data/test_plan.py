"""The plan: which crop of which image is in which batch."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alexnet_dist.data.eval_plan import EvalPlan
from alexnet_dist.data.plan import SamplePlan

sizes = st.lists(st.tuples(st.integers(1, 900), st.integers(1, 900)), min_size=5, max_size=60)


def plan(sizes: list[tuple[int, int]], batch: int = 4, **options: object) -> SamplePlan:
    return SamplePlan(np.array(sizes), batch, seed=3, **options)  # type: ignore[arg-type]


@given(sizes, st.integers(0, 5), st.sampled_from([1, 2, 3, 4]))
def test_ranks_partition_each_batch(sizes: list[tuple[int, int]], epoch: int, ranks: int) -> None:
    full = plan(sizes)
    order = full.permutation(epoch)
    assert len(set(order.tolist())) == len(order) == full.steps_per_epoch * 4
    for step in range(full.steps_per_epoch):
        every = full.sample(epoch, step)
        assert every.indices.tolist() == order[step * 4 : step * 4 + 4].tolist()
        for rank in range(ranks):
            rows = slice(rank, None, ranks)
            mine = plan(sizes).sample(epoch, step, rows)
            for name in ("indices", "crop_boxes", "flips", "pca_coeffs"):
                assert np.array_equal(getattr(mine, name), getattr(every, name)[rows])


@given(sizes, st.sampled_from(["paper", "random_resized"]), st.floats(0.3, 1.0))
def test_boxes_lie_inside(sizes: list[tuple[int, int]], crop: str, fraction: float) -> None:
    full = plan(sizes, crop=crop, crop_fraction=fraction)
    ten = EvalPlan(full.sizes, 4, fraction, num_crops=10)
    for samples in (*full.epoch(0, 0, slice(None)), *ten.batches(slice(None))):
        top, left, height, width = samples.crop_boxes.T
        limits = full.sizes[samples.indices]
        assert (samples.crop_boxes[:, :2] >= 0).all()
        assert (height >= 1).all()
        assert (width >= 1).all()
        assert (top + height <= limits[:, 0]).all()
        assert (left + width <= limits[:, 1]).all()


def test_the_papers_crop_of_a_stored_256_image() -> None:
    full = plan([(256, 256)] * 4000, batch=4000)
    boxes = full.sample(0, 0).crop_boxes
    assert (boxes[:, 2:] == 224).all()
    for corner in (boxes[:, 0], boxes[:, 1]):  # 0 to 32, each as often
        counts = np.bincount(corner, minlength=33)
        assert len(counts) == 33
        assert ((counts - 4000 / 33) ** 2 / (4000 / 33)).sum() < 64  # chi-square, 32 degrees: 0.1 %


def test_the_crop_stays_in_the_central_square() -> None:
    boxes = plan([(200, 400)] * 500, batch=500).sample(0, 0).crop_boxes
    assert (boxes[:, 2:] == 175).all()
    assert boxes[:, 1].min() >= 100
    assert (boxes[:, 1] + 175).max() <= 300


def test_flips_and_pca_coefficients() -> None:
    samples = plan([(256, 256)] * 20000, batch=20000).sample(1, 0)
    assert abs(samples.flips.mean() - 0.5) < 0.015
    assert np.abs(samples.pca_coeffs.mean(0)).max() < 0.03
    assert np.abs(np.cov(samples.pca_coeffs.T) - np.eye(3)).max() < 0.04
    assert not plan([(256, 256)] * 8, hflip=False).sample(0, 0).flips.any()


def test_random_squares_of_half_the_side_and_more() -> None:
    squares = {"crop": "random_resized", "scale": (0.25, 1.0), "ratio": (1.0, 1.0)}
    full = plan([(224, 224)] * 5000, 5000, **squares)
    boxes = full.sample(0, 0).crop_boxes
    assert (boxes[:, 2] == boxes[:, 3]).all()
    assert (boxes[:, 2].min(), boxes[:, 2].max()) == (112, 224)
    assert abs((boxes[:, 2] ** 2).mean() / 224**2 - 0.625) < 0.01


@given(st.integers(0, 9), st.integers(0, 9))
@settings(max_examples=20)
def test_samples_depend_on_the_position_and_not_on_the_batch(epoch: int, step: int) -> None:
    small, large = plan([(300, 300)] * 400, 4), plan([(300, 300)] * 400, 40)
    here, there = small.sample(epoch, step), large.sample(epoch, step * 4 // 40)
    at = step * 4 % 40
    assert np.array_equal(here.crop_boxes, there.crop_boxes[at : at + 4])
    assert np.array_equal(here.pca_coeffs, there.pca_coeffs[at : at + 4])


def test_seeds_and_epochs_differ() -> None:
    one, other = plan([(256, 256)] * 100), SamplePlan(np.full((100, 2), 256), 4, seed=4)
    assert one.permutation(0).tolist() != one.permutation(1).tolist()
    assert one.permutation(0).tolist() != other.permutation(0).tolist()


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_evaluation_has_each_image_once_and_as_many_batches_everywhere(ranks: int) -> None:
    full = EvalPlan(np.full((13, 2), 256), 8)
    each = [list(full.batches(slice(r, None, ranks))) for r in range(ranks)]
    assert {len(batches) for batches in each} == {2}
    indices = [n for batches in each for samples in batches for n in samples.indices.tolist()]
    assert sorted(indices) == list(range(13))
    assert {tuple(box) for b in each for d in b for box in d.crop_boxes} == {(16, 16, 224, 224)}

    ten = replace(full, num_crops=10)
    for rows, batches in ((slice(r, None, ranks), each[r]) for r in range(ranks)):
        for crops, center in zip(ten.batches(rows), batches, strict=True):
            assert crops.indices.tolist() == np.repeat(center.indices, 10).tolist()
            assert np.array_equal(crops.crop_boxes_for(crops.indices), crops.crop_boxes)


def test_the_papers_ten_crops_of_a_stored_256_image() -> None:
    (samples,) = EvalPlan(np.full((2, 2), 256), 2, num_crops=10).batches(slice(None))
    corners = [(0, 0), (0, 32), (32, 0), (32, 32), (16, 16)]
    wanted = {(n, *at, 224, 224, flip) for n in (0, 1) for at in corners for flip in (False, True)}
    columns = samples.indices, samples.crop_boxes, samples.flips
    rows = zip(*(column.tolist() for column in columns), strict=True)
    found = [(index, *box, flip) for index, box, flip in rows]
    assert len(found) == 20
    assert set(found) == wanted
    assert not samples.pca_coeffs.any()


def test_the_authors_crops_are_alike_for_32_images_in_a_row() -> None:
    full = plan([(256, 256)] * 128, batch=128, crop="chunked")
    samples = full.sample(0, 0)
    for first in range(0, 128, 32):
        chunk = slice(first, first + 32)
        assert len(np.unique(samples.crop_boxes[chunk], axis=0)) == 1
        assert len(np.unique(samples.flips[chunk])) == 1
        assert len(np.unique(samples.pca_coeffs[chunk], axis=0)) == 32
    assert len(np.unique(samples.crop_boxes, axis=0)) == 4
    mine = full.sample(0, 0, slice(1, None, 3))  # whoever has which rows
    assert np.array_equal(mine.crop_boxes, samples.crop_boxes[1::3])
