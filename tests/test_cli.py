from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lirpa_fastwarmup as fw
from lirpa_fastwarmup import cli
from lirpa_fastwarmup.cli.options import number, settings_and_origins
from lirpa_fastwarmup.engine.compat import ACTIVE_PATCHES, ENGINE_VERSION
from lirpa_fastwarmup.experiments import data
from lirpa_fastwarmup.experiments.presets import PRESETS

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
    for text in (fw.__version__, f"auto_LiRPA {ENGINE_VERSION}", "contain all outputs found", *ACTIVE_PATCHES):
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
        assert f"{name:<17} {value} " in out
    assert re.search(r"^lr_milestones +\[3, 4\] +command line$", out, re.MULTILINE)
    assert re.search(r"^lr_factor +0.2 +preset mnist5k$", out, re.MULTILINE)


def test_show_names_the_source_of_published_settings(capsys):
    arguments = ("train", "cifar10", "--eps", "2/255", "--epochs", 16, "--schedule", "ctbench", "--show")
    status, out, _ = run(capsys, *arguments, "--method", "mtl-ibp", "--attack-restarts", 1)
    assert status == 0
    lines = dict(line.split(maxsplit=1) for line in out.splitlines())
    for name, value in (("alpha", "0.01 "), ("attack_scale", "2.0 "), ("batch_size", "128 "), ("l1_weight", "3e-06 ")):
        assert lines[name].startswith(value)
        assert lines[name].endswith("CTBench, commit 0f18162, scripts/examples")
    assert lines["swa_start"].split() == ["15", "scaled", "with", "epochs"]
    assert lines["attack_restarts"].endswith("command line")
    assert lines["loss"].endswith("method mtl-ibp")
    assert lines["tol"].endswith("preset cifar10")
    _, out, _ = run(capsys, *arguments, "--method", "cc-ibp")
    lines = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert lines["batchnorm_policy"].split(maxsplit=1) == ["adversarial", "expressive-losses, commit 3df64fa, README"]
    # A method alone leaves the paper's schedule.
    _, out, _ = run(capsys, "train", "cifar10", "--method", "sabr", "--show")
    lines = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert lines["epochs"].split(maxsplit=1) == ["160", "preset cifar10"]
    assert lines["ratio"].startswith("0.9 ")


def test_what_nobody_published_is_an_error(capsys):
    arguments = ("train", "mnist5k", "--show", "--method")
    for method, needed in (("sabr", "ratio"), ("mtl-ibp", "alpha"), ("cc-ibp", "alpha"), ("exp-ibp", "alpha")):
        status, _, err = run(capsys, *arguments, method)
        assert status == 1
        assert f"needs {needed}" in err
        assert f"nobody published one for mnist5k at ε = 0.1: give --{needed}" in err
        assert run(capsys, *arguments, method, f"--{needed}", 0.3)[0] == 0
    status, _, err = run(capsys, "train", "mnist", "--eps", 0.3, "--show", "--method", "exp-ibp")
    assert "needs alpha" in err
    assert "mnist at 0.1" in err
    status, _, err = run(capsys, "train", "mnist5k", "--show", "--schedule", "ctbench")
    assert status == 1
    assert "CTBench has no schedule for mnist5k at ε = 0.1, only for mnist at 0.1" in err


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
        (["train", "mnist5k", "--out", "{tmp}/x", "--data-limit", "1"], "leave no batch with two samples"),
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


@pytest.mark.parametrize("arguments", [["--eps", "big"], ["--epochs", "many"], ["--init", "nothing"]])
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
    with pytest.raises(argparse.ArgumentTypeError, match="is neither a number nor a fraction"):
        number(text)


def in_a_process(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    return done


def test_an_interruption_of_the_imports_is_reported_in_a_line():
    done = in_a_process("""
import importlib.abc, sys

class Interrupts(importlib.abc.MetaPathFinder):
    def find_spec(self, name, *_):
        if name == "auto_LiRPA":
            raise KeyboardInterrupt

from lirpa_fastwarmup.cli import main
sys.meta_path.insert(0, Interrupts())
sys.exit(main(["info"]))
""")
    assert (done.returncode, done.stderr) == (130, "lirpa-fastwarmup: interrupted\n")


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["train", "mnist5k", "--show"]])
def test_help_and_settings_need_neither_torch_nor_the_engine(arguments):
    done = in_a_process(f"""
import sys
sys.modules["torch"] = sys.modules["auto_LiRPA"] = None
from lirpa_fastwarmup.cli import main
sys.exit(main({arguments}))
""")
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) > 10


def test_every_command_reports_a_missing_engine_in_a_few_lines(tmp_path):
    done = in_a_process(f"""
import sys
from lirpa_fastwarmup.cli import main
sys.modules["auto_LiRPA"] = None
for command in ("inspect mnist5k", "info", "verify {tmp_path}", "train mnist5k --out {tmp_path}/new"):
    assert main(command.split()) == 1
    sys.stderr.write("---\\n")
""")
    messages = done.stderr.split("---\n")[:-1]
    assert len(messages) == 4
    for message in messages:
        assert message.startswith("lirpa-fastwarmup: error: lirpa_fastwarmup needs the auto_LiRPA engine")
        assert len(message.splitlines()) <= 5
    assert not (tmp_path / "new").exists()


def test_train_help_lists_groups_defaults_and_presets(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    text = capsys.readouterr().out
    for name in ("data:", "optimisation:", "(default: adam)", *(f"  {name}  " for name in PRESETS)):
        assert name in text


SCALED = [
    ([], (20, 10, (15, 18))),
    (["--epochs", 2], (2, 1, (2, 2))),
    (["--epochs", 50], (50, 25, (38, 45))),
    (["--epochs", 2, "--ramp-length", 7], (2, 7, (2, 2))),
    (["--epochs", 2, "--lr-milestones", 9], (2, 1, (9,))),
]


@pytest.mark.parametrize(("arguments", "expected"), SCALED)
def test_epochs_scale_the_ramp_and_the_milestones(arguments, expected, capsys):
    status, out, _ = run(capsys, "train", "mnist5k", "--show", *arguments)
    assert status == 0
    shown = {line.split()[0]: re.split(" {2,}", line)[1] for line in out.splitlines()}
    epochs, ramp, milestones = expected
    assert (shown["epochs"], shown["ramp_length"], shown["lr_milestones"]) == (
        *(str(epochs), str(ramp), str(list(milestones))),
    )


def test_scaling_is_reported_in_a_line(capsys, caplog):
    with caplog.at_level("INFO", "lirpa_fastwarmup.cli"):
        run(capsys, "train", "cifar10", "--show", "--epochs", 20)
    (record,) = caplog.records
    assert record.getMessage() == ("epochs 160 -> 20: ramp_length 80 -> 10, lr_milestones (120, 140) -> (15, 18)")


def test_a_failed_command_leaves_no_folder(capsys, tmp_path):
    for mistake in (["--data-limit", 0], ["--model", "cnn8"]):
        assert run(capsys, "train", "mnist5k", "--out", tmp_path / "runs" / "one", *mistake)[0] == 1
        assert not list(tmp_path.iterdir())


def test_names_are_checked_before_anything_is_downloaded(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(data.LOADERS, "cifar10", lambda _: pytest.fail("loaded"))
    for mistake in (["--model", "cnn8"], ["--model", "no_such_module:net"]):
        status, _, err = run(capsys, "train", "cifar10", "--out", tmp_path / "run", *mistake)
        assert status == 1
        assert mistake[1].partition(":")[0] in err


def test_the_current_folder_replaces_no_module_of_others(tmp_path):
    (tmp_path / "queue.py").write_text("raise SystemExit('a file of the current folder was imported')")
    (tmp_path / "torch.py").write_text("raise SystemExit('a file of the current folder was imported')")
    program = Path(sys.executable).parent / "lirpa-fastwarmup"
    command = [program, "train", "mnist5k", "--model", "mine:make", "--out", "run"]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert found.returncode == 1
    assert "the module 'mine' of the network" in found.stderr


class BegunError(Exception):
    pass


def begun(*_, **__):
    raise BegunError


def test_a_restarted_command_never_resumes_the_run_that_it_is_to_replace(tmp_path, monkeypatch):
    (tmp_path / "checkpoint.pt").write_text("")
    (tmp_path / "summary.json").write_text("{}")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setattr("lirpa_fastwarmup.experiments.training.train", begun)
    with pytest.raises(BegunError):
        cli.main(["train", "mnist5k", *TINY, "--out", str(tmp_path), "--overwrite"])


def test_a_run_with_a_published_schedule_is_resumed_by_its_own_command(tmp_path, monkeypatch):
    arguments = ["train", "cifar10", "--eps", "8/255", "--method", "mtl-ibp", "--schedule", "ctbench"]
    settings, _ = settings_and_origins(cli._parser(arguments).parse_args(arguments))
    assert settings.schedule != "ctbench"
    monkeypatch.setattr("lirpa_fastwarmup.experiments.training.settings_of_run", lambda _: settings)
    monkeypatch.setattr("lirpa_fastwarmup.experiments.training.resume", begun)
    with pytest.raises(BegunError):
        cli.main([*arguments, "--resume", "--out", str(tmp_path)])
