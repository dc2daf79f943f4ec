"""Dropout masks: a hash of seed, step, layer, position and unit, the same whoever computes it."""

from typing import Any

import pytest
import torch

from alexnet_dist.model import dropout
from alexnet_dist.model.dropout import Dropout, make_dropout_masks


def masks(*layers: Dropout, **options: Any) -> tuple[torch.Tensor, ...]:
    defaults = {"seed": 3, "step": 8, "batch": 10, "rows": slice(None)}
    return make_dropout_masks(layers, device=torch.device("cpu"), **(defaults | options))


def test_a_process_has_its_rows_and_columns_of_the_global_masks() -> None:
    full = masks(Dropout(50), Dropout(30, 0.25))
    for rank in range(3):
        rows, columns = slice(rank, None, 3), slice(17 * rank, 50)
        ours = masks(Dropout(50 - 17 * rank, first_unit=17 * rank), Dropout(30, 0.25), rows=rows)
        assert torch.equal(ours[0], full[0][rows, columns])
        assert torch.equal(ours[1], full[1][rows])


def test_masks_are_the_same_on_every_machine() -> None:
    (mask,) = masks(Dropout(24, 0.3), seed=7, step=1234, rows=slice(5, 6))
    assert "".join(str(int(kept)) for kept in mask[0]) == "111001011010111011011111"


def test_compiled_masks_have_the_same_bits() -> None:
    keys = torch.tensor([2**31 - 1, -(2**31) + 7], dtype=torch.int32)
    compiled = torch.compile(dropout._kept, dynamic=False)
    for units, p in (((0, 300), 0.5), ((3, 107), 0.3)):
        images = (1, 130, 2)
        assert torch.equal(compiled(keys, images, units, p), dropout._kept(keys, images, units, p))


@pytest.mark.parametrize("p", [0.5, 0.3, 0.01])
def test_units_are_dropped_with_probability_p(p: float) -> None:
    """In all, per image and per unit, within five standard deviations."""
    (mask,) = masks(Dropout(4096, p), batch=1024)
    dropped = ~mask
    for mean, count in ((dropped.float().mean(), 2**22), (dropped.float().mean(1), 4096)):
        assert ((mean - p).abs() < 5 * (p * (1 - p) / count) ** 0.5).all()
    assert ((dropped.float().mean(0) - p).abs() < 5 * (p * (1 - p) / 1024) ** 0.5).all()


def test_images_units_layers_steps_and_seeds_are_independent() -> None:
    """Any two masks agree in half of the units, and so do neighbors within one."""
    layers = [Dropout(4096), Dropout(4096)]
    found = [
        mask.float() * 2 - 1
        for seed, step in ((0, 0), (0, 1), (1, 0), (0, 2**20))
        for mask in masks(*layers, seed=seed, step=step, batch=256)
    ]
    for at, one in enumerate(found):
        for other in found[:at]:
            assert (one * other).mean().abs() < 5 / 2**10
    for mask in found[:2]:
        images, units = mask @ mask.T / 4096, mask.T[:1024] @ mask[:, :1024] / 256
        for correlation, count in ((images, 4096), (units, 256)):
            off_diagonal = correlation - torch.diag(correlation.diag())
            assert off_diagonal.abs().max() < 6 / count**0.5
            # chi-square over all pairs: their mean square is 1 / count, give or take 3 %
            pairs = len(correlation) * (len(correlation) - 1)
            assert off_diagonal.square().sum() / pairs * count == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("dim", [0, 1])
def test_bits_in_a_row_take_all_patterns_alike(dim: int) -> None:
    """Chi-square of 8 neighboring units, or images: 255 degrees of freedom, deviation 22.6."""
    (mask,) = masks(Dropout(2048), batch=2048)
    bits = (mask if dim else mask.T).reshape(-1, 8).long()
    counts = torch.bincount(bits @ 2 ** torch.arange(8), minlength=256).double()
    expected = len(bits) / 256
    assert ((counts - expected).square() / expected).sum().item() == pytest.approx(255, abs=110)


def test_scaling_of_2012_and_inverted() -> None:
    x, mask = torch.ones(2, 4), torch.tensor([[True, False, True, False]] * 2)
    ours, torchs = Dropout(4, 0.5), Dropout(4, 0.5, "inverted")
    assert ours(x, mask).tolist() == [[1, 0, 1, 0]] * 2
    assert torchs(x, mask).tolist() == [[2, 0, 2, 0]] * 2
    assert ours.eval()(x).tolist() == [[0.5] * 4] * 2
    assert torchs.eval()(x).tolist() == [[1] * 4] * 2


def test_without_dropout_there_is_no_mask() -> None:
    layer = Dropout(8, 0.0)
    assert masks(layer) == ()
    assert torch.equal(layer(torch.ones(2, 8)), torch.ones(2, 8))
