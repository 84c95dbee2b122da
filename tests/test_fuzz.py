"""No point of a box that sampling or PGD finds has an output or a margin outside its bounds, by any method.

More pairs of a network and a box, and others, with the share of networks that were refused:
``FUZZ_PAIRS=10000 FUZZ_SEED=1 python -m pytest tests/test_fuzz.py --hypothesis-show-statistics``.
"""

from __future__ import annotations

import copy
import os
import warnings

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, event, given, seed
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import lirpa_fastwarmup as fw
from lirpa_fastwarmup.engine.bounds import METHODS, MarginBounds, fused_crown_loss, ibp_margin_bounds, margin_matrix
from lirpa_fastwarmup.engine.precision import default_dtype
from lirpa_fastwarmup.verification import attack
from tests.conformance.strategy import operator_networks
from tests.strategies import networks
from tests.test_soundness import outputs_in_box

PAIRS = int(os.environ.get("FUZZ_PAIRS", "200"))
SEED = os.environ.get("FUZZ_SEED")
ROUNDING = {torch.float32: 1e-4, torch.float64: 1e-9}
# Few steps of alpha-CROWN: its bounds are as sound after one as after twenty.
OPTIONS = {"optimize_bound_args": {"iteration": 4}}


def fuzzed(pairs):
    return hypothesis_settings(
        max_examples=pairs, derandomize=SEED is None, suppress_health_check=list(HealthCheck), database=None
    )


def lowest_margins(model, x, y, eps, count=100):
    """The lowest margins met at random points, corners and on PGD's way down, (batch, classes − 1)."""
    matrix = margin_matrix(y, 3, x.dtype)
    with torch.no_grad():
        outputs = outputs_in_box(model, x, eps, clean_statistics=False, count=count)
        found = attack(model, x, y, eps, steps=10, restarts=2)
        outputs = torch.cat([outputs, model(found.points).unsqueeze(0)])
        return torch.einsum("bmk,nbk->nbm", matrix, outputs).amin(0), 1 + float(outputs.abs().max())


@seed(int(SEED or 0))
@fuzzed(PAIRS // 2)
@given(
    model=networks(),
    eps=st.floats(1e-4, 0.5),
    dtype=st.sampled_from(list(ROUNDING)),
    labels=st.lists(st.integers(0, 2), min_size=2, max_size=2),
)
def test_no_point_leaves_its_bounds(model, eps, dtype, labels):
    x, y = torch.rand(2, 1, 6, 6, dtype=dtype), torch.tensor(labels)
    network = MarginBounds(fw.BoundedModule(model.eval(), x.float(), bound_opts=OPTIONS), dtype)
    lowest, scale = lowest_margins(network.model, x, y, eps)
    for method in METHODS:
        lower = network.lower(fw.input_box(x, eps), y, method)
        assert bool((lower <= lowest + ROUNDING[dtype] * scale).all()), method


@seed(int(SEED or 0))
@fuzzed(PAIRS // 2)
@given(
    drawn=operator_networks(),
    eps=st.floats(1e-3, 0.3),
    labels=st.lists(st.integers(0, 2), min_size=2, max_size=2),
    optimize=st.integers(0, 19).map(lambda drawn: drawn == 0),
)
def test_operators_and_attributes_are_sound_or_refused(drawn, eps, labels, optimize):
    (model, x), y = drawn, torch.tensor(labels)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", fw.TracedPathWarning)
            with default_dtype(torch.float64):  # Of the engine's own tensors.
                bounded = fw.BoundedModule(model, x, bound_opts=OPTIONS)
            network = MarginBounds(bounded, torch.float64)
    except NotImplementedError:
        event("refused at building")
        return
    event("accepted")
    with torch.no_grad(), default_dtype(torch.float64):
        check_both_modes(bounded, x, eps)
    lowest, scale = lowest_margins(network.model, x, y, eps, count=40)
    for method in METHODS if optimize else METHODS[:3]:
        try:
            lower = network.lower(fw.input_box(x, eps), y, method)
        except NotImplementedError:
            event(f"refused by {method}")
            continue
        assert bool((lower <= lowest + 1e-8 * scale).all()), method


def check_fused_loss(bounded, x, eps, outputs):
    """Loss fusion bounds the cross-entropy of all sampled outputs (points, batch, classes)."""
    labels = outputs[0].argmin(1)
    try:
        lower, upper = ibp_margin_bounds(bounded, fw.input_box(x, eps), labels, 3)
        loss = fused_crown_loss(bounded, -upper, -lower, labels, 3)
    except NotImplementedError:
        event("refused by the fused loss")
        return
    attained = torch.stack([F.cross_entropy(one, labels, reduction="none") for one in outputs]).amax(0)
    assert bool((loss >= attained - 1e-8 * (1 + attained)).all())


def check_both_modes(bounded, x, eps):
    """IBP and CROWN-IBP bounds contain sampled outputs, in evaluation mode and with the batch's statistics."""
    for training in (False, True):
        outputs = outputs_in_box(copy.deepcopy(bounded.wrapped), x, eps, clean_statistics=training, count=40)
        if not bool(outputs.isfinite().all()):
            continue
        slack = 1e-8 * (1 + outputs.abs().max())
        bounded.train(training)
        for method in ("IBP", "CROWN-IBP"):
            try:
                lower, upper = bounded.compute_bounds(x=(fw.input_box(x, eps),), method=method)
            except NotImplementedError:
                event(f"refused by {method}")
                continue
            inside = (outputs >= lower - slack) & (outputs <= upper + slack)
            assert bool(inside.all()), (method, training)
        check_fused_loss(bounded, x, eps, outputs)
    bounded.eval()
