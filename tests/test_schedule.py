from __future__ import annotations

import pytest
import torch
from auto_LiRPA.eps_scheduler import SmoothedScheduler
from hypothesis import given
from hypothesis import strategies as st

import lirpa_fastwarmup as fw


@given(
    start=st.integers(1, 4),
    length=st.integers(1, 12),
    steps=st.integers(1, 40),
    mid=st.floats(0.1, 0.9),
    beta=st.sampled_from([2.0, 3.0, 4.0]),
)
def test_equals_the_engines_scheduler(start, length, steps, mid, beta):
    ours = fw.SmoothedEpsilon(0.3, start, length, steps, mid=mid, beta=beta)
    if int(mid * length * steps) == 0:
        return  # The engine divides by zero here.
    engine = SmoothedScheduler(0.3, f"start={start},length={length},mid={mid},beta={beta}")
    engine.set_epoch_length(steps)
    for step in range((start + length) * steps):
        if step % steps == 0:
            engine.step_epoch()
        engine.step_batch()
        assert abs(ours(step) - engine.get_eps()) <= 1e-12


def test_is_exact_at_the_ends():
    schedule = fw.SmoothedEpsilon(8 / 255, start=2, length=3, steps_per_epoch=7)
    assert [schedule(step) for step in (0, 6, 7)] == [0, 0, 0]
    assert 0 < schedule(8) < 1e-4
    assert schedule(27) < 8 / 255
    assert schedule(28) == schedule(10**9) == 8 / 255


def test_value_and_slope_meet_at_the_join():
    schedule = fw.SmoothedEpsilon(1.0, start=1, length=1, steps_per_epoch=100_000)
    before, at, after = (schedule(25_000 + d) for d in (-1, 0, 1))
    assert (at - before) == pytest.approx(after - at, rel=1e-3)


@pytest.mark.parametrize(("length", "steps"), [(0, 10), (1, 1), (1, 3)])
def test_where_the_engine_divides_by_zero(length, steps):
    schedule = fw.SmoothedEpsilon(0.1, start=2, length=length, steps_per_epoch=steps)
    last = (1 + length) * steps
    assert schedule(last) == 0.1
    for step in range(steps, last):  # No power law fits: linear.
        assert schedule(step) == pytest.approx(0.1 * (step - steps) / (last - steps))


def test_linear_and_constant():
    linear = fw.LinearEpsilon(0.2, start=1, length=2, steps_per_epoch=5)
    assert [linear(step) for step in (0, 5, 10, 11)] == pytest.approx([0, 0.1, 0.2, 0.2])
    constant = fw.ConstantEpsilon(0.2)
    assert (constant(0), constant.fraction(0)) == (0.2, 1.0)


def test_radius_may_be_a_tensor():
    schedule = fw.LinearEpsilon(torch.tensor([0.2, 0.4]), start=1, length=1, steps_per_epoch=2)
    assert torch.allclose(schedule(1), torch.tensor([0.1, 0.2]))
    assert torch.equal(schedule(2), torch.tensor([0.2, 0.4]))


@pytest.mark.parametrize("eps", [-0.1, float("nan"), float("inf"), torch.tensor([0.1, -0.1])])
def test_impossible_radius(eps):
    with pytest.raises(ValueError, match="eps must be finite and at least 0"):
        fw.SmoothedEpsilon(eps, 1, 1, 1)
    with pytest.raises(ValueError, match="eps must be finite and at least 0"):
        fw.ConstantEpsilon(eps)


@pytest.mark.parametrize("arguments", [(0, 1, 1), (1, -1, 1), (1, 1, 0)])
def test_impossible_ramp(arguments):
    with pytest.raises(ValueError, match="start ≥ 1"):
        fw.LinearEpsilon(0.1, *arguments)
    with pytest.raises(ValueError, match="mid"):
        fw.SmoothedEpsilon(0.1, 1, 1, 1, mid=1.5)
