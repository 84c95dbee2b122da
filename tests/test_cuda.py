"""What only a GPU shows. Everything else is tested on the CPU."""

from __future__ import annotations

import pytest
import torch

import lirpa_fastwarmup as fw
from lirpa_fastwarmup.engine.precision import products_in_tf32
from lirpa_fastwarmup.experiments.presets import preset
from lirpa_fastwarmup.experiments.training import TrainingInterrupted, resume, train
from lirpa_fastwarmup.recipe import compiled
from lirpa_fastwarmup.recipe.losses import LOSSES
from tests import networks
from tests.test_compiled import EPS, FULL, RAMPING, STARTING, assert_same_step, pair
from tests.test_resume import SignalAt

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


class FakeGraph:
    """Stands for a CUDA graph: counts its replays."""

    replays = 0

    def replay(self):
        FakeGraph.replays += 1


class Nothing:
    """Stands for streams and for what is done within them."""

    def __init__(self, *_): ...

    def __enter__(self): ...

    def __exit__(self, *_): ...

    def wait_stream(self, _): ...


def test_a_graph_is_captured_once_and_leaves_the_state_as_it_was(monkeypatch):
    for name in ("Stream", "stream", "current_stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, Nothing)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(FakeGraph, "replays", 0)
    calls = []

    def function(state, x):
        calls.append((state, x))
        state.add_(1)
        return x * 2

    state, x = torch.zeros(2), torch.ones(3)
    graph = compiled.CudaGraph(function, (x,))
    assert torch.equal(graph(state, x), 2 * x)
    warm_up_and_capture = len(calls)
    graph(state, 5 * x)
    assert len(calls) == warm_up_and_capture
    assert FakeGraph.replays == 2
    assert torch.equal(calls[-1][1], 5 * x)  # Where the graph reads its input.
    # The fake runs what it captures once, as a real one does not; the runs before it are undone.
    assert torch.equal(state, torch.ones(2))
    moved = state.clone()
    graph(moved, x)
    assert len(calls) == 2 * warm_up_and_capture
    assert calls[-1][0] is moved


@on_gpu
@pytest.mark.parametrize("bound", ["ibp", "crown-ibp-fused"])
@pytest.mark.parametrize("step", [STARTING, RAMPING, FULL])
def test_compiled_steps_are_the_eager_ones_and_wait_for_nothing(step, bound, x, y):
    x, y = x.cuda(), y.cuda()
    eager, compiled = pair(
        networks.SmallResNet(batchnorm=True).cuda(), x, backend="inductor", step=step, loss=LOSSES[bound]()
    )
    with products_in_tf32(False):
        assert_same_step(eager, compiled, x, y)
        for objective in (eager, compiled):
            for parameter in objective.parameters():
                parameter.data = parameter.data * 0.9
        assert_same_step(eager, compiled, x.flip(0), y.flip(0))
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        compiled(x, y).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    compiled.raise_pending_errors()


@on_gpu
def test_results_of_a_step_outlive_the_next(x, y):
    x, y = x.cuda(), y.cuda()
    eager, compiled = pair(networks.convolutional().cuda(), x, backend="inductor")
    with products_in_tf32(False):
        first = compiled(x, y)
        robust_loss = float(first.robust_loss)
        second = compiled(x.flip(0) * 0.5, y)
        assert float(first.robust_loss) == robust_loss
        (first.loss + second.loss).backward()
        (eager(x, y).loss + eager(x.flip(0) * 0.5, y).loss).backward()
    for one, other in zip(eager.parameters(), compiled.parameters(), strict=True):
        assert (one.grad - other.grad).norm() <= 1e-4 * (1 + one.grad.norm())


@on_gpu
def test_bounds_on_the_gpu_are_those_on_the_cpu(x, y):
    model = networks.SmallResNet(batchnorm=True).eval()
    on_cpu = fw.ShortWarmup(fw.BoundedModule(model, x), fw.ConstantEpsilon(EPS)).eval()
    expected = float(on_cpu(x, y).loss.detach())
    on_gpu = fw.ShortWarmup(fw.BoundedModule(model.cuda(), x.cuda()), fw.ConstantEpsilon(EPS)).eval()
    with products_in_tf32(False):
        assert float(on_gpu(x.cuda(), y.cuda()).loss.detach()) == pytest.approx(expected, rel=1e-5)


@on_gpu
def test_a_run_trains_stops_and_goes_on(tmp_path):
    settings = preset("mnist5k").replace(
        width=2, hidden=8, epochs=3, ramp_length=2, data_limit=200, batch_size=64, compile=True, pgd_steps=2
    )
    with pytest.raises(TrainingInterrupted):
        train(settings, tmp_path, device="cuda", progress=SignalAt(5))
    summary = resume(tmp_path, device="cuda")
    assert summary["standard_error"] <= summary["verified_error"] <= 1
    assert len((tmp_path / "history.csv").read_text().splitlines()) == 1 + settings.epochs
