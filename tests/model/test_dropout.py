"""Masks that depend on the step and the image, not on who draws them."""

import torch

from alexnet_dist.model.dropout import Dropout, make_dropout_masks

CPU = torch.device("cpu")


def test_processes_draw_the_rows_of_one_mask() -> None:
    layers = [Dropout(50, 0.5), Dropout(30, 0.25)]
    options = {"seed": 3, "step": 8, "batch": 10, "device": CPU}
    whole = make_dropout_masks(layers, rows=slice(None), **options)
    for replicas in (2, 3, 4):
        for replica in range(replicas):
            rows = slice(replica, None, replicas)
            for mine, every in zip(
                make_dropout_masks(layers, rows=rows, **options), whole, strict=True
            ):
                assert torch.equal(mine, every[rows])


def test_masks_differ_by_seed_step_and_layer() -> None:
    layers = [Dropout(64), Dropout(64)]
    draws = [
        make_dropout_masks(layers, seed=seed, step=step, batch=4, rows=slice(None), device=CPU)
        for seed, step in ((1, 0), (1, 1), (2, 0))
    ]
    masks = [mask for pair in draws for mask in pair]
    for at, mask in enumerate(masks):
        assert not any(torch.equal(mask, other) for other in masks[:at])


def test_share_that_stays() -> None:
    (mask,) = make_dropout_masks(
        [Dropout(4096, 0.3)], seed=0, step=0, batch=64, rows=slice(None), device=CPU
    )
    assert abs(mask.float().mean().item() - 0.7) < 0.005


def test_the_form_of_2012_halves_at_test_and_torchs_doubles_in_training() -> None:
    x, mask = torch.ones(2, 4), torch.tensor([[True, False, True, False]] * 2)
    ours, theirs = Dropout(4, 0.5), Dropout(4, 0.5, "inverted")
    assert ours(x, mask).tolist() == [[1, 0, 1, 0]] * 2
    assert theirs(x, mask).tolist() == [[2, 0, 2, 0]] * 2
    assert ours.eval()(x).tolist() == [[0.5] * 4] * 2
    assert theirs.eval()(x).tolist() == [[1] * 4] * 2


def test_none_needs_no_mask() -> None:
    layers = [Dropout(8, 0.0)]
    assert make_dropout_masks(layers, seed=0, step=0, batch=2, rows=slice(None), device=CPU) == ()
    assert torch.equal(layers[0](torch.ones(2, 8)), torch.ones(2, 8))
