"""The pretraining dataset: reproducible crops, untouched generators, substitutes for unreadable images."""

import pickle
import random

import numpy as np
import pytest
import torch
from data_stand_ins import MemoryTargets, make_pretraining_dataset

from dinov2.data.pretraining import (
    PretrainingDataset,
    SampleKey,
    TooManyUnreadableImages,
    UnreadableTally,
)
from dinov2.utils.seeds import isolated_random_state


def same(left, right):
    crops = zip(left.global_crops + left.local_crops, right.global_crops + right.local_crops, strict=True)
    return left.name == right.name and all(torch.equal(a, b) for a, b in crops)


def test_crops_depend_on_seed_and_position_only():
    dataset = make_pretraining_dataset(seed=1)
    sample = dataset[SampleKey(17, 3)]
    torch.manual_seed(99)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    again = pickle.loads(pickle.dumps(dataset))[SampleKey(17, 3)]
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[:2], "the caller's"  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), states[2])
    assert same(sample, again)
    assert sample.position == 17
    assert sample.name == "image_3.png"
    assert sample.unreadable == ()
    assert not same(sample, dataset[SampleKey(18, 3)])
    assert not same(sample, make_pretraining_dataset(seed=2)[SampleKey(17, 3)])


def test_all_three_generators_are_seeded_and_restored_after_an_error():
    def draw():
        return random.random(), np.random.rand(), torch.rand(()).item()  # noqa: NPY002

    with isolated_random_state(2**62 + 5):
        first = draw()
    before = random.getstate()

    def draw_and_fail():
        with isolated_random_state(2**62 + 5):
            assert draw() == first
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        draw_and_fail()
    assert random.getstate() == before


def test_unreadable_image_is_replaced_deterministically_and_logged_once(caplog):
    broken = {2, 4, 5, 6, 7}
    dataset = make_pretraining_dataset(10, broken=broken)
    for position in range(20):
        sample = dataset[SampleKey(position, 2)]
        assert sample.unreadable[0] == "image_2.png"
        assert len(set(sample.unreadable)) == len(sample.unreadable)
        assert int(sample.name[6:-4]) not in broken
        again = make_pretraining_dataset(10, broken=broken)[SampleKey(position, 2)]
        assert same(sample, again)
        assert sample.unreadable == again.unreadable
    caplog.clear()
    dataset = make_pretraining_dataset(10, broken={2})
    assert len({dataset[SampleKey(position, 2)].name for position in range(20)}) > 1
    (record,) = caplog.records
    assert "image_2.png" in record.getMessage()
    assert "truncated" in record.getMessage()


def test_refusals_and_warnings(caplog):
    PretrainingDataset(MemoryTargets([0] * 3), SeenImages(), part_positives=0.5)
    assert "part_positives=0.5 has no effect" in caplog.text, "no part has several images"
    with pytest.raises(RuntimeError, match=r"no readable image after 16 substitutes: .*image_0\.png"):
        make_pretraining_dataset(2, broken=[0, 1])[SampleKey(0, 0)]
    with pytest.raises(ValueError, match="no images"):
        PretrainingDataset(MemoryTargets([]), SeenImages())
    with pytest.raises(ValueError, match="part_positives must lie in"):
        PretrainingDataset(MemoryTargets([0] * 3), SeenImages(), part_positives=1.5)
    for size, fraction in ((0, 0.1), (5, -0.1), (5, 1.1)):
        with pytest.raises(ValueError, match=r"must (be at least 1|lie in 0\.\.1)"):
            UnreadableTally(size, fraction)


class SeenImages:
    """An augmentation that keeps what it was called with."""

    def __init__(self):
        self.calls = []

    def __call__(self, image, partner=None):
        self.calls.append((image, partner))
        return {"global_crops": [], "global_crops_teacher": [], "local_crops": [], "offsets": ()}


def partners_seen(group_ids, part_positives, positions, index=0, broken=()):
    """For every position, the index of the image that came as partner of image ``index``, or None."""
    images = MemoryTargets([0] * len(group_ids), broken=broken, group_ids=group_ids)
    pixels = {images.get_image(i).tobytes(): i for i in range(len(group_ids)) if i not in images.broken}
    augmentation = SeenImages()
    dataset = PretrainingDataset(images, augmentation, seed=5, part_positives=part_positives)
    samples = [dataset[SampleKey(position, index)] for position in range(positions)]
    partners = [None if partner is None else pixels[partner.tobytes()] for _, partner in augmentation.calls]
    return partners, samples


def test_partners_are_the_other_images_of_the_part_equally_often():
    partners, _ = partners_seen(["a", "b", "a", "a", "b"], 1.0, 300, index=2)
    assert set(partners) == {0, 3}
    assert 110 < partners.count(0) < 190


def test_partners_come_as_often_as_asked_and_are_the_same_in_every_run():
    partners, _ = partners_seen(["a", "a"], 0.3, 500)
    assert 0.22 < partners.count(1) / 500 < 0.38
    assert partners == partners_seen(["a", "a"], 0.3, 500)[0]
    for group_ids, share in ((["a", "a"], 0.0), (["a", "b", "b"], 1.0)):  # never asked for; alone in its part
        assert set(partners_seen(group_ids, share, 5)[0]) == {None}


def test_an_unreadable_partner_is_reported_and_left_out():
    partners, samples = partners_seen(["a", "a"], 1.0, 3, broken={1})
    assert set(partners) == {None}
    assert all(sample.unreadable == ("image_1.png",) and sample.name == "image_0.png" for sample in samples)


def test_a_substitute_takes_its_partner_from_its_own_part():
    partners, samples = partners_seen(["a", "b", "b"], 1.0, 20, broken={0})
    names = [sample.name for sample in samples]
    assert set(names) == {"image_1.png", "image_2.png"}
    assert all(
        partner == {"image_1.png": 2, "image_2.png": 1}[name] for partner, name in zip(partners, names, strict=True)
    )


def test_the_tally_counts_names_once_survives_and_stops_a_run():
    first, tally = UnreadableTally(100, 0.02), UnreadableTally(100, 0.02)
    first.add(["b.jpg", "a.jpg"])
    tally.load_state_dict(first.state_dict())
    for _ in range(5):
        tally.add(["a.jpg", "b.jpg"])
    tally.check()
    assert tally.count == 2
    assert tally.summary() == "2 of 100 images unreadable (2.00%)"
    tally.add(["c.jpg"])
    assert tally.exceeded
    message = r"3 of 100 .*max_bad_fraction \(2\.00%\).*a\.jpg, b\.jpg, c\.jpg$"
    with pytest.raises(TooManyUnreadableImages, match=message):
        tally.check()
    tally.add([f"{number}.jpg" for number in range(5)])
    with pytest.raises(TooManyUnreadableImages, match=r"and 3 more"):
        tally.check()
