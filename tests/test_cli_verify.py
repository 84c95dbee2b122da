"""The commands ``verify`` and ``export`` on a run and on external models: files, statuses, errors."""

from __future__ import annotations

import csv
import json
import shutil

import pytest
import torch
from torch import nn

import lirpa_fastwarmup as fw
from lirpa_fastwarmup import cli, verification
from lirpa_fastwarmup.engine.compat import ENGINE_VERSION, engine
from lirpa_fastwarmup.experiments import data
from lirpa_fastwarmup.experiments.presets import preset
from lirpa_fastwarmup.experiments.training import load_model, train

IN_SHAPE = (1, 28, 28)


def run(capsys, *arguments):
    status = cli.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return status, out, err


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A short run, whose network is good for something."""
    out = tmp_path_factory.mktemp("run")
    settings = preset("mnist5k").replace(
        width=2, hidden=8, epochs=5, ramp_start=2, ramp_length=2, eps=0.01, lr=5e-3, pgd_steps=1, pgd_restarts=1
    )
    train(settings, out, overwrite=True)
    return out


@pytest.fixture
def run_dir(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def rows_of(path):
    with path.open() as file:
        return list(csv.DictReader(file))


# Digits come in order of their classes: 1,000 of them, in a few steps of the attack.
QUICK = ("--pgd-steps", 3, "--pgd-restarts", 1)


def test_files_of_a_verification_agree_with_one_another_and_the_library(run_dir, capsys):
    status, out, err = run(capsys, "verify", run_dir, *QUICK, "--float64", "--eps", 0.01, "8/255")
    assert status == 0, err
    summary = json.loads((run_dir / "verification.json").read_text())
    rows = rows_of(run_dir / "certificates.csv")
    assert len(rows) == 2000
    assert list(rows[0]) == [
        *(
            "index",
            "label",
            "prediction",
            "verified",
            "method",
            "margin_lower_bound",
            "falsified",
            "eps",
            "float64",
            "weights",
        )
    ]
    test = data.load("mnist5k").test
    model = load_model(run_dir / "model.pt")
    x = test.images.float() / 255
    bounded = fw.BoundedModule(model, x[:2])
    for part, eps, result in zip((rows[:1000], rows[1000:]), (0.01, 8 / 255), summary["results"], strict=True):
        assert result["eps"] == pytest.approx(eps)
        assert [int(row["index"]) for row in part] == list(range(1000))
        assert [int(row["label"]) for row in part] == test.labels.tolist()
        assert [int(row["prediction"]) for row in part] == model(x).argmax(1).tolist()
        wrong = sum(row["label"] != row["prediction"] for row in part)
        falsified = sum(row["falsified"] == "1" for row in part)
        unverified = sum(row["verified"] == "0" for row in part)
        assert wrong <= falsified <= unverified < 1000
        for name, count in (("standard", wrong), ("pgd", falsified), ("verified", unverified)):
            assert result[f"{name}_error"]["count"] == count
            assert result[f"{name}_error"]["value"] == count / 1000
            low, high = result[f"{name}_error"]["interval_95"]
            assert low < count / 1000 < high
        by_ibp = verification.evaluate(bounded, [(x, test.labels)], eps, restarts=0).verified_error.value
        assert sum(row["method"] == "IBP" for row in part) == round(1000 * (1 - by_ibp))
        for row in part:
            assert (row["method"] != "") == (row["verified"] == "1")
            assert (float(row["margin_lower_bound"]) > 0) == (row["verified"] == "1")
        assert result["changed_in_float64"] == {row["index"]: row["float64"] for row in part if row["float64"]}
        attacked = [row for row in part if row["falsified"] and row["label"] == row["prediction"]]
        assert result["stages"]["PGD"]["samples"] == len(attacked) < 1000
        checked = [row for row in attacked if row["verified"] == "1"]
        assert result["proved_and_attacked"] == len(checked) >= 10 * 10
        assert f"verified error  {unverified / 1000:.2%} [" in out
    assert wrong < falsified  # At the larger ε.
    assert summary["results"][0]["verified_error"]["count"] < summary["results"][1]["verified_error"]["count"]
    assert summary["engine"] == f"auto_LiRPA {ENGINE_VERSION}"
    assert "float32" in summary["precision"]
    assert not (run_dir / "verification.partial").exists()


def test_an_unfinished_run_is_said_to_be_one(run_dir, capsys, caplog):
    (run_dir / "summary.json").unlink()
    status, _, _ = run(capsys, "verify", run_dir, *QUICK, "--methods", "IBP", "--limit", 10)
    assert status == 0
    assert (
        f"{run_dir} holds no summary.json, so the run may be unfinished: this is its network after epoch 5"
        in caplog.text
    )


@pytest.mark.parametrize("options", [["--rigorous"], ["--float64"], ["--abcrown", "."]])
def test_what_the_search_for_radii_does_not_do_is_refused(options, run_dir, capsys):
    status, _, err = run(capsys, "verify", run_dir, "--radius", *options)
    assert status == 1
    assert "--rigorous, --float64 and --abcrown do not apply to --radius: leave them out" in err
    assert not (run_dir / "radii.csv").exists()


def test_radius_of_the_run_comes_by_default_and_results_are_not_replaced(run_dir, capsys):
    status, _, _ = run(capsys, "verify", run_dir, *QUICK, "--methods", "IBP", "--limit", 100)
    assert status == 0
    summary = json.loads((run_dir / "verification.json").read_text())
    assert summary["results"][0]["eps"] == 0.01
    assert summary["methods"] == ["IBP"]
    assert summary["samples"] == 100
    before = (run_dir / "certificates.csv").read_bytes()
    status, _, err = run(capsys, "verify", run_dir, "--eps", 0.02)
    assert status == 1
    assert "holds a verification already" in err
    assert (run_dir / "certificates.csv").read_bytes() == before
    status, out, _ = run(capsys, "verify", run_dir, *QUICK, "--radius", "--limit", 60, "--overwrite")
    assert status == 0
    assert not (run_dir / "certificates.csv").exists()
    radii = rows_of(run_dir / "radii.csv")
    assert len(radii) == 60
    assert max(float(row["certified_radius"]) for row in radii) > 0.01
    summary = json.loads((run_dir / "verification.json").read_text())
    mean = sum(float(row["certified_radius"]) for row in radii) / 60
    assert summary["certified_radius"]["mean"] == pytest.approx(mean)
    assert f"mean {mean:.4f}" in out
    # A new run in the folder is of another network, of which the old certificates say nothing.
    train(preset("mnist5k").replace(width=2, hidden=8, epochs=1, ramp_length=1, data_limit=70), run_dir, overwrite=True)
    assert not (run_dir / "radii.csv").exists()
    assert not (run_dir / "verification.json").exists()


def test_limit_takes_evenly_spaced_samples_and_options_are_lenient(run_dir, capsys):
    few = ("--limit", 20, "--pgd-steps", 1, "--methods", "ibp")
    status, out, err = run(capsys, "verify", run_dir, *few, "--pgd-restarts", 1, "--eps", "2/255")
    assert status == 0, err
    assert out.startswith("eps 2/255: 20 samples, errors with 95 % intervals\n")
    rows, labels = rows_of(run_dir / "certificates.csv"), data.load("mnist5k").test.labels
    assert [int(row["index"]) for row in rows] == list(range(0, 1000, 50))
    assert [int(row["label"]) for row in rows] == labels[::50].tolist()
    assert {float(row["eps"]) for row in rows} == {2 / 255}
    summary = json.loads((run_dir / "verification.json").read_text())
    assert summary["pgd_restarts"] == 1
    assert summary["methods"] == ["IBP"]
    assert summary["results"][0]["eps"] == 2 / 255
    assert "falsified" in summary["results"][0]["stages"]["PGD"]
    status, _, _ = run(capsys, "verify", run_dir, *few, "--radius", "--out", run_dir / "radii")
    assert status == 0
    assert [int(row["index"]) for row in rows_of(run_dir / "radii/radii.csv")] == list(range(0, 1000, 50))


@pytest.mark.parametrize(
    "name", ["cnn9", "no.such:factory", "{folder}/networks.py:none", "{folder}/none.py:small", "none.onnx"]
)
def test_networks_are_checked_before_data_is_loaded(name, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(data, "load", lambda *_: pytest.fail("data was loaded"))
    (tmp_path / "networks.py").write_text(FACTORY)
    named = ("--model", name.format(folder=tmp_path), "--dataset", "mnist5k", "--out", tmp_path / "new" / "out")
    status, _, err = run(capsys, "verify", *named, "--eps", 0.1)
    assert status == 1
    assert err.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_an_interrupted_command_goes_on(run_dir, capsys, monkeypatch):
    arguments = ("verify", run_dir, *QUICK, "--limit", 90, "--batch-size", 30, "--eps", 0.005, 0.01)
    assert run(capsys, *arguments, "--out", run_dir.parent / "unbroken")[0] == 0
    screen, calls = verification.certify.Certifier.screen, []

    def stopping(self, *rest):
        calls.append(1)
        if len(calls) == 5:  # The second batch at the second radius.
            raise KeyboardInterrupt
        return screen(self, *rest)

    monkeypatch.setattr(verification.certify.Certifier, "screen", stopping)
    status, _, err = run(capsys, *arguments)
    assert status == 130
    assert "the same command resumes" in err
    assert not (run_dir / "certificates.csv").exists()
    assert run(capsys, *arguments)[0] == 0
    assert len(calls) == 5 + 2
    assert (run_dir / "certificates.csv").read_bytes() == (run_dir.parent / "unbroken/certificates.csv").read_bytes()
    assert not (run_dir / "verification.partial").exists()


def test_unsound_bounds_are_written_named_and_refused(run_dir, capsys, monkeypatch):
    original = engine.bound_general.BoundLinear.interval_propagate

    def wrong(self, *v, **kwargs):
        # One weight's sign in the interval product, of the layer of the classes: no other has eight inputs.
        weight = v[1][0].clone().contiguous()
        if weight.shape[1] == 8:
            weight.view(-1)[weight.abs().argmax()] *= -1
        return original(self, v[0], (weight, weight), *v[2:], **kwargs)

    monkeypatch.setattr(engine.bound_general.BoundLinear, "interval_propagate", wrong)
    status, out, err = run(capsys, "verify", run_dir, *QUICK, "--eps", 0.005, 0.01)
    assert status == 1
    assert "the bounds are not sound, and no certificate of this verification can be trusted: eps 0.005, sample" in err
    assert "sample " in err
    summary = json.loads((run_dir / "verification.json").read_text())
    assert all(result["contradictions"] for result in summary["results"])
    assert len(rows_of(run_dir / "certificates.csv")) == 2000
    assert out.count("verified error") == 2


def weights_of(run_dir, path):
    torch.save(load_model(run_dir / "model.pt").state_dict(), path)
    return path


FACTORY = """
import lirpa_fastwarmup as fw

def small(in_shape, classes):
    return fw.models.cnn7(in_shape, classes, width=2, hidden=8)
"""


def test_an_external_model(run_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "external_networks.py").write_text(FACTORY)
    weights = weights_of(run_dir, tmp_path / "weights.pt")
    verification.write_onnx(load_model(run_dir / "model.pt"), IN_SHAPE, tmp_path / "network.onnx")
    common = (*QUICK, "--eps", 0.01, "--limit", 50, "--dataset", "mnist5k")
    assert run(capsys, "verify", run_dir, *common, "--out", "a")[0] == 0
    named = ("--model", "external_networks:small", "--weights", weights)
    assert run(capsys, "verify", *named, *common, "--out", "b")[0] == 0
    assert run(capsys, "verify", "--model", "network.onnx", *common, "--out", "c")[0] == 0
    torch.save({"state_dict": torch.load(weights, weights_only=True), "epoch": 3}, tmp_path / "checkpoint.pt")
    named = ("--model", "external_networks:small", "--weights", "checkpoint.pt", "--mean", 0, "--std", 1)
    assert run(capsys, "verify", *named, *common, "--out", "d")[0] == 0
    named = ("--model", "external_networks.py:small", "--weights", weights)
    assert run(capsys, "verify", *named, *common, "--out", "f")[0] == 0
    first = rows_of(tmp_path / "a/certificates.csv")
    assert rows_of(tmp_path / "f/certificates.csv") == first
    assert rows_of(tmp_path / "b/certificates.csv") == first
    for name in ("c", "d"):
        other = rows_of(tmp_path / f"{name}/certificates.csv")
        assert [row["verified"] for row in other] == [row["verified"] for row in first]
        for row, expected in zip(other, first, strict=True):
            assert float(row["margin_lower_bound"]) == pytest.approx(float(expected["margin_lower_bound"]), abs=1e-4)
    # Normalisation is part of the network: half the contrast is half the network's radius.
    assert run(capsys, "verify", *named[:4], *common, "--mean", 0.1, "--std", 2, "--out", "e")[0] == 0
    assert rows_of(tmp_path / "e/certificates.csv") != first


def test_export(run_dir, capsys, tmp_path):
    status, out, _ = run(capsys, "export", run_dir, "--samples", "3-4", 990, 3)
    assert status == 0
    assert "3 properties at eps 0.01" in out
    folder = run_dir / "export"
    assert sorted(path.name for path in (folder / "properties").iterdir()) == [
        *("000003.vnnlib", "000004.vnnlib", "000990.vnnlib")
    ]
    read = verification.read_onnx(folder / "network.onnx", IN_SHAPE)
    x = data.load("mnist5k").test.images[:5].float() / 255
    assert torch.allclose(read(x), load_model(run_dir / "model.pt")(x), atol=1e-4)
    text = (folder / "properties/000990.vnnlib").read_text()
    assert text.startswith("; sample 990, label 9, eps 0.01\n")
    assert "(and (>= Y_0 Y_9))" in text


MISTAKES = [
    (["verify"], "name either the folder of a training run, or a network with --model"),
    (["verify", "{run}", "--model", "cnn7"], "name either the folder of a training run, or"),
    (["verify", "{tmp}"], "holds no trained network (model.pt)"),
    (["verify", "{run}", "--weights", "w"], "--weights is for an external model"),
    (["verify", "no/such/run"], "there is no folder no/such/run"),
    (["verify", "{run}", "--eps", "0"], "eps must be above 0"),
    (["verify", "{run}", "--eps", "0.01", "-0.1"], "eps must be finite and at least 0"),
    (["verify", "{run}", "--eps", "8"], "write 8/255, not 8"),
    (["verify", "{run}", "--limit", "1001"], "has 1000 samples; cannot take 1001"),
    (["verify", "--model", "cnn7", "--out", "{tmp}/x"], "name --dataset"),
    (["verify", "--model", "cnn7", "--dataset", "mnist5k"], "--out DIR"),
    (["verify", "--model", "cnn7", "--dataset", "mnist5k", "--out", "{tmp}/x"], "random weights"),
    (
        ["verify", "--model", "cnn7", "--weights", "{weights}", "--dataset", "mnist5k", "--out", "{tmp}/x"],
        "holds the weights of another architecture",
    ),
    (
        ["verify", "--model", "cnn7", "--weights", "{run}/summary.json", "--dataset", "mnist5k", "--out", "{tmp}/x"],
        "cannot be read as weights",
    ),
    (["verify", "--model", "{tmp}/no.onnx", "--dataset", "mnist5k", "--out", "{tmp}/x"], "no.onnx"),
    (
        ["verify", "--model", "{five}", "--dataset", "mnist5k", "--out", "{tmp}/x", "--eps", "0.1"],
        "the dataset has 10 classes, the network's output is (1, 5)",
    ),
    (
        ["verify", "--model", "{round}", "--dataset", "mnist5k", "--out", "{tmp}/x", "--eps", "0.1"],
        "has no bounds for the operator(s)",
    ),
    (["export", "{run}", "--samples", "1000"], "there is no sample 1000"),
    (["export", "--model", "cnn7"], "--out DIR"),
    (["export", "{run}", "--eps", "0"], "eps must be above 0"),
    (["export", "{run}", "--samples", "0-99999999999"], "there is no sample 0-99999999999"),
    (["verify", "{run}", "--eps", "1e400"], "eps must be finite"),
    (["verify", "{run}", "--eps", "1e999999999"], "eps must be finite"),
]


class Rounding(nn.Module):
    def __init__(self):
        super().__init__()
        self.last = nn.Linear(784, 10)

    def forward(self, x):
        return self.last(torch.round(x.flatten(1)))


@pytest.fixture(scope="module")
def files(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    verification.write_onnx(nn.Sequential(nn.Flatten(), nn.Linear(784, 5)).eval(), IN_SHAPE, folder / "five.onnx")
    verification.write_onnx(Rounding().eval(), IN_SHAPE, folder / "round.onnx")
    weights_of(trained, folder / "weights.pt")
    return {
        "run": trained,
        "weights": folder / "weights.pt",
        "five": folder / "five.onnx",
        "round": folder / "round.onnx",
    }


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_mistakes_are_told_in_a_line_and_touch_nothing(arguments, message, files, capsys, tmp_path):
    names = {**files, "tmp": tmp_path}
    before = sorted(path.name for path in files["run"].iterdir())
    status, _, err = run(capsys, *[argument.format(**names) for argument in arguments])
    assert status == 1
    assert message.format(**names) in err
    assert "Traceback" not in err
    assert sorted(path.name for path in files["run"].iterdir()) == before
    assert not list(tmp_path.glob("x/*"))


def test_arguments_that_cannot_be_read(capsys):
    with pytest.raises(SystemExit):
        cli.main(["verify", "x", "--methods", "MILP"])
    assert "invalid choice: 'MILP'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["export", "x", "--samples", "a-b"])
    assert "'a-b' is neither an index nor a range such as 0-99" in capsys.readouterr().err
