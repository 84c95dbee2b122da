from __future__ import annotations

import gzip
import struct

import pytest
import torch

from lirpa_fastwarmup.experiments import data
from lirpa_fastwarmup.experiments.data import CorruptFileError
from lirpa_fastwarmup.experiments.data.mnist import read_idx

FILES = {
    "train-images-idx3-ubyte": (6, 28, 28),
    "train-labels-idx1-ubyte": (6,),
    "t10k-images-idx3-ubyte": (4, 28, 28),
    "t10k-labels-idx1-ubyte": (4,),
}


def idx(shape, values=None):
    array = torch.arange(torch.Size(shape).numel()) % 10 if values is None else values
    return struct.pack(f">BBBB{len(shape)}I", 0, 0, 8, len(shape), *shape) + bytes(array.to(torch.uint8).tolist())


@pytest.fixture
def mnist_dir(tmp_path):
    for name, shape in FILES.items():
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(idx(shape)))
    return tmp_path


def test_mnist_from_compressed_and_plain_files(mnist_dir):
    dataset = data.load("mnist", mnist_dir)
    assert (dataset.name, dataset.classes, dataset.in_shape) == ("MNIST", 10, (1, 28, 28))
    assert (len(dataset.train), len(dataset.test)) == (6, 4)
    assert dataset.train.images.dtype == torch.uint8
    assert dataset.train.labels.tolist() == [0, 1, 2, 3, 4, 5]
    assert dataset.test.images[0, 0, 0, :12].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    plain = mnist_dir / "t10k-labels-idx1-ubyte"
    plain.write_bytes(idx((4,), torch.tensor([9, 8, 7, 6])))
    assert data.load("mnist", mnist_dir).test.labels.tolist() == [9, 8, 7, 6]


def test_missing_files_are_named(mnist_dir):
    (mnist_dir / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"needs t10k-labels-idx1-ubyte \(or t10k.*--data-dir"):
        data.load("mnist", mnist_dir)


DAMAGE = {
    "truncated gzip": lambda raw: raw[:-20],
    "no gzip": lambda raw: b"<html>not found</html>",
    "flipped byte": lambda raw: raw[:40] + bytes([raw[40] ^ 255]) + raw[41:],
    "truncated array": lambda raw: gzip.compress(gzip.decompress(raw)[:-5]),
    "other type": lambda raw: gzip.compress(b"\0\0\x0d\x01\0\0\0\x01" + b"\0" * 4),
    "header cut": lambda raw: gzip.compress(b"\0\0\x08\x03\0\0"),
    "empty": lambda raw: gzip.compress(b""),
    "too many bytes": lambda raw: gzip.compress(gzip.decompress(raw) + b"\0"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_corrupt_files_are_refused(damage, mnist_dir):
    path = mnist_dir / "train-images-idx3-ubyte.gz"
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    with pytest.raises(CorruptFileError, match="train-images-idx3-ubyte"):
        read_idx(path)


def test_images_and_labels_that_do_not_match(mnist_dir):
    (mnist_dir / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx((5,))))
    with pytest.raises(CorruptFileError, match=r"\(6, 28, 28\).*\(5,\)"):
        data.load("mnist", mnist_dir)


def test_unknown_dataset_lists_the_known():
    with pytest.raises(ValueError, match="unknown dataset 'svhn'; known are mnist5k, mnist"):
        data.load("svhn")


def test_mnist5k_is_split_by_class_and_always_alike():
    one, two = data.load("mnist5k"), data.load("mnist5k")
    assert (len(one.train), len(one.test), one.in_shape) == (4000, 1000, (1, 28, 28))
    assert one.test.labels.bincount().tolist() == [100] * 10
    assert one.train.labels.bincount().tolist() == [400] * 10
    assert torch.equal(one.test.images, two.test.images)
    held_out = {image.numpy().tobytes() for image in one.test.images}
    assert not held_out & {image.numpy().tobytes() for image in one.train.images}
    assert int(one.train.images.max()) == 255
