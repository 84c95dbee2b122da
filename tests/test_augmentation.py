from __future__ import annotations

import numpy as np
import pytest
import torch

from lirpa_fastwarmup.experiments.data import Augmentation, Batches, Split


def images(count=64, channels=3, height=7, width=6):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(256, (count, channels, height, width), generator=generator, dtype=torch.uint8)


def generator():
    return torch.Generator().manual_seed(5)


def by_numpy(batch, flip, padding):
    """One image after the other; random numbers in the documented order."""
    source = generator()
    count = len(batch)
    mirrored = torch.randint(2, (count,), generator=source) if flip else torch.zeros(count)
    offsets = [torch.randint(2 * padding + 1, (count,), generator=source) if padding else torch.zeros(count)] * 2
    if padding:
        offsets[1] = torch.randint(2 * padding + 1, (count,), generator=source)
    result = []
    for image, mirror, top, left in zip(batch.numpy(), mirrored, *offsets, strict=True):
        image = image[:, :, ::-1] if mirror else image
        padded = np.pad(image, ((0, 0), (padding, padding), (padding, padding)), mode="edge")
        top, left = int(top), int(left)
        result.append(padded[:, top : top + image.shape[1], left : left + image.shape[2]])
    return torch.from_numpy(np.stack(result))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("flip", "padding"), [(True, 0), (False, 1), (True, 2), (True, 4), (False, 9)])
def test_batches_are_augmented_as_one_image_after_the_other(flip, padding, channels):
    batch = images(channels=channels)
    before = batch.clone()
    augmented = Augmentation(flip, padding, generator())(batch)
    assert augmented.dtype == torch.uint8
    assert torch.equal(augmented, by_numpy(batch, flip, padding))
    assert torch.equal(batch, before)


def test_nothing_is_drawn_and_nothing_done_when_off():
    source = generator()
    batch = images()
    assert Augmentation(False, 0, source)(batch) is batch
    assert torch.equal(source.get_state(), generator().get_state())


def test_all_offsets_and_both_sides_occur():
    # Rows and columns of a gradient tell by the pixel in the middle how far a window has moved.
    ramp = (10 * torch.arange(9).view(9, 1) + torch.arange(9)).to(torch.uint8)
    batch = ramp.expand(2000, 1, 9, 9)
    middle = Augmentation(False, 2, generator())(batch)[:, 0, 4, 4]
    places, counts = middle.unique(return_counts=True)
    assert places.tolist() == [10 * row + column for row in range(2, 7) for column in range(2, 7)]
    assert int(counts.min()) > 40  # 80 are expected of each.
    corner = Augmentation(True, 0, generator())(batch)[:, 0, 0, 0]
    assert corner.unique().tolist() == [0, 8]
    assert 900 < int((corner == 8).sum()) < 1100


def test_batches_hand_out_augmented_images_in_the_range_of_pixels():
    split = Split(images(8), torch.arange(8))
    ((plain, _),) = Batches(split, 8)
    ((augmented, _),) = Batches(split, 8, augment=Augmentation(True, 2, generator()))
    assert torch.equal((augmented * 255).round().byte(), by_numpy(split.images, True, 2))
    assert not torch.equal(augmented, plain)
    assert 0 <= float(augmented.min()) <= float(augmented.max()) <= 1
