"""Autograd functions that are written out by hand, against chains of tensor operations and finite differences."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from lirpa_fastwarmup.engine.batchnorm import normalize_by_batch
from lirpa_fastwarmup.recipe.regularizers import state_moments

SHAPES = [(6, 3), (4, 3, 5), (3, 3, 4, 4), (2, 3, 2, 2, 2)]


def leaf(*shape):
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_normalisation_and_its_statistics(shape):
    x, weight, bias = leaf(*shape), leaf(3), leaf(3)
    running = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    expected_running = [tensor.clone() for tensor in running]
    result, mean, var = normalize_by_batch(x, weight, bias, *running, 0.1, 1e-5)
    expected = F.batch_norm(x, *expected_running, weight, bias, True, 0.1, 1e-5)
    over = [dim for dim in range(x.ndim) if dim != 1]
    assert torch.allclose(result, expected)
    assert torch.allclose(mean, x.mean(over))
    assert torch.allclose(var, x.var(over, unbiased=False))
    assert all(map(torch.allclose, running, expected_running))

    def function(*inputs):
        return normalize_by_batch(*inputs, *(tensor.detach().clone() for tensor in running), 0.1, 1e-5)

    assert gradcheck(function, (x, weight, bias))


def test_normalisation_gives_gradients_where_they_are_asked_for_only():
    x, weight, bias = torch.randn(5, 3), leaf(3).float().detach().requires_grad_(), torch.zeros(3)
    result, _, _ = normalize_by_batch(x, weight, bias, torch.zeros(3), torch.ones(3), 0.1, 1e-5)
    result.sum().backward()
    assert x.grad is None
    assert bias.grad is None
    assert weight.grad is not None


@pytest.mark.parametrize("offset", [-2.0, 0.0, 2.0], ids=["mostly inactive", "mixed", "mostly active"])
def test_moments_of_both_states(offset):
    lower = (leaf(5, 4, 3) + offset).detach().requires_grad_()
    upper = (lower + torch.rand_like(lower)).detach().requires_grad_()
    centre = (lower + upper) / 2
    deviation = centre - centre.mean()
    for moments, state in zip(state_moments(lower, upper), (lower > 0, upper < 0), strict=True):
        assert torch.allclose(moments[0], (centre * state).sum())
        assert torch.allclose(moments[1], (deviation.square() * state).sum())
    assert gradcheck(state_moments, (lower, upper))
    # In float32, small values beside a large mean keep their digits.
    small = torch.cat([torch.full((1000,), 1e3), torch.full((10,), 1e-3)])
    assert float(state_moments(-small, -small)[1, 0]) == pytest.approx(-1e6 - 0.01, rel=1e-6)
    mixed = torch.cat([small[-10:], -small])
    assert float(state_moments(mixed, mixed)[0, 0]) == pytest.approx(0.01, rel=1e-5)
