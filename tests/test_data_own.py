"""Data of the user's own: float arrays of any rank in files and from factories, trained on and verified."""

from __future__ import annotations

import csv
import json
import re

import numpy as np
import pytest
import torch

from lirpa_fastwarmup import cli
from lirpa_fastwarmup.experiments import data
from lirpa_fastwarmup.experiments.data.download import CorruptFileError
from lirpa_fastwarmup.experiments.presets import preset
from lirpa_fastwarmup.experiments.training import UntrustedError, load_model, resume, train
from lirpa_fastwarmup.storage import read_json

RANDOM = np.random.default_rng(0)
NET = """
import torch
from torch import nn
from lirpa_fastwarmup.models import Normalize

def make(in_shape, classes, mean, std):
    return nn.Sequential(Normalize(mean, std), nn.Flatten(), nn.Linear(torch.Size(in_shape).numel(), 8), nn.ReLU(),
                         nn.Linear(8, classes))

def series():
    x = torch.randn(60, 2, 7, generator=torch.Generator().manual_seed(0))
    y = (x.mean((1, 2)) > 0).long()
    return (x[:40], y[:40]), torch.utils.data.TensorDataset(x[40:], y[40:])

def fractions():
    x = torch.randn(9, 2)
    return (x, (x[:, 0] > 0).long()), torch.utils.data.TensorDataset(x, torch.rand(9) * 2)

def booleans():
    x = torch.randn(9, 2)
    part = [(x[place], bool(place % 2)) for place in range(9)]
    return list_of(part), list_of([(one, torch.tensor([int(y)])) for one, y in part])

class list_of(torch.utils.data.Dataset):
    def __init__(self, pairs):
        self.pairs = pairs

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, place):
        return self.pairs[place]

def numbers():
    return 7
"""
BRIEF = ["--epochs", "2", "--batch-size", "16", "--pgd-steps", "1", "--pgd-restarts", "1"]
CUSTOM = ["train", "custom", "--model", "net.py:make", *BRIEF]


def samples(count=60, shape=(4,)):
    inputs = RANDOM.normal(size=(count, *shape))
    return inputs, (inputs.reshape(count, -1)[:, 0] > 0).astype(np.int64)


def table(path, inputs, labels, names=("a", "b", "c", "d")):
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*names[:2], "label", *names[2:]])
        writer.writerows([*row[:2], label, *row[2:]] for row, label in zip(inputs, labels, strict=True))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(NET)
    return tmp_path


def test_the_same_samples_from_every_kind_of_file(folder):
    inputs, labels = samples()
    np.savez("one.npz", inputs=inputs, labels=labels)
    torch.save({"inputs": torch.from_numpy(inputs), "labels": torch.from_numpy(labels).short()}, "one.pt")
    table(folder / "one.csv", inputs, labels)
    found = [data.load(f"one.{kind}") for kind in ("npz", "pt", "csv")]
    for dataset in found:
        assert (dataset.name, dataset.classes, dataset.in_shape, dataset.input_range) == ("one", 2, (4,), None)
        assert (len(dataset.train), len(dataset.test)) == (48, 12)
        assert torch.equal(dataset.train.inputs, found[0].train.inputs)
        assert torch.equal(dataset.test.labels, found[0].test.labels)
        assert dataset.mean == pytest.approx(dataset.train.images.double().mean(0).tolist())
        assert dataset.std == pytest.approx(dataset.train.images.double().std(0, correction=0).tolist())
    rows = torch.cat([found[0].train.images, found[0].test.images])
    expected = torch.from_numpy(inputs).float()
    assert torch.equal(rows[rows[:, 0].argsort()], expected[expected[:, 0].argsort()])
    x, _ = next(iter(data.Batches(found[0].test, 5)))
    assert torch.equal(x, found[0].test.images[:5])  # No pixels, so not divided by 255.


@pytest.mark.parametrize("shape", [(4,), (2, 9), (3, 5, 6), (2, 3, 4, 5)])
def test_inputs_of_any_rank_with_their_range(shape, folder):
    for name in ("train", "test"):
        inputs, labels = samples(20, shape)
        high = np.full(shape, 9.0, dtype=np.float32)
        np.savez(f"{name}.npz", inputs=inputs.astype(np.float16), labels=labels.astype(np.uint8), low=-9, high=high)
    dataset = data.load(".")
    assert dataset.in_shape == shape
    assert len(dataset.mean) == shape[0]
    low, high = dataset.input_range
    assert float(low) == -9
    assert high.shape == shape
    assert data.load(".", input_range=(-8.0, 8.0)).input_range == (-8.0, 8.0)
    with pytest.raises(ValueError, match=r"inputs must lie in input_range \(0\.0, 0\.5\)"):
        data.load(".", input_range=(0.0, 0.5))


def test_large_offsets_do_not_spoil_the_deviation(folder):
    inputs, labels = samples()
    inputs[:, 0] += 1e6
    inputs[:, 1] = 7
    np.savez("one.npz", inputs=inputs, labels=labels)
    dataset = data.load("one.npz")
    assert dataset.std == pytest.approx(
        [*dataset.train.images.double().std(0, correction=0).tolist()[:1], 1.0, 1, 1], 0.3
    )
    assert dataset.std[1] == 1.0


def text(content):
    return lambda path: path.with_suffix(".csv").write_text(content)


X, Y = samples(10)
WRONG = {
    "no labels": (lambda p: np.savez(p, inputs=X), "must hold 'inputs' .*'labels'.*it holds 'inputs'"),
    "other keys": (lambda p: np.savez(p, x=X, y=Y), "it holds 'x', 'y'"),
    "both": (lambda p: np.savez(p, inputs=X, images=X, labels=Y), "it holds 'inputs', 'images', 'labels'"),
    "bytes": (lambda p: np.savez(p, inputs=X.astype(np.uint8), labels=Y), "pixels from 0 to 255 as the array 'images'"),
    "texts": (lambda p: np.savez(p, inputs=X.astype(str), labels=Y), r"inputs of .* are <U32 of shape \(10, 4\)"),
    "rank 1": (lambda p: np.savez(p, inputs=X[:, 0], labels=Y), r"shape \(10,\): expected numbers"),
    "nan": (
        lambda p: np.savez(p, inputs=np.where(X[3, 2] == X, np.nan, X), labels=Y),
        r"holds nan in row \d, column 2",
    ),
    "inf": (lambda p: np.savez(p, inputs=np.where(X[3, 2] == X, 1e60, X), labels=Y), r"holds inf in row \d, column 2"),
    "text labels": (lambda p: np.savez(p, inputs=X, labels=Y.astype(str)), "integer labels from 0 .*found <U21"),
    "float labels": (lambda p: np.savez(p, inputs=X, labels=Y * 1.0), "integer labels from 0 .*found float64"),
    "negative": (lambda p: np.savez(p, inputs=X, labels=Y - 1), "labels from 0 .*from -1 to 0"),
    "low alone": (lambda p: np.savez(p, inputs=X, labels=Y, low=0), "both 'low' and 'high'"),
    "outside": (lambda p: np.savez(p, inputs=X, labels=Y, low=0, high=0.1), "inputs must lie in input_range"),
    "range of another shape": (
        lambda p: np.savez(p, inputs=X, labels=Y, low=np.zeros(3), high=np.ones(3)),
        "input_range has shape",
    ),
    "a list": (lambda p: torch.save([torch.ones(2)], p.with_suffix(".pt")), "holds no dictionary of tensors"),
    "pt keys": (lambda p: torch.save({"x": torch.ones(2)}, p.with_suffix(".pt")), "must hold 'inputs'.*it holds 'x'"),
    "no pt": (lambda p: p.with_suffix(".pt").write_bytes(b"no"), "cannot be read as tensors: write a dictionary"),
    "no column label": (text("a,b,y\n1,2,0\n"), "the class numbers 'label'; found 'a', 'b', 'y'"),
    "two columns of a name": (text("a,a,label\n1,2,0\n"), "each once"),
    "empty": (text(""), "found none"),
    "no rows": (text("a,label\n"), r"shape \(0, 1\)"),
    "one row": (text("a,label\n1,0\n"), "holds 1 sample"),
    "a word": (text("a,label\n1,0\n\nx,1\n"), "line 4, column 'a': found 'x'; write a finite number"),
    "an empty cell": (text("a,b,label\n1,2,0\n1,,0\n"), "line 3, column 'b': found ''"),
    "nan in a table": (text("a,label\n1,0\nnan,1\n"), "line 3, column 'a': found 'nan'"),
    "word as label": (text("a,label\n1,cat\n"), "line 2, column 'label': found 'cat'; number the classes from 0"),
    "half a class": (text("a,label\n1,0.5\n"), "column 'label': found '0.5'; number"),
    "short line": (text("a,b,label\n1,0\n"), "line 2: 2 cells, and the first line has 3"),
    "no text": (lambda p: p.with_suffix(".csv").write_bytes(b"\xff\xfe\x00"), "not a table of text"),
}


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("wrong", WRONG)
def test_files_that_hold_something_else_are_refused_by_name(wrong, folder):
    change, message = WRONG[wrong]
    change(folder / "mine.npz")
    (path,) = folder.glob("mine.*")
    with pytest.raises(ValueError, match=message) as caught:
        data.load(str(path))
    assert "mine" in str(caught.value) or "input_range" in str(caught.value)


def test_train_and_test_must_fit_together(folder):
    table(folder / "train.csv", *samples(10))
    table(folder / "test.csv", *samples(10), names=("b", "a", "c", "d"))
    with pytest.raises(ValueError, match=r"has the columns \['a', 'b', 'label', 'c', 'd'\], and .*\['b', 'a', "):
        data.load(".")
    (folder / "test.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"needs test\.csv"):
        data.load(".")
    with pytest.raises(FileNotFoundError, match=r"missing\.csv"):
        data.load("missing.csv")


def test_what_factories_return(folder):
    dataset = data.load("net.py:series")
    assert (dataset.name, dataset.in_shape, len(dataset.train), len(dataset.test)) == ("series", (2, 7), 40, 20)
    assert data.load("net.py:booleans").test.labels.tolist() == [0, 1, 0, 1, 0, 1, 0, 1, 0]
    with pytest.raises(CorruptFileError, match=r"should contain integer labels .* found float32"):
        data.load("net.py:fractions")
    with pytest.raises(TypeError, match="returned an object of type int: return \\(train, test\\)"):
        data.load("net.py:numbers")
    with pytest.raises(ImportError, match="has no 'absent', named by the dataset"):
        data.load("net.py:absent")


def run(*arguments):
    assert cli.main([str(argument) for argument in arguments]) == 0


@pytest.mark.parametrize("kind", ["csv", "npz"])
def test_a_run_on_a_table_from_training_to_the_report(kind, folder, capsys):
    inputs, labels = samples(100)
    inputs *= [1, 1, 50, 1]
    if kind == "csv":
        table(folder / "mine.csv", inputs, labels)
    else:
        np.savez("mine.npz", inputs=inputs, labels=labels, low=-300, high=np.array([5, 6, 300, 6.0]))
    run(*CUSTOM, "--dataset", f"mine.{kind}", "--eps", "2", "--out", "run", "--validation", "10", "--data-limit", "70")
    assert "mine, 20 test samples" in capsys.readouterr().out
    model = load_model(folder / "run" / "model.pt", trust=True)
    assert model[0].std.tolist() == pytest.approx(data.load(f"mine.{kind}").std)
    run("verify", "run", "--trust", "--radius", "--eps", "0.1", "3", "--pgd-restarts", "1")
    content = read_json(folder / "run" / "verification.json")
    assert content["input_range"] == (None if kind == "csv" else [-300.0, [5.0, 6.0, 300.0, 6.0]])
    with (folder / "run" / "certificates.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 40
    run("inspect", "run", "--trust")
    run("report", "run", "--trust", "--out", "report.html")
    assert "20 test samples" in " ".join((folder / "report.html").read_text().split())
    run("export", "run", "--trust", "--samples", "0-1", "--out", "out")
    assert (folder / "out" / "instances.csv").is_file()
    with pytest.raises(UntrustedError, match=r"net\.py:make"):
        load_model(folder / "run" / "model.pt")


def test_certificates_hold_within_the_given_range_alone(folder):
    """The whole line is misclassified somewhere, but not within the range."""
    inputs, labels = samples(60, (1,))
    inputs = np.abs(inputs) * (2 * labels[:, None] - 1)
    np.savez("mine.npz", inputs=inputs, labels=labels)
    run(*CUSTOM, "--dataset", "mine.npz", "--eps", "0.01", "--epochs", "8", "--out", "run")
    bounds = ("--input-range", "-9", "9")
    run("verify", "run", "--trust", "--eps", "0.5", "--out", "wide", *bounds)
    assert read_json(folder / "wide" / "verification.json")["input_range"] == [-9.0, 9.0]
    assert cli.main(["verify", "run", "--trust", "--eps", "0.5", "--out", "narrow", "--input-range", "0", "9"]) == 1


def test_a_run_on_a_factory_is_resumed_bit_for_bit_with_trust(folder, monkeypatch):
    settings = preset("custom", dataset="net.py:series", eps=0.05).replace(
        model="net.py:make", epochs=2, ramp_length=1, batch_size=16, pgd_restarts=0
    )
    train(settings, folder / "whole")
    from lirpa_fastwarmup.experiments.training import run as runs

    close, closed = runs._close_epoch, []

    def dies(*arguments):
        if closed:
            raise RuntimeError("killed")
        closed.append(close(*arguments))

    with monkeypatch.context() as patch:
        patch.setattr(runs, "_close_epoch", dies)
        with pytest.raises(RuntimeError, match="killed"):
            train(settings, folder / "part")
    with pytest.raises(UntrustedError, match=r"series|make"):
        resume(folder / "part")
    resume(folder / "part", trust=True)
    one, other = (load_model(folder / name / "model.pt", trust=True).state_dict() for name in ("whole", "part"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert (folder / "whole" / "history.csv").read_text() == (folder / "part" / "history.csv").read_text()


def test_the_factory_of_the_data_needs_trust_too(folder, capsys):
    run(*CUSTOM, "--dataset", "net.py:series", "--eps", "0.05", "--out", "run")
    assert cli.main(["inspect", "run"]) == 1
    assert "--trust" in capsys.readouterr().err
    from lirpa_fastwarmup.experiments.training.network import load_dataset

    with pytest.raises(UntrustedError, match=r"net\.py:series"):
        load_dataset(preset("custom", dataset="net.py:series", eps=1.0), folder / "model.pt")


def test_changed_data_is_refused_on_resuming(folder):
    inputs, labels = samples(50)
    table(folder / "mine.csv", inputs, labels)
    settings = preset("custom", dataset="mine.csv", eps=0.05).replace(
        model="net.py:make", epochs=1, ramp_length=0, batch_size=16, pgd_restarts=0
    )
    train(settings, folder / "run")
    (folder / "run" / "summary.json").unlink()
    table(folder / "mine.csv", *samples(60))
    with pytest.raises(ValueError, match=r"40 training samples .* and mine has 48 training samples"):
        resume(folder / "run", trust=True)
    table(folder / "mine.csv", samples(50)[0] * 2, samples(50)[1])
    with pytest.raises(
        ValueError, match=r"digest \w+.* and mine has 40 training samples \(digest .*: use the same data"
    ):
        resume(folder / "run", trust=True)
    (folder / "moved").mkdir()
    (folder / "mine.csv").unlink()
    table(folder / "moved" / "mine.csv", inputs, labels)
    resume(folder / "run", data_dir=folder / "moved", trust=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "mine.csv"], "the preset custom has no radius, because it depends on your data: give --eps"),
        (["--eps", "1"], "the preset custom has no data of its own: name yours with --dataset"),
        (
            ["--dataset", "mine.csv", "--eps", "1", "--model", "cnn7"],
            r"cnn7, .* need images .*--model file\.py:factory",
        ),
        (["--dataset", "mine.csv", "--eps", "1", "--flip"], r"\(4,\) are no images, which --flip and --crop-padding"),
        (["--dataset", "mine.csv", "--eps", "1", "--input-range", "1", "0"], "the lowest and the highest valid input"),
        (["--dataset", "mine.csv", "--eps", "30", "--input-range", "-9", "9"], "only 18 wide"),
        (["--dataset", "mine.tsv", "--eps", "1"], r"unknown dataset 'mine\.tsv'; known are .*FILE\.csv"),
    ],
)
def test_what_custom_runs_need_is_said_in_a_line(arguments, message, folder, capsys):
    table(folder / "mine.csv", *samples(50))
    assert cli.main([*CUSTOM, *arguments, "--out", "run"]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("lirpa-fastwarmup: error: ")
    assert re.search(message, last), last
    assert not (folder / "run").exists()


def test_custom_is_listed_shown_and_scaled(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    assert "  custom " in capsys.readouterr().out
    run(
        "train",
        "custom",
        "--dataset",
        "mine.csv",
        "--eps",
        "0.1",
        "--epochs",
        "20",
        "--input-range",
        "0",
        "2",
        "--show",
    )
    lines = capsys.readouterr().out.splitlines()
    shown = {line.split()[0]: re.split(" {2,}", line)[1] for line in lines}  # Name, value and origin.
    assert (shown["ramp_length"], shown["lr_milestones"], shown["flip"]) == ("10", "[16, 18]", "False")
    assert json.loads(shown["input_range"]) == [0.0, 2.0]
