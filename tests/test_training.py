from __future__ import annotations

import csv
import dataclasses
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lirpa_fastwarmup as fw
from lirpa_fastwarmup.experiments import data
from lirpa_fastwarmup.experiments.presets import preset
from lirpa_fastwarmup.experiments.training import OutputExistsError, load_model, train
from lirpa_fastwarmup.experiments.training.loop import EpochMeans
from lirpa_fastwarmup.storage import read_json

SMALL = preset("mnist5k").replace(
    width=2,
    hidden=8,
    epochs=2,
    ramp_length=1,
    data_limit=129,
    batch_size=64,
    lr_milestones=(1,),
    pgd_steps=2,
    pgd_restarts=1,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "deep" / "er"
    return out, train(SMALL, out)


def test_files_of_a_run(finished):
    out, summary = finished
    assert sorted(path.name for path in out.iterdir()) == [
        *("checkpoint.pt", "curves.png", "history.csv", "model.pt", "summary.json")
    ]
    assert read_json(out / "summary.json") == summary
    for key in ("standard_error", "pgd_error", "verified_error"):
        assert 0 <= summary[key] <= 1
    assert summary["standard_error"] <= summary["pgd_error"] <= summary["verified_error"]
    assert (summary["preset"], summary["method"], summary["model"]) == ("mnist5k", "fast", "cnn7")
    assert (summary["selected_epoch"], summary["selected_by"]) == (2, "the last epoch")
    assert (summary["seed"], summary["eps"], summary["epochs"]) == (0, 0.1, 2)
    assert (summary["train_samples"], summary["test_samples"]) == (129, 1000)
    assert summary["engine"].startswith("auto_LiRPA ")
    assert summary["torch"] == torch.__version__
    assert 0 < summary["train_seconds_per_epoch"] < summary["seconds"]


def test_history_has_a_row_per_epoch(finished):
    out, summary = finished
    with (out / "history.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["epoch"]) for row in rows] == [1, 2]
    assert [float(row["lr"]) for row in rows] == pytest.approx([5e-4, 1e-4])
    assert float(rows[-1]["eps"]) == pytest.approx(0.1)
    assert float(rows[-1]["verified_error"]) == summary["verified_error"]
    assert float(rows[-1]["standard_error"]) == summary["standard_error"]
    assert float(rows[0]["tightness"]) > 0
    assert rows[1]["tightness"] == "nan"  # At full radius the regularisers are off.


def test_model_can_be_rebuilt_without_the_run(finished):
    out, summary = finished
    model = load_model(out / "model.pt")
    assert not model.training
    test = data.load("mnist5k").test
    wrong = (model(test.images.float() / 255).argmax(1) != test.labels).double().mean()
    assert float(wrong) == pytest.approx(summary["standard_error"])


def test_the_formats_of_files_stay(finished):
    out, _ = finished
    saved = torch.load(out / "model.pt", weights_only=True)
    assert saved["format"] == 3
    assert saved.keys() == {"format", "epoch", "architecture", "settings", "state_dict", "outputs"}
    assert saved["architecture"].keys() == {
        *("model", "in_shape", "classes", "width", "hidden", "batchnorm", "mean", "std")
    }
    saved = torch.load(out / "checkpoint.pt", weights_only=True)
    assert saved["format"] == 3
    assert saved.keys() == {
        *("format", "settings", "data", "objective", "optimizer", "batches", "average", "position", "outputs")
    }
    assert saved["position"].keys() == {
        *("means", "epoch", "batches_done", "eps", "seconds", "history", "epoch_seconds", "best", "elapsed")
    }


def test_a_file_that_is_no_model(tmp_path):
    torch.save({"format": 99}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"has format 99, and this version .* reads format 3"):
        load_model(tmp_path / "model.pt")
    for content in (b"", b"text", b"PK\x03\x04 cut off", pickle.dumps(Path)):
        (tmp_path / "model.pt").write_bytes(content)
        with pytest.raises(ValueError, match="was not written by lirpa_fastwarmup, or is damaged"):
            load_model(tmp_path / "model.pt")


def test_a_ramp_that_outlasts_training_warns(tmp_path, caplog):
    train(SMALL.replace(epochs=1, ramp_length=5, data_limit=70), tmp_path / "run")
    assert "eps reaches 0.1 only after 5 epochs, and training ends after 1" in caplog.text


def test_a_batch_of_one_is_fine_without_batchnorm(tmp_path):
    train(SMALL.replace(epochs=1, data_limit=3, batch_size=1, batchnorm=False), tmp_path / "run")


def test_same_seed_same_run_and_the_callers_random_state_untouched(finished, tmp_path):
    out, _ = finished
    torch.manual_seed(123)
    before = torch.get_rng_state()
    train(SMALL, tmp_path / "again")
    assert torch.equal(torch.get_rng_state(), before)
    one, two = load_model(out / "model.pt"), load_model(tmp_path / "again" / "model.pt")
    assert all(torch.equal(value, two.state_dict()[name]) for name, value in one.state_dict().items())
    train(SMALL.replace(seed=1), tmp_path / "other")
    three = load_model(tmp_path / "other" / "model.pt")
    assert not torch.equal(one[0].weight, three[0].weight)


def test_each_remedy_can_be_switched_off(tmp_path):
    short = SMALL.replace(epochs=1, data_limit=70)
    for name, off in (("init", "default"), ("batchnorm", False), ("regularizers", False)):
        train(short.replace(**{name: off}), tmp_path / name)
    model = load_model(tmp_path / "batchnorm" / "model.pt")
    assert not any("running" in key for key in model.state_dict())
    default = load_model(tmp_path / "init" / "model.pt")
    # PyTorch's default is uniform within 1/√n: √(1/3n) in all, and none beyond the edge.
    assert float(default[0].weight.detach().abs().max()) < 1 / 3 + 0.05
    with (tmp_path / "regularizers" / "history.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert row["tightness"] == row["relu_balance"] == "nan"


def test_occupied_folders_are_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match=r"not empty; nothing in it was touched.*--overwrite"):
        train(SMALL, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    (tmp_path / "history.csv").write_text("old")
    train(SMALL.replace(epochs=1, data_limit=70), tmp_path, overwrite=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert "old" not in (tmp_path / "history.csv").read_text()


def test_an_earlier_run_stays_until_there_is_another(tmp_path):
    (tmp_path / "summary.json").write_text("old")
    for broken in (SMALL.replace(data_limit=99_999), SMALL.replace(lr=1e30, data_limit=64)):
        with pytest.raises((ValueError, fw.NonFiniteLossError)):
            train(broken, tmp_path, overwrite=True)
        assert (tmp_path / "summary.json").read_text() == "old"


def test_weights_that_the_last_step_broke_are_not_kept(tmp_path):
    with pytest.raises(fw.NonFiniteLossError, match=r"epoch 1: .*no longer finite.*no epoch had been finished"):
        train(SMALL.replace(lr=1e30, data_limit=64), tmp_path / "run")
    assert not (tmp_path / "run" / "model.pt").exists()


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/lirpa")):
        with pytest.raises(OSError, match=f"cannot write to {out}"):
            train(SMALL, out)


def test_diverging_training_stops_and_keeps_the_last_good_model(tmp_path, monkeypatch):
    calls = 0
    forward = fw.ShortWarmup.forward

    def diverging(self, x, y):
        nonlocal calls
        calls += 1
        if calls == 3:  # Three batches of 129 samples: the second epoch's first is the third, singles skipped.
            with torch.no_grad():
                next(self.parameters()).fill_(torch.nan)
        return forward(self, x, y)

    monkeypatch.setattr(fw.ShortWarmup, "forward", diverging)
    with pytest.raises(
        fw.NonFiniteLossError, match=r"epoch 2: the loss is nan at step 2, eps 0\.1.*model\.pt holds epoch 1"
    ):
        train(SMALL.replace(compile=False), tmp_path / "run")  # No step is timed first.
    model = load_model(tmp_path / "run" / "model.pt")
    assert all(bool(value.isfinite().all()) for value in model.state_dict().values())
    assert not (tmp_path / "run" / "summary.json").exists()


def test_means_skip_what_was_not_computed():
    means = EpochMeans(torch.device("cpu"), ["own"])
    nan = torch.tensor(torch.nan)

    def step(loss, robust):
        values = dict.fromkeys((field.name for field in dataclasses.fields(fw.StepLoss)), nan)
        values |= {"loss": torch.tensor(loss), "robust_loss": torch.tensor(robust)}
        return fw.StepLoss(**{**values, "terms": {"own": torch.tensor(2 * loss)}})

    means.add(step(1.0, 4.0), 30)
    means.add(step(4.0, torch.nan), 10)
    read = means.read()
    assert read["own"] == pytest.approx(3.5)
    assert read["loss"] == pytest.approx(1.75)
    assert read["robust_loss"] == pytest.approx(4.0)
    assert read["tightness"] != read["tightness"]


def test_runs_without_matplotlib(tmp_path):
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from pathlib import Path\n"
        "from lirpa_fastwarmup.experiments.training import train\n"
        "from tests.test_training import SMALL\n"
        f"train(SMALL.replace(epochs=1, data_limit=70), Path({str(tmp_path / 'run')!r}))\n"
    )
    root = Path(__file__).parent.parent
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "curves.png was not drawn: plots need matplotlib: pip install 'lirpa_fastwarmup[plots]'" in result.stderr
    assert (tmp_path / "run" / "summary.json").exists()
