"""Certificates are right where the truth is known, survive interruptions, and are refused where bounds are wrong."""

from __future__ import annotations

import copy
import math
import platform
import re
import resource
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import lirpa_fastwarmup as fw
from lirpa_fastwarmup import memory, verification
from lirpa_fastwarmup.engine import bounds, precision
from lirpa_fastwarmup.engine.bounds import ClosedClamps, MarginBounds, ibp_margin_bounds, margin_matrix
from lirpa_fastwarmup.engine.compat import engine
from lirpa_fastwarmup.engine.margins import margin_interval
from lirpa_fastwarmup.recipe.losses import LOSSES
from lirpa_fastwarmup.verification import METHODS, Journal, UnsoundBoundError, certify
from tests import networks
from tests.test_verification import LABELS, POINTS, linear_classifier


def bounded_classifier():
    return fw.BoundedModule(linear_classifier(), POINTS)


def trained_digits():
    """A small network on 1×8×8 inputs with margins worth certifying, and 24 samples of it."""
    torch.manual_seed(1)
    model = networks.convolutional(batchnorm=False).eval()
    x = torch.rand(24, 1, 8, 8)
    with torch.no_grad():
        for layer in (0, 2, 5):
            model[layer].weight.mul_(1.3)
        model[7].weight.mul_(8)
        model[7].bias.sub_(model(x).mean(0))
    y = model(x).argmax(1)
    y[::8] = (y[::8] + 1) % 3  # And some that are misclassified.
    return fw.BoundedModule(model, x[:2]), x, y


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("eps", [0.02, 0.05, 0.1, 0.18])
def test_certificates_of_a_classifier_whose_margins_are_known(eps, method):
    # z_y − z_j is 2 y w·x − 2·3ε at the worst corner, and every method is exact on a linear network.
    found = fw.verify(bounded_classifier(), (POINTS, LABELS), eps, [method], input_range=None)  # Attacks all of them.
    products = torch.tensor([0.5, 0.2, -0.6, 0.05]) * torch.tensor([1, 1, -1, -1])
    for sample, product in zip(found.certificates, products.tolist(), strict=True):
        margin = 2 * product - 6 * eps
        assert sample.margin == pytest.approx(margin, abs=1e-6)
        assert sample.verified == (margin > 0)
        assert sample.falsified == (margin < 0)
        assert sample.method == (method if margin > 0 else None)
        assert sample.correct == (product > 0)
    assert [sample.index for sample in found.certificates] == [0, 1, 2, 3]
    assert [sample.label for sample in found.certificates] == LABELS.tolist()


def test_methods_run_cheapest_first_and_see_what_is_open():
    bounded, x, y = trained_digits()
    found = fw.verify(bounded, (x, y), 0.015, ("alpha-CROWN", "CROWN", "IBP", "CROWN-IBP"), batch_size=7)
    assert list(found.stages) == ["IBP", "PGD", *METHODS[1:]]
    assert found.stages["IBP"].samples == len(x)
    attacked = [one for one in found.certificates if one.correct and one.falsified is not None]
    assert found.stages["PGD"].samples == len(attacked) >= found.checked
    falsified = {sample.index for sample in found.certificates if sample.falsified}
    assert falsified >= set(range(0, 24, 8))
    left = len(x) - len(falsified)
    for method in METHODS:
        if method != "IBP":
            assert found.stages[method].samples == left
        assert found.stages[method].hits == found.proved_by(method)
        left -= found.proved_by(method)
    assert sum(found.proved_by(method) > 0 for method in METHODS) >= 2  # The chain is worth its name here.
    assert not found.contradictions
    assert found.standard_error.count == 3
    assert found.standard_error.count <= found.pgd_error.count <= found.verified_error.count
    # IBP alone proves what verified_error counts.
    alone = fw.verify(bounded, (x, y), 0.015, ("IBP",), restarts=0)
    assert (
        alone.verified_error.value == verification.evaluate(bounded, [(x, y)], 0.015, restarts=0).verified_error.value
    )
    assert alone.pgd_error is None


def test_names_of_methods_ignore_case():
    bounded, x, y = trained_digits()
    found = fw.verify(bounded, (x, y), 0.015, ("crown-ibp", "ibp", "IBP", "ALPHA-crown"), restarts=0)
    assert list(found.stages) == ["IBP", "CROWN-IBP", "alpha-CROWN"]
    assert len(verification.certified_radii(bounded, (x[:2], y[:2]), ["ibp"], restarts=0)) == 2


def test_a_verification_prints_as_a_table():
    bounded, x, y = trained_digits()
    found = fw.verify(bounded, (x, y), 0.015, float64=True)
    lines = str(found).splitlines()
    assert lines[0] == "eps 0.015: 24 samples, errors with 95 % intervals"
    assert lines[1] == f"  standard error  {found.standard_error}"
    assert lines[2] == f"  PGD error       {found.pgd_error}"
    assert lines[3] == f"  verified error  {found.verified_error}"
    assert lines[4] == "  stage        samples  decided  s per sample"
    assert [line.split()[:3] for line in lines[5:8]] == [
        [name, str(stage.samples), str(stage.hits)] for name, stage in found.stages.items()
    ]
    assert lines[8:] == [
        f"  PGD attacked {found.checked} proved samples, as a check of the bounds",
        "  float64 changes the verdicts of 0 samples",
    ]
    assert found._repr_html_() == f"<pre>{found}</pre>"


@pytest.mark.parametrize("restarts", [0, 2])
@pytest.mark.parametrize("shape", [(), (8, 1, 1, 1), (1, 8, 8)])
def test_batches_have_radii_of_their_own(shape, restarts):
    bounded, x, y = trained_digits()
    radii = [0.001, 0.03, 0.01]
    given = {"restarts": restarts, "methods": ("IBP", "CROWN-IBP"), "pgd_steps": 5}
    parts = list(zip(x.split(8), y.split(8), radii, strict=True))
    own = [(one, labels, torch.full(shape, eps) if shape else eps) for one, labels, eps in parts]
    found = fw.verify(bounded, own, None, **given).certificates
    alone = [
        sample for one, labels, eps in parts for sample in fw.verify(bounded, (one, labels), eps, **given).certificates
    ]
    assert [one.index for one in found] == list(range(24))
    assert len({one.verified for one in found}) == 2
    for one, other, eps in zip(found, alone, [eps for eps in radii for _ in range(8)], strict=True):
        assert (one.verified, one.method, one.prediction) == (other.verified, other.method, other.prediction)
        assert one.margin == pytest.approx(other.margin, rel=1e-4, abs=1e-6)
        assert one.eps == pytest.approx(eps)


def test_indices_name_samples(tmp_path):
    bounded, x, y = trained_digits()
    numbers = list(range(100, 124))
    journal = Journal(tmp_path / "journal")
    seen = []
    found = fw.verify(
        *(bounded, (x, y), 0.015),
        batch_size=7,
        indices=numbers,
        journal=journal,
        progress=lambda done: seen.extend(done),
    )
    assert [one.index for one in found.certificates] == sorted(one.index for one in seen) == numbers
    # The journal depends on the samples, not on their numbers.
    resumed = fw.verify(bounded, (x, y), 0.015, batch_size=7, journal=Journal(journal.path))
    assert [one.index for one in resumed.certificates] == list(range(24))
    assert resumed.stages["PGD"].seconds == found.stages["PGD"].seconds
    radii = verification.certified_radii(bounded, (x[:3], y[:3]), ["IBP"], restarts=0, indices=[5, 7, 9])
    assert [one.index for one in radii] == [5, 7, 9]
    with pytest.raises(ValueError, match="one index per sample"):
        fw.verify(bounded, (x, y), 0.015, indices=[1, 2])
    with pytest.raises(ValueError, match=f"found 99 indices for {len(y)} samples"):
        fw.verify(bounded, (x, y), 0.015, ["IBP"], restarts=0, indices=range(99))


def test_loaders_and_tensors_give_the_same():
    bounded, x, y = trained_digits()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=10)
    given = [fw.verify(bounded, samples, 0.05, batch_size=10) for samples in (loader, (x, y), [x, y])]
    assert given[0].certificates == given[1].certificates == given[2].certificates


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_method_bounds_samples_in_both_precisions(method, dtype):
    bounded, x, y = trained_digits()
    x = x.to(dtype)
    lower = MarginBounds(bounded, dtype).lower(fw.input_box(x, 0.1), y, method)
    assert lower.shape == (24, 2)
    assert lower.dtype == dtype
    assert not lower.requires_grad
    at_least, _ = ibp_margin_bounds(bounded.rebuilt(dtype), fw.input_box(x, 0.1), y, 3)
    if method in ("CROWN-IBP", "alpha-CROWN"):  # On average: of single margins IBP's may be the tighter.
        assert float(lower.detach().mean()) > float(at_least.detach().mean())


def test_alpha_crown_is_tighter_than_crown():
    bounded, x, y = trained_digits()
    network = MarginBounds(bounded, torch.float32)
    lower = {method: network.lower(fw.input_box(x, 0.1), y, method) for method in ("CROWN-IBP", "CROWN", "alpha-CROWN")}
    assert bool((lower["alpha-CROWN"] >= lower["CROWN"] - 1e-4).all())
    assert float(lower["alpha-CROWN"].mean()) > float(lower["CROWN"].mean()) + 1e-3


@pytest.mark.parametrize("method", ["CROWN-IBP", "CROWN", "alpha-CROWN"])
def test_margins_in_blocks_of_rows_are_those_of_all_rows_at_once(method, monkeypatch):
    torch.manual_seed(3)
    classes, samples, widest = 12, 5, 20
    model = nn.Sequential(nn.Linear(6, widest), nn.ReLU(), nn.Linear(widest, 9), nn.ReLU(), nn.Linear(9, classes))
    x, y = torch.rand(samples, 6, dtype=torch.float64), torch.tensor([0, 11, 5, 7, 3])
    network = MarginBounds(fw.BoundedModule(model, x[:2].float()), torch.float64)
    rows = []

    def recorded(labels, classes, dtype, others=None):
        matrix = margin_matrix(labels, classes, dtype, others)
        rows.append(matrix.shape[1])
        return matrix

    monkeypatch.setattr(bounds, "margin_matrix", recorded)
    at_once = network.lower(fw.input_box(x, 0.1), y, method)
    assert rows == ([11] if method != "alpha-CROWN" else [11, 11])  # alpha-CROWN starts from CROWN's bounds.
    rows.clear()
    monkeypatch.setattr(bounds, "COEFFICIENTS", 3 * samples * widest + 1)
    in_blocks = network.lower(fw.input_box(x, 0.1), y, method)
    assert rows == ([3, 3, 3, 2] if method != "alpha-CROWN" else 2 * [3, 3, 3, 2])
    # alpha-CROWN stops when no row improves any more, which a block does earlier than all rows.
    assert torch.allclose(in_blocks, at_once, rtol=0, atol=1e-10 if method != "alpha-CROWN" else 1e-3)


@pytest.mark.parametrize("method", ["CROWN", "alpha-CROWN"])
def test_crown_bounds_a_few_samples_at_a_time_as_it_bounds_the_batch(method, monkeypatch):
    bounded, x, y = trained_digits()
    passes = []
    compute_bounds = fw.BoundedModule.compute_bounds

    def recorded(self, x=None, *args, **kwargs):
        if kwargs.get("method") == "CROWN" and x is not None:
            passes.append(len(x[0]))
        return compute_bounds(self, x, *args, **kwargs)

    monkeypatch.setattr(fw.BoundedModule, "compute_bounds", recorded)
    found = []
    for elements in (1, 1 << 30):
        monkeypatch.setattr(bounds, "_ELEMENTS", elements)
        passes.clear()
        found.append(fw.verify(bounded, (x, y), 0.1, [method], restarts=0))
        assert max(passes) == (1 if elements == 1 else len(x))
    for one, other in zip(*(result.certificates for result in found), strict=True):
        assert one.verified == other.verified
        assert one.margin == pytest.approx(other.margin, abs=1e-5)


def test_alpha_crown_optimises_the_slopes_of_the_margins_alone():
    """Those of intermediate neurons would cost most of the time, and change nothing: their bounds are given."""
    bounded, x, y = trained_digits()
    network = MarginBounds(bounded, torch.float32)
    network.lower(fw.input_box(x, 0.1), y, "alpha-CROWN")
    used = network.bounded("alpha-CROWN")
    slopes = [node.alpha for node in used.optimizable_activations]
    assert len(slopes) == 3
    assert all(set(alpha) == {used.final_name} for alpha in slopes)


def test_alpha_crown_of_fewer_rows_changes_neither_classes_nor_certificates():
    """The engine overwrites `final_shape` by the shape of C."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4)).eval()
    with torch.no_grad():
        network[2].weight[1], network[2].weight[2] = network[2].weight[0], -network[2].weight[0]
        network[2].weight[3] = network[2].weight[0] + torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0])
        network[2].bias.copy_(torch.tensor([3.0, 1.0, 0.0, 2.9]))
    x = torch.rand(20, 6)
    y = torch.zeros(20, dtype=torch.int64)
    bounded = fw.BoundedModule(network, x[:2])
    before = verification.evaluate(bounded, (x, y), 0.3, restarts=0, check=False)
    rows = torch.eye(4)[:1] - torch.eye(4)[1:3]
    bounded.compute_bounds(x=(fw.input_box(x, 0.3),), C=rows.expand(20, 2, 4), method="alpha-CROWN", bound_upper=False)
    after = verification.evaluate(bounded, (x, y), 0.3, restarts=0, check=False)
    assert bounds.class_count(bounded) == 4
    assert [one.verified for one in after.certificates] == [one.verified for one in before.certificates]
    assert sum(one.verified for one in before.certificates) < 20


def test_closed_clamps_have_a_gradient_at_their_ends():
    """Without one, which PyTorch 2.15 took away, alpha-CROWN stays at CROWN's slopes, which are 0 and 1."""
    x = torch.tensor([-0.5, 0.0, 0.3, 1.0, 1.5, math.nan], requires_grad=True)
    for ends in ({"min": 0.0, "max": 1.0}, {"min": 0.0}, {"max": 1.0}, {"min": torch.zeros(6), "max": torch.ones(6)}):
        for clamp in (torch.clamp, torch.Tensor.clamp):
            with ClosedClamps():
                found = clamp(x, **ends)
            assert torch.allclose(found.detach(), torch.clamp(x, **ends).detach(), rtol=0, atol=0, equal_nan=True)
            (gradient,) = torch.autograd.grad(found.sum(), x)
            inside = (x >= ends.get("min", -math.inf)) & (x <= ends.get("max", math.inf)) | x.isnan()
            assert torch.equal(gradient, inside.to(x.dtype))


def test_wilson_intervals():
    # Their ends are the rates p at which the count is z = 1.96 deviations of a binomial with p away.
    for count, samples in ((1, 10), (63, 1000), (999, 1000)):
        rate = verification.ErrorRate(count, samples)
        for end in rate.interval:
            assert abs(rate.value - end) / math.sqrt(end * (1 - end) / samples) == pytest.approx(1.959964, abs=1e-5)
        assert rate.interval[0] < rate.value < rate.interval[1]
    assert verification.ErrorRate(0, 10).interval[0] == 0.0
    assert verification.ErrorRate(10, 10).interval[1] == 1.0


def absorbing_classifier():
    """z = (2²⁵ x + 1, 2²⁵): in float32 the 1 is lost, and so is the margin."""
    first, last = nn.Linear(1, 1), nn.Linear(1, 2)
    with torch.no_grad():
        first.weight.fill_(2.0**25)
        first.bias.fill_(1.0)
        last.weight.copy_(torch.tensor([[1.0], [0.0]]))
        last.bias.copy_(torch.tensor([0.0, 2.0**25]))
    return nn.Sequential(first, nn.ReLU(), last).eval()


def test_verdicts_that_change_in_double_precision_are_told():
    x, y = torch.ones(2, 1), torch.zeros(2, dtype=torch.long)
    bounded = fw.BoundedModule(absorbing_classifier(), x)
    found = fw.verify(bounded, (x, y), 1e-9, ("IBP",), float64=True, input_range=None)
    assert [sample.float64 for sample in found.changed_in_float64] == ["not verified -> verified"] * 2
    assert fw.verify(bounded, (x, y), 1e-9, input_range=None).changed_in_float64 == []
    digits, x, y = trained_digits()
    steady = fw.verify(digits, (x, y), 0.004, METHODS, float64=True)
    assert all(sample.float64 == "" for sample in steady.certificates)


def test_coarse_arithmetic_of_the_process_changes_nothing():
    bounded, x, y = trained_digits()
    expected = fw.verify(bounded, (x, y), 0.004)
    bits = {}

    def look(done):
        bits["inside"] = torch.is_autocast_enabled("cpu"), torch.get_float32_matmul_precision()

    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert bounded.wrapped(x).dtype == torch.bfloat16  # It would matter.
            found = fw.verify(bounded, (x, y), 0.004, progress=look)
        assert bits["inside"] == (True, "medium")  # Between batches the process has its settings back.
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert found.certificates == expected.certificates


def test_what_is_compiled_is_verified_eagerly(monkeypatch):
    compiled = []

    def backend(graph, _):
        return lambda *inputs: compiled.append(len(inputs)) or graph(*inputs)

    doubled = torch.compile(lambda x: 2 * x, backend=backend)
    bounded, x, y = trained_digits()
    doubled(y)
    assert len(compiled) == 1
    original = MarginBounds.lower

    def look(network, box, labels, *args):
        assert not torch.compiler.is_compiling()
        assert torch.equal(doubled(labels), 2 * labels)  # Compiled for this shape,
        assert torch.equal(doubled(labels[:, None]), 2 * labels[:, None])  # or not yet.
        return original(network, box, labels, *args)

    monkeypatch.setattr(MarginBounds, "lower", look)
    fw.verify(bounded, (x, y), 0.004)
    assert len(compiled) == 1
    doubled(y)
    assert len(compiled) == 2


@pytest.fixture
def wrong_sign(monkeypatch):
    """One weight of every linear layer has the wrong sign in the interval product, and nowhere else."""
    layer = engine.bound_general.BoundLinear
    original = layer.interval_propagate

    def wrong(self, *v, **kwargs):
        weight = v[1][0].clone().contiguous()
        place = weight.abs().argmax()
        weight.view(-1)[place] *= -1
        return original(self, v[0], (weight, weight), *v[2:], **kwargs)

    def wrong_margins(node, labels, interval_of):
        def changed(source):
            ends = interval_of(source)
            if len(node.inputs) < 2 or source is not node.inputs[1]:
                return ends
            weight = ends[0].clone().contiguous()
            weight.view(-1)[weight.abs().argmax()] *= -1
            return weight, weight

        return margin_interval(node, labels, changed)

    # Layers without bias delegate to this method: a second fault in BoundMatMul would cancel the first.
    monkeypatch.setattr(layer, "interval_propagate", wrong)
    monkeypatch.setattr("lirpa_fastwarmup.engine.module.margin_interval", wrong_margins)


@pytest.mark.parametrize("float64", [False, True])
def test_an_unsound_engine_is_caught(wrong_sign, float64):
    bounded = bounded_classifier()
    with pytest.raises(UnsoundBoundError, match=r"no certificate of this verification can be trusted: sample \d") as e:
        fw.verify(bounded, (POINTS, LABELS), 0.1, ("IBP",), input_range=None, float64=float64)
    found = e.value.result
    assert len(found.certificates) == 4  # Nothing is lost.
    # w·x = 0.2 < 3ε: sample 1 has misclassified points, and w' = (1, 2) "proves" it.
    assert any("is proved by IBP and yet misclassified" in text for text in found.contradictions)
    assert any("smaller margin at a point of its box than IBP's lower bound" in text for text in found.contradictions)


def test_a_bound_that_is_too_high_is_caught_though_nothing_is_misclassified(monkeypatch):
    original = MarginBounds.lower
    monkeypatch.setattr(MarginBounds, "lower", lambda *args: original(*args) + 0.3)
    with pytest.raises(UnsoundBoundError, match="sample 0 has other margins than IBP gives") as error:
        fw.verify(bounded_classifier(), (POINTS[:1], LABELS[:1]), 0.05, ("IBP",), input_range=None)
    assert any("has a smaller margin at a point of its box" in text for text in error.value.result.contradictions)


def test_one_wrong_sign_in_a_convolution_is_caught_though_the_box_would_hide_it(monkeypatch):
    bounded, x, y = trained_digits()
    conv = engine.bound_general.BoundConv
    original = conv.interval_propagate

    def wrong(self, *v, **kwargs):
        weight = v[1][0].clone()
        weight[1, 0, 1, 1] *= -1
        return original(self, v[0], (weight, weight), *v[2:], **kwargs)

    # Nothing contradicts such bounds in a large box, whose slack is larger than the mistake.
    large = {"methods": ("IBP",), "restarts": 1}
    fw.verify(bounded, (x, y), 0.1, **large)
    monkeypatch.setattr(conv, "interval_propagate", wrong)
    with pytest.raises(UnsoundBoundError) as e:
        fw.verify(bounded, (x, y), 0.1, **large)
    assert all("has other margins than IBP gives the box of radius 0" in text for text in e.value.contradictions)
    assert len(e.value.contradictions) >= 10


def test_nan_proves_nothing_and_contradicts_nothing():
    bounded, x, y = trained_digits()
    with torch.no_grad():
        bounded.wrapped[7].weight.fill_(torch.nan)
    found = fw.verify(bounded, (x, y), 0.004)
    assert found.verified_error.value == 1.0
    assert all(math.isnan(sample.margin) for sample in found.certificates)


class Stop(KeyboardInterrupt):
    pass


def stop_after(batches):
    done = []

    def progress(certificates):
        done.append(len(certificates))
        if len(done) == batches:
            raise Stop

    return progress


@pytest.mark.parametrize("torn", [False, True])
def test_an_interrupted_verification_goes_on(torn, tmp_path, monkeypatch):
    bounded, x, y = trained_digits()
    given = {"methods": ("IBP", "CROWN"), "batch_size": 5, "float64": True}
    unbroken = fw.verify(bounded, (x, y), 0.004, **given)
    path = tmp_path / "journal"
    with pytest.raises(Stop):
        fw.verify(bounded, (x, y), 0.004, **given, journal=Journal(path), progress=stop_after(3))
    if torn:
        path.write_bytes(path.read_bytes()[:-20])
    calls = []

    def counted(original):
        def noted(self, x, *rest):
            calls.append(len(x))
            return original(self, x, *rest)

        return noted

    for name in ("screen", "certify"):
        monkeypatch.setattr(certify.Certifier, name, counted(getattr(certify.Certifier, name)))
    fw.verify(bounded, (x, y), 0.004, **given)
    all_calls = calls.copy()
    assert sum(all_calls) > len(x)
    calls.clear()
    journal = Journal(path)
    resumed = fw.verify(bounded, (x, y), 0.004, **given, journal=journal)
    done = len(journal._known) - len(calls)
    assert calls == all_calls[done:]
    assert done == 3 - torn
    assert resumed.certificates == unbroken.certificates
    assert {name: stage.samples for name, stage in resumed.stages.items()} == {
        name: stage.samples for name, stage in unbroken.stages.items()
    }
    # Another radius, other weights, other settings: nothing of it fits.
    calls.clear()
    fw.verify(bounded, (x, y), 0.003, **given, journal=Journal(path))
    fw.verify(bounded, (x, y), 0.004, **given, seed=1, journal=Journal(path))
    with torch.no_grad():
        bounded.wrapped[0].weight[0, 0, 0, 0] += 1e-6
    fw.verify(bounded, (x, y), 0.004, **given, journal=Journal(path))
    assert len(calls) >= 3 * 5
    # What a finished verification used is taken out, and no more.
    before = len(path.read_text().split("\n{"))
    journal.forget(journal.used)
    assert len(path.read_text().split("\n{")) == before - len(all_calls) - torn


def test_a_journal_goes_with_its_last_line(tmp_path):
    bounded, x, y = trained_digits()
    journal = Journal(tmp_path / "journal")
    fw.verify(bounded, (x, y), 0.004, journal=journal)
    assert journal.path.is_file()
    journal.forget(journal.used)
    assert not journal.path.exists()


def test_batches_shrink_until_they_fit(monkeypatch):
    bounded, x, y = trained_digits()
    expected = fw.verify(bounded, (x, y), 0.004)
    original, sizes = MarginBounds.lower, []

    def greedy(self, box, labels, method):
        if method == "IBP":
            sizes.append(len(labels))
        if len(labels) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return original(self, box, labels, method)

    monkeypatch.setattr(MarginBounds, "lower", greedy)
    found = fw.verify(bounded, (x, y), 0.004)
    assert [(one.verified, one.method) for one in found.certificates] == [
        (one.verified, one.method) for one in expected.certificates
    ]
    assert sizes[:5] == [1, 24, 12, 6, 3]  # What one sample takes is counted first.
    assert max(sizes[4:]) == 3  # What was learned is not forgotten.


def test_a_sample_that_does_not_fit_is_an_error_that_names_the_method(monkeypatch):
    bounded, x, y = trained_digits()

    def greedy(*args):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(MarginBounds, "lower", greedy)
    with pytest.raises(verification.OutOfMemoryError, match="IBP needs more memory than there is, for a single sample"):
        fw.verify(bounded, (x, y), 0.004)


def test_other_failures_are_no_lack_of_memory():
    def fails(part):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        memory.MicroBatches(4).each(fails, torch.arange(8), "IBP")


def test_parts_fit_into_the_memory_that_is_free(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda: 1_100_000)
    sizes = []

    def compute(part):
        sizes.append(len(part))
        first = torch.ones(len(part), 100_000, dtype=torch.uint8)
        second = first.view(len(part), -1) + 1  # 200,000 bytes a sample at once, in two tensors.
        del first
        return (second + 1)[:, 0].long() - 3 + part

    assert torch.equal(memory.MicroBatches(16).each(compute, torch.arange(10), "CROWN"), torch.arange(10))
    assert sizes == [1, 4, 4, 2]


def test_the_cache_of_a_control_group_is_available_memory(tmp_path):
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 64000 kB\nMemAvailable:    9000 kB\n")
    assert memory.free_memory(tmp_path) == 9000 * 1024
    (group / "memory.max").write_text("max\n")
    (group / "memory.current").write_text("6000\n")
    assert memory.free_memory(tmp_path) == 9000 * 1024
    (group / "memory.max").write_text("10000\n")
    (group / "memory.stat").write_text("anon 1000\nactive_file 7\ninactive_file 5000\n")
    assert memory.free_memory(tmp_path) == 10000 - 6000 + 5000


_FAULTS = """
import resource, sys, torch
from lirpa_fastwarmup.memory import keep_freed_memory
if "keep" in sys.argv:
    assert keep_freed_memory()
for number in range(30):
    if number == 20:  # The places of blocks have settled.
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.zeros(40_000_000, dtype=torch.uint8)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
def test_freed_memory_is_kept_on_request():
    kept, returned = (
        int(subprocess.run([sys.executable, "-c", _FAULTS, *more], capture_output=True, check=True, text=True).stdout)
        for more in (["keep"], [])
    )
    assert returned > 10 * 40_000_000 / 4096 / 2  # Pages, of which some are large.
    assert kept < returned / 20


def test_radii_of_a_classifier_whose_margins_are_known():
    # |w·x| / 3 where the sample is right; 0 where it is not.
    radii = verification.certified_radii(bounded_classifier(), (POINTS, LABELS), METHODS, input_range=None)
    for one, exact in zip(radii, [0.5 / 3, 0.2 / 3, 0.2, 0.0], strict=True):
        assert exact - 1e-4 <= one.radius <= exact + 1e-7
        assert one.method == ("IBP" if exact else None) or one.radius > exact - 1e-4
    assert [one.index for one in radii] == [0, 1, 2, 3]
    capped = verification.certified_radii(bounded_classifier(), (POINTS, LABELS), largest=0.1, input_range=None)
    assert [one.radius for one in capped][::2] == [pytest.approx(0.1), pytest.approx(0.1)]


def test_each_radius_is_certified_and_slightly_more_is_not(tmp_path):
    bounded, x, y = trained_digits()
    given = {"methods": ("IBP", "CROWN-IBP"), "batch_size": 9}
    radii = verification.certified_radii(bounded, (x, y), **given)
    assert {one.method for one in radii} >= {"CROWN-IBP", None}
    some = [one for one in radii if one.radius][::4]
    assert some
    for one in some:
        sample = x[one.index : one.index + 1], y[one.index : one.index + 1]
        assert fw.verify(bounded, sample, one.radius, (one.method,), restarts=1).verified_error.count == 0
        assert fw.verify(bounded, sample, one.radius + 1.1e-4, ("IBP", "CROWN-IBP")).verified_error.count == 1
    journal = Journal(tmp_path / "journal")

    def stop(new):
        raise Stop

    with pytest.raises(Stop):
        verification.certified_radii(bounded, (x, y), **given, journal=journal, progress=stop)
    assert verification.certified_radii(bounded, (x, y), **given, journal=Journal(journal.path)) == radii


def test_radii_of_an_unsound_engine_are_refused(wrong_sign):
    with pytest.raises(UnsoundBoundError, match="no certificate of this verification") as e:
        verification.certified_radii(bounded_classifier(), (POINTS, LABELS), ("IBP",), input_range=None)
    assert len(e.value.result) == 4
    told = " ".join(e.value.contradictions)
    assert re.search(r"sample 1 is proved by IBP at 0\.\d+ and misclassified at a point of that box", told)
    assert "sample 0 has other margins than IBP gives the box of radius 0 around it" in told


def without_mode(bounded, x, y):
    bounded.train()
    return bounded, (x, y), 0.1


BAD = {
    "eps 0": (lambda b, x, y: (b, (x, y), 0.0), ValueError, "eps must be above 0, found 0.0"),
    "eps negative": (lambda b, x, y: (b, (x, y), -0.1), ValueError, "eps must be finite and at least 0"),
    "eps too large": (lambda b, x, y: (b, (x, y), 8), ValueError, r"only 1 wide.*write 8/255, not 8"),
    "eps nan": (lambda b, x, y: (b, (x, y), math.nan), ValueError, "eps must be finite"),
    "eps text": (lambda b, x, y: (b, (x, y), "0.1"), TypeError, "eps must be a number"),
    "range": (lambda b, x, y: (b, (x * 255, y), 0.1), ValueError, "inputs must lie in input_range"),
    "bytes": (lambda b, x, y: (b, ((x * 255).byte(), y), 0.1), TypeError, "floating-point numbers, found torch.uint8"),
    "mode": (without_mode, ValueError, "the network is in training mode"),
    "no labels": (lambda b, x, y: (b, [x], 0.1), TypeError, "labels are needed"),
    "labels None": (lambda b, x, y: (b, (x, None), 0.1), TypeError, "labels are needed"),
    "loader without labels": (lambda b, x, y: (b, [(x,)], 0.1), TypeError, "labels are needed"),
    "float labels": (lambda b, x, y: (b, (x, y.float()), 0.1), TypeError, "labels must be class numbers"),
    "labels too high": (lambda b, x, y: (b, (x, y + 2), 0.1), ValueError, "labels must be between 0 and 2"),
    "nothing": (lambda b, x, y: (b, [], 0.1), ValueError, "no samples"),
    "plain network": (
        lambda b, x, y: (b.wrapped, (x, y), 0.1),
        TypeError,
        "expected a BoundedModule, found Sequential",
    ),
    "method": (lambda b, x, y: (b, (x, y), 0.1, ["MILP"]), ValueError, "unknown method 'MILP'; name at least one of"),
    "no method": (lambda b, x, y: (b, (x, y), 0.1, []), ValueError, "name at least one of IBP"),
    "method as text": (lambda b, x, y: (b, (x, y), 0.1, "IBP"), ValueError, "as a sequence"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    make, kind, message = BAD[case]
    bounded, x, y = trained_digits()
    arguments = make(bounded, x, y)
    with pytest.raises(kind, match=message):
        fw.verify(*arguments)


def test_bad_settings():
    bounded, x, y = trained_digits()
    with pytest.raises(ValueError, match="batch_size at least 1; found 50, 5 and 0"):
        fw.verify(bounded, (x, y), 0.1, batch_size=0)
    with pytest.raises(ValueError, match="0 < tolerance < largest"):
        verification.certified_radii(bounded, (x, y), tolerance=0.0)


def test_a_part_in_training_mode_is_named():
    bounded = fw.BoundedModule(networks.convolutional().eval(), torch.rand(2, 1, 8, 8))
    bounded.wrapped[1].train()
    with pytest.raises(ValueError, match=r"in training mode \(1\)"):
        fw.verify(bounded, (torch.rand(2, 1, 8, 8), torch.tensor([0, 1])), 0.1)


def test_classes_that_no_sample_has_are_told(caplog):
    bounded, x, y = trained_digits()
    fw.verify(bounded, (x[y == 1], y[y == 1]), 0.004, restarts=0)
    assert "no sample has the labels 0, 2, of the network's 3 classes" in caplog.text


def test_a_failure_of_the_engine_names_method_and_place(monkeypatch):
    bounded, x, y = trained_digits()
    general = engine.bound_general
    monkeypatch.setattr(general.BoundRelu, "bound_backward", general.Bound.bound_backward)
    with pytest.raises(NotImplementedError, match=r"failed in CROWN at Relu after module '\d+' \(\w+Error: "):
        fw.verify(bounded, (x, y), 0.5, ("CROWN",))


def test_the_network_is_left_as_it_was():
    bounded, x, y = trained_digits()
    before = {name: value.clone() for name, value in bounded.state_dict().items()}
    fw.verify(bounded, (x, y), 0.004, METHODS)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in bounded.parameters())
    assert all(torch.equal(value, before[name]) for name, value in bounded.state_dict().items())


@pytest.mark.parametrize("method", ["CROWN-IBP", "CROWN", "alpha-CROWN"])
def test_bounds_do_not_depend_on_what_was_bounded_before(method):
    bounded, x, y = trained_digits()
    network = MarginBounds(bounded, torch.float32)
    fresh = network.lower(fw.input_box(x[:4], 0.02), y[:4], method)
    for other, eps in (("alpha-CROWN", 0.1), ("CROWN", 0.004), ("alpha-CROWN", 0.05)):
        network.lower(fw.input_box(x[4:9], eps), y[4:9], other)
    assert torch.equal(network.lower(fw.input_box(x[:4], 0.02), y[:4], method), fresh)


def test_threads_leave_the_process_as_it_was_and_get_the_same_certificates():
    bounded, x, y = trained_digits()
    given = {"methods": METHODS, "float64": True, "pgd_steps": 3, "restarts": 1, "batch_size": 6}
    expected = fw.verify(bounded, (x, y), 0.02, **given).certificates

    def process():
        coarse = [setting.read() for setting in precision._COARSE]
        return (
            torch.get_default_dtype(),
            sys.stdout,
            resource.getrlimit(resource.RLIMIT_AS),
            coarse,
            warnings.filters[:],
        )

    before = process()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: fw.verify(bounded, (x, y), 0.02, **given).certificates, range(4)))
    assert process() == before
    assert all(certificates == expected for certificates in found)


def test_attacks_do_not_depend_on_how_a_batch_was_split(monkeypatch):
    bounded, x, y = trained_digits()
    begun = {}
    original = certify.attack

    def noted(model, x, y, eps, **given):
        for sample, start in zip(x, given["starts"].transpose(0, 1), strict=True):
            begun.setdefault(sample.numpy().tobytes(), []).append(start)
        return original(model, x, y, eps, **given)

    monkeypatch.setattr(certify, "attack", noted)
    whole = fw.verify(bounded, (x, y), 0.05, ("IBP",), pgd_steps=5)
    monkeypatch.setattr(memory, "free_memory", lambda: 100_000)
    parts = fw.verify(bounded, (x, y), 0.05, ("IBP",), pgd_steps=5)
    assert [one.falsified for one in whole.certificates] == [one.falsified for one in parts.certificates]
    assert len(begun) == whole.stages["PGD"].samples >= 10
    for starts in begun.values():
        assert all(torch.equal(start, starts[0]) for start in starts)


def test_radii_of_one_sample_each_are_bounded_in_parts_too(monkeypatch):
    bounded, x, y = trained_digits()
    eps = torch.linspace(0.001, 0.05, 24).view(24, 1, 1, 1)
    whole = fw.verify(bounded, (x, y), eps, METHODS, pgd_steps=3, batch_size=24)
    monkeypatch.setattr(memory, "free_memory", lambda: 200_000)
    parts = fw.verify(bounded, (x, y), eps, METHODS, pgd_steps=3, batch_size=24)
    assert [one.verified for one in whole.certificates] == [one.verified for one in parts.certificates]
    for one, other in zip(whole.certificates, parts.certificates, strict=True):
        assert one.margin == pytest.approx(other.margin, rel=1e-4, abs=1e-5, nan_ok=True)


def scaled(factor):
    """A network; all of them have one text and one state."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x):
            return self.layer(x) * factor

    return Net().eval()


def test_the_journal_tells_networks_apart_by_what_they_compute(tmp_path):
    torch.manual_seed(0)
    models = [scaled(2), scaled(3)]
    models[1].load_state_dict(models[0].state_dict())
    assert str(models[0]) == str(models[1])
    x, y = torch.rand(6, 4), torch.arange(6) % 3
    ranges = [(torch.zeros(4), torch.ones(4)), (torch.zeros(4), torch.tensor([1.0, 1.0, 1.0, 2.0]))]
    found = []
    for model in models:
        for input_range in ranges:
            given = {"restarts": 0, "input_range": input_range}
            bounded = fw.BoundedModule(model, x)
            found.append(fw.verify(bounded, (x, y), 0.3, ("IBP",), journal=Journal(tmp_path / "journal"), **given))
            alone = fw.verify(bounded, (x, y), 0.3, ("IBP",), **given)
            assert alone.certificates == found[-1].certificates
    assert (tmp_path / "journal").read_text().count("\n{") == 4


def test_a_damaged_line_of_the_journal_is_computed_again(tmp_path):
    bounded, x, y = trained_digits()
    path = tmp_path / "journal"
    expected = fw.verify(bounded, (x, y), 0.004, ("IBP",), restarts=0, batch_size=8, journal=Journal(path))
    lines = [line for line in path.read_text().splitlines() if line]
    lines[1] = (
        lines[1].replace('"verified": true', '"verified": false').replace('"verified": false', '"verified": true')
    )
    lines[2] = "[" * 100_000
    path.write_text("\n".join(lines) + "\n")
    found = fw.verify(bounded, (x, y), 0.004, ("IBP",), restarts=0, batch_size=8, journal=Journal(path))
    assert found.certificates == expected.certificates


def test_the_search_for_radii_ends_where_float32_ends():
    bounded, x, y = trained_digits()
    fine = verification.certified_radii(bounded, (x, y), ("IBP",), tolerance=1e-12, restarts=0)
    coarse = verification.certified_radii(bounded, (x, y), ("IBP",), tolerance=1e-4, restarts=0)
    for one, other in zip(fine, coarse, strict=True):
        assert 0 <= one.radius - other.radius <= 1e-4 + 1e-9
    network = MarginBounds(bounded, torch.float32)
    for one in fine:
        if one.radius:
            box = fw.input_box(x[one.index :][:1], one.radius * (1 + 1e-5))
            assert not bool((network.lower(box, y[one.index :][:1], "IBP") > 0).all())


@pytest.mark.parametrize("bound", ["crown-ibp", "crown-ibp-fused"])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh, nn.Sigmoid, nn.ReLU6], ids=lambda kind: kind.__name__)
def test_networks_in_double_precision_are_trained_under_a_default_of_single_precision(bound, activation):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), activation(), nn.Linear(8, 3)).double()
    x, y = torch.rand(6, 1, 4, 4).double(), torch.arange(6) % 3
    warmup = fw.ShortWarmup(
        fw.BoundedModule(model, x), fw.LinearEpsilon(0.1, 1, 2, 2), loss=LOSSES[bound](), regularizers=()
    )
    warmup.step()
    out = warmup(x, y)
    out.loss.backward()
    assert out.loss.dtype == model[1].weight.grad.dtype == torch.float64
    assert torch.get_default_dtype() == torch.float32
    single = fw.ShortWarmup(
        fw.BoundedModule(copy.deepcopy(model).float(), x.float()),
        warmup.schedule,
        loss=LOSSES[bound](),
        regularizers=(),
    )
    single.step()
    assert float(single(x.float(), y).loss.detach()) == pytest.approx(float(out.loss.detach()), rel=1e-5)
    assert verification.evaluate(warmup.bounded, (x, y), 0.01).standard_error.samples == 6
