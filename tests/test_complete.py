"""α,β-CROWN driven from here: a stand-in for its checkout is asked by the real worker, and fails in every way."""

import dataclasses
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

import lirpa_fastwarmup as fw
from lirpa_fastwarmup import cli
from lirpa_fastwarmup.experiments.presets import preset
from lirpa_fastwarmup.experiments.training import train
from lirpa_fastwarmup.verification import ABCrown, Journal, WorkerError, complete
from lirpa_fastwarmup.verification.folder import JOURNAL
from tests.networks import TwoInputs, convolutional

# What the worker uses of α,β-CROWN. Its word on a sample is the setting of the sample's label.
API = """
import os, sys, time
import arguments
import torch

class ConfigBuilder:
    def __init__(self):
        self.config = {"general": {"device": "cuda"}, "bab": {"timeout": 360}}

    def update(self, changes):
        for name, section in changes.items():
            self.config.setdefault(name, {}).update(section)
        return self

    def to_dict(self):
        return self.config

class VerificationSpec:
    @classmethod
    def build_spec(cls, vnnlib_path, input_shape):
        assert arguments.Config.all_args["general"]["device"] == "cpu"
        spec = cls()
        spec.lines, spec.shape = open(vnnlib_path).read().splitlines(), input_shape
        return spec

class Result:
    def __init__(self, status, stats):
        self.status, self.stats = status, stats

class ABCrownSolver:
    def __init__(self, spec, network, config):
        self.spec, self.network, self.config = spec, network, config

    def solve(self, return_reference):
        print("noise on stdout")
        lines, shape = self.spec.lines, self.spec.shape
        label = next(line.split()[-1] for line in lines if line.strip().startswith("(and (>= Y_"))[2:-2]
        word = self.config["standin"]["words"][label]
        with open(self.config["standin"]["log"], "a") as file:
            file.write(f"{label} {word} {self.config['bab']['timeout']}\\n")
        lower = torch.tensor([float(line.split()[-1][:-2]) for line in lines if line.startswith("(assert (>= X_")])
        assert self.network(lower.view(1, *shape[1:])).shape[0] == 1
        if word == "crash":
            os._exit(7)
        if word == "raise":
            raise MemoryError("out of memory")
        if word == "hang":
            time.sleep(600)
        if "nan" in word:
            return Result("unsafe-pgd", {"attack_examples": torch.full((1, 1, *shape[1:]), torch.nan)})
        points = {"attack_examples": lower.view(1, 1, *shape[1:]).expand(1, 3, *shape[1:])} if "pgd" in word else {}
        return Result(word, {"elapsed": 1.0, **points})
"""
ARGUMENTS = """
class Config:
    all_args = {"general": {"device": "cuda"}, "bab": {}}
"""


@pytest.fixture
def checkout(tmp_path):
    folder = tmp_path / "alpha-beta-CROWN" / "complete_verifier"
    folder.mkdir(parents=True)
    (folder / "api.py").write_text(API)
    (folder / "arguments.py").write_text(ARGUMENTS)
    return folder.parent


def open_samples(methods, restarts=0):
    """A network, and samples of all classes that ``methods`` and an attack leave open."""
    torch.manual_seed(0)
    model = convolutional(batchnorm=True).eval()
    x = torch.rand(200, 1, 8, 8)
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    with torch.no_grad():
        last.bias -= model(x).mean(0)  # No class has most samples.
    y = model(x).argmax(1)
    bounded = fw.BoundedModule(model, x[:2]).eval()
    found = fw.verify(bounded, (x, y), 0.02, methods=methods, restarts=restarts)
    left = [one.index for one in found.certificates if not one.verified and not one.falsified]
    return bounded, x[left], y[left]


@pytest.fixture
def batch():
    """Samples that IBP leaves open, of each label two."""
    bounded, x, y = open_samples(("IBP",))
    chosen = torch.cat([(y == label).nonzero().flatten()[:2] for label in range(3)])
    assert len(chosen) == 6
    return bounded, x[chosen], y[chosen]


def standin(checkout, words, **options):
    settings = {"standin": {"words": dict(zip("012", words, strict=True)), "log": str(checkout / "log")}}
    return ABCrown(checkout, settings=settings, **{"time_limit": 5.0, **options})


def asked(checkout):
    log = checkout / "log"
    return log.read_text().splitlines() if log.exists() else []


def verified(batch, abcrown, **options):
    bounded, x, y = batch
    return fw.verify(bounded, (x, y), 0.02, ("IBP", "abcrown"), abcrown=abcrown, restarts=0, **options)


def test_verdicts_and_what_they_mean(batch, checkout):
    found = verified(batch, standin(checkout, ("safe", "unknown", "safe-incomplete")))
    labels = [one.label for one in found.certificates]
    assert [one.complete for one in found.certificates] == [
        ("certified", "timeout", "certified")[one] for one in labels
    ]
    assert [one.verified for one in found.certificates] == [one != 1 for one in labels]
    assert {one.method for one in found.certificates if one.verified} == {"abcrown"}
    assert found.verified_error.count == 2
    assert found.stages["abcrown"].samples == 6
    assert found.stages["abcrown"].hits == 4
    assert "4 certified, 0 falsified, 2 timeout, 0 error by abcrown" in str(found)
    assert found.as_dict()["outcomes"] == {"certified": 4, "falsified": 0, "timeout": 2, "error": 0}
    assert [row["complete"] for row in found.rows()] == [one.complete for one in found.certificates]
    assert all(line.endswith(" 5.0") for line in asked(checkout))


def test_only_what_is_open_is_asked(batch, checkout):
    bounded, x, y = batch
    wrong = (y + 1) % 3
    found = fw.verify(
        bounded, (x, wrong), 0.02, ("abcrown",), abcrown=standin(checkout, ("safe",) * 3), restarts=0, input_range=None
    )
    assert asked(checkout) == []
    assert [one.complete for one in found.certificates] == [None] * 6
    assert all(one.falsified for one in found.certificates)


def test_a_counterexample_has_to_hold(batch, checkout):
    bounded, x, y = batch
    found = verified(batch, standin(checkout, ("unsafe-pgd", "unsafe-bab", "safe")))
    lower = (x - 0.02).clamp(0, 1)
    holds = bounded.wrapped(lower).argmax(1) != y
    for one, is_counterexample in zip(found.certificates, holds.tolist(), strict=True):
        if one.label == 0:
            assert one.falsified is (True if is_counterexample else None)
            assert (one.complete == "falsified") is is_counterexample
        if one.label == 1 or (one.label == 0 and not is_counterexample):
            assert "without a counterexample that holds" in one.complete
            assert not one.verified


def test_points_that_are_no_numbers_falsify_nothing(batch, checkout):
    found = verified(batch, standin(checkout, ("nan",) * 3))
    assert [one.complete.partition(",")[0] for one in found.certificates] == ["error: unsafe-pgd"] * 6
    assert not any(one.falsified for one in found.certificates)


def test_another_function_in_the_other_process_is_an_error(batch, checkout):
    bounded, x, y = batch
    verifier = complete.CompleteVerifier(standin(checkout, ("safe",) * 3), bounded.wrapped, x, None, "")
    verifier._model = nn.Sequential(bounded.wrapped, nn.Softplus())
    try:
        outcome = verifier.outcome(x[0] - 0.02, x[0] + 0.02, int(y[0]), 3)
    finally:
        verifier.close()
    assert outcome.startswith("error: its process ended")
    assert "computes other outputs here" in outcome


def test_counterexamples_of_a_network_are_found(batch, checkout):
    bounded, x, y = batch
    # Boxes wide enough that their lower corner is misclassified.
    eps = 0.5
    holds = bounded.wrapped((x - eps).clamp(0, 1)).argmax(1) != y
    assert bool(holds.any())
    abcrown = standin(checkout, ("unsafe-pgd",) * 3)
    found = fw.verify(bounded, (x, y), eps, ("IBP", "abcrown"), abcrown=abcrown, restarts=0)
    assert [one.complete == "falsified" for one in found.certificates] == holds.tolist()
    assert found.pgd_error.count == int(holds.sum())


def test_a_crash_a_hang_and_an_exception_cost_their_samples_alone(batch, checkout, monkeypatch):
    monkeypatch.setattr(complete, "_GRACE", 1.0)
    words = ("crash", "hang", "safe")
    found = verified(batch, standin(checkout, words, time_limit=1.0))
    texts = {one.label: one.complete for one in found.certificates}
    assert "status 7" in texts[0]
    assert "no answer within 3 s" in texts[1]
    assert texts[2] == "certified"
    assert found.as_dict()["outcomes"] == {"certified": 2, "falsified": 0, "timeout": 0, "error": 4}
    assert found.verified_error.count == 4
    assert "sample 0: error: " in str(found)
    found = verified(batch, standin(checkout, ("raise", "what", "safe")))
    texts = {one.label: one.complete for one in found.certificates}
    assert "MemoryError: out of memory" in texts[0]
    assert texts[1] == "error: α,β-CROWN answered 'what'"
    assert texts[2] == "certified"


def test_verdicts_are_kept_in_the_journal_and_errors_are_not(batch, checkout, tmp_path):
    bounded, x, y = batch
    journal, words = tmp_path / "journal", ("safe", "crash", "unknown")
    first = verified(batch, standin(checkout, words), journal=Journal(journal))
    assert len(asked(checkout)) == 6
    # In other batches, the verdicts on samples count, and errors are tried again.
    halves = [(x[:3], y[:3]), (x[3:], y[3:])]
    options = {"restarts": 0, "journal": Journal(journal), "abcrown": standin(checkout, words)}
    other = fw.verify(bounded, halves, 0.02, ("IBP", "abcrown"), **options)
    assert len(asked(checkout)) == 6 + 2
    assert other.certificates == first.certificates
    with_other_limit = {**options, "journal": Journal(journal), "abcrown": standin(checkout, words, time_limit=6.0)}
    fw.verify(bounded, halves, 0.02, ("IBP", "abcrown"), **with_other_limit)
    assert len(asked(checkout)) == 8 + 6
    kept = Journal(journal)
    kept.forget(kept._known.keys() - {key for key in kept._known if key.startswith("part:")})
    assert not journal.exists()


def test_an_environment_without_it_is_refused_at_once(batch, checkout, tmp_path):
    (checkout / "complete_verifier" / "api.py").write_text("import no_such_module_of_abcrown")
    with pytest.raises(WorkerError, match=r"does not start with .*No module named 'no_such_module_of_abcrown'"):
        verified(batch, standin(checkout, ("safe",) * 3))
    with pytest.raises(WorkerError, match=r"does not start with .*nowhere"):
        verified(batch, standin(checkout, ("safe",) * 3, python=tmp_path / "nowhere"))
    babbler = tmp_path / "python"
    babbler.write_text("#!/bin/sh\necho hello\n")
    babbler.chmod(0o755)
    with pytest.raises(WorkerError, match="does not start"):
        verified(batch, standin(checkout, ("safe",) * 3, python=babbler))


def test_bad_requests(batch, checkout, tmp_path):
    bounded, x, y = batch
    with pytest.raises(FileNotFoundError, match=r"no checkout of alpha-beta-CROWN: it has no complete_verifier"):
        ABCrown(tmp_path)
    with pytest.raises(ValueError, match="time_limit, seconds for each sample, must be above 0"):
        ABCrown(checkout, time_limit=0.0)
    abcrown = standin(checkout, ("safe",) * 3)
    with pytest.raises(ValueError, match="need each other"):
        fw.verify(bounded, (x, y), 0.02, ("IBP", "abcrown"))
    with pytest.raises(ValueError, match="need each other"):
        fw.verify(bounded, (x, y), 0.02, ("IBP",), abcrown=abcrown)
    with pytest.raises(NotImplementedError, match="in float32 only"):
        verified(batch, abcrown, float64=True)
    inputs = torch.rand(2, 1, 8, 8), torch.rand(2, 5)
    two = fw.BoundedModule(TwoInputs(), inputs).eval()
    with pytest.raises(NotImplementedError, match="on networks of one input only"):
        fw.verify(two, (inputs, y[:2]), 0.02, ("IBP", "abcrown"), abcrown=abcrown)
    with pytest.raises(ValueError, match="radii are searched by bounds alone"):
        fw.verification.certified_radii(bounded, (x, y), ("IBP", "abcrown"))


class OfAScript(nn.Sequential):
    """Stands for a class of a script or a notebook."""


def test_networks_that_another_process_cannot_import_are_refused(batch, checkout, monkeypatch):
    _, x, y = batch
    monkeypatch.setattr(OfAScript, "__module__", "__main__")
    bounded = fw.BoundedModule(OfAScript(nn.Flatten(), nn.Linear(64, 3)), x).eval()
    with pytest.raises(ValueError, match="define the network in a module of its own"):
        verified((bounded, x, y), standin(checkout, ("safe",) * 3))


def test_networks_of_files_are_loaded_from_them(batch, checkout, tmp_path):
    """As `--model file.py:factory` imports them: under a name that no other process knows."""
    (tmp_path / "mine.py").write_text(
        textwrap.dedent(
            """
            from torch import nn

            class Mine(nn.Module):
                def __init__(self):
                    super().__init__()
                    self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))

                def forward(self, x):
                    return self.net(x)
            """
        )
    )
    code = textwrap.dedent(
        f"""
        import torch
        import lirpa_fastwarmup as fw
        from lirpa_fastwarmup.models.factory import find_factory
        from lirpa_fastwarmup.verification import ABCrown
        torch.manual_seed(0)
        net = find_factory({str(tmp_path / "mine.py:Mine")!r})().eval()
        x = torch.rand(4, 1, 8, 8)
        settings = {{"standin": {{"words": dict.fromkeys("012", "safe"), "log": {str(checkout / "log")!r}}}}}
        bounded = fw.BoundedModule(net, x)
        found = fw.verify(bounded, (x, net(x).argmax(1)), 0.4, ("abcrown",), restarts=0,
                          abcrown=ABCrown({str(checkout)!r}, settings=settings))
        print([one.complete for one in found.certificates])
        """
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(["certified"] * 4)


def test_from_the_command_line(checkout, tmp_path, capsys):
    settings = preset("mnist5k").replace(width=2, hidden=8, epochs=1, ramp_length=1, data_limit=96, pgd_restarts=0)
    train(settings, tmp_path / "run")
    api = checkout / "complete_verifier" / "api.py"
    api.write_text(
        API.replace('self.config["standin"]["words"][label]', '"safe"').replace(
            'self.config["standin"]["log"]', "os.devnull"
        )
    )
    arguments = [
        "verify",
        str(tmp_path / "run"),
        "--limit",
        "20",
        "--methods",
        "IBP",
        "abcrown",
        "--abcrown",
        str(checkout),
    ]
    torch.set_flush_denormal(False)  # PyTorch 2.4's compiled steps, in other tests, set it.
    status = cli.main([*arguments, "--time-limit", "7", "--pgd-restarts", "0", "--eps", "0.5", "--rigorous"])
    out = capsys.readouterr().out
    assert status == 0
    assert "abcrown" in out
    content = json.loads((tmp_path / "run" / "verification.json").read_text())
    assert content["methods"] == ["IBP", "abcrown"]
    outcomes = content["results"][0]["outcomes"]
    assert outcomes["certified"] > 0
    assert outcomes["falsified"] == outcomes["timeout"] == outcomes["error"] == 0
    assert not (tmp_path / "run" / JOURNAL).exists()


@pytest.mark.skipif("ABCROWN" not in os.environ, reason="make test-abcrown ABCROWN=DIR runs the real one")
def test_the_real_one_agrees_on_five_samples():
    bounded, x, y = (part if place == 0 else part[:5] for place, part in enumerate(open_samples(("CROWN-IBP",), 3)))
    assert len(x) == 5
    # As most networks for colour images begin.
    same = nn.Sequential(fw.models.Normalize([0.0], [0.5]), nn.Sequential(*bounded.wrapped))
    with torch.no_grad():
        next(module for module in same.modules() if isinstance(module, nn.Conv2d)).weight.mul_(0.5)
    bounded = fw.BoundedModule(same.eval(), x[:2]).eval()
    assert torch.equal(bounded(x).argmax(1), y)
    python = os.environ.get("ABCROWN_PYTHON", sys.executable)
    abcrown = ABCrown(Path(os.environ["ABCROWN"]), python=python, time_limit=60.0)
    options = {"abcrown": abcrown, "restarts": 0}
    decided = fw.verify(bounded, (x, y), 0.02, ("abcrown",), **options)
    proved = fw.verify(bounded, (x, y), 0.02, ("alpha-CROWN",), restarts=5, pgd_steps=200)
    for one, other in zip(decided.certificates, proved.certificates, strict=True):
        assert one.complete in ("certified", "falsified"), one.complete
        assert not (one.complete == "certified" and other.falsified)
        assert not (one.complete == "falsified" and other.verified)


def test_the_settings_are_those_of_the_exported_file(checkout):
    assert dataclasses.replace(ABCrown(checkout), time_limit=30.0).configuration() == {
        "general": {"device": "cpu", "complete_verifier": "bab"},  # The command line's own default.
        "bab": {"timeout": 30.0},
    }
