"""Random block masks."""

import random

import numpy as np
import pytest

from dinov2.data.masking import MaskingGenerator, max_patches_cap


def test_masks_never_exceed_the_request():
    rng = random.Random(0)
    for shape in ((16, 16), (7, 7), (5, 9), (2, 2), (1, 8)):
        generator = MaskingGenerator(shape, max_num_patches=shape[0] * shape[1] // 2 or 1)
        for requested in (0, 1, shape[0] * shape[1] // 3, shape[0] * shape[1]):
            mask = generator(requested, rng)
            assert mask.shape == shape
            assert mask.dtype == np.bool_
            assert mask.sum() <= requested


def test_masks_follow_the_given_generator_alone():
    generator = MaskingGenerator(16)
    python_state, numpy_state = random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    first, second = generator(50, random.Random(3)), generator(50, random.Random(3))
    assert np.array_equal(first, second)
    assert not np.array_equal(first, generator(50, random.Random(4)))
    assert random.getstate() == python_state
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002


@pytest.mark.parametrize("shape", [(16, 16), (7, 7), (3, 11), (1, 4)])
def test_exact_masks_hold_the_requested_number(shape):
    generator = MaskingGenerator(shape, exact=True)
    rng = random.Random(0)
    cells = shape[0] * shape[1]
    for requested in range(0, cells + 1, max(1, cells // 20)):
        assert generator(requested, rng).sum() == requested


def test_cap_equals_the_reference(reference):
    for row in reference("masking_fixture.json")["max_num_patches_formula"]:
        assert max_patches_cap(row["img_size"], row["patch_size"]) == row["max_num_patches"]
    assert max_patches_cap((112, 224), 14) == 64
    assert max_patches_cap((98, 98), (14, 14)) == 21


def adjacent_pairs(mask):
    return (mask[1:] & mask[:-1]).sum() + (mask[:, 1:] & mask[:, :-1]).sum()


def test_statistics_equal_the_reference(reference):
    rng = random.Random(0)
    draws = 800
    for row in reference("masking_fixture.json")["generator"]:
        if row["requested"] == 0:
            continue
        cap = None if row["max_num_patches"] is None else int(row["max_num_patches"])
        generator = MaskingGenerator(tuple(row["grid"]), max_num_patches=cap)
        masks = [generator(row["requested"], rng) for _ in range(draws)]
        counts = np.array([mask.sum() for mask in masks])
        label = (row["grid"], row["requested"])
        tolerance = max(0.01 * row["count_mean"], 4 * row["count_std"] * (1 / draws + 1 / row["draws"]) ** 0.5)
        assert counts.mean() == pytest.approx(row["count_mean"], abs=tolerance), label
        error = (row["fraction_exact"] * (1 - row["fraction_exact"]) * (1 / draws + 1 / row["draws"])) ** 0.5
        exact = np.mean(counts == row["requested"])
        assert exact == pytest.approx(row["fraction_exact"], abs=max(0.03, 4 * error)), label
        clustering = sum(adjacent_pairs(mask) for mask in masks) / counts.sum()
        assert clustering == pytest.approx(row["adjacent_pairs_per_masked_cell"], rel=0.03, abs=1e-9), label
        if "cell_frequency" in row:
            frequency = np.mean(masks, axis=0)
            assert np.abs(frequency - np.array(row["cell_frequency"]).reshape(frequency.shape)).max() < 0.075, label


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_size": 0}, "input_size must be positive"),
        ({"input_size": 4, "min_num_patches": 0}, "min_num_patches must be at least 1"),
        ({"input_size": 4, "min_aspect": 2.0}, "need 0 < min_aspect <= max_aspect"),
        ({"input_size": 4, "min_aspect": 0.0}, "need 0 < min_aspect <= max_aspect"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        MaskingGenerator(**options)
    for requested in (-1, 17):
        with pytest.raises(ValueError, match=r"can mask 0\.\.16 patches"):
            MaskingGenerator(4)(requested, random.Random(0))
