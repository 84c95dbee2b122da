"""Tiny-ImageNet from its folder of JPEG files (needs Pillow, of the extra ``images``)."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from lirpa_fastwarmup.experiments.data.dataset import Dataset, Split
from lirpa_fastwarmup.experiments.data.download import CorruptFileError, Source
from lirpa_fastwarmup.experiments.data.files import archived_folder, cache_folder, missing_files

_CLASSES, _ANNOTATIONS = "wnids.txt", "val/val_annotations.txt"
_SIZE = 64
_THREADS = 8  # Pillow decodes without Python's lock.
SOURCE = Source(
    "tiny-imagenet-200.zip",
    "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
    "md5:90528d7ca1a48142e341f4ef8d21d0de",
)


def load(data_dir: Path | None = None) -> Dataset:
    """Tiny-ImageNet, 100,000 training images of 64×64 in 200 classes; its 10,000 validation images are the test set.

    Args:
        data_dir: the folder ``tiny-imagenet-200``, or the one that holds it or its archive; by default the user's
            cache, where it is downloaded to.

    Raises:
        ImportError: Pillow is not installed.
        OSError: files are missing, or cannot be downloaded; the text names them and the folder.
        CorruptFileError: a file is damaged, or not as in Tiny-ImageNet.
    """
    _require_pillow()
    place = archived_folder(
        "Tiny-ImageNet",
        data_dir,
        cache_folder("tiny-imagenet"),
        SOURCE,
        "tiny-imagenet-200",
        [_CLASSES, _ANNOTATIONS],
    )
    numbers = {name: number for number, name in enumerate(sorted((place / _CLASSES).read_text().split()))}
    return Dataset(
        name="Tiny-ImageNet",
        classes=len(numbers),
        train=_decoded(_training_files(place, numbers)),
        test=_decoded(_validation_files(place, numbers)),
        mean=(0.4802, 0.4481, 0.3975),
        std=(0.2302, 0.2265, 0.2262),
    )


def _require_pillow() -> None:
    try:
        import PIL.Image  # noqa: F401
    except ImportError as error:
        raise ImportError("Tiny-ImageNet is JPEG files: pip install 'lirpa_fastwarmup[images]' to read them") from error


def _training_files(place: Path, numbers: dict[str, int]) -> list[tuple[Path, int]]:
    files = []
    for name, number in numbers.items():
        found = sorted((place / "train" / name / "images").glob("*.JPEG"))
        if not found:
            raise missing_files("Tiny-ImageNet", [f"JPEG files of the class {name}"], place / "train" / name / "images")
        files += [(path, number) for path in found]
    return files


def _validation_files(place: Path, numbers: dict[str, int]) -> list[tuple[Path, int]]:
    files = []
    for line in (place / _ANNOTATIONS).read_text().splitlines():
        fields = line.split("\t")
        if len(fields) < 2 or fields[1] not in numbers:
            raise CorruptFileError(
                f"{place / _ANNOTATIONS} has the line {line!r}, where a file and one of the classes of {_CLASSES} were "
                "expected: fetch the dataset again"
            )
        files.append((place / "val" / "images" / fields[0], numbers[fields[1]]))
    if not files:
        raise CorruptFileError(f"{place / _ANNOTATIONS} is empty: fetch the dataset again")
    return files


def _decoded(files: Sequence[tuple[Path, int]]) -> Split:
    images = torch.empty(len(files), 3, _SIZE, _SIZE, dtype=torch.uint8)

    def decode(position: int) -> None:
        images[position] = torch.from_numpy(_pixels(files[position][0])).permute(2, 0, 1)

    with ThreadPoolExecutor(_THREADS) as pool:
        for _ in pool.map(decode, range(len(files)), chunksize=256):
            pass  # Raises what went wrong in a thread.
    return Split(images, torch.tensor([number for _, number in files]))


def _pixels(path: Path) -> np.ndarray:
    """The image in ``path``, uint8 of shape (height, width, 3)."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            pixels = np.array(image.convert("RGB"))
    except FileNotFoundError:
        raise missing_files("Tiny-ImageNet", [path.name], path.parent) from None
    except Exception as error:  # Pillow fails in many ways on damaged files.
        raise CorruptFileError(f"{path} cannot be decoded ({error}): fetch the dataset again") from error
    if pixels.shape != (_SIZE, _SIZE, 3):
        raise CorruptFileError(f"{path} is an image of {pixels.shape[1]}×{pixels.shape[0]} pixels, not {_SIZE}×{_SIZE}")
    return pixels
