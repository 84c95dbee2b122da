"""The commands ``inspect`` and ``report``: on runs finished, broken off and damaged, and the page in a browser."""

from __future__ import annotations

import csv
import html
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

import lirpa_fastwarmup as fw
from lirpa_fastwarmup import cli, storage
from lirpa_fastwarmup.experiments import data
from lirpa_fastwarmup.experiments.presets import preset
from lirpa_fastwarmup.experiments.report import records
from lirpa_fastwarmup.experiments.report.records import read_history, read_record
from lirpa_fastwarmup.experiments.training import load_model, train
from lirpa_fastwarmup.storage import read_csv, read_json, weights_sum, write_json, write_tensors

SETTINGS = preset("mnist5k").replace(
    width=2, hidden=8, epochs=3, ramp_start=2, ramp_length=1, eps=0.01, lr=5e-3, pgd_steps=1, pgd_restarts=1
)
TINY = ("--width", 2, "--hidden", 8)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def run(capsys, *arguments):
    status = cli.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return status, out, err


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "first"
    train(SETTINGS, out)
    return out


@pytest.fixture
def run_dir(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "first")


@pytest.fixture
def crashed(run_dir):
    """A run that was killed after its second epoch."""
    (run_dir / "summary.json").unlink()
    (run_dir / "curves.png").unlink()
    lines = (run_dir / "history.csv").read_text().splitlines(keepends=True)
    (run_dir / "history.csv").write_text("".join(lines[:3]))
    return run_dir


def texts(page):
    """The page without tags and pictures."""
    return html.unescape(re.sub(r"<[^>]*>", " ", re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)))


def test_inspect_of_a_run(run_dir, tmp_path, capsys):
    status, out, err = run(capsys, "inspect", run_dir, "--csv", tmp_path / "layers.csv", "--samples", 50)
    assert status == 0, err
    x = data.spread(data.load("mnist5k").test, 50).inputs
    found = fw.inspect(fw.BoundedModule(load_model(run_dir / "model.pt"), x), x, 0.01)
    assert out.strip() == str(found)
    assert (tmp_path / "layers.csv").read_text() == found.to_csv()
    _, out, _ = run(capsys, "inspect", run_dir, "--samples", 50, "--markdown", "--training", "--eps", "1/255")
    assert out.startswith("50 samples, eps 0.00392157, training mode")
    assert "| ReLU layer |" in out


def test_inspect_of_a_preset_is_what_training_begins_with(capsys):
    status, out, _ = run(capsys, "inspect", "mnist5k", *TINY, "--init", "kaiming")
    assert status == 0
    assert "training mode" in out
    assert "! exploded bounds" in out
    assert "call ibp_init_" in " ".join(out.split())
    _, other, _ = run(capsys, "inspect", "mnist5k", *TINY, "--init", "ibp", "--evaluation", "--no-bn", "--seed", 3)
    assert "evaluation mode" in other
    assert "call ibp_init_" not in " ".join(other.split())
    assert "! no BatchNorm" in other


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere",), "neither a folder nor a preset"),
        (("mnist5k", *TINY, "--samples", 0), "cannot take 0"),
        (("mnist5k", *TINY, "--samples", 10**6), "has 1000 samples"),
        (("mnist5k", *TINY, "--eps", 0), "eps must be above 0"),
    ],
)
def test_inspect_of_what_cannot_be(arguments, message, capsys):
    status, _, err = run(capsys, "inspect", *arguments)
    assert status == 1
    assert message in err


def test_inspect_refuses_settings_that_a_run_has(run_dir, tmp_path, capsys):
    status, _, err = run(capsys, "inspect", run_dir, "--init", "kaiming")
    assert status == 1
    assert "init: the network in" in err
    status, _, err = run(capsys, "inspect", tmp_path)
    assert status == 1
    assert "holds no trained network" in err


def test_history_has_the_statistics_of_the_layers(trained):
    rows = read_history(trained / "history.csv")
    assert len(rows) == 3
    x = data.spread(data.load("mnist5k").test, 250).inputs
    found = fw.inspect(fw.BoundedModule(load_model(trained / "model.pt"), x), x, 0.01)
    for layer in found.relus:
        for column in ("half_width", "growth", "always_active", "always_inactive", "unstable", "dead", "mean_ratio"):
            expected = pytest.approx(getattr(layer, column), rel=1e-4, nan_ok=True)
            assert rows[-1][f"{column}/{layer.name}"] == expected
    assert rows[-1]["dead"] == pytest.approx(found.dead)
    assert rows[-1]["input_half_width"] == pytest.approx(found.input_half_width)


def test_a_line_of_training_prints_the_fraction_of_dead_neurons(capsys, tmp_path):
    options = ("--epochs", 1, "--ramp-length", 1, "--data-limit", 70, "--pgd-steps", 1, "--pgd-restarts", 1)
    _, out, _ = run(capsys, "train", "mnist5k", "--out", tmp_path / "run", *TINY, *options)
    printed = re.search(r"verified error +[\d.]+% +dead +([\d.]+)%", out)
    assert printed
    assert float(printed[1]) == pytest.approx(100 * read_history(tmp_path / "run" / "history.csv")[0]["dead"], abs=0.06)


def test_report_is_one_file_that_needs_no_other(run_dir, capsys):
    status, out, err = run(capsys, "report", run_dir)
    assert status == 0, err
    assert "written to" in out
    page = (run_dir / "report.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(sources) >= 7
    assert all(source.startswith("data:image/svg+xml;base64,") for source in sources)
    assert "http" not in re.sub(r"base64,[A-Za-z0-9+/=]*", "", page)
    summary = json.loads((run_dir / "summary.json").read_text())
    text = texts(page)
    for part in (
        "finished after 3 epochs",
        "There are no certificates",
        f"{summary['verified_error']:.2%}",
        "ramp_length",
    ):
        assert part in text
    assert str(run_dir.parent) not in page


def test_report_with_certificates_shows_the_extreme_samples(run_dir, capsys):
    assert run(capsys, "verify", run_dir, "--pgd-steps", 2, "--pgd-restarts", 1, "--eps", 0.01, 0.02)[0] == 0
    status, _, err = run(capsys, "report", run_dir, "--out", run_dir / "pages" / "page.html")
    assert status == 0, err
    text = texts((run_dir / "pages" / "page.html").read_text())
    assert "There are no certificates" not in text
    results = json.loads((run_dir / "verification.json").read_text())["results"]
    for result in results:
        assert f"{result['verified_error']['value']:.2%}" in text
    record = read_record(run_dir)
    with (run_dir / "certificates.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if float(row["eps"]) == 0.01]
    rows.sort(key=lambda row: float(row["margin_lower_bound"]))
    shown = [rows[place]["index"] for place in (*range(6), *range(-6, 0))]
    assert [str(sample.index) for sample, _ in record.images] == shown
    test = data.load("mnist5k").test
    for sample, image in record.images:
        assert np.array_equal(image[..., 0], test.images[sample.index, 0].numpy())
        assert sample.label == int(test.labels[sample.index])


def test_the_headline_names_bound_radius_and_samples(run_dir, capsys):
    summary = read_json(run_dir / "summary.json")
    assert run(capsys, "report", run_dir)[0] == 0
    certified = f"{100 * (1 - summary['verified_error']):.1f} % of 1,000 test samples are certified at ε = 0.01 by IBP."
    assert certified in texts((run_dir / "report.html").read_text())
    assert run(capsys, "verify", run_dir, "--pgd-steps", 1, "--pgd-restarts", 1, "--limit", 50)[0] == 0
    content = read_json(run_dir / "verification.json")
    stages = content["results"][0]["stages"]
    assert stages["PGD"]["falsified"] >= 0
    assert run(capsys, "report", run_dir)[0] == 0
    text = texts((run_dir / "report.html").read_text())
    error = content["results"][0]["verified_error"]["value"]
    assert f"{100 * (1 - error):.1f} % of 50 test samples are certified at ε = 0.01 by IBP and CROWN-IBP." in text
    for part in ("after training", "by verify on", "IBP, CROWN-IBP", "1 steps × 1", "method", "fast"):
        assert part in text


def test_a_report_reads_the_model_once(run_dir, monkeypatch):
    read, names = records.read_tensors, []
    for module in (records, storage):
        monkeypatch.setattr(module, "read_tensors", lambda path, text: names.append(path.name) or read(path, text))
    assert read_record(run_dir).inspection is not None
    assert names == ["model.pt"]


def test_certificates_are_shown_without_the_data_too(run_dir, capsys):
    assert run(capsys, "verify", run_dir, "--pgd-steps", 2, "--pgd-restarts", 1, "--limit", 50)[0] == 0
    (run_dir / "model.pt").unlink()
    assert run(capsys, "report", run_dir)[0] == 0
    assert "Verified margins at" in (run_dir / "report.html").read_text()


def test_certificates_of_an_earlier_network_go_when_training_goes_on(crashed, capsys):
    state = torch.load(crashed / "checkpoint.pt", weights_only=True)
    state["position"]["epoch"], state["position"]["history"] = 3, state["position"]["history"][:2]
    write_tensors(crashed / "checkpoint.pt", state)
    assert run(capsys, "verify", crashed, "--pgd-steps", 1, "--pgd-restarts", 1, "--limit", 20)[0] == 0
    assert run(capsys, "train", "--resume", "--out", crashed)[0] == 0
    assert not (crashed / "certificates.csv").exists()
    assert not (crashed / "verification.json").exists()


def test_report_shows_that_not_all_samples_were_verified(run_dir, capsys):
    assert run(capsys, "verify", run_dir, "--pgd-steps", 1, "--pgd-restarts", 1, "--limit", 20)[0] == 0
    assert run(capsys, "report", run_dir)[0] == 0
    assert "of 20 test samples" in texts((run_dir / "report.html").read_text())


def test_images_of_other_data_than_the_certificates_are_not_shown(run_dir, capsys):
    assert run(capsys, "verify", run_dir, "--pgd-steps", 2, "--pgd-restarts", 1, "--limit", 50)[0] == 0
    content = read_json(run_dir / "verification.json")
    write_json(run_dir / "verification.json", {**content, "dataset": "other digits"})
    assert run(capsys, "report", run_dir)[0] == 0
    page = (run_dir / "report.html").read_text()
    assert "The certificates are for other digits" in page
    assert "smallest verified margins" not in page


def test_report_without_certificates_bounds_samples_itself(run_dir):
    record = read_record(run_dir)
    test = data.load("mnist5k").test
    bounded = fw.BoundedModule(load_model(run_dir / "model.pt"), test.inputs[:2])
    assert len(record.samples) == 1000
    chosen = torch.tensor([sample.index for sample in record.samples[:20]])
    found = fw.verify(bounded, (test.inputs[chosen], test.labels[chosen]), 0.01, methods=("IBP",), restarts=0)
    assert [sample.margin for sample in record.samples[:20]] == pytest.approx(
        [one.margin for one in found.certificates], rel=1e-3, abs=1e-5
    )


def test_report_over_several_runs(run_dir, tmp_path, capsys):
    other = tmp_path / "deeper" / "first"
    shutil.copytree(run_dir, other)
    summary = read_json(other / "summary.json")
    summary["settings"]["lr"] = 0.1
    write_json(other / "summary.json", summary)
    assert run(capsys, "report", run_dir, other)[0] == 0
    assert not (other / "report.html").exists()
    text = texts((run_dir / "report.html").read_text())
    assert "2 runs" in text
    assert "Comparison" in text
    assert str(other) in text  # Two folders of one name are distinguished.


def test_report_of_a_crashed_run_shows_how_far_it_got(crashed, capsys):
    status, _, err = run(capsys, "report", crashed)
    assert status == 0, err
    text = texts((crashed / "report.html").read_text())
    assert "not finished: 2 of 3 epochs" in text
    assert "--resume" in text
    assert "after epoch 2" in text


@pytest.mark.parametrize("lost", [("model.pt",), ("model.pt", "history.csv"), ("checkpoint.pt",)])
def test_report_of_what_is_left(crashed, lost, capsys):
    for name in lost:
        (crashed / name).unlink()
    status, _, err = run(capsys, "report", crashed)
    assert status == 0, err
    text = texts((crashed / "report.html").read_text())
    assert ("holds no trained network" in text) == ("model.pt" in lost)


def test_report_of_a_history_by_an_earlier_version(run_dir, capsys):
    rows = read_history(run_dir / "history.csv")
    names = [name for name in rows[0] if "/" not in name and name not in ("dead", "input_half_width")]
    with (run_dir / "history.csv").open("w") as file:
        writer = csv.DictWriter(file, names, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    summary = {name: value for name, value in read_json(run_dir / "summary.json").items() if name != "files"}
    (run_dir / "summary.json").write_text(json.dumps(summary))  # Without a checksum, as before.
    assert run(capsys, "report", run_dir)[0] == 0


def test_reports_and_comparisons_refuse_files_of_other_weights_and_other_tables(run_dir, tmp_path, capsys):
    assert run(capsys, "verify", run_dir, "--pgd-steps", 1, "--pgd-restarts", 1, "--limit", 20)[0] == 0
    assert run(capsys, "report", run_dir)[0] == 0
    digest = weights_sum(load_model(run_dir / "model.pt").state_dict())
    assert (
        read_json(run_dir / "verification.json")["weights"] == read_json(run_dir / "summary.json")["weights"] == digest
    )
    rows = read_csv(run_dir / "certificates.csv", ("weights",), "certificates")
    assert {row["weights"] for row in rows} == {digest[: len("sha256:") + 16]}

    def refused(command, said):
        status, _, err = run(capsys, command, run_dir)
        assert status == 1
        assert said in err

    for name in ("history.csv", "certificates.csv"):
        text = (run_dir / name).read_text()
        (run_dir / name).write_text(text.replace("0.", "0.1", 1))
        refused("report", f"{run_dir / name} is not the file that")
        (run_dir / name).write_text(text)
    train(SETTINGS.replace(seed=7), tmp_path / "other")
    shutil.copy(tmp_path / "other" / "model.pt", run_dir / "model.pt")
    for command in ("report", "compare"):
        refused(command, "summary.json belongs to other weights than")
    for name in ("summary.json", "history.csv"):
        shutil.copy(tmp_path / "other" / name, run_dir / name)
    refused("report", "verification.json belongs to other weights than")


def test_report_of_no_run(tmp_path, run_dir, capsys):
    for folder, message in ((tmp_path / "nowhere", "no folder"), (tmp_path, "holds no run")):
        status, _, err = run(capsys, "report", folder)
        assert status == 1
        assert message in err
    (run_dir / "history.csv").write_text("not,a\nhistory,x,y\n")
    status, _, err = run(capsys, "report", run_dir)
    assert status == 1
    assert "cannot be read as the history" in err


@pytest.mark.parametrize("missing", ["matplotlib", "jinja2"])
def test_without_its_packages_the_error_names_the_extra(missing, run_dir):
    code = (
        f"import sys; sys.modules['{missing}'] = None; sys.modules['{missing}.figure'] = None\n"
        f"from lirpa_fastwarmup import cli; sys.exit(cli.main(['report', {str(run_dir)!r}]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "pip install 'lirpa_fastwarmup[plots]'" in done.stderr
    assert not (run_dir / "report.html").exists()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_page_in_a_browser(run_dir, tmp_path, capsys):
    from matplotlib.image import imread

    assert run(capsys, "report", run_dir)[0] == 0
    picture = tmp_path / "page.png"
    quiet = ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run")
    subprocess.run(
        [
            *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *quiet),
            *(f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1280,4000"),
            *(f"--screenshot={picture}", f"file://{run_dir / 'report.html'}"),
        ],
        check=True,
        capture_output=True,
        timeout=120,
    )
    pixels = (imread(picture)[..., :3] * 255).round().astype(int)
    assert pixels.shape[:2] == (4000, 1280)
    # The pictures are drawn: each of their colours covers a good part of the page.
    for color in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)):
        assert (np.abs(pixels - color).max(-1) < 8).sum() > 500
    # Nothing runs over the right edge: the margin there is blank.
    assert (pixels[:, -8:] == 255).all()
