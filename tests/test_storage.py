"""Files that are whole or refused: checksums, digests of weights, locks, and what is left after a kill."""

from __future__ import annotations

import errno
import json
import os
import random
import subprocess
import sys
import threading
from contextlib import contextmanager

import pytest
import torch

from lirpa_fastwarmup import storage


def test_one_flipped_bit_in_a_file_of_tensors_is_noticed(tmp_path):
    path = tmp_path / "model.pt"
    storage.write_tensors(path, {"format": 1, "weight": torch.arange(40.0), "name": "w"})
    whole = path.read_bytes()
    assert torch.load(path, weights_only=True)["name"] == "w"  # Without this package, too.
    assert storage.has_checksum(path)
    draw = random.Random(0)
    trailer = len(whole) - 73
    places = {draw.randrange(trailer) for _ in range(100)} | {trailer + 20, trailer + 71}
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << draw.randrange(8)
        path.write_bytes(bytes(damaged))
        if storage.has_checksum(path):
            with pytest.raises(ValueError, match=r"model\.pt is damaged"):
                storage.read_tensors(path, "is damaged")
        else:  # In the checksum itself, which every file of the present format has.
            assert place >= trailer


def test_truncated_files_of_tensors_are_refused(tmp_path):
    path = tmp_path / "model.pt"
    storage.write_tensors(path, {"weight": torch.arange(40.0)})
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is damaged"):
        storage.read_tensors(path, "is damaged")


def test_json_that_was_changed_is_refused(tmp_path):
    path = tmp_path / "summary.json"
    values = {"error": 0.25, "list": (1, 2), "nothing": None, "wide": "ε"}
    storage.write_json(path, values)
    assert storage.read_json(path) == {**values, "list": [1, 2]}
    path.write_text(path.read_text().replace("0.25", "0.15"))
    with pytest.raises(ValueError, match="was changed after it was written"):
        storage.read_json(path)
    path.write_text('{"error": 0.25}')  # As earlier versions wrote it.
    assert storage.read_json(path) == {"error": 0.25}


@pytest.mark.parametrize(
    "content",
    [b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xfe", b"[]", b"", "{}".encode("utf-16")],
    ids=["nested lists", "nested objects", "no UTF-8", "list", "empty", "UTF-16"],
)
def test_what_is_no_json_object_is_refused_by_name(content, tmp_path):
    path = tmp_path / "summary.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"summary\.json"):
        storage.read_json(path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a,b\n1\n", "not of one length"),
        ("b\n1\n", "no column 'a'"),
        ("a,b\n1,2,3\n", "not of one length"),
        ("", "no col"),
    ],
)
def test_tables_that_are_not_right_are_refused_by_name(text, said, tmp_path):
    path = tmp_path / "table.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"table\.csv cannot be read as a table: .*{said}"):
        storage.read_csv(path, ("a",), "a table")


def test_the_digest_of_weights_is_of_names_dtypes_shapes_and_bytes():
    weights = {"a": torch.arange(6.0), "b": torch.zeros(())}
    digest = storage.weights_sum(weights)
    assert storage.weights_sum(dict(reversed(weights.items()))) == digest
    assert storage.weights_sum({name: value.clone() for name, value in weights.items()}) == digest
    others = [
        {**weights, "a": weights["a"].view(2, 3)},
        {**weights, "a": weights["a"].double()},
        {**weights, "a": weights["a"].nextafter(torch.tensor(9.0))},
        {"c": weights["a"], "b": weights["b"]},
        {"a": weights["a"]},
        {**weights, "a": weights["a"].int()},
    ]
    assert len({digest, *map(storage.weights_sum, others)}) == 7


HOLDS = """
import sys
from pathlib import Path
from lirpa_fastwarmup.storage import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def holder(folder):
    """Another process that has the folder."""
    command = [sys.executable, "-c", HOLDS, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_folder_has_one_writer_and_is_free_after_a_kill(tmp_path):
    with (
        holder(tmp_path) as process,
        pytest.raises(storage.FolderInUseError, match=f"by process {process.pid} on "),
        storage.locked(tmp_path),
    ):
        pass
    with (
        storage.locked(tmp_path),
        pytest.raises(storage.FolderInUseError, match=f"process {os.getpid()}"),
        storage.locked(tmp_path),
    ):
        pass
    with storage.locked(tmp_path):
        pass


def test_waiting_for_a_folder_ends_when_it_is_free(tmp_path):
    with holder(tmp_path) as process:
        threading.Timer(0.5, process.kill).start()
        with storage.locked(tmp_path, wait=True):
            assert process.wait() != 0


def test_a_folder_of_a_failed_command_is_removed_while_it_is_empty(tmp_path):
    for path, left in ((tmp_path / "a" / "b", []), (tmp_path, [])):
        with pytest.raises(KeyboardInterrupt), storage.make_folder(path), storage.locked(path):
            raise KeyboardInterrupt
        assert list(tmp_path.iterdir()) == left
    result = tmp_path / "a" / "b" / "result"
    with pytest.raises(FileExistsError), storage.make_folder(result.parent):
        [result.touch(exist_ok=False) for _ in range(2)]
    assert result.exists()
    with pytest.raises(OSError, match="is a file"), storage.make_folder(result):
        pass


def test_a_full_disk_is_told_with_the_file(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "history.csv"
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"cannot write .*history\.csv: No space left"):
        storage.write_atomically(path, b"new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_numbers_and_texts_of_one_spelling_have_different_hashes():
    import hashlib

    def digest(value):
        hashed = hashlib.sha256()
        storage.add_to_hash(hashed, value)
        return hashed.hexdigest()

    values = [
        1,
        1.0,
        "1",
        True,
        (1,),
        [1],
        ("1",),
        {"1": 1},
        b"1",
        None,
        torch.ones(1),
        ("a", "b"),
        ("ab",),
        ("a", ("b",)),
    ]
    assert len(set(map(digest, values))) == len(values)
    wide = torch.zeros(10_000)
    changed = wide.clone()
    changed[5_000] = 1  # Where repr shows dots.
    assert digest({"range": (0.0, wide)}) != digest({"range": (0.0, changed)})
    assert json.dumps(digest(wide)) == json.dumps(digest(wide.clone()))
