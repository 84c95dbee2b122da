"""Losses and gradients of this package against those of CTBench and CTRAIN, at adversarial points that are handed over.

    PYTHONPATH=CTRAIN_CHECKOUT:CTBENCH_CHECKOUT:AUTO_LIRPA_0.7_CHECKOUT python benchmarks/peers.py

Same weights, batch, points and radius. CTBench's losses are this package's with the BatchNorm policy "clean", CTRAIN's
with "adversarial" and, for SABR, a small box of one size at every coordinate. Peers that cannot be imported are left
out.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import lirpa_fastwarmup as fw
from lirpa_fastwarmup.engine.compat import engine

EPS, ALPHA, RATIO = 0.05, 0.3, 0.4
Result = tuple[Tensor, Tensor]


class Given(fw.attacks.PGD):
    """An attack that returns the points of the comparison."""

    def points(self, *_: Any) -> Tensor:
        return POINTS


def network() -> nn.Sequential:
    """CNN-7, flat, as CTBench converts it."""
    torch.manual_seed(0)
    net = fw.models.cnn7((1, 28, 28), 10, width=4, hidden=32)
    return nn.Sequential(
        *(one for module in net for one in (module if isinstance(module, nn.Sequential) else [module]))
    )


def _finished(loss: Tensor, model: nn.Module) -> Result:
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def ours(loss: fw.losses.Loss, x: Tensor, y: Tensor) -> Result:
    """A loss of this package and its gradient."""
    model = network().train()
    bounded = fw.BoundedModule(model, x[:2]).train()
    logits = bounded(x)
    step = fw.losses.LossStep(bounded, x, y, logits, fw.input_box(x, EPS), EPS, (0.0, 1.0))
    return _finished(loss(step).loss, model)


def ctrain(kind: str, x: Tensor, y: Tensor) -> Result:
    """A loss of CTRAIN and its gradient."""
    for name in ("CTRAIN.eval", "CTRAIN.eval.eval"):  # It needs verifiers that the losses do not use.
        sys.modules.setdefault(name, mock.MagicMock())
    from CTRAIN.train.certified.losses.convex_combinations import get_mtl_ibp_loss
    from CTRAIN.train.certified.losses.sabr import get_sabr_loss

    model = network().eval()
    with contextlib.redirect_stdout(None):
        bounded = engine.BoundedModule(model, x[:2], bound_opts={"conv_mode": "patches"})
    model.train()
    bounded.train()
    criterion = nn.CrossEntropyLoss(reduction="none")
    ends = {"x_L": (x - EPS).clamp(0, 1), "x_U": (x + EPS).clamp(0, 1)}
    box = engine.PerturbationLpNorm(norm=float("inf"), eps=EPS, **ends)
    place = {"MTL-IBP": "train.certified.losses.convex_combinations", "SABR": "bound.sabr"}[kind]
    bounded(x)
    with mock.patch(f"CTRAIN.{place}.pgd_attack", return_value=POINTS):
        if kind == "SABR":
            limits = {"data_min": torch.tensor(0.0).to(x), "data_max": torch.tensor(1.0).to(x)}
            loss = get_sabr_loss(bounded, model, x, y, EPS, RATIO, criterion, device="cpu", **limits)[0]
        else:
            loss = get_mtl_ibp_loss(bounded, model, box, x, y, 10, criterion, ALPHA, pgd_ptb=box, device="cpu")[0]
    return _finished(loss, model)


def ctbench(kind: str, x: Tensor, y: Tensor) -> Result:
    """A loss of CTBench and its gradient."""
    import model_wrapper
    from AIDomains.abstract_layers import Sequential

    model = network()
    net = Sequential.from_concrete_network(model, (1, 28, 28))
    net.set_dim(x[:2])
    settings = argparse.Namespace(
        model_selection=None, train_steps=1, restarts=1, step_size=None, train_eps=EPS, test_eps=EPS, use_amp=False
    )
    kinds = {"MTL-IBP": "MTLIBP", "EXP-IBP": "EXPIBP", "CC-IBP": "CCIBP", "SABR": "SmallBox"}
    wrapper_class = getattr(model_wrapper, f"{kinds[kind]}ModelWrapper")
    given = (RATIO,) if kind == "SABR" else (ALPHA, 1.0)
    options = {"eps_shrinkage": RATIO} if kind == "SABR" else {}
    arguments = (net, nn.CrossEntropyLoss(), (1, 28, 28), torch.device("cpu"), settings)
    wrapper = wrapper_class(*arguments, **options) if options else wrapper_class(*arguments, *given)
    wrapper.max_eps = EPS
    wrapper.current_eps = EPS
    wrapper.robust_weight = 0.5  # With 1, it would detach the clean pass.
    net.train()
    with mock.patch.object(model_wrapper, "adv_whitebox", return_value=POINTS):
        wrapper.compute_nat_loss_and_set_BN(x, y)
        if kind == "SABR":
            loss = wrapper.get_robust_stat_from_input_noise(EPS, x, y)[0]
        else:
            loss = wrapper.get_robust_stat_from_bounds((x - EPS).clamp(min=0), (x + EPS).clamp(max=1), x, y)[0]
    return _finished(loss, net)


def main() -> None:
    """Print relative differences of losses and gradients."""
    global POINTS
    attack = Given()
    losses = fw.losses
    pairs: list[tuple[str, Callable[..., Result], str, fw.losses.Loss]] = [
        ("CTRAIN", ctrain, "MTL-IBP", losses.MTLIBP(ALPHA, attack, "adversarial")),
        ("CTRAIN", ctrain, "SABR", losses.SABR(RATIO, attack, "adversarial", scalar=True)),
        ("CTBench", ctbench, "MTL-IBP", losses.MTLIBP(ALPHA, attack)),
        ("CTBench", ctbench, "EXP-IBP", losses.EXPIBP(ALPHA, attack)),
        ("CTBench", ctbench, "CC-IBP", losses.CCIBP(ALPHA, attack)),
        ("CTBench", ctbench, "SABR", losses.SABR(RATIO, attack)),
    ]
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(16, 1, 28, 28, generator=generator), torch.randint(10, (16,), generator=generator)
    POINTS = (x + EPS * (2 * torch.rand(x.shape, generator=generator) - 1).sign()).clamp(0, 1)
    print(f"{'peer':<8} {'loss':<8} {'value':>12} {'difference':>11} {'of gradients':>13}")
    for peer, compute, kind, loss in pairs:
        try:
            (found, gradient), (theirs, other) = ours(loss, x, y), compute(kind, copy.deepcopy(x), y)
        except ImportError as error:
            print(f"{peer:<8} {kind:<8} not compared: {error}")
            continue
        difference = float((found - theirs).abs() / theirs.abs())
        print(
            f"{peer:<8} {kind:<8} {float(theirs):>12.4f} {difference:>11.1e} "
            f"{float((gradient - other).norm() / other.norm()):>13.1e}"
        )


if __name__ == "__main__":
    main()
