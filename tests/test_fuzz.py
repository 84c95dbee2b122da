"""No point of a box that sampling or PGD finds has a margin outside its bounds, by any method, in either precision.

More pairs of a network and a box, and others: ``FUZZ_PAIRS=10000 FUZZ_SEED=1 python -m pytest tests/test_fuzz.py``.
"""

from __future__ import annotations

import os

import torch
from hypothesis import HealthCheck, given, seed
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import lirpa_fastwarmup as fw
from lirpa_fastwarmup.engine.bounds import margin_matrix
from lirpa_fastwarmup.engine.methods import METHODS, MarginBounds
from lirpa_fastwarmup.verification import attack
from tests.strategies import networks
from tests.test_soundness import outputs_in_box

PAIRS = int(os.environ.get("FUZZ_PAIRS", "200"))
SEED = os.environ.get("FUZZ_SEED")
ROUNDING = {torch.float32: 1e-4, torch.float64: 1e-9}


@seed(int(SEED or 0))
@hypothesis_settings(max_examples=PAIRS, derandomize=SEED is None, suppress_health_check=list(HealthCheck))
@given(
    model=networks(),
    eps=st.floats(1e-4, 0.5),
    dtype=st.sampled_from(list(ROUNDING)),
    labels=st.lists(st.integers(0, 2), min_size=2, max_size=2),
)
def test_no_point_leaves_its_bounds(model, eps, dtype, labels):
    x, y = torch.rand(2, 1, 6, 6, dtype=dtype), torch.tensor(labels)
    # Few steps of alpha-CROWN: its bounds are as sound after one as after twenty.
    options = {"optimize_bound_args": {"iteration": 4}}
    network = MarginBounds(fw.BoundedModule(model.eval(), x.float(), bound_opts=options), dtype)
    matrix = margin_matrix(y, 3, dtype)
    with torch.no_grad():
        outputs = outputs_in_box(network.model, x, eps, clean_statistics=False, count=100)
        found = attack(network.model, x, y, eps, steps=10, restarts=2)
        outputs = torch.cat([outputs, network.model(found.points).unsqueeze(0)])
        lowest = torch.einsum("bmk,nbk->nbm", matrix, outputs).amin(0)
    scale = 1 + float(outputs.abs().max())
    for method in METHODS:
        lower = network.lower(fw.input_box(x, eps), y, method)
        assert bool((lower <= lowest + ROUNDING[dtype] * scale).all()), method
