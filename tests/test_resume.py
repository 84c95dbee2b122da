"""Runs that are stopped, killed or damaged, and go on."""

from __future__ import annotations

import csv
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from lirpa_fastwarmup import cli
from lirpa_fastwarmup.experiments.presets import preset
from lirpa_fastwarmup.experiments.training import OutputExistsError, TrainingInterrupted, resume, train
from lirpa_fastwarmup.experiments.training.loop import Progress
from lirpa_fastwarmup.storage import FolderInUseError, read_json, write_tensors

# Three batches an epoch, everything random in use, and a state beside the weights' own.
SETTINGS = preset("mnist5k").replace(
    width=2,
    hidden=8,
    epochs=3,
    ramp_length=2,
    data_limit=170,
    validation=20,
    select="validation",
    batch_size=64,
    accumulate=2,
    lr_milestones=(1, 2),
    flip=True,
    crop_padding=1,
    average_decay=0.5,
    precise_bn=True,
    loss="mtl-ibp",
    alpha=0.5,
    batchnorm_policy="running",
    attack_restarts=2,
    pgd_steps=2,
    pgd_restarts=1,
)


pytestmark = pytest.mark.usefixtures("digits_for_processes")


def outcome(out):
    model = torch.load(out / "model.pt", weights_only=True)
    return (out / "history.csv").read_text(), model["epoch"], model["state_dict"]


BRIEF = preset("mnist5k").replace(
    width=2,
    hidden=8,
    epochs=2,
    ramp_start=1,
    ramp_length=1,
    data_limit=96,
    batch_size=48,
    eps=0.01,
    pgd_steps=1,
    pgd_restarts=1,
    evaluate_test="end",
)


def assert_same_outcome(one, other):
    history, epoch, weights = outcome(one)
    other_history, other_epoch, other_weights = outcome(other)
    assert history == other_history
    assert epoch == other_epoch
    assert weights.keys() == other_weights.keys()
    assert all(torch.equal(value, other_weights[name]) for name, value in weights.items())


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    out = tmp_path_factory.mktemp("unbroken")
    train(SETTINGS, out)
    return out


class SignalAt:
    """A progress that sends this process a signal at a step, or when an epoch is told to be done."""

    def __init__(self, step=None, number=signal.SIGINT, epoch=None):
        self.step, self.number, self.epoch = step, number, epoch
        self.steps = 0

    def epoch_started(self, epoch, batches, done): ...

    def step_done(self, means):
        self.steps += 1
        if self.steps == self.step:
            os.kill(os.getpid(), self.number)

    def epoch_done(self, row, seconds):
        if row["epoch"] == self.epoch:
            os.kill(os.getpid(), self.number)


# Within epochs, after the last step of an epoch, and between two epochs.
@pytest.mark.parametrize(
    "progress",
    [SignalAt(1), SignalAt(5, signal.SIGTERM), SignalAt(6), SignalAt(epoch=2), SignalAt(epoch=3)],
    ids=["first step", "SIGTERM mid-epoch", "last step of an epoch", "after an epoch", "after the last epoch"],
)
def test_a_stopped_run_goes_on_to_the_same_end(progress, unbroken, tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(TrainingInterrupted, match=rf"{progress.number.name} stopped the run") as stopped:
        train(SETTINGS, tmp_path, progress=progress)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert stopped.value.signal_number == progress.number
    assert not (tmp_path / "summary.json").exists()
    summary = resume(tmp_path)
    assert_same_outcome(unbroken, tmp_path)
    assert summary["settings"] == SETTINGS.as_dict()


def test_a_mean_of_weights_goes_on(tmp_path):
    settings = SETTINGS.replace(average_decay=None, swa_start=2, precise_bn=False, loss="sabr", alpha=None, ratio=0.3)
    train(settings, tmp_path / "unbroken")
    for place in (4, 5):  # Before and after the second epoch's second step.
        with pytest.raises(TrainingInterrupted):
            train(settings, tmp_path / str(place), progress=SignalAt(place))
        resume(tmp_path / str(place))
        assert_same_outcome(tmp_path / "unbroken", tmp_path / str(place))


def test_a_run_can_be_stopped_again_and_again(unbroken, tmp_path):
    run = train
    arguments = (SETTINGS, tmp_path)
    for _ in range(20):
        try:
            run(*arguments, progress=SignalAt(2))
            break
        except TrainingInterrupted:
            run, arguments = resume, (tmp_path,)
    else:
        pytest.fail("the run does not get on")
    assert_same_outcome(unbroken, tmp_path)


def test_a_resumed_run_never_removes_what_it_goes_on_from(tmp_path, monkeypatch):
    with pytest.raises(TrainingInterrupted):
        train(SETTINGS, tmp_path, progress=SignalAt(1))
    monkeypatch.setattr(
        "lirpa_fastwarmup.experiments.training.checkpoint.remove",
        lambda _, *names: "history.csv" in names and pytest.fail("removed"),
    )
    with pytest.raises(TrainingInterrupted):
        resume(tmp_path, progress=SignalAt(1))


def test_a_stop_in_the_last_evaluation_loses_nothing(unbroken, tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the signal was not raised at once")

    with monkeypatch.context() as patch:
        patch.setattr("lirpa_fastwarmup.experiments.training.run.summarise", interrupted)
        with pytest.raises(TrainingInterrupted, match="SIGTERM"):
            train(SETTINGS, tmp_path)
    resume(tmp_path)
    assert_same_outcome(unbroken, tmp_path)


# Run in a process of its own, which kills itself without warning.
KILLED = """
import os, signal, sys
from pathlib import Path
from lirpa_fastwarmup.experiments.training import checkpoint, train
from tests.test_resume import SETTINGS, SignalAt

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

class Torn:
    def __init__(self, file): self.file = file
    def __enter__(self): return self
    def __exit__(self, *_): self.file.close()
    def write(self, content):
        self.file.write(content[: len(content) // 2])
        self.file.flush()
        kill()

opened, written = Path.open, 0

def open_torn(self, mode="r", *rest, **named):
    global written
    file = opened(self, mode, *rest, **named)
    if {tear!r} and "w" in mode and checkpoint.CHECKPOINT in self.name:
        written += 1
        if written == 2:
            return Torn(file)
    return file

Path.open = open_torn
progress = None if {tear!r} else SignalAt(5, signal.SIGKILL)
train(SETTINGS, Path({out!r}), progress=progress)
"""


@pytest.mark.parametrize("tear", [False, True], ids=["in the middle of an epoch", "while a checkpoint is written"])
def test_a_killed_run_goes_on_to_the_same_end(tear, unbroken, tmp_path):
    out = tmp_path / "run"
    code = KILLED.format(tear=tear, out=str(out))
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    root = Path(__file__).parent.parent
    killed = subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    torn = list(out.glob(".checkpoint.pt*"))
    assert bool(torn) is tear
    with (out / "history.csv").open() as file:
        finished = len(list(csv.DictReader(file)))
    assert finished == 1  # Torn was the second checkpoint, which comes before the history.
    resume(out)
    assert_same_outcome(unbroken, out)
    assert not list(out.glob(".*"))


# Forks a process for each run, which kills itself at one of its file operations, or is killed after a while.
KILLED_ANYWHERE = """
import dataclasses, os, random, shutil, signal, sys, time
sys.modules["matplotlib"] = None  # Drawing takes longer than the run.
from pathlib import Path
from lirpa_fastwarmup.experiments import data
from lirpa_fastwarmup.experiments.training import resume, train
from tests.test_resume import BRIEF

digits = data.load("mnist5k")
digits = dataclasses.replace(digits, test=data.spread(digits.test, 100))
data.LOADERS["mnist5k"] = lambda _: digits

folder = Path({folder!r})

def begun(out):
    # As a user would go on, who was told of both commands and of no --overwrite.
    resume(out) if (out / "checkpoint.pt").exists() else train(BRIEF, out)

def killing(at):
    done = 0
    def wrap(function):
        def operation(*arguments, **named):
            nonlocal done
            done += 1
            if done == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **named)
        return operation
    Path.replace, Path.unlink, os.fsync = wrap(Path.replace), wrap(Path.unlink), wrap(os.fsync)

def child(out, at):
    pid = os.fork()
    if pid == 0:
        try:
            if at:
                killing(at)
            begun(out)
            os._exit(0)
        except BaseException as error:
            print(error, file=sys.stderr, flush=True)
            os._exit(1)
    return pid

def status(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

train(BRIEF, folder / "first")  # What is done once a process is done before it is forked.
started = time.perf_counter()
assert status(child(folder / "unbroken", 0)) == 0
whole = time.perf_counter() - started
draw = random.Random(0)
kills = 0
for number, at in enumerate([1, 2, 3, 4, 5, 6, 8, 10, 12, 14, *5 * [0]]):
    out = folder / str(number)
    delay = draw.uniform(0.05, 0.9) * whole
    pid = child(out, at)
    if not at:
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)
    while (end := status(pid)) == 0 and not at:  # It was faster than the unbroken run.
        shutil.rmtree(out)
        delay /= 2
        pid = child(out, at)
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)
    kills += end == -signal.SIGKILL
    assert status(child(out, 0)) == 0, number
print(kills)
"""


def test_runs_killed_at_any_moment_end_as_unbroken_ones(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    root = Path(__file__).parent.parent
    command = [sys.executable, "-c", KILLED_ANYWHERE.format(folder=str(tmp_path))]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 15
    files = sorted(path.name for path in (tmp_path / "unbroken").iterdir())
    for number in range(15):
        assert_same_outcome(tmp_path / "unbroken", tmp_path / str(number))
        assert sorted(path.name for path in (tmp_path / str(number)).iterdir()) == files


def test_a_second_run_into_a_folder_is_refused_while_the_first_one_writes(tmp_path):
    class Second(Progress):
        def epoch_started(self, epoch, batches, done):
            for begin in (lambda: train(BRIEF, tmp_path, overwrite=True), lambda: train(BRIEF, tmp_path)):
                with pytest.raises(FolderInUseError, match=f"is being written to by process {os.getpid()}"):
                    begin()

    summary = train(BRIEF, tmp_path, progress=Second())
    assert read_json(tmp_path / "summary.json") == summary


def test_an_earlier_run_stays_until_there_is_something_in_its_place(unbroken, tmp_path):
    out = shutil.copytree(unbroken, tmp_path / "run")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(KilledError):
        train(BRIEF, out, overwrite=True, progress=KilledAt(1))
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


class KilledError(Exception):
    """Raised in the midst of a run, as if it had been killed."""


class KilledAt(Progress):
    def __init__(self, step):
        super().__init__()
        self._left = step

    def step_done(self, means):
        self._left -= 1
        if self._left == 0:
            raise KilledError


def test_a_thread_that_is_not_the_main_one_can_train(tmp_path):
    short = SETTINGS.replace(epochs=1, ramp_length=1)
    thread = threading.Thread(target=train, args=(short, tmp_path))
    thread.start()
    thread.join()
    assert (tmp_path / "summary.json").exists()


def test_a_finished_run_is_left_as_it_is(unbroken, capsys):
    before = {path.name: path.stat().st_mtime_ns for path in unbroken.iterdir()}
    assert cli.main(["train", "--resume", "--out", str(unbroken)]) == 0
    assert "verified error (IBP)" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in unbroken.iterdir()} == before


@pytest.fixture
def stopped(tmp_path):
    with pytest.raises(TrainingInterrupted):
        train(SETTINGS, tmp_path / "run", progress=SignalAt(2))
    return tmp_path / "run"


def checkpoint_changed(out, change):
    content = torch.load(out / "checkpoint.pt", weights_only=True)
    change(content)
    write_tensors(out / "checkpoint.pt", content)


def other_version(content):
    content["format"] = 99


def other_settings(content):
    content["settings"]["warp"] = 9


def other_architecture(content):
    content["settings"]["width"] = 3


def other_data(content):
    content["settings"]["data_limit"] = 180


BROKEN = {
    "another version": (other_version, r"has format 99, and this version .* reads format 3"),
    "settings of another version": (other_settings, r"settings in .* 'warp'"),
    "another architecture": (other_architecture, r"weights of another architecture.*size mismatch"),
    "other data": (
        other_data,
        r"150 training samples .* has 160 training samples",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_checkpoints_that_do_not_fit_are_told(case, stopped):
    change, message = BROKEN[case]
    checkpoint_changed(stopped, change)
    before = (stopped / "checkpoint.pt").read_bytes()
    with pytest.raises(ValueError, match=f"(?s){message}"):
        resume(stopped)
    assert (stopped / "checkpoint.pt").read_bytes() == before


def test_truncated_and_missing_checkpoints(stopped):
    path = stopped / "checkpoint.pt"
    content = path.read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"text"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"checkpoint\.pt was not written by lirpa_fastwarmup, or is damaged"):
            resume(stopped)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        resume(stopped)


def test_the_command_tells_how_to_go_on(tmp_path):
    out = tmp_path / "a run"
    options = ["--width", "2", "--hidden", "8", "--data-limit", "170", "--epochs", "30", "--pgd-steps", "1"]
    command = [sys.executable, "-m", "lirpa_fastwarmup", "train", "mnist5k", "--out", str(out), *options]
    root = Path(__file__).parent.parent
    process = subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("epoch")
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    assert f"To resume it:\n    lirpa-fastwarmup train --resume --out '{out}'" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("named", [("--model", "mine.py:net"), ("--dataset", "mine.py:data"), ()])
def test_the_command_to_resume_trusts_the_factories_that_were_named(named, tmp_path, monkeypatch, capsys):
    def stop(*_, **__):
        raise TrainingInterrupted(signal.SIGINT, tmp_path)

    monkeypatch.setattr("lirpa_fastwarmup.cli.train._run", stop)
    assert cli.main(["train", "mnist5k", "--device", "cpu", "--out", str(tmp_path), *named]) == 128 + signal.SIGINT
    assert capsys.readouterr().err.rstrip().endswith(" --trust" if named else f"--out {tmp_path}")


def test_options_beside_resume_must_be_those_of_the_run(stopped, capsys):
    assert cli.main(["train", "--resume", "--out", str(stopped), "--lr", "0.1", "--data-limit", "170"]) == 1
    assert "a resumed run keeps its settings" in (err := capsys.readouterr().err)
    assert "lr 0.0005, not 0.1. Leave" in err
    assert cli.main(["train", "mnist5k", "--resume", "--out", str(stopped)]) == 1
    assert "width 2, not 8" in capsys.readouterr().err
    # The epochs scale the preset's ramp, which is not that of the run: nobody asked for it.
    command = ["train", "mnist5k", "--epochs", str(SETTINGS.epochs), "--resume", "--out", str(stopped)]
    assert cli.main(command) == 1
    assert "ramp_length" not in (err := capsys.readouterr().err.split("Leave")[0].split("resumed run")[1])
    assert "width 2, not 8" in err
    assert cli.main(["train", "--resume", "--out", str(stopped), "--show"]) == 0
    assert "average_decay     0.5" in capsys.readouterr().out
    assert cli.main(["train", "--resume", "--out", str(stopped), "--seed", "0"]) == 0


def test_what_a_run_chose_to_compile_is_not_asked_of_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda graph, **_: graph)
    monkeypatch.setattr("lirpa_fastwarmup.experiments.training.choices._phases_that_pay", lambda run: ("in the ramp",))
    with pytest.raises(TrainingInterrupted):
        train(SETTINGS, tmp_path, progress=SignalAt(4))
    assert cli.main(["train", "mnist5k", "--resume", "--out", str(tmp_path)]) == 1  # Of another width than the preset.
    assert "compile" not in capsys.readouterr().err
    assert cli.main(["train", "--resume", "--out", str(tmp_path), "--no-compile"]) == 1
    assert "compile None, not False" in capsys.readouterr().err


def test_an_unfinished_run_in_the_way_is_pointed_to(stopped):
    with pytest.raises(OutputExistsError, match=r"--overwrite, or resume it with --resume"):
        train(SETTINGS, stopped)


def test_a_stopped_run_with_compiled_steps_goes_on_to_the_same_end(tmp_path, monkeypatch):
    # The recording is what could differ from run to run; a compiler's part is left to `make test-all`.
    monkeypatch.setattr(torch, "compile", lambda graph, **_: graph)
    settings = SETTINGS.replace(compile=True)
    train(settings, tmp_path / "unbroken")
    with pytest.raises(TrainingInterrupted):
        train(settings, tmp_path / "stopped", progress=SignalAt(4))
    resume(tmp_path / "stopped")
    assert_same_outcome(tmp_path / "unbroken", tmp_path / "stopped")


@pytest.mark.slow
def test_a_run_with_compiled_steps_is_resumed_by_another_process(tmp_path):
    train(SETTINGS.replace(compile=True), tmp_path / "unbroken")
    with pytest.raises(TrainingInterrupted):
        train(SETTINGS.replace(compile=True), tmp_path / "stopped", progress=SignalAt(4))
    command = [sys.executable, "-m", "lirpa_fastwarmup", "train", "--resume", "--out", str(tmp_path / "stopped")]
    subprocess.run(command, check=True, capture_output=True)
    assert_same_outcome(tmp_path / "unbroken", tmp_path / "stopped")
