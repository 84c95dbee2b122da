from __future__ import annotations

import argparse
import json
import subprocess
import sys

import pytest

import lirpa_fastwarmup as fw
from lirpa_fastwarmup import cli
from lirpa_fastwarmup.cli.options import number
from lirpa_fastwarmup.engine.compat import ACTIVE_PATCHES, ENGINE_VERSION

TINY = [
    *("--width", "2", "--hidden", "8", "--epochs", "1", "--ramp-length", "1"),
    *("--data-limit", "70", "--pgd-steps", "1", "--pgd-restarts", "1"),
]


def run(capsys, *arguments):
    status = cli.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return status, out, err


def test_info(capsys):
    status, out, _ = run(capsys, "info")
    assert status == 0
    for text in (fw.__version__, f"auto_LiRPA {ENGINE_VERSION}", "contain all sampled outputs", *ACTIVE_PATCHES):
        assert text in out


def test_info_tells_bounds_that_do_not_hold(capsys, monkeypatch):
    bounds = fw.BoundedModule.compute_bounds

    def too_narrow(self, *args, **kwargs):
        lower, upper = bounds(self, *args, **kwargs)
        middle = (lower + upper) / 2
        return middle, middle

    monkeypatch.setattr(fw.BoundedModule, "compute_bounds", too_narrow)
    status, out, _ = run(capsys, "info")
    assert status == 1
    assert "DO NOT CONTAIN" in out


def test_train_prints_a_line_per_epoch_and_a_table(capsys, tmp_path):
    out_dir = tmp_path / "run"
    status, out, _ = run(capsys, "train", "mnist5k", "--out", out_dir, *TINY, "--eps", "8/255", "--seed", 5)
    assert status == 0
    assert out.count("epoch 1/1") == 1
    summary = json.loads((out_dir / "summary.json").read_text())
    assert summary["eps"] == pytest.approx(8 / 255)
    assert summary["settings"]["seed"] == 5
    assert f"verified error (IBP)     {summary['verified_error']:.2%}" in out
    assert f"PGD error (lower bound)  {summary['pgd_error']:.2%}" in out
    status, _, err = run(capsys, "train", "mnist5k", "--out", out_dir, *TINY)
    assert status == 1
    assert "--overwrite" in err
    assert run(capsys, "train", "mnist5k", "--out", out_dir, "--overwrite", *TINY)[0] == 0


def test_show_prints_the_settings_after_the_overrides(capsys):
    status, out, _ = run(capsys, "train", "mnist5k", "--show", "--no-bn", "--lr-milestones", 3, 4, "--data-limit", 10)
    assert status == 0
    for name, value in (("batchnorm", False), ("init", "ibp"), ("lr_milestones", [3, 4]), ("data_limit", 10)):
        assert f"{name:<17} {value}\n" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "cifar11", "--out", "x"], "unknown preset 'cifar11'; known are mnist5k"),
        (["train", "mnist5k"], "--out DIR"),
        (["train", "mnist5k", "--out", "x", "--eps", "-0.1"], "eps must be above 0"),
        (["train", "mnist5k", "--out", "x", "--eps", "nan"], "eps must be above 0"),
        (["train", "mnist5k", "--out", "x", "--eps", "1e999999999"], "eps must be above 0"),
        (["train", "mnist5k", "--out", "x", "--eps", "1e400"], "eps must be above 0"),
        (["train", "mnist5k", "--out", "x", "--device", "tpu"], "device 'tpu' cannot be used here"),
        (["train", "mnist5k", "--out", "x", "--device", "meta"], "device 'meta' cannot be used here"),
        (["train", "mnist5k", "--out", "{tmp}/x", "--data-limit", "0"], "cannot limit it to 0"),
        (["train", "mnist5k", "--out", "{tmp}/x", "--data-limit", "1"], "leave no batch of two"),
        (
            ["train", "mnist5k", "--out", "{tmp}/x", "--dataset", "mnist", "--data-dir", "{tmp}"],
            "MNIST needs train-images-idx3-ubyte",
        ),
    ],
)
def test_mistakes_are_told_in_a_line(arguments, message, capsys, tmp_path):
    status, _, err = run(capsys, *(argument.format(tmp=tmp_path) for argument in arguments))
    assert status == 1
    assert err.startswith("lirpa-fastwarmup: error: ")
    assert message in err
    assert "Traceback" not in err


def test_traceback_on_request():
    with pytest.raises(ValueError, match="unknown preset"):
        cli.main(["--traceback", "train", "nothing"])


@pytest.mark.parametrize("arguments", [["--eps", "big"], ["--epochs", "many"], ["--dataset", "nothing"]])
def test_arguments_that_cannot_be_read(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", "mnist5k", *arguments])
    assert stopped.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_runs_as_a_module():
    result = subprocess.run([sys.executable, "-m", "lirpa_fastwarmup", "--version"], capture_output=True, text=True)
    assert (result.returncode, result.stdout.strip()) == (0, fw.__version__)


@pytest.mark.parametrize(
    ("text", "value"), [("8/255", 8 / 255), (" 8 / 255 ", 8 / 255), ("0.1", 0.1), ("1e-3", 1e-3), ("2.5/5", 0.5)]
)
def test_numbers_and_fractions(text, value):
    assert number(text) == value


@pytest.mark.parametrize("text", ["8/0", "", "/", "1/2/3", "8:255", "eight"])
def test_what_is_no_number(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is no number, nor a fraction"):
        number(text)


def test_an_interruption_of_the_imports_is_told_in_a_line():
    code = """
import importlib.abc, sys

class Interrupts(importlib.abc.MetaPathFinder):
    def find_spec(self, name, *_):
        if name == "lirpa_fastwarmup.recipe":
            raise KeyboardInterrupt

sys.meta_path.insert(0, Interrupts())
sys.argv = [{program!r}, "info"]
from lirpa_fastwarmup.cli import main
"""
    told, raised = (
        subprocess.run([sys.executable, "-c", code.format(program=program)], capture_output=True, text=True)
        for program in ("/usr/bin/lirpa-fastwarmup", "my_program.py")
    )
    assert (told.returncode, told.stderr) == (1, "lirpa-fastwarmup: interrupted\n")
    assert "KeyboardInterrupt" in raised.stderr
