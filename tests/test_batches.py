from __future__ import annotations

import io

import numpy as np
import pytest
import torch

from lirpa_fastwarmup.experiments import data
from lirpa_fastwarmup.experiments.data.dataset import seed_of


def split(count):
    return data.Split(torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1), torch.arange(count))


def test_batches_keep_the_last_and_skip_a_single():
    sizes = [len(y) for _, y in data.Batches(split(10), 4)]
    assert sizes == [4, 4, 2]
    assert [len(y) for _, y in data.Batches(split(9), 4)] == [4, 4, 1]
    skipping = data.Batches(split(9), 4, drop_single=True)
    assert [len(y) for _, y in skipping] == [4, 4]
    assert len(skipping) == 2
    x, y = next(iter(data.Batches(split(3), 3)))
    assert x.dtype == torch.float32
    assert torch.allclose(x.flatten(), y / 255)


def test_batches_are_reshuffled_reproducibly():
    def epochs(seed):
        batches = data.Batches(split(50), 8, generator=torch.Generator().manual_seed(seed))
        return [torch.cat([y for _, y in batches]).tolist() for _ in range(2)]

    first, second = epochs(0)
    assert sorted(first) == list(range(50))
    assert first != second
    assert epochs(0) == [first, second]
    assert epochs(1) != [first, second]


def test_limit_is_a_seeded_choice():
    one = data.limited(split(100), 20, seed=0)
    assert len(set(one.labels.tolist())) == 20
    assert torch.equal(one.labels, data.limited(split(100), 20, seed=0).labels)
    assert not torch.equal(one.labels, data.limited(split(100), 20, seed=1).labels)
    with pytest.raises(ValueError, match="has 100 samples; cannot limit it to 101"):
        data.limited(split(100), 101, seed=0)


def test_bad_tensors_and_sizes():
    with pytest.raises(ValueError, match="expected uint8 images"):
        data.Split(torch.rand(2, 1, 4, 4, dtype=torch.float64), torch.arange(2))
    with pytest.raises(ValueError, match="expected 3 int64 labels"):
        data.Split(torch.zeros(3, 1, 4, 4, dtype=torch.uint8), torch.arange(2))
    with pytest.raises(ValueError, match="in batches of 0 leave no batch"):
        data.Batches(split(3), 0)
    for count, size in ((1, 4), (5, 1)):
        with pytest.raises(ValueError, match="leave no batch with two samples"):
            data.Batches(split(count), size, drop_single=True)


def test_held_out_samples_are_the_rest():
    kept, held = data.held_out(split(50), 20, seed=3)
    assert sorted([*kept.labels.tolist(), *held.labels.tolist()]) == list(range(50))
    assert len(held) == 20
    again = data.held_out(split(50), 20, seed=3)
    assert torch.equal(again[1].labels, held.labels)
    # Not the samples that a limit of the same seed draws first.
    assert held.labels.tolist() != data.limited(split(50), 20, seed=3).labels.tolist()
    for count in (0, 50, 51):
        with pytest.raises(ValueError, match=f"has 50 samples; cannot hold out {count}"):
            data.held_out(split(50), count, seed=0)


def images(count):
    generator = torch.Generator().manual_seed(9)
    pixels = torch.randint(256, (count, 3, 6, 5), generator=generator, dtype=torch.uint8)
    return data.Split(pixels, torch.arange(count))


def shuffled(seed, augment=True):
    drawn = torch.Generator().manual_seed(seed_of(seed, 1))
    augmentation = data.Augmentation(flip=True, crop_padding=2, generator=drawn)
    generator = torch.Generator().manual_seed(seed)
    return data.Batches(images(23), 5, generator=generator, augment=augmentation if augment else None)


def through_a_file(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)


@pytest.mark.parametrize("augment", [True, False])
@pytest.mark.parametrize("stop", [0, 1, 4, 5, 7, 10])
def test_batches_resume_bit_for_bit(stop, augment):
    whole = [batch for batches in [shuffled(0, augment)] for _ in range(3) for batch in batches]
    stopped, seen = shuffled(0, augment), 0
    state = stopped.state_dict()
    while seen < stop:
        for _ in stopped:
            seen += 1
            state = stopped.state_dict()
            if seen == stop:
                break
    rest = shuffled(77, augment)  # Whatever it was seeded with.
    rest.load_state_dict(through_a_file(state))
    kept = through_a_file(rest.state_dict())  # Saved again before the first batch.
    assert kept["position"] == stop % 5
    rest = shuffled(78, augment)
    rest.load_state_dict(kept)
    expected = whole[stop:]
    found = []
    while len(found) < len(expected):
        found += list(rest)
    for (x, y), (expected_x, expected_y) in zip(found, expected, strict=True):
        assert torch.equal(y, expected_y)
        assert torch.equal(x, expected_x)


def test_an_interruption_without_a_state_begins_a_new_epoch():
    batches = shuffled(0)
    next(iter(batches))
    assert sum(len(y) for _, y in batches) == 23


def test_a_state_of_other_batches_is_refused():
    with pytest.raises(ValueError, match="differ in their random augmentation"):
        shuffled(0).load_state_dict(shuffled(0, augment=False).state_dict())
    with pytest.raises(ValueError, match="differ in their random order"):
        data.Batches(split(3), 2).load_state_dict(data.Batches(split(3), 2, generator=torch.Generator()).state_dict())


def test_memory_mapped_images_are_read_as_they_are_needed(tmp_path):
    pixels = np.arange(4 * 12, dtype=np.uint8).reshape(4, 3, 2, 2)
    np.save(tmp_path / "pixels.npy", pixels)
    mapped = torch.from_numpy(np.load(tmp_path / "pixels.npy", mmap_mode="c"))
    batches = data.Batches(data.Split(mapped, torch.arange(4)), 3, generator=torch.Generator().manual_seed(0))
    for x, y in batches:
        assert torch.equal((x * 255).round().byte(), torch.from_numpy(pixels)[y])
    assert data.place(batches.split, torch.device("cpu")) is batches.split
