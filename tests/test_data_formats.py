"""Readers of the real formats, on small files that the tests write in them."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import pickle
import sys
import tarfile
import threading
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch

from lirpa_fastwarmup.experiments import data
from lirpa_fastwarmup.experiments.data import CorruptFileError, cifar10, imagenet, mnist
from lirpa_fastwarmup.experiments.data.download import Source
from tests.test_data import FILES, idx

RANDOM = np.random.default_rng(0)


def half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def nonsense(path):
    path.write_bytes(b"<html>404</html>" * 20)


# CIFAR-10


def cifar_batch(count, protocol=2):
    pixels = RANDOM.integers(0, 256, (count, 3072), dtype=np.uint8)
    labels = [int(label) for label in RANDOM.integers(0, 10, count)]
    content = {b"batch_label": b"some", b"labels": labels, b"data": pixels, b"filenames": [b"a.png"] * count}
    return pixels, labels, pickle.dumps(content, protocol=protocol)


@pytest.fixture
def cifar_dir(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"):
        (folder / name).write_bytes(cifar_batch(4)[2])
    return folder


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_cifar10_batches_in_order(protocol, cifar_dir):
    pixels, labels, content = cifar_batch(5, protocol)
    (cifar_dir / "data_batch_2").write_bytes(content)
    for place in (cifar_dir, cifar_dir.parent):
        dataset = data.load("cifar10", place)
        assert (dataset.classes, dataset.in_shape) == (10, (3, 32, 32))
        assert (len(dataset.train), len(dataset.test)) == (21, 4)
        # A row is the red plane, then the green, then the blue one.
        assert torch.equal(dataset.train.images[4:9], torch.from_numpy(pixels.reshape(5, 3, 32, 32)))
        assert dataset.train.labels[4:9].tolist() == labels
        assert dataset.mean == (0.4914, 0.4822, 0.4465)
        assert dataset.std == (0.2023, 0.1994, 0.2010)


def test_only_the_original_files_are_called_cifar10(cifar_dir, monkeypatch):
    assert data.load("cifar10", cifar_dir).name == "CIFAR-10 (not the original files)"
    sums = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in cifar_dir.iterdir()}
    monkeypatch.setattr(cifar10, "_ORIGINALS", sums)
    assert data.load("cifar10", cifar_dir).name == "CIFAR-10"


def test_cifar10_as_numpy_1_pickled_it(cifar_dir):
    content = (cifar_dir / "test_batch").read_bytes()
    old = content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert old != content
    (cifar_dir / "test_batch").write_bytes(old)
    assert len(data.load("cifar10", cifar_dir).test) == 4


def test_cifar10_from_its_archive(cifar_dir, tmp_path):
    (tmp_path / "other").mkdir()
    with tarfile.open(tmp_path / "other" / "cifar-10-python.tar.gz", "w:gz") as tar:
        tar.add(cifar_dir, "cifar-10-batches-py")
    assert len(data.load("cifar10", tmp_path / "other").train) == 20
    for damage in (half, nonsense):
        again = tmp_path / damage.__name__
        again.mkdir()
        archive = again / "cifar-10-python.tar.gz"
        archive.write_bytes((tmp_path / "other" / archive.name).read_bytes())
        damage(archive)
        with pytest.raises(CorruptFileError, match=r"cifar-10-python\.tar\.gz is a damaged archive"):
            data.load("cifar10", again)


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil",)


CIFAR_DAMAGE = {
    "truncated": half,
    "no pickle": nonsense,
    "code": lambda path: path.write_bytes(pickle.dumps({b"data": Evil()})),
    "a list": lambda path: path.write_bytes(pickle.dumps([1])),
    "no labels": lambda path: path.write_bytes(pickle.dumps({b"data": np.zeros((2, 3072), np.uint8)})),
    "other shape": lambda path: path.write_bytes(
        pickle.dumps({b"data": np.zeros((2, 9), np.uint8), b"labels": [0, 0]})
    ),
    "other class": lambda path: path.write_bytes(
        pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": [10]})
    ),
}


@pytest.mark.parametrize("damage", CIFAR_DAMAGE)
def test_damaged_cifar10_batches_are_refused(damage, cifar_dir, monkeypatch):
    monkeypatch.chdir(cifar_dir)
    CIFAR_DAMAGE[damage](cifar_dir / "data_batch_3")
    with pytest.raises(CorruptFileError, match="data_batch_3"):
        data.load("cifar10", cifar_dir)
    assert not (cifar_dir / "evil").exists()


# Tiny-ImageNet

WNIDS = ["n03", "n01", "n02"]


def jpeg(color, size=64, mode="RGB"):
    image = pytest.importorskip("PIL.Image").new(mode, (size, size), color)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


@pytest.fixture
def tiny_dir(tmp_path):
    folder = tmp_path / "tiny-imagenet-200"
    (folder / "val" / "images").mkdir(parents=True)
    (folder / "wnids.txt").write_text("\n".join(WNIDS) + "\n")
    for number, name in enumerate(WNIDS):
        (folder / "train" / name / "images").mkdir(parents=True)
        for image in range(2):
            path = folder / "train" / name / "images" / f"{name}_{image}.JPEG"
            path.write_bytes(jpeg((80 * number, 40 * image, 200)))
    lines = []
    for image, name in enumerate(["n02", "n03", "n02", "n01"]):
        # Some of the real ones are grey.
        grey = {"mode": "L"} if image == 3 else {}
        (folder / "val" / "images" / f"val_{image}.JPEG").write_bytes(
            jpeg(60 * image if grey else (60 * image,) * 3, **grey)
        )
        lines.append(f"val_{image}.JPEG\t{name}\t0\t0\t63\t63")
    (folder / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")
    return folder


def test_tiny_imagenet_folder(tiny_dir):
    for place in (tiny_dir, tiny_dir.parent):
        dataset = data.load("tiny-imagenet", place)
        assert (dataset.name, dataset.classes, dataset.in_shape) == ("Tiny-ImageNet", 3, (3, 64, 64))
        # Classes are numbered in the order of their sorted names.
        assert dataset.train.labels.tolist() == [0, 0, 1, 1, 2, 2]
        assert dataset.test.labels.tolist() == [1, 2, 1, 0]
        # n01 was written as the second, n02 as the third, n03 as the first.
        reds = dataset.train.images[:, 0].float().mean((1, 2))
        assert torch.allclose(reds, torch.tensor([80.0, 80, 160, 160, 0, 0]), atol=4)
        greens = dataset.train.images[:, 1].float().mean((1, 2))
        assert torch.allclose(greens, torch.tensor([0.0, 40] * 3), atol=4)
        assert torch.allclose(dataset.test.images[:, 2].float().mean((1, 2)), torch.tensor([0.0, 60, 120, 180]), atol=4)
        assert dataset.mean == (0.4802, 0.4481, 0.3975)
        assert dataset.train.images.is_contiguous()


def test_tiny_imagenet_from_its_archive(tiny_dir, tmp_path):
    archive = tmp_path / "other" / "tiny-imagenet-200.zip"
    archive.parent.mkdir()
    with zipfile.ZipFile(archive, "w") as content:
        for path in tiny_dir.rglob("*"):
            content.write(path, path.relative_to(tmp_path))
    assert len(data.load("tiny-imagenet", archive.parent).train) == 6
    (tmp_path / "broken").mkdir()
    broken = tmp_path / "broken" / archive.name
    broken.write_bytes(archive.read_bytes())
    half(broken)
    with pytest.raises(CorruptFileError, match=r"tiny-imagenet-200\.zip is a damaged archive"):
        data.load("tiny-imagenet", broken.parent)


def test_damaged_tiny_imagenet_is_refused(tiny_dir):
    image = tiny_dir / "train" / "n02" / "images" / "n02_1.JPEG"
    whole = image.read_bytes()
    for content in (whole[: len(whole) // 2], b"no image", b""):
        image.write_bytes(content)
        with pytest.raises(CorruptFileError, match=r"n02_1\.JPEG cannot be decoded"):
            data.load("tiny-imagenet", tiny_dir)
    image.write_bytes(jpeg((0, 0, 0), size=32))
    with pytest.raises(CorruptFileError, match=r"n02_1\.JPEG is an image of 32×32 pixels"):
        data.load("tiny-imagenet", tiny_dir)
    image.write_bytes(whole)
    (tiny_dir / "val" / "images" / "val_2.JPEG").unlink()
    with pytest.raises(FileNotFoundError, match=r"needs val_2\.JPEG"):
        data.load("tiny-imagenet", tiny_dir)
    for lines in ("val_0.JPEG\tn99\t0", "val_0.JPEG", ""):
        (tiny_dir / "val" / "val_annotations.txt").write_text(lines)
        with pytest.raises(CorruptFileError, match=r"val_annotations\.txt"):
            data.load("tiny-imagenet", tiny_dir)


def test_tiny_imagenet_without_pillow_names_the_extra(tiny_dir, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(ImportError, match=r"pip install 'lirpa_fastwarmup\[images\]'"):
        data.load("tiny-imagenet", tiny_dir)


# A dataset of the user's own


def write_npz(folder, shape=(6, 8, 8), classes=3, name="train", **changes):
    arrays = {
        "images": RANDOM.integers(0, 256, shape, dtype=np.uint8),
        "labels": np.arange(shape[0]) % classes,
    }
    np.savez(folder / f"{name}.npz", **{**arrays, **changes})
    return arrays["images"]


@pytest.mark.parametrize(
    ("shape", "to_channels_first"),
    [((6, 8, 9), lambda a: a[:, None]), ((6, 3, 8, 9), lambda a: a), ((6, 8, 9, 3), lambda a: a.transpose(0, 3, 1, 2))],
)
def test_own_arrays_in_every_layout(shape, to_channels_first, tmp_path):
    train = to_channels_first(write_npz(tmp_path, shape))
    write_npz(tmp_path, (4, *shape[1:]), classes=4, name="test")
    dataset = data.load("npz", tmp_path)
    assert (dataset.name, dataset.classes) == (tmp_path.name, 4)
    assert torch.equal(dataset.train.images, torch.from_numpy(np.ascontiguousarray(train)))
    assert dataset.test.labels.tolist() == [0, 1, 2, 3]
    pixels = train / 255
    assert dataset.mean == pytest.approx(pixels.mean((0, 2, 3)).tolist())
    assert dataset.std == pytest.approx(pixels.std((0, 2, 3)).tolist())


def test_a_channel_of_one_value_is_not_divided_by_zero(tmp_path):
    for name in ("train", "test"):
        write_npz(tmp_path, name=name, images=np.full((6, 8, 8), 9, np.uint8))
    assert data.load("npz", tmp_path).std == (1.0,)


OWN_DAMAGE = {
    "truncated": (half, CorruptFileError, "not a valid npz|pickled objects"),
    "no npz": (nonsense, CorruptFileError, "pickled objects, or is not an npz"),
    "pickled": (lambda p: np.savez(p, images=np.array([None]), labels=[0]), CorruptFileError, "pickled objects"),
    "no labels": (lambda p: np.savez(p, images=np.zeros((2, 8, 8), np.uint8)), ValueError, "'labels'.*holds 'images'"),
    "floats": (
        lambda p: write_npz(p.parent, images=np.zeros((6, 8, 8))),
        ValueError,
        r"float64 of shape .*: store pixels as uint8",
    ),
    "flat": (lambda p: write_npz(p.parent, images=np.zeros((6, 64), np.uint8)), ValueError, r"shape \(6, 64\)"),
    "too few labels": (
        lambda p: write_npz(p.parent, labels=np.zeros(5, int)),
        ValueError,
        r"each of 6.*found int64 \(5,\)",
    ),
    "negative": (
        lambda p: write_npz(p.parent, labels=-np.ones(6, int)),
        ValueError,
        "labels from 0 .*found int64 .* from -1 to -1",
    ),
    "float labels": (
        lambda p: write_npz(p.parent, labels=np.zeros(6)),
        ValueError,
        "integer labels from 0 .*found float64",
    ),
    "other size": (lambda p: write_npz(p.parent, (6, 9, 9)), ValueError, r"\(1, 9, 9\).*\(1, 8, 8\).*: a network"),
}


@pytest.mark.parametrize("damage", OWN_DAMAGE)
def test_own_arrays_that_are_not_right_are_refused(damage, tmp_path):
    write_npz(tmp_path)
    write_npz(tmp_path, name="test")
    change, kind, message = OWN_DAMAGE[damage]
    change(tmp_path / "train.npz")
    with pytest.raises(kind, match=message):
        data.load("npz", tmp_path)


def test_own_arrays_must_be_named(tmp_path):
    with pytest.raises(ValueError, match="pass it as --data-dir"):
        data.load("npz")
    with pytest.raises(FileNotFoundError, match=r"needs train\.npz, test\.npz"):
        data.load("npz", tmp_path)


# Downloads into the cache


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """A folder that is served as the datasets' home, and an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    served = tmp_path / "served"
    served.mkdir()

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_): ...

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(served))) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield served, f"http://127.0.0.1:{http.server_address[1]}"
        http.shutdown()
        thread.join()


def served_source(mirror, name, content):
    folder, address = mirror
    (folder / name).write_bytes(content)
    return Source(name, f"{address}/{name}", f"md5:{hashlib.md5(content).hexdigest()}")


def test_missing_files_are_downloaded_into_the_cache(mirror, tmp_path, monkeypatch, cifar_dir, tiny_dir):
    digits = [served_source(mirror, f"{name}.gz", gzip.compress(idx(shape))) for name, shape in FILES.items()]
    monkeypatch.setattr(mnist, "SOURCES", digits)
    assert len(data.load("mnist").train) == 6
    cache = tmp_path / "cache" / "lirpa_fastwarmup"
    (cache / "mnist" / "t10k-labels-idx1-ubyte.gz").unlink()
    assert len(data.load("mnist").test) == 4
    tar, archive = io.BytesIO(), io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w:gz") as content:
        content.add(cifar_dir, "cifar-10-batches-py")
    monkeypatch.setattr(cifar10, "SOURCE", served_source(mirror, "cifar-10-python.tar.gz", tar.getvalue()))
    assert len(data.load("cifar10").train) == 20
    with zipfile.ZipFile(archive, "w") as content:
        for path in tiny_dir.rglob("*"):
            content.write(path, path.relative_to(tiny_dir.parent))
    monkeypatch.setattr(imagenet, "TINY_SOURCE", served_source(mirror, "tiny-imagenet-200.zip", archive.getvalue()))
    assert len(data.load("tiny-imagenet").train) == 6


@pytest.mark.parametrize("name", ["mnist", "cifar10", "tiny-imagenet"])
def test_without_network_the_files_are_named(name, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def no_network(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    with pytest.raises(OSError, match=r"could not be downloaded .*no network.*--data-dir") as caught:
        data.load(name)
    assert str(tmp_path / "lirpa_fastwarmup" / name) in str(caught.value)
    known = {"mnist": mnist.SOURCES, "cifar10": [cifar10.SOURCE], "tiny-imagenet": [imagenet.TINY_SOURCE]}
    for source in known[name]:
        assert source.url in str(caught.value)


@pytest.mark.parametrize("name", ["mnist", "cifar10", "tiny-imagenet", "npz"])
def test_a_named_folder_is_never_downloaded_into(name, tmp_path, monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: pytest.fail("downloaded"))
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        data.load(name, tmp_path)
    assert not list(tmp_path.iterdir())
