"""Tiny-ImageNet, from its JPEG files."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from lirpa_fastwarmup.experiments.data.dataset import Dataset, Split
from lirpa_fastwarmup.experiments.data.download import CorruptFileError, Source, extracted_folder, missing_files

_TINY = "tiny-imagenet-200.zip"
TINY_SOURCE = Source(_TINY, f"http://cs231n.stanford.edu/{_TINY}", "md5:90528d7ca1a48142e341f4ef8d21d0de")
_REQUIRED = _WNIDS, _ANNOTATIONS = "wnids.txt", "val/val_annotations.txt"
_THREADS = 8  # Pillow releases the GIL while it decodes.


def load(data_dir: Path | None = None) -> Dataset:
    """Tiny-ImageNet, 100,000 training images in 200 classes; its 10,000 validation images are the test set.

    ``data_dir`` is the folder ``tiny-imagenet-200``, or contains it or its archive.
    """
    try:
        import PIL.Image  # noqa: F401
    except ImportError as error:
        raise ImportError("Tiny-ImageNet needs Pillow: pip install 'lirpa_fastwarmup[images]'") from error
    folder = extracted_folder("Tiny-ImageNet", "tiny-imagenet", data_dir, TINY_SOURCE, "tiny-imagenet-200", _REQUIRED)
    classes = {name: number for number, name in enumerate(sorted((folder / _WNIDS).read_text().split()))}
    train, test = (_decode(list(files(folder, classes))) for files in (_training_files, _validation_files))
    return Dataset("Tiny-ImageNet", len(classes), train, test, (0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262))


def _training_files(folder: Path, classes: dict[str, int]) -> Iterator[tuple[Path, int]]:
    for name, number in classes.items():
        images = folder / "train" / name / "images"
        if not (found := sorted(images.glob("*.JPEG"))):
            raise missing_files("Tiny-ImageNet", [f"JPEG files of the class {name}"], images)
        yield from ((path, number) for path in found)


def _validation_files(folder: Path, classes: dict[str, int]) -> Iterator[tuple[Path, int]]:
    annotations = folder / _ANNOTATIONS
    if not (lines := annotations.read_text().splitlines()):
        raise CorruptFileError(f"{annotations} is empty: download the dataset again")
    for line in lines:
        name, _, rest = line.partition("\t")
        number = classes.get(rest.partition("\t")[0])
        if number is None:
            raise CorruptFileError(f"{annotations}: {line!r} is not a file and a class of {_WNIDS}: download it again")
        yield folder / "val" / "images" / name, number


def _decode(files: Sequence[tuple[Path, int]]) -> Split:
    image = np.dtype((np.uint8, (3, 64, 64)))
    with ThreadPoolExecutor(_THREADS) as pool:
        images = np.fromiter(pool.map(_read_jpeg, (path for path, _ in files)), image, len(files))
    return Split(torch.from_numpy(images), torch.tensor([number for _, number in files]))


def _read_jpeg(path: Path) -> np.ndarray:
    from PIL import Image

    try:
        with Image.open(path) as image:
            pixels = np.array(image.convert("RGB"))
    except FileNotFoundError:
        raise missing_files("Tiny-ImageNet", [path.name], path.parent) from None
    except Exception as error:  # Pillow fails in many ways on damaged files.
        raise CorruptFileError(f"{path} cannot be decoded ({error}): download the dataset again") from error
    if pixels.shape != (64, 64, 3):
        raise CorruptFileError(f"{path} is an image of {pixels.shape[1]}×{pixels.shape[0]} pixels, not 64×64")
    return pixels.transpose(2, 0, 1)
