"""The pretraining dataset: reproducible crops, untouched generators, substitutes for unreadable images."""

import logging
import pickle
import random

import numpy as np
import pytest
import torch
from data_stand_ins import MemoryImages, make_pretraining_dataset

from dinov2.data.pretraining import PretrainingDataset, SampleKey, isolated_random_state


def same(left, right):
    crops = zip(left.global_crops + left.local_crops, right.global_crops + right.local_crops, strict=True)
    return left.name == right.name and all(torch.equal(a, b) for a, b in crops)


def test_crops_depend_on_seed_and_position_only():
    dataset = make_pretraining_dataset(seed=1)
    sample = dataset[SampleKey(17, 3)]
    torch.manual_seed(99)
    again = pickle.loads(pickle.dumps(dataset))[SampleKey(17, 3)]
    assert same(sample, again)
    assert sample.position == 17
    assert sample.name == "image_3.png"
    assert sample.unreadable == ()
    assert not same(sample, dataset[SampleKey(18, 3)])
    assert not same(sample, make_pretraining_dataset(seed=2)[SampleKey(17, 3)])


def test_generators_of_the_caller_are_untouched():
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    make_pretraining_dataset()[SampleKey(0, 0)]
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), states[2])


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


def test_unreadable_image_is_replaced_deterministically():
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
    assert len({dataset[SampleKey(position, 2)].name for position in range(20)}) > 1


def test_unreadable_paths_are_logged_once(caplog):
    dataset = make_pretraining_dataset(10, broken=[2])
    with caplog.at_level(logging.WARNING, logger="dinov2"):
        for position in range(5):
            dataset[SampleKey(position, 2)]
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1
    assert "image_2.png" in messages[0]
    assert "truncated" in messages[0]


def test_nothing_readable_is_an_error():
    with pytest.raises(RuntimeError, match=r"no readable image after 16 substitutes: .*image_0\.png"):
        make_pretraining_dataset(2, broken=[0, 1])[SampleKey(0, 0)]


def test_empty_dataset():
    with pytest.raises(ValueError, match="no images"):
        PretrainingDataset(MemoryImages(0), lambda image: image)
