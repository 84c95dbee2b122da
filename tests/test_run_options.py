"""What the settings of a run change, and what is said of settings that cannot be run."""

from __future__ import annotations

import copy
import csv
import json
import sys
import warnings

import pytest
import torch
from torch import nn

import lirpa_fastwarmup as fw
from lirpa_fastwarmup import cli
from lirpa_fastwarmup.engine.precision import products_in_tf32
from lirpa_fastwarmup.experiments import data
from lirpa_fastwarmup.experiments.presets import preset
from lirpa_fastwarmup.experiments.training import METHODS, choices, load_model, resume, summary, train
from lirpa_fastwarmup.experiments.training.build import build_run
from lirpa_fastwarmup.experiments.training.interrupt import StopRequest
from lirpa_fastwarmup.experiments.training.loop import EpochMeans, Position, Progress, train_epoch
from lirpa_fastwarmup.experiments.training.network import build_network, save_model
from lirpa_fastwarmup.recipe.compiled import CompiledSteps
from lirpa_fastwarmup.recipe.losses import PHASES
from lirpa_fastwarmup.storage import read_json

CPU = torch.device("cpu")
SMALL = preset("mnist5k").replace(
    width=2,
    hidden=8,
    epochs=1,
    ramp_length=1,
    data_limit=96,
    batch_size=48,
    lr_milestones=(),
    pgd_steps=1,
    pgd_restarts=1,
)


def history(out):
    with (out / "history.csv").open() as file:
        return list(csv.DictReader(file))


def one_epoch(settings, tmp_path):
    """The run after an epoch's steps, and its network before them."""
    run = build_run(settings, CPU)
    before = copy.deepcopy(run.objective.model)
    train_epoch(run, Position(EpochMeans(CPU)), Progress(), StopRequest(tmp_path))
    return run, before


NEEDED = {"sabr": {"ratio": 0.4}, "mtl-ibp": {"alpha": 0.3}, "cc-ibp": {"alpha": 0.3}, "exp-ibp": {"alpha": 0.3}}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains(method, tmp_path):
    summary = train(SMALL.with_method(method, **NEEDED.get(method, {})), tmp_path)
    assert summary["method"] == method
    assert 0 <= summary["verified_error"] <= 1
    (row,) = history(tmp_path)
    attacked = "alpha" in NEEDED.get(method, {})
    assert ("adversarial_loss" in row) is ("train_adversarial_error" in row) is attacked
    terms = {"xiao": {"relu_stability", "weight_l1"}, "colt": {"volume"}}
    warmup = {"tightness", "relu_balance"} if method in ("fast", *NEEDED) else set()
    for name in ("tightness", "relu_balance", "relu_stability", "weight_l1", "volume"):
        assert (row.get(name, "nan") != "nan") is (name in terms.get(method, warmup))


def test_the_loss_has_the_settings_of_its_run():
    changes = {"alpha": 0.2, "attack_steps": 4, "attack_step_size": 0.3, "attack_restarts": 2, "attack_scale": 1.5}
    settings = SMALL.with_method("cc-ibp", **changes, attack_best=True, batchnorm_policy="adversarial")
    attack = fw.attacks.PGD(4, 0.3, 2, scale=1.5, return_best=True)
    objective = build_run(settings.replace(train_eps_factor=2.0, kappa=(0.3, 0.4)), CPU).objective
    assert objective.loss == fw.losses.CCIBP(0.2, attack, "adversarial")
    assert objective.schedule.max_eps == pytest.approx(2 * settings.eps)
    assert objective.kappa == (0.3, 0.4)
    settings = SMALL.with_method("sabr", ratio=0.3, relu_shrinkage=0.8)
    assert build_run(settings, CPU).objective.loss == fw.losses.SABR(0.3, fw.attacks.PGD(), relu_shrinkage=0.8)


def test_errors_are_those_at_the_radius_itself(tmp_path):
    settings = SMALL.replace(eps=0.05, epochs=2)
    summary = train(settings.replace(train_eps_factor=2.0), tmp_path)
    row = history(tmp_path)[-1]
    assert float(row["eps"]) == pytest.approx(0.1)
    model = load_model(tmp_path / "model.pt")
    found = fw.verification.evaluate(
        fw.BoundedModule(model, torch.zeros(2, 1, 28, 28)),
        data.Batches(data.load("mnist5k").test, 250),
        0.05,
        restarts=0,
    )
    assert found.verified_error.value == summary["verified_error"] == float(row["verified_error"])


def test_random_starts_depend_on_the_seed_alone(tmp_path):
    settings = SMALL.with_method("mtl-ibp", alpha=0.5)
    torch.manual_seed(0)
    first, _ = one_epoch(settings, tmp_path)
    torch.manual_seed(1)
    again, _ = one_epoch(settings, tmp_path)
    other, _ = one_epoch(settings.replace(attack_restarts=2), tmp_path)
    weights = [run.objective.model[0].weight for run in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("method", ["gowal", "crown-ibp"])
def test_remedies_can_be_added_to_any_method(method, tmp_path):
    settings = SMALL.with_method(method).replace(regularizers=True, init="ibp")
    train(settings, tmp_path)
    assert history(tmp_path)[0]["tightness"] != "nan"
    weight = build_run(settings, CPU).objective.model[0].weight
    fast = build_run(SMALL, CPU).objective.model[0].weight
    assert torch.equal(weight, fast)


@pytest.mark.parametrize("init", ["default", "kaiming", "xavier", "orthogonal", "ibp"])
def test_initialisations_by_name(init):
    model = build_run(SMALL.replace(init=init, width=16, hidden=64), CPU).objective.model
    weights = [module.weight.detach() for module in model if isinstance(module, nn.Conv2d | nn.Linear)]
    second, hidden, last = weights[1], weights[-2], weights[-1]  # Fan-ins 16·9, 14²·32, 64.
    fan_in, fan_out = 16 * 9, 16 * 9
    expected = {
        "default": (1 / (3 * fan_in)) ** 0.5,
        "kaiming": (2 / fan_in) ** 0.5,
        "xavier": (2 / (fan_in + fan_out)) ** 0.5,
        "ibp": (2 * torch.pi) ** 0.5 / fan_in,
    }
    if init in expected:
        assert float(second.std()) == pytest.approx(expected[init], rel=0.1)
    if init == "orthogonal":
        assert torch.allclose(hidden @ hidden.T, torch.eye(64), atol=1e-4)
        assert torch.allclose(last @ last.T, torch.eye(10), atol=1e-4)


def test_accumulated_parts_have_their_own_statistics_and_add_up(tmp_path):
    settings = SMALL.replace(accumulate=2, data_limit=48, optimizer="sgd", momentum=0.0, lr=0.1, grad_clip=0.0)
    run, before = one_epoch(settings, tmp_path)
    x, y = _only_batch(settings)
    warmup = fw.ShortWarmup(fw.BoundedModule(before, x[:2]), run.objective.schedule)
    loss = (warmup(x[:24], y[:24]).loss + warmup(x[24:], y[24:]).loss) / 2
    gradients = torch.autograd.grad(loss, list(before.parameters()))
    for parameter, gradient, new in zip(before.parameters(), gradients, run.objective.model.parameters(), strict=True):
        assert torch.allclose(new, parameter - 0.1 * gradient, atol=1e-5)
    # Running statistics have moved twice, as in two passes.
    assert all(m.num_batches_tracked == 2 for m in run.objective.model if isinstance(m, nn.BatchNorm2d))
    assert run.objective.steps_done == 1


def _only_batch(settings):
    (batch,) = build_run(settings, CPU).train_batches
    return batch


def test_parts_are_never_of_one_sample(tmp_path):
    run, _ = one_epoch(SMALL.replace(accumulate=40, data_limit=51), tmp_path)  # Batches of 48 and 3.
    assert run.objective.steps_done == 2
    assert run.objective._compiled._batch_size == 2
    assert choices._eager_seconds(run, "float32") > 0


def test_a_network_with_batchnorm_of_its_own_is_never_given_one_sample(own_networks):
    settings = SMALL.replace(model="my_networks:normalised", width=None, batchnorm=False, data_limit=97, accumulate=48)
    run, _ = one_epoch(settings, own_networks)
    assert len(run.train_batches) == 2  # The last sample is left out.


def test_fewer_samples_than_a_batch_are_compiled_too():
    assert build_run(SMALL.replace(data_limit=20), CPU).objective._compiled._batch_size == 20


def test_gradients_are_clipped_to_the_norm(tmp_path):
    base = SMALL.replace(data_limit=48, optimizer="sgd", momentum=0.0, lr=1.0)
    steps = {}
    for clip in (0.0, 0.01):
        run, before = one_epoch(base.replace(grad_clip=clip), tmp_path)
        pairs = zip(run.objective.model.parameters(), before.parameters(), strict=True)
        steps[clip] = float(torch.cat([(new - old).detach().flatten() for new, old in pairs]).norm())
    assert steps[0.01] == pytest.approx(0.01, rel=1e-3)
    assert steps[0.0] > 0.1


def test_sgd_has_momentum_and_decay():
    optimizer = build_run(SMALL.replace(optimizer="sgd", momentum=0.8, weight_decay=1e-4), CPU).optimizer
    assert isinstance(optimizer, torch.optim.SGD)
    assert (optimizer.param_groups[0]["momentum"], optimizer.param_groups[0]["weight_decay"]) == (0.8, 1e-4)


def test_the_average_of_weights_is_what_is_evaluated_and_kept(tmp_path):
    settings = SMALL.replace(average_decay=0.5)
    run, _ = one_epoch(settings, tmp_path)
    again, _ = one_epoch(settings, tmp_path / "again")
    assert torch.equal(again.average.module[0].weight, run.average.module[0].weight)
    # Two steps: the first sets the average to the weights w1, the second makes it (w1 + w2)/2.
    trained = run.objective.model[0].weight
    average = run.average.module[0].weight
    assert not torch.equal(average, trained)
    after_one = 2 * average - trained
    assert float((after_one - trained).detach().abs().max()) < 2 * settings.lr  # One step of Adam away.
    summary = train(settings, tmp_path / "run")
    kept = load_model(tmp_path / "run" / "model.pt")
    assert torch.equal(kept[0].weight, average)
    test = data.load("mnist5k").test
    wrong = (kept(test.images.float() / 255).argmax(1) != test.labels).double().mean()
    assert float(wrong) == pytest.approx(summary["standard_error"])


def test_the_mean_of_weights_from_an_epoch_on_is_kept(tmp_path):
    settings = SMALL.replace(epochs=3, swa_start=2, data_limit=96, batch_size=8)  # 12 steps an epoch.
    run, states = build_run(settings, CPU), []

    class Recorded(Progress):
        def step_done(self, means):
            states.append(copy.deepcopy(run.objective.model[0].weight))

    position = Position(EpochMeans(CPU))
    for epoch in (1, 2, 3):
        position.epoch, position.batches_done = epoch, 0
        train_epoch(run, position, Recorded(), StopRequest(tmp_path))
        if epoch == 1:
            assert torch.equal(run.average.module[0].weight, run.objective.model[0].weight)
    # Of every tenth step from the first of epoch 2 on.
    expected = (states[12] + states[22] + states[32]) / 3
    assert torch.allclose(run.average.module[0].weight, expected, rtol=1e-6)
    train(settings, tmp_path / "run")
    kept = load_model(tmp_path / "run" / "model.pt")
    assert torch.equal(kept[0].weight, run.average.module[0].weight)
    samples = run.train_batches.split.images.float() / 255
    first = kept[0](samples).transpose(0, 1).flatten(1)
    assert torch.allclose(kept[1].running_mean, first.mean(1), atol=1e-5)


def test_precise_bn_takes_the_statistics_of_the_training_set(tmp_path):
    settings = SMALL.replace(precise_bn=True)
    train(settings, tmp_path / "precise")
    train(settings.replace(precise_bn=False), tmp_path / "plain")
    precise, plain = (load_model(tmp_path / name / "model.pt") for name in ("precise", "plain"))
    assert torch.equal(precise[0].weight, plain[0].weight)
    samples = build_run(settings, CPU).train_batches.split.images.float() / 255
    with torch.no_grad():
        first = precise[0](samples).transpose(0, 1).flatten(1)
    assert torch.allclose(precise[1].running_mean, first.mean(1), atol=1e-5)
    assert torch.allclose(precise[1].running_var, first.var(1), rtol=1e-4)
    assert not torch.allclose(plain[1].running_var, first.var(1), rtol=1e-2)


CODE = """
import torch
from torch import nn

class Own(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(1, 2, 3, stride=3), nn.ReLU(), nn.Flatten(), nn.Linear(162, 10))
        self.register_buffer("drawn", torch.randn(10), persistent=False)

    def forward(self, x):
        return super().forward(x) + self.drawn
"""


@pytest.fixture
def own_code(tmp_path):
    """A run on a network in a file, and a function that replaces its code."""

    def written(text):
        (tmp_path / "own.py").write_text(text)
        for name in [name for name in sys.modules if name.startswith("file_")]:
            del sys.modules[name]

    written(CODE)
    train(SMALL.replace(model=f"{tmp_path / 'own.py'}:Own", width=None), tmp_path / "run")
    return tmp_path / "run", written


def test_a_network_whose_code_has_changed_since_is_refused(own_code):
    out, written = own_code
    (out / "summary.json").unlink()  # As if it had been stopped.
    written(CODE.replace("nn.ReLU()", "nn.LeakyReLU(0.01)"))  # The weights still fit.
    with pytest.raises(ValueError, match=r"different outputs than when it was saved.*own\.py:Own"):
        load_model(out / "model.pt", trust=True)
    written(CODE.replace("nn.ReLU()", "nn.Sequential(nn.ReLU(), nn.Tanh())"))
    with pytest.raises(ValueError, match=r"checkpoint\.pt computes different outputs than when it was saved"):
        resume(out, trust=True)
    written(CODE.replace("10))", "10), nn.Identity())"))
    assert load_model(out / "model.pt", trust=True)[4] is not None


def test_what_a_network_draws_and_keeps_is_drawn_again(own_code):
    out, _ = own_code
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one, other = (load_model(out / "model.pt", trust=True) for _ in range(2))
    assert torch.equal(one.drawn, other.drawn)
    assert torch.equal(torch.get_rng_state(), before)
    (out / "model.pt").unlink()
    (out / "summary.json").unlink()
    assert resume(out, trust=True)["epochs"] == SMALL.epochs


def test_a_network_that_refuses_some_inputs_is_kept_without_its_outputs(own_code):
    out, written = own_code
    content = torch.load(out / "model.pt", weights_only=True)
    assert content["outputs"].shape == (2, 10)
    written(CODE.replace("return", "assert bool((x == x.round()).all())\n        return"))
    architecture = {**content["architecture"], "batchnorm": False}
    save_model(out / "model.pt", build_network(architecture), architecture, SMALL, epoch=1)
    assert torch.load(out / "model.pt", weights_only=True)["outputs"] is None
    assert type(load_model(out / "model.pt", trust=True)).__name__ == "Own"


def test_a_run_loads_under_another_default_dtype(tmp_path):
    train(SMALL, tmp_path)
    torch.set_default_dtype(torch.float64)
    try:
        assert load_model(tmp_path / "model.pt")[0].weight.dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("decay", [0.9, 0.9995])
def test_averages_leave_integers_as_they_are(decay, own_networks):
    settings = SMALL.replace(model="my_networks:Permuted", width=None, average_decay=decay, epochs=3)
    train(settings, own_networks / "run")
    kept = load_model(own_networks / "run" / "model.pt", trust=True)
    assert kept.index.tolist() == [3, 1, 2, 0, 7, 5, 6, 4]


def test_precise_statistics_weigh_samples_alike(tmp_path, monkeypatch):
    monkeypatch.setattr(summary, "_PRECISE_BATCH", 50)
    settings = SMALL.replace(data_limit=52)  # Batches of 50 and 2.
    run = build_run(settings.replace(precise_bn=True), CPU)
    summary._recompute_statistics(run)
    network = run.evaluated.wrapped
    with torch.no_grad():
        first = network[0](run.train_batches.split.images.float() / 255).transpose(0, 1).flatten(1)
    assert torch.allclose(network[1].running_mean, first.mean(1), atol=1e-6)
    assert network[1].momentum == 0.1
    assert not any(module.training for module in network.modules())


def test_precise_statistics_leave_a_single_sample_out(own_networks, monkeypatch):
    monkeypatch.setattr(summary, "_PRECISE_BATCH", 50)
    settings = SMALL.replace(data_limit=51, model="my_networks:of_vectors", width=None, precise_bn=True)
    run = build_run(settings, CPU)
    summary._recompute_statistics(run)
    assert all(value.isfinite().all() for value in run.evaluated.wrapped.state_dict().values())


def test_precise_statistics_know_no_dropout(own_networks):
    runs = []
    for model in ("normalised", "dropping"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            runs.append(build_run(SMALL.replace(model=f"my_networks:{model}", width=None, precise_bn=True), CPU))
        summary._recompute_statistics(runs[-1])
    norms = [next(m for m in run.evaluated.wrapped.modules() if isinstance(m, nn.BatchNorm2d)) for run in runs]
    assert torch.equal(norms[0].running_var, norms[1].running_var)


@pytest.mark.parametrize("changes", [{"precise_bn": True}, {"swa_start": 1}])
def test_precise_statistics_leave_frozen_batchnorm_alone(changes, own_networks):
    settings = SMALL.replace(model="my_networks:frozen", width=None, batchnorm=False, **changes)
    train(settings, own_networks / "run")
    kept = load_model(own_networks / "run" / "model.pt", trust=True)
    assert kept[0].running_var.item() == 4.0
    assert 0 < kept[1].running_var.item() < 0.5


def test_the_first_step_of_the_average_is_always_in_it(tmp_path):
    settings = SMALL.replace(epochs=3, swa_start=3)  # Two steps an epoch.
    run, position = build_run(settings, CPU), Position(EpochMeans(CPU))
    for epoch in (1, 2, 3):
        position.epoch, position.batches_done = epoch, 0
        train_epoch(run, position, Progress(), StopRequest(tmp_path))
    assert int(run.average.n_averaged) == 1
    with pytest.raises(ValueError, match="no weights are averaged: swa_start is 4, of 3 epochs"):
        settings.replace(swa_start=4)


@pytest.mark.parametrize(
    ("select", "column"), [("validation", "validation_verified_error"), ("test", "verified_error")]
)
def test_the_best_epoch_is_kept(select, column, tmp_path):
    # A rate that wrecks the network later on: the best epoch is not the last.
    settings = SMALL.replace(epochs=4, lr=0.3, eps=0.01, data_limit=128, validation=32, select=select, seed=1)
    summary = train(settings, tmp_path)
    errors = [float(row[column]) for row in history(tmp_path)]
    best = errors.index(min(errors)) + 1
    assert summary["selected_epoch"] == best
    assert (summary["train_samples"], summary["validation_samples"]) == (96, 32)
    assert ("on the test set itself: these errors are optimistic" in summary["selected_by"]) is (select == "test")
    assert summary["verified_error"] == float(history(tmp_path)[best - 1]["verified_error"])
    assert summary["standard_error"] == float(history(tmp_path)[best - 1]["standard_error"])
    assert torch.load(tmp_path / "model.pt", weights_only=True)["epoch"] == best


def test_held_out_samples_are_not_trained_on():
    run = build_run(SMALL.replace(validation=20), CPU)
    trained = {image.numpy().tobytes() for image in run.train_batches.split.images}
    held_out = {image.numpy().tobytes() for image in run.validation_batches.split.images}
    assert (len(trained), len(held_out)) == (76, 20)
    assert not trained & held_out


def test_errors_on_the_test_set_are_taken_at_the_end_alone(tmp_path, capsys):
    options = ["--width", "2", "--hidden", "8", "--epochs", "2", "--ramp-length", "1", "--data-limit", "96"]
    brief = ["--pgd-steps", "1", "--pgd-restarts", "1"]
    for name in ("every-epoch", "end"):
        given = [*options, *brief, "--evaluate-test", name, "--out", str(tmp_path / name)]
        assert cli.main(["train", "mnist5k", *given]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    assert [("standard error" in line, "nan" in line) for line in lines] == [(True, False)] * 2 + [(False, False)] * 2
    every, end = (history(tmp_path / name) for name in ("every-epoch", "end"))
    for one, other in zip(every, end, strict=True):
        for column, value in one.items():
            assert other[column] == ("nan" if column in ("standard_error", "verified_error") else value), column
    errors = [read_json(tmp_path / name / "summary.json") for name in ("every-epoch", "end")]
    for column in ("standard_error", "pgd_error", "verified_error", "weights"):
        assert errors[0][column] == errors[1][column]


MODULE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes=10):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 5, stride=3)
        self.head = nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Linear(128, 8), nn.ReLU(), nn.Linear(8, num_classes))

    def forward(self, x):
        return self.head(self.conv(x))

class Sines(Net):
    def forward(self, x):
        return self.head(torch.linalg.pinv(self.conv(x)))

def steep():
    net = Net()
    net.head[0] = nn.LeakyReLU(1.5)
    return net

def seven():
    return Net(7)

class Permuted(Net):
    def __init__(self):
        super().__init__()
        self.register_buffer("index", torch.tensor([3, 1, 2, 0, 7, 5, 6, 4]))
        self.last = nn.Linear(8, 10)

    def forward(self, x):
        return self.last(self.head[:3](self.conv(x))[:, self.index].relu())

def normalised():
    net = Net()
    net.head.insert(0, nn.BatchNorm2d(2))
    return net

def of_vectors():
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 10))

def dropping():
    net = normalised()
    net.head.insert(0, nn.Dropout(0.5))
    return net

class Frozen(nn.Sequential):
    def train(self, mode=True):
        super().train(mode)
        self[0].eval()
        return self

def frozen():
    norm = nn.BatchNorm2d(1)
    norm.running_var.fill_(4.0)
    return Frozen(norm, nn.BatchNorm2d(1), Net())

def text():
    return "net"

"""


@pytest.fixture
def own_networks(tmp_path, monkeypatch):
    (tmp_path / "my_networks.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_a_network_of_ones_own_is_trained_with_all_remedies(own_networks):
    settings = SMALL.replace(model="my_networks:Net", width=None)
    summary = train(settings, own_networks / "run")
    assert summary["model"] == "my_networks:Net"
    model = load_model(own_networks / "run" / "model.pt", trust=True)
    assert type(model).__name__ == "Net"
    # BatchNorm was inserted, and its statistics are kept.
    assert int(model.conv.batchnorm.num_batches_tracked) == 2
    test = data.load("mnist5k").test
    wrong = (model(test.images.float() / 255).argmax(1) != test.labels).double().mean()
    assert float(wrong) == pytest.approx(summary["standard_error"])
    train(settings.replace(batchnorm=False), own_networks / "without")
    assert not any(
        "batchnorm" in name for name, _ in load_model(own_networks / "without" / "model.pt", trust=True).named_modules()
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "cnn8"], "cnn8"),
        (["--model", "no_such_module:net"], "no_such_module"),
        (["--model", "my_networks:nothing"], "nothing"),
        (["--model", "my_networks:text"], "str"),
        (["--model", "my_networks:seven"], "(2, 7)"),
        (["--model", "my_networks:Sines"], "auto_LiRPA"),
        (["--dataset", "cifar10", "--data-dir", "{tmp}"], "data_batch_1"),
        (["--dataset", "npz", "--data-dir", "{tmp}"], "train.npz"),
        (["--validation", "96"], "hold"),
    ],
)
def test_what_cannot_be_run_is_told_in_a_line(arguments, message, own_networks, capsys):
    filled = [argument.format(tmp=own_networks) for argument in arguments]
    out = own_networks / "run"
    assert cli.main(["train", "mnist5k", "--out", str(out), "--data-limit", "96", *filled]) == 1
    err = capsys.readouterr().err
    # Lines about BatchNorm that was inserted may come before: 0.7.1 converts networks that end in Dropout.
    assert err.splitlines()[-1].startswith("lirpa-fastwarmup: error: ")
    assert message in err
    assert "Traceback" not in err
    assert not out.exists()


def test_a_network_with_an_operator_that_has_no_bounds_names_it(own_networks, capsys):
    arguments = ["--model", "my_networks:Sines", "--data-limit", "96", "--no-bn"]
    assert cli.main(["train", "mnist5k", "--out", str(own_networks / "run"), *arguments]) == 1
    err = capsys.readouterr().err
    assert "has no bounds for the operator(s) aten::linalg_pinv" in err
    assert "tested operators (docs/operators.md)" in err


@pytest.mark.parametrize("name", ["mnist", "cifar10", "cifar10-70", "tiny-imagenet"])
def test_presets_whose_data_is_missing_name_the_files(name, tmp_path, capsys):
    assert cli.main(["train", name, "--out", str(tmp_path / "run"), "--data-dir", str(tmp_path / "data")]) == 1
    err = capsys.readouterr().err
    assert str(tmp_path / "data") in err
    wanted = {
        "mnist": "train-images-idx3-ubyte",
        "tiny-imagenet": "tiny-imagenet-200",
    }
    assert wanted.get(name, "data_batch_1") in err


def test_bfloat16_is_for_training_alone(tmp_path, monkeypatch):
    seen = []
    forward = fw.ShortWarmup.forward

    def watched(self, x, y):
        seen.append(torch.is_autocast_enabled("cpu"))
        return forward(self, x, y)

    monkeypatch.setattr(fw.ShortWarmup, "forward", watched)
    eager = SMALL.replace(compile=False)  # Otherwise steps are timed first.
    train(eager.replace(precision="bf16"), tmp_path / "bf16")
    train(eager, tmp_path / "float32")
    assert seen == [True, True, False, False]
    assert history(tmp_path / "bf16")[0]["loss"] != history(tmp_path / "float32")[0]["loss"]
    assert load_model(tmp_path / "bf16" / "model.pt")[0].weight.dtype == torch.float32


@pytest.mark.parametrize("allowed", [True, False])
def test_products_in_tf32_are_set_and_set_back(allowed):
    def settings():
        if hasattr(torch.backends.cudnn, "conv"):  # Since PyTorch 2.9.
            return (
                torch.backends.cuda.matmul.fp32_precision == "tf32",
                torch.backends.cudnn.conv.fp32_precision == "tf32",
            )
        return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32

    before = settings()
    with products_in_tf32(allowed):
        assert settings() == (allowed, allowed)
    assert settings() == before


def test_only_whole_batches_of_a_run_are_compiled(tmp_path, monkeypatch):
    monkeypatch.setattr(CompiledSteps.__init__, "__kwdefaults__", {"batch_size": None, "backend": "eager"})
    run, _ = one_epoch(SMALL.replace(compile=True, data_limit=60), tmp_path)  # 48 samples, and 12.
    assert len(run.objective._compiled._steps) == 1
    run, _ = one_epoch(SMALL.replace(compile=True, data_limit=60, accumulate=2), tmp_path)  # 24, 24, 6 and 6.
    assert len(run.objective._compiled._steps) == 1


def phases_chosen(monkeypatch, seconds, **changes):
    monkeypatch.setattr(choices, "_eager_seconds", lambda run, precision: seconds)
    return choices._phases_that_pay(build_run(SMALL.replace(**changes), CPU))


def test_the_phases_that_repay_it_are_compiled(monkeypatch):
    length = {"epochs": 20, "ramp_start": 2, "ramp_length": 5}  # Of 1, 5 and 14 epochs, each of two steps.
    assert phases_chosen(monkeypatch, 1e-3, **length) == ()
    assert phases_chosen(monkeypatch, 6.6, **length) == PHASES  # Saves 52.8 s, by one compilation of 50 s,
    without = length | {"regularizers": False}
    assert phases_chosen(monkeypatch, 6.6, **without) == PHASES[1:]  # and 50.2 s without the first epoch.
    assert phases_chosen(monkeypatch, 1e3, **without) == PHASES
    assert phases_chosen(monkeypatch, 1e3, epochs=1, ramp_start=2) == ("before the ramp",)
    assert phases_chosen(monkeypatch, 9.0, epochs=3, ramp_start=1, ramp_length=9) == ()  # Saves 10.8 s.


@pytest.mark.parametrize(("rounded", "chosen"), [(0.5, "bf16"), (0.99, "tf32"), (2.0, "tf32"), (0.0, "tf32")])
def test_the_precision_that_pays_is_chosen_once(rounded, chosen, tmp_path, monkeypatch):
    seconds = {"tf32": 1e-3, "bf16": 1e-3 * rounded}
    monkeypatch.setattr(choices, "_eager_seconds", lambda run, precision: seconds[precision])
    automatic, given = SMALL.replace(precision="auto", epochs=2), SMALL.replace(precision=chosen, epochs=2)
    expected = train(given, tmp_path / "given")["weights"]
    with pytest.raises(KeyboardInterrupt):
        train(automatic, tmp_path / "automatic", progress=StopAfterFirstEpoch())
    seconds["bf16"] = 1e-3 - seconds["bf16"]  # Measured again, the choice would be another.
    assert cli.main(["train", "--resume", "--out", str(tmp_path / "automatic"), "--precision", "auto"]) == 0
    summary = read_json(tmp_path / "automatic" / "summary.json")
    assert summary["settings"]["precision"] == chosen
    assert summary["weights"] == expected


def test_a_step_is_timed_in_either_precision():
    run = build_run(SMALL.replace(precision="auto"), CPU)
    before = {name: value.clone() for name, value in run.objective.state_dict().items()}
    assert all(choices._eager_seconds(run, precision) > 0 for precision in ("tf32", "bf16"))
    assert all(torch.equal(value, before[name]) for name, value in run.objective.state_dict().items())


def test_the_choice_changes_nothing_else_and_is_kept(tmp_path, monkeypatch):
    attacked = SMALL.with_method("mtl-ibp", alpha=0.3)  # Whose random starts must be the same.
    chosen = train(attacked, tmp_path / "auto")
    eager = train(attacked.replace(compile=False), tmp_path / "eager")
    assert chosen["weights"] == eager["weights"]
    assert chosen["settings"]["compiled_phases"] == []
    monkeypatch.setattr(CompiledSteps.__init__, "__kwdefaults__", {"batch_size": None, "backend": "eager"})
    monkeypatch.setattr(choices, "_eager_seconds", lambda run, precision: 1e3)
    longer = attacked.replace(epochs=2)
    train(longer, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(longer, tmp_path / "parts", progress=StopAfterFirstEpoch())
    monkeypatch.setattr(choices, "_eager_seconds", lambda run, precision: pytest.fail("measured again"))
    resumed = resume(tmp_path / "parts")
    assert resumed["settings"]["compiled_phases"] == ["in the ramp", "at full ε"]
    assert resumed["weights"] == read_json(tmp_path / "whole" / "summary.json")["weights"]


class StopAfterFirstEpoch(Progress):
    def epoch_started(self, epoch, batches, done):
        if epoch == 2:
            raise KeyboardInterrupt


def test_files_of_a_network_with_untested_operators_say_so(own_networks, capsys):
    out = own_networks / "run"
    arguments = ["train", "mnist5k", "--out", str(out), "--model", "my_networks:steep", "--data-limit", "96"]
    brief = ["--epochs", "1", "--pgd-steps", "1", "--pgd-restarts", "1", "--eps", "0.001"]
    assert cli.main([*arguments, *brief]) == 1
    assert "have not been tested for LeakyRelu in module" in capsys.readouterr().err
    assert cli.main([*arguments, *brief, "--allow-untested"]) == 0
    (named,) = json.loads((out / "summary.json").read_text())["untested"]
    assert named.startswith("LeakyRelu in ")
    assert (
        cli.main(["verify", str(out), "--trust", "--limit", "20", "--methods", "IBP", "--eps", "0.001", "--radius"])
        == 0
    )
    assert "relies on untested bounds of LeakyRelu" in capsys.readouterr().out
    assert json.loads((out / "verification.json").read_text())["untested"] == [named]
    for name in ("certificates.csv", "radii.csv"):
        with (out / name).open(newline="") as file:
            assert {row["untested"] for row in csv.DictReader(file)} == {"1"}
    assert cli.main(["report", str(out), "--trust", "--out", str(own_networks / "report.html")]) == 0
    assert "operators with untested bounds" in (own_networks / "report.html").read_text()
