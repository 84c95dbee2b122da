"""The losses of later work: identities, order, gradients, BatchNorm policies, and what is refused."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lirpa_fastwarmup as fw
from lirpa_fastwarmup import losses
from lirpa_fastwarmup.attacks import PGD
from tests import networks

EPS = 0.08
EXPRESSIVE = {"mtl": losses.MTLIBP, "exp": losses.EXPIBP, "cc": losses.CCIBP}
ATTACK = PGD(steps=3, step_size=0.5, restarts=2, return_best=True)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(8, 1, 8, 8, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (8,), generator=generator)


def network(batchnorm=True):
    torch.manual_seed(0)
    return networks.convolutional(batchnorm).double()


def step_of(bounded, x, y, eps=EPS, **options):
    """A step after the clean pass."""
    logits = bounded(x)
    return losses.LossStep(bounded, x, y, logits, fw.input_box(x, eps), eps, (0.0, 1.0), **options)


def value(loss, x, y, model=None, seed=0):
    bounded = fw.BoundedModule(network() if model is None else model, x[:2]).train()
    step = step_of(bounded, x, y)
    torch.manual_seed(seed)
    return loss(step)


def test_a_ratio_of_one_is_the_ibp_loss(batch):
    found = value(losses.SABR(ratio=1.0, attack=ATTACK), *batch)
    assert torch.allclose(found.loss, value(losses.IBP(), *batch).loss, rtol=1e-12)
    assert found.certified is None


@pytest.mark.parametrize("name", EXPRESSIVE)
def test_alpha_one_is_the_ibp_loss_and_alpha_zero_the_adversarial_one(name, batch):
    ibp = value(losses.IBP(), *batch)
    at_one, at_zero = (value(EXPRESSIVE[name](alpha=alpha, attack=ATTACK), *batch) for alpha in (1.0, 0.0))
    assert torch.allclose(at_one.loss, ibp.loss, rtol=1e-12)
    assert torch.allclose(at_zero.loss, at_zero.adversarial_loss, rtol=1e-12)
    assert torch.equal(at_zero.certified, ibp.certified)


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.9])
def test_the_order_of_the_expressive_losses(alpha, batch):
    found = {name: value(kind(alpha=alpha, attack=ATTACK), *batch) for name, kind in EXPRESSIVE.items()}
    mtl, exp, cc = (found[name].loss for name in ("mtl", "exp", "cc"))
    one = found["mtl"]
    assert cc <= mtl
    assert exp <= mtl
    assert torch.minimum(one.adversarial_loss, one.robust_loss) <= exp
    assert one.adversarial_loss <= one.robust_loss


@pytest.mark.parametrize(
    "loss",
    [
        losses.IBP(),
        losses.SABR(ratio=0.3, attack=ATTACK),
        losses.SABR(ratio=0.3, attack=ATTACK, scalar=True, relu_shrinkage=0.8),
        *(kind(alpha=0.3, attack=ATTACK) for kind in EXPRESSIVE.values()),
    ],
    ids=lambda loss: type(loss).__name__,
)
def test_gradients_are_finite_differences(loss, batch):
    """Of the loss at points that are held fixed, as no gradient passes through the attack."""
    x, y = batch
    model = network()
    bounded = fw.BoundedModule(model, x[:2]).train()
    torch.manual_seed(0)
    step = step_of(bounded, x, y)
    points = step.attacked(loss.attack, loss.batchnorm).detach() if hasattr(loss, "attack") else None

    class Given(losses.LossStep):
        def attacked(self, attack, batchnorm):
            return points

    def at(bounded):
        logits = bounded(x)
        return loss(Given(bounded, x, y, logits, fw.input_box(x, EPS), EPS, (0.0, 1.0))).loss

    parameters = list(model.parameters())
    gradients = torch.autograd.grad(at(bounded), parameters)
    generator = torch.Generator().manual_seed(1)
    directions = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
    expected = sum(float((g * d).sum()) for g, d in zip(gradients, directions, strict=True))
    size, values = 1e-6, []
    for sign in (1, -1):
        with torch.no_grad():
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter += sign * size * direction
            values.append(float(at(bounded)))
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter -= sign * size * direction
    assert (values[0] - values[1]) / (2 * size) == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("scalar", [False, True])
def test_the_small_box_lies_in_the_box_around_the_point(scalar, batch):
    x, y = batch
    bounded = fw.BoundedModule(network(), x[:2]).train()
    step = step_of(bounded, x, y, eps=0.3)  # Clipped in many places.
    big = step.box.ptb.x_L.clone(), step.box.ptb.x_U.clone()
    points = step.attacked(ATTACK, "clean")
    assert bool(((points >= big[0] - 1e-12) & (points <= big[1] + 1e-12)).all())
    lower, upper = losses.SABR(ratio=0.25, attack=ATTACK, scalar=scalar).small_box(step, points)
    assert bool((lower <= upper).all())
    assert bool((lower >= big[0] - 1e-12).all() or scalar)
    assert bool(((lower >= -1e-12) & (upper <= 1 + 1e-12)).all())
    if not scalar:
        assert torch.allclose(upper - lower, 0.25 * (big[1] - big[0]))
        assert bool((upper <= big[1] + 1e-12).all())


def test_an_attack_scale_searches_a_larger_box(batch):
    x, y = batch
    bounded = fw.BoundedModule(network(), x[:2]).train()
    step = step_of(bounded, x, y)
    far = PGD(steps=2, step_size=1.0, scale=2.0)
    points = step.attacked(far, "clean")
    distance = float((points - x).abs().max())
    assert EPS < distance <= 2 * EPS + 1e-12
    assert bool(((points >= 0) & (points <= 1)).all())


def test_what_is_visited_more_often_is_not_better_for_the_network(batch):
    x, y = batch
    bounded = fw.BoundedModule(network(), x[:2]).train()

    def loss_at(attack):
        torch.manual_seed(0)
        step = step_of(bounded, x, y)
        return float(F.cross_entropy(step.logits_at(step.attacked(attack, "clean")), y).detach())

    clean = float(F.cross_entropy(bounded(x), y).detach())
    best = loss_at(PGD(steps=8, step_size=0.5, restarts=3, decay=(0.1, (4, 7)), return_best=True))
    assert best > clean
    assert best >= loss_at(PGD(steps=8, step_size=0.5, restarts=1, return_best=False)) - 1e-9


def test_of_several_restarts_the_last_points_are_compared(batch):
    x, y = batch
    bounded = fw.BoundedModule(network(), x[:2]).eval()
    step = step_of(bounded, x, y)
    box, starts = (x - 0.3, x + 0.3), PGD(restarts=8).starts(x)

    def losses_at(restarts, some):
        attack = PGD(steps=1, step_size=0.7, restarts=restarts, return_best=False)
        points = attack.points(step.logits_at, y, *box, some)
        return F.cross_entropy(step.logits_at(points), y, reduction="none").detach()

    each = torch.stack([losses_at(1, start.unsqueeze(0)) for start in starts])
    assert torch.allclose(losses_at(8, starts), each.amax(0))
    assert not torch.allclose(each[0], each.amax(0))


def norms(model):
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


@pytest.mark.parametrize("policy", ["clean", "running", "adversarial"])
def test_batchnorm_policies(policy, batch):
    x, y = batch
    model = network()
    with torch.no_grad():
        model.train()(x.flip(0) * 0.7)  # Running statistics unlike the batch's.
    bounded = fw.BoundedModule(model, x[:2]).train()
    expected = copy.deepcopy(model)
    expected.train()(x)
    running = [module.running_mean.clone() for module in norms(expected)]
    torch.manual_seed(0)
    step = step_of(bounded, x, y)
    assert all(torch.allclose(m.running_mean, mean) for m, mean in zip(norms(model), running, strict=True))
    loss = losses.MTLIBP(alpha=0.5, attack=ATTACK, batchnorm=policy)
    found = loss(step)
    moved = [not torch.equal(m.running_mean, mean) for m, mean in zip(norms(model), running, strict=True)]
    assert all(moved) if policy == "adversarial" else not any(moved)

    # The attack's points, by a plain network in the mode that the policy names.
    twin = copy.deepcopy(expected)
    torch.manual_seed(0)
    starts = ATTACK.starts(x)
    ends = (x - EPS).clamp(0, 1), (x + EPS).clamp(0, 1)
    if policy == "clean":
        points = ATTACK.points(lambda z: with_batch_of(twin, x, z), y, *ends, starts)
        logits = with_batch_of(twin, x, points)
    else:
        points = ATTACK.points(twin.eval(), y, *ends, starts)
        logits = twin.train()(points) if policy == "adversarial" else with_batch_of(twin, x, points)
    assert float(found.adversarial_loss.detach()) == pytest.approx(float(F.cross_entropy(logits, y).detach()), rel=1e-6)


def with_batch_of(model, x, z):
    """The outputs for ``z`` of a network that normalises by the statistics of ``x``."""
    model = copy.deepcopy(model)
    for module in norms(model):

        def normalise(module, given):
            reference = given[0][: len(x)]
            over = [0, *range(2, reference.ndim)]
            shape = (1, -1, *[1] * (reference.ndim - 2))
            mean, var = reference.mean(over).view(shape), reference.var(over, correction=0).view(shape)
            scaled = (given[0] - mean) / (var + module.eps).sqrt()
            return scaled * module.weight.view(shape) + module.bias.view(shape)

        module.forward = lambda given, module=module, normalise=normalise: normalise(module, (given,))
    return model(torch.cat([x, z]))[len(x) :]


NAMED = {
    "sabr": losses.SABR(ratio=0.5, attack=PGD(steps=2, step_size=0.5, return_best=True)),
    "shrunk": losses.SABR(ratio=0.5, attack=PGD(), relu_shrinkage=0.8),
    "mtl": losses.MTLIBP(alpha=0.3),
    "adversarial": losses.MTLIBP(alpha=0.3, batchnorm="adversarial"),
    "exp": losses.EXPIBP(alpha=0.3, batchnorm="running"),
    "cc": losses.CCIBP(alpha=0.3, attack=PGD(steps=2, step_size=0.5, scale=1.5)),
}


def objective(loss, x, **options):
    model = network().float()
    bounded = fw.BoundedModule(model, x[:2])
    fw.ibp_init_(bounded)
    return fw.ShortWarmup(bounded, fw.SmoothedEpsilon(0.1, start=2, length=2, steps_per_epoch=4), loss=loss, **options)


@pytest.mark.parametrize("name", NAMED)
def test_steps_of_all_phases(name, batch):
    x, y = batch[0].float(), batch[1]
    torch.manual_seed(0)
    warmup = objective(NAMED[name], x).train()
    optimizer = torch.optim.Adam(warmup.parameters(), lr=1e-2)
    at_full_eps = []
    for number in range(30):
        out = warmup(x, y)
        if number >= 12:
            at_full_eps.append(float(out.loss.detach()))
        out.loss.backward()
        assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in warmup.parameters())
        optimizer.step()
        optimizer.zero_grad()
        warmup.step()
        in_warmup = number < 12
        assert bool(out.tightness.isfinite()) == in_warmup
        has_attack = number > 4
        assert bool(out.adversarial_loss.isfinite()) == (has_attack and "s" not in name[:1])
    assert at_full_eps[-1] < 0.9 * at_full_eps[0]
    with torch.no_grad():
        assert warmup.eval()(x, y).robust_loss.isfinite()  # Evaluation is always by IBP over the whole box.


@pytest.mark.parametrize("name", NAMED)
def test_compiled_steps_are_the_eager_ones(name, batch):
    x, y = batch[0].float(), batch[1]
    found = []
    for compiled in (False, True):
        warmup = objective(NAMED[name], x).train()
        if compiled:
            warmup._compiled = fw.recipe.compiled.CompiledSteps(warmup.bounded, (0.0, 1.0), None, "eager")
            warmup.compiled_phases = losses.PHASES
        warmup.steps_done = 9
        torch.manual_seed(1)
        out = warmup(x, y)
        out.loss.backward()
        found.append((out, [p.grad.clone() for p in warmup.parameters()]))
        if compiled:
            assert warmup._compiled._steps
    (eager, grads), (recorded, others) = found
    for field in ("loss", "adversarial_loss", "verified_error", "robust_loss"):
        assert torch.allclose(getattr(eager, field), getattr(recorded, field), rtol=1e-4, equal_nan=True)
    for one, two in zip(grads, others, strict=True):
        assert torch.allclose(one, two, rtol=1e-2, atol=1e-5)


def test_a_loss_of_ones_own(batch):
    x, y = batch[0].float(), batch[1]

    def smoothed(step):
        lower = step.ibp_margins()
        return losses.LossValue(F.softplus(-lower).sum(1).mean(), certified=(lower > 0).all(1))

    warmup = objective(smoothed, x).train()
    warmup.steps_done = 9
    out = warmup(x, y)
    out.loss.backward()
    assert out.loss.isfinite()
    assert 0 <= out.verified_error <= 1
    assert out.robust_loss.isnan()


BAD = {
    "alpha above 1": (lambda: losses.MTLIBP(alpha=1.5), ValueError, "alpha must be from 0"),
    "alpha below 0": (lambda: losses.CCIBP(alpha=-0.1), ValueError, "alpha must be from 0"),
    "alpha nan": (lambda: losses.EXPIBP(alpha=math.nan), ValueError, "alpha must be from 0"),
    "ratio 0": (lambda: losses.SABR(ratio=0.0), ValueError, "above 0 and at most 1; found 0.0"),
    "ratio above 1": (lambda: losses.SABR(ratio=1.1), ValueError, "at most 1"),
    "shrinkage": (lambda: losses.SABR(relu_shrinkage=0.0), ValueError, "relu_shrinkage"),
    "policy": (lambda: losses.SABR(batchnorm="frozen"), ValueError, "clean, running and adversarial"),
    "no steps": (lambda: PGD(steps=0), ValueError, "at least one of steps"),
    "no restarts": (lambda: PGD(restarts=0), ValueError, "at least one of restarts"),
    "half a step": (lambda: PGD(steps=1.5), TypeError, "steps must be an integer"),
    "scale below 1": (lambda: PGD(scale=0.5), ValueError, "miss points of the box that is certified"),
    "step size": (lambda: PGD(step_size=0.0), ValueError, "step_size"),
    "decay": (lambda: PGD(decay=(2.0, (1,))), ValueError, "decay is a factor"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_settings_are_refused(case):
    make, kind, message = BAD[case]
    with pytest.raises(kind, match=message):
        make()


@pytest.mark.parametrize("loss", [lambda step: step.logits.mean(), lambda step: losses.LossValue(step.logits.mean(1))])
def test_a_loss_that_returns_no_mean_is_refused(loss):
    x = torch.rand(4, 3)
    bounded = fw.BoundedModule(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), x)
    warmup = fw.ShortWarmup(bounded, fw.ConstantEpsilon(0.1), loss=loss)
    with pytest.raises(TypeError, match="must return a LossValue with a 0-dim loss"):
        warmup(x, torch.tensor([0, 1, 0, 1]))
