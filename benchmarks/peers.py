"""Losses, gradients and speed of this package against CTBench and CTRAIN.

    PYTHONPATH=CTRAIN_CHECKOUT:CTBENCH_CHECKOUT:AUTO_LIRPA_0.7_CHECKOUT python benchmarks/peers.py
    ... python benchmarks/peers.py --time --width 8 32 --rounds 20

Same weights, batch, points and radius. CTBench's losses are this package's with the BatchNorm policy "clean", CTRAIN's
with "adversarial" and, for SABR, a small box of one size at every coordinate. Peers that cannot be imported are left
out. Timed steps go from the clean pass to the gradients, without regularisers and optimiser: once with adversarial
points that are handed over, once with the attack, from one start.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any
from unittest import mock

import measure
import torch
from torch import Tensor, nn

import lirpa_fastwarmup as fw
from lirpa_fastwarmup.engine.compat import engine
from lirpa_fastwarmup.memory import keep_freed_memory

EPS, ALPHA, RATIO = 0.05, 0.3, 0.4
KINDS = ("MTL-IBP", "EXP-IBP", "CC-IBP", "SABR")
Step = Callable[[], Tensor]  # Computes a loss, of which gradients can be taken.
Peer = Callable[[str, measure.Setup, Tensor | None, int], tuple[Step, nn.Module]]


class Given(fw.attacks.PGD):
    """An attack that returns the points of the comparison."""

    def points(self, *_: Any) -> Tensor:
        return POINTS


def flat(setup: measure.Setup) -> nn.Sequential:
    """CNN-7, flat, as CTBench converts it."""
    net = setup.network()
    return nn.Sequential(
        *(one for module in net for one in (module if isinstance(module, nn.Sequential) else [module]))
    )


def ours(
    kind: str,
    setup: measure.Setup,
    points: Tensor | None,
    steps: int,
    *,
    policy: Any = "clean",
    scalar: bool = False,
    compile: bool = False,  # noqa: A002
) -> tuple[Step, nn.Module]:
    """A step of this package."""
    x, y = setup.batch_of_noise()
    model = flat(setup).train()
    attack = fw.attacks.PGD(steps=steps, step_size=0.5, return_best=True) if points is None else Given()
    kinds = {"MTL-IBP": fw.losses.MTLIBP, "EXP-IBP": fw.losses.EXPIBP, "CC-IBP": fw.losses.CCIBP}
    loss = fw.losses.SABR(RATIO, attack, policy, scalar) if kind == "SABR" else kinds[kind](ALPHA, attack, policy)
    schedule = fw.ConstantEpsilon(EPS)
    warmup = fw.ShortWarmup(fw.BoundedModule(model, x[:2]), schedule, loss=loss, regularizers=(), compile=compile)
    warmup.train()
    return lambda: warmup(x, y).loss, model


def ctrain(kind: str, setup: measure.Setup, points: Tensor | None, steps: int) -> tuple[Step, nn.Module]:
    """A step of CTRAIN."""
    for name in ("CTRAIN.eval", "CTRAIN.eval.eval"):  # It needs verifiers that the losses do not use.
        sys.modules.setdefault(name, mock.MagicMock())
    from CTRAIN.train.certified.losses.convex_combinations import get_mtl_ibp_loss
    from CTRAIN.train.certified.losses.sabr import get_sabr_loss

    x, y = setup.batch_of_noise()
    model = flat(setup).eval()
    with contextlib.redirect_stdout(None):
        bounded = engine.BoundedModule(model, x[:2], bound_opts={"conv_mode": "patches"})
    model.train()
    bounded.train()
    criterion = nn.CrossEntropyLoss(reduction="none")
    ends = {"x_L": (x - EPS).clamp(0, 1), "x_U": (x + EPS).clamp(0, 1)}
    box = engine.PerturbationLpNorm(norm=float("inf"), eps=EPS, **ends)
    limits = {"data_min": torch.tensor(0.0).to(x), "data_max": torch.tensor(1.0).to(x)}
    place = {"MTL-IBP": "train.certified.losses.convex_combinations", "SABR": "bound.sabr"}[kind]

    def step() -> Tensor:
        bounded(x)
        with _handed_over(f"CTRAIN.{place}.pgd_attack", points):
            if kind == "SABR":
                options: dict[str, Any] = {"pgd_steps": steps, "pgd_early_stopping": False, "device": "cpu"}
                found: tuple[Tensor, ...] = get_sabr_loss(
                    bounded, model, x, y, EPS, RATIO, criterion, **limits, **options
                )
            else:
                options = {"n_steps": steps, "step_size": 0.5, "pgd_ptb": box, "device": "cpu"}
                found = get_mtl_ibp_loss(bounded, model, box, x, y, setup.classes, criterion, ALPHA, **options)
            return found[0]

    return step, model


def ctbench(kind: str, setup: measure.Setup, points: Tensor | None, steps: int) -> tuple[Step, nn.Module]:
    """A step of CTBench."""
    import model_wrapper
    from AIDomains.abstract_layers import Sequential

    x, y = setup.batch_of_noise()
    net = Sequential.from_concrete_network(flat(setup), setup.shape)
    net.set_dim(x[:2])
    settings = argparse.Namespace(
        model_selection=None, train_steps=steps, restarts=1, step_size=0.5, train_eps=EPS, test_eps=EPS, use_amp=False
    )
    kinds = {"MTL-IBP": "MTLIBP", "EXP-IBP": "EXPIBP", "CC-IBP": "CCIBP", "SABR": "SmallBox"}
    wrapper_class = getattr(model_wrapper, f"{kinds[kind]}ModelWrapper")
    given = () if kind == "SABR" else (ALPHA, 1.0)
    options = {"eps_shrinkage": RATIO} if kind == "SABR" else {}
    arguments = (net, nn.CrossEntropyLoss(), setup.shape, torch.device("cpu"), settings)
    wrapper = wrapper_class(*arguments, *given, **options)
    wrapper.max_eps = EPS
    wrapper.current_eps = EPS
    wrapper.robust_weight = 0.5  # With 1, it would detach the clean pass.
    net.train()

    def step() -> Tensor:
        with _handed_over("model_wrapper.adv_whitebox", points):
            wrapper.compute_nat_loss_and_set_BN(x, y)
            if kind == "SABR":
                found = wrapper.get_robust_stat_from_input_noise(EPS, x, y)
            else:
                found = wrapper.get_robust_stat_from_bounds((x - EPS).clamp(min=0), (x + EPS).clamp(max=1), x, y)
            loss: Tensor = found[0]
            return loss

    torch.autograd.set_detect_anomaly(False)  # Importing CTBench switches it on, for all code.
    return step, net


def _handed_over(attack: str, points: Tensor | None) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext() if points is None else mock.patch(attack, return_value=points)


def compare() -> None:
    """Print relative differences of losses and gradients."""
    setup = measure.Setup(width=4, hidden=32, batch=16)
    hand_over(setup)
    adversarial = partial(ours, policy="adversarial")
    pairs: list[tuple[str, Peer, str, Peer]] = [
        ("CTRAIN", ctrain, "MTL-IBP", adversarial),
        ("CTRAIN", ctrain, "SABR", partial(adversarial, scalar=True)),
        *(("CTBench", ctbench, kind, ours) for kind in KINDS),
    ]
    print(f"{'peer':<8} {'loss':<8} {'value':>12} {'difference':>11} {'of gradients':>13}")
    for peer, theirs, kind, own in pairs:
        try:
            results = [_result(*make(kind, setup, POINTS, 1)) for make in (own, theirs)]
        except ImportError as error:
            print(f"{peer:<8} {kind:<8} not compared: {error}")
            continue
        (found, gradient), (expected, other) = results
        difference = float((found - expected).abs() / expected.abs())
        print(
            f"{peer:<8} {kind:<8} {float(expected):>12.4f} {difference:>11.1e} "
            f"{float((gradient - other).norm() / other.norm()):>13.1e}"
        )


def hand_over(setup: measure.Setup) -> None:
    """Make the points that all codes take for their attack's."""
    global POINTS
    x, _ = setup.batch_of_noise()
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(1))
    POINTS = (x + EPS * (2 * noise - 1).sign()).clamp(0, 1)


def _result(step: Step, model: nn.Module) -> tuple[Tensor, Tensor]:
    loss = step()
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def time_steps(setup: measure.Setup, steps: int, rounds: int) -> None:
    """Print milliseconds of steps that alternate, and each peer's over those with its BatchNorm policy."""
    hand_over(setup)
    print(f"{setup}, attack of {steps} steps")
    print(f"{'':<26} {'loss, ms':>9} {'over compiled':>14} {'over eager':>11} {'attack, ms':>11}")
    for kind in ("SABR", "MTL-IBP"):
        for policy, name, theirs in (("clean", "CTBench", ctbench), ("adversarial", "CTRAIN", ctrain)):
            own = partial(ours, policy=policy, scalar=policy == "adversarial")
            codes: dict[str, Peer] = {"compiled": partial(own, compile=True), "eager": own, name: theirs}
            timed: dict[str, measure.Step] = {"clean": measure.clean_step(setup)}
            for code, make in codes.items():
                for part, points in (("loss", POINTS), ("whole", None)):
                    timed[f"{code}, {part}"] = whole(*make(kind, setup, points, steps))
            times = measure.seconds_of(timed, rounds, setup.device)
            print(f"{kind}, {policy}, clean step {1e3 * median(times['clean']):.0f} ms")
            for code in codes:
                loss, both = times[f"{code}, loss"], times[f"{code}, whole"]
                attack = median(one - other for one, other in zip(both, loss, strict=True))
                ratios = [measure.ratio(loss, times[f"{base}, loss"]) for base in ("compiled", "eager")]
                print(
                    f"  {code:<24} {1e3 * median(loss):>9.0f} {ratios[0]:>14.2f} {ratios[1]:>11.2f} "
                    f"{1e3 * attack:>11.0f}",
                    flush=True,
                )


def whole(step: Step, model: nn.Module) -> measure.Step:
    """The step and its backward pass."""

    def run() -> None:
        model.zero_grad()
        step().backward()

    return run


def main() -> None:
    """Compare values, or measure times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--time", action="store_true", help="measure times instead of comparing values")
    parser.add_argument("--width", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=1, help="of the attack")
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    logging.disable(logging.INFO)
    if not options.time:
        compare()
        return
    print(measure.machine("cpu"))
    keep_freed_memory()  # Page faults would slow all of them, each by another amount.
    for width in options.width:
        setup = measure.Setup(width=width, hidden=options.hidden, shape=(3, 32, 32), batch=options.batch)
        time_steps(setup, options.steps, options.rounds)


if __name__ == "__main__":
    main()
