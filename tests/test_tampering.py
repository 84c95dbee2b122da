"""Files of strangers and damaged files: one error that names the file, no code that is run, no crash, no hang."""

from __future__ import annotations

import gzip
import os
import pickle
import random
import shutil
import signal
import zipfile

import numpy as np
import pytest
import torch

from lirpa_fastwarmup import cli, storage
from lirpa_fastwarmup.experiments import data
from lirpa_fastwarmup.experiments.data import arrays, cifar10, mnist
from lirpa_fastwarmup.experiments.presets import preset
from lirpa_fastwarmup.experiments.report.records import certified_samples, read_history, read_summary
from lirpa_fastwarmup.experiments.training import (
    UntrustedError,
    checkpoint,
    load_model,
    resume,
    settings_of_run,
    train,
)
from lirpa_fastwarmup.verification import Journal

SETTINGS = preset("mnist5k").replace(
    width=2, hidden=8, data_limit=70, epochs=1, ramp_start=1, ramp_length=1, eps=0.01, pgd_steps=1, pgd_restarts=1
)
FILES = 2000  # Total.


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "run"
    train(SETTINGS, out)
    few = ["--limit", "20", "--pgd-restarts", "0", "--methods", "IBP"]
    assert cli.main(["verify", str(out), *few]) == 0
    journal = Journal(out / "journal")
    for number in range(9):
        journal.put(str(number), [number, {"margin": 0.5}])
    return out


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    draw = np.random.default_rng(0)
    for name in ("train", "test"):
        images = draw.integers(0, 256, (6, 1, 4, 4), dtype=np.uint8)
        np.savez_compressed(folder / f"{name}.npz", images=images, labels=np.arange(6))
    batch = {b"data": draw.integers(0, 256, (4, 3072), dtype=np.uint8), b"labels": [0, 1, 2, 3], b"batch_label": b"one"}
    for protocol in (0, 2, 5):
        (folder / f"batch{protocol}").write_bytes(pickle.dumps(batch, protocol=protocol))
    idx = b"\0\0\x08\3" + b"".join(size.to_bytes(4, "big") for size in (3, 4, 4)) + bytes(range(48))
    (folder / "images.gz").write_bytes(gzip.compress(idx))
    return folder


READERS = {
    "model.pt": load_model,
    "checkpoint.pt": checkpoint.read,
    "summary.json": lambda path: read_summary(path.parent),
    "history.csv": read_history,
    "verification.json": storage.read_json,
    "certificates.csv": lambda path: certified_samples(path, 0.01),
    "journal": Journal,
    "train.npz": lambda path: arrays.load(path.parent),
    "batch0": cifar10._read_batch,
    "batch2": cifar10._read_batch,
    "batch5": cifar10._read_batch,
    "images.gz": mnist.read_idx,
}


def damaged(content, draw):
    """The content with one thing changed: bits, ranges, lengths, or numbers and words of a text."""
    content = bytearray(content)
    place = draw.randrange(len(content))
    kind = draw.randrange(6)
    if kind == 0:
        content[place] ^= 1 << draw.randrange(8)
    elif kind == 1:
        del content[place:]
    elif kind == 2:
        content[place : place + draw.randrange(1, 40)] = draw.randbytes(draw.randrange(40))
    elif kind == 3:
        content[place : place + 4] = (2 ** draw.randrange(32) - 1).to_bytes(4, draw.choice(["big", "little"]))
    elif kind == 4:
        for old, new in draw.sample(
            [(b"0", b"9" * 30), (b":", b":null,"), (b'"', b""), (b",", b"\n"), (b"u1", b"O8")], 2
        ):
            content = content.replace(old, new, draw.randrange(1, 3))
    else:
        content[place:place] = draw.choice(
            [b"[" * 2000, b"\xff\xfe\0", b"nan", b"1e999", b"\0" * 100, bytes(content[:50])]
        )
    return bytes(content)


def too_long(*_):
    raise TimeoutError("a file was read for more than a minute")


@pytest.mark.parametrize("name", READERS)
def test_damaged_files_are_read_or_refused_by_name(name, run_dir, data_dir):
    path = (run_dir if (run_dir / name).exists() else data_dir) / name
    whole = path.read_bytes()
    draw = random.Random(name)
    before = signal.signal(signal.SIGALRM, too_long)
    try:
        for _ in range(-(-FILES // len(READERS))):
            content = damaged(whole, draw)
            path.write_bytes(content)
            signal.alarm(60)
            try:
                READERS[name](path)
            except (ValueError, OSError) as error:
                # Of a history that does not fit its summary, either may be named.
                named = (name, "summary.json") if name == "history.csv" else (name,)
                assert any(one in str(error) for one in named), (error, content)  # noqa: PT017
            finally:
                signal.alarm(0)
    finally:
        signal.signal(signal.SIGALRM, before)
        path.write_bytes(whole)


@pytest.mark.parametrize(
    ("labels", "said"),
    [([0, 2**40], "labels from 0 to 999999"), ([0, -1], "labels from 0 to 999999"), ([], "one for each of 2")],
)
def test_labels_that_are_no_classes_are_refused(labels, said, tmp_path):
    for name in ("train", "test"):
        images = np.zeros((2, 4, 4), dtype=np.uint8)
        np.savez(tmp_path / f"{name}.npz", images=images, labels=np.array(labels, dtype=np.int64))
    with pytest.raises(ValueError, match=rf"train\.npz.*{said}"):
        data.load("npz", tmp_path)


def test_arrays_that_promise_more_than_there_is_are_refused(data_dir, tmp_path):
    header = b"\x93NUMPY\x01\0" + (118).to_bytes(2, "little")
    text = "{'descr': '|u1', 'fortran_order': False, 'shape': (1099511627776, 1, 4, 4)}".ljust(117) + "\n"
    with zipfile.ZipFile(tmp_path / "train.npz", "w") as archive:
        archive.writestr("images.npy", header + text.encode() + bytes(96))
        archive.writestr("labels.npy", b"no array")
    (tmp_path / "test.npz").write_bytes((data_dir / "test.npz").read_bytes())
    with pytest.raises(ValueError, match=r"train\.npz is not a valid npz file"):
        data.load("npz", tmp_path)


class Reduced:
    """Pickles as a call."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


NO_BATCHES = {
    "a function": Reduced(os.system, ("true",)),
    "an array by its constructor": {b"data": Reduced(np.ndarray, ((2**40, 3072), np.dtype("u1"))), b"labels": []},
    "an array of objects": {b"data": np.array([[object]], dtype=object), b"labels": [0]},
    "an array of numbers": {b"data": np.zeros((1, 3072)), b"labels": [0]},
    "a state of another array": {b"data": Reduced(np.empty, (3,)), b"labels": [0]},
    "labels of lists": {b"data": np.zeros((1, 3072), np.uint8), b"labels": [[0]]},
    "a label beyond": {b"data": np.zeros((1, 3072), np.uint8), b"labels": [2**40]},
}


@pytest.mark.parametrize("case", NO_BATCHES)
def test_pickles_that_are_no_batches_are_refused(case, tmp_path):
    path = tmp_path / "data_batch_1"
    path.write_bytes(pickle.dumps(NO_BATCHES[case], protocol=2))
    with pytest.raises(data.CorruptFileError, match="data_batch_1"):
        cifar10._read_batch(path)


def test_the_state_that_ended_the_process_is_refused(tmp_path):
    """An array whose state promises more bytes than it brings, which numpy's own function reads beyond the end."""
    shape = b"(I1\nJ\xff\xff\xff\x7ft"
    crafted = (
        b"\x80\x02}(C\x04datacnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntC\x01btR(I1\n"
        + shape
        + b"cnumpy\ndtype\n(X\x02\0\0\0u1I0\nI1\ntR\x89C\x04aaaatbC\x06labels]u."
    )
    path = tmp_path / "data_batch_1"
    path.write_bytes(crafted)
    with pytest.raises(data.CorruptFileError, match="data_batch_1"):
        cifar10._read_batch(path)


def renamed(run_dir, tmp_path, name):
    """A copy of the run whose files name the network ``name``."""
    out = tmp_path / "run"
    out.mkdir()
    for file in ("model.pt", "checkpoint.pt"):
        content = torch.load(run_dir / file, weights_only=True)
        content["settings"]["model"] = name
        if "architecture" in content:
            content["architecture"]["model"] = name
        storage.write_tensors(out / file, content)
    return out


def test_no_code_is_run_that_a_file_names(run_dir, tmp_path, monkeypatch, capsys):
    out = renamed(run_dir, tmp_path, "evil:touch")
    (tmp_path / "evil.py").write_text("from pathlib import Path\nPath('touched').touch()\ndef touch(): pass\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UntrustedError, match=r"model\.pt names the factory 'evil:touch'.*--trust, or trust=True"):
        load_model(out / "model.pt")
    with pytest.raises(UntrustedError, match=r"checkpoint\.pt names the factory"):
        resume(out)
    assert settings_of_run(out).model == "evil:touch"
    for command in (
        ["verify", out, "--out", "v"],
        ["train", "--resume", "--out", out],
        ["inspect", out],
        ["export", out],
    ):
        assert cli.main([str(part) for part in command]) == 1
        assert "whose code would be imported and run" in capsys.readouterr().err
    assert cli.main(["report", str(out)]) == 0
    assert "whose code would be imported and run" in (out / "report.html").read_text()
    assert not (tmp_path / "touched").exists()
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises((TypeError, ValueError)):
        load_model(out / "model.pt", trust=True)  # The factory returns no network.
    assert (tmp_path / "touched").exists()


def test_files_of_another_format_are_refused(run_dir, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(run_dir, out)
    for name, read in (("model.pt", lambda: load_model(out / "model.pt")), ("checkpoint.pt", lambda: resume(out))):
        content = torch.load(out / name, weights_only=True)
        content["format"] -= 1
        torch.save(content, out / name)
        with pytest.raises(ValueError, match=r"has format \d, and this version of lirpa_fastwarmup reads format \d"):
            read()
