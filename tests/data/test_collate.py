"""Collating crops and dealing masks."""

import pickle
import random

import numpy as np
import pytest
import torch

from dinov2.data.collate import PretrainingCollate, collate_crops
from dinov2.data.masking import MaskingGenerator, max_patches_cap
from dinov2.data.pretraining import CropSample


def make_samples(count, num_local=3, global_size=8, local_size=4):
    """Global crop c of image i holds 10 * i + c, local crop c holds 100 * i + c."""
    return [
        CropSample(
            global_crops=tuple(torch.full((3, global_size, global_size), 10.0 * i + c) for c in range(2)),
            local_crops=tuple(torch.full((3, local_size, local_size), 100.0 * i + c) for c in range(num_local)),
            name=f"{i}.png",
            position=40 + i,
            unreadable=(f"bad{i}.png",) if i == 1 else (),
        )
        for i in range(count)
    ]


class ScriptedRandom(random.Random):
    """Midpoints instead of random numbers, and no shuffling."""

    def __init__(self):
        super().__init__(0)
        self.bounds = []

    def uniform(self, a, b):
        self.bounds.append([a, b])
        return (a + b) / 2

    def shuffle(self, x):
        pass


def test_example_equals_the_reference(reference):
    expected = reference("masking_fixture.json")["collate_example"]
    scripted = [np.isin(np.arange(16), cells).reshape(4, 4) for cells in expected["scripted_masked_cells"]]
    requests = []

    def generator(count, rng):
        requests.append(count)
        return scripted[len(requests) - 1]

    rng = ScriptedRandom()
    batch = collate_crops(
        make_samples(expected["n_images"]),
        mask_ratio_min_max=tuple(expected["mask_ratio_tuple"]),
        mask_probability=expected["mask_probability"],
        num_tokens=expected["n_tokens"],
        mask_generator=generator,
        rng=rng,
    )
    assert rng.bounds == expected["uniform_bounds"]
    assert requests == [count for count in expected["generator_calls"] if count > 0]
    assert batch.masks.int().tolist() == expected["collated_masks"]
    assert batch.mask_indices.tolist() == expected["mask_indices_list"]
    assert batch.mask_weights.tolist() == expected["masks_weight"]
    assert batch.upperbound == expected["upperbound"]
    assert batch.num_masked == expected["n_masked_patches"][0]
    assert list(batch.global_crops.shape) == expected["global_shape"]
    assert list(batch.local_crops.shape) == expected["local_shape"]
    assert batch.global_crops[:, 0, 0, 0].tolist() == expected["global_order"]
    assert batch.local_crops[:, 0, 0, 0].tolist() == expected["local_order"]
    tensors = (batch.global_crops, batch.local_crops, batch.masks, batch.mask_indices, batch.mask_weights)
    names = ["collated_global_crops", "collated_local_crops", "collated_masks", "mask_indices_list", "masks_weight"]
    assert [str(tensor.dtype) for tensor in tensors] == [expected["dtypes"][name] for name in names]
    assert batch.names == ("0.png", "1.png", "2.png")
    assert batch.unreadable == ("bad1.png",)


def test_statistics_equal_the_reference(reference):
    for row in reference("masking_fixture.json")["collate_statistics"]:
        grid, draws = row["grid"], 1500
        generator = MaskingGenerator(grid, max_num_patches=max_patches_cap(14 * grid, 14))
        samples = make_samples(row["images"], 0, 1, 1)
        rng = random.Random(0)
        batches = [
            collate_crops(
                samples,
                mask_ratio_min_max=tuple(row["mask_ratio"]),
                mask_probability=row["mask_probability"],
                num_tokens=grid * grid,
                mask_generator=generator,
                rng=rng,
            )
            for _ in range(draws)
        ]
        masked_crops = [int(batch.masks.any(dim=1).sum()) for batch in batches]
        assert [min(masked_crops), max(masked_crops)] == row["masked_crops"]
        assert {batch.upperbound for batch in batches} == set(row["upperbound"])
        assert all(batch.num_masked <= batch.upperbound for batch in batches)
        assert np.mean([batch.num_masked for batch in batches]) == pytest.approx(row["n_masked_mean"], rel=0.01)
        ranked = (
            torch.stack([batch.masks.sum(dim=1).sort(descending=True).values for batch in batches]).double().mean(0)
        )
        assert ranked.tolist() == pytest.approx(row["per_rank_mean_count"], rel=0.01)


def test_masks_agree_with_indices_and_weights():
    batch = PretrainingCollate(mask_generator=MaskingGenerator(4))(make_samples(5))
    assert batch.masks.flatten()[batch.mask_indices].all()
    assert len(batch.mask_indices) == len(batch.mask_weights) == batch.num_masked == int(batch.masks.sum())
    rows = batch.mask_indices // 16
    sums = torch.zeros(10).index_add_(0, rows, batch.mask_weights)
    torch.testing.assert_close(sums, batch.masks.any(dim=1).float())
    every = PretrainingCollate(mask_generator=MaskingGenerator(4, exact=True), mask_probability=1.0)(make_samples(4))
    assert every.masks.any(dim=1).all()


def test_masks_depend_on_seed_and_first_position_only():
    samples = make_samples(5)
    collate = PretrainingCollate(mask_generator=MaskingGenerator(4), seed=1)
    first = collate(samples).masks
    random.seed(0)
    copy = pickle.loads(pickle.dumps(collate))
    assert torch.equal(copy(samples).masks, first)
    assert not torch.equal(collate(samples[1:] + samples[:1]).masks, first)
    assert not torch.equal(PretrainingCollate(mask_generator=MaskingGenerator(4), seed=2)(samples).masks, first)


@pytest.mark.parametrize(("count", "probability"), [(1, 0.4), (3, 0.0)])
def test_no_local_crops_and_no_masks(count, probability):
    collate = PretrainingCollate(mask_generator=MaskingGenerator(4), mask_probability=probability)
    batch = collate(make_samples(count, num_local=0))
    assert batch.local_crops is None
    assert (batch.num_masked, batch.upperbound) == (0, 0)
    assert batch.mask_indices.shape == batch.mask_weights.shape == (0,)
    assert batch.mask_indices.dtype == torch.int64


def test_types_of_the_batch():
    batch = PretrainingCollate(mask_generator=MaskingGenerator(4), dtype=torch.float16)(make_samples(2))
    assert batch.global_crops.dtype == batch.local_crops.dtype == torch.float16
    batch = batch.to("cpu", torch.bfloat16)
    assert batch.global_crops.dtype == batch.local_crops.dtype == torch.bfloat16
    assert (batch.masks.dtype, batch.mask_weights.dtype) == (torch.bool, torch.float32)
    assert batch.names == ("0.png", "1.png")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_ratio_min_max": (0.5, 0.1)}, "smallest <= largest"),
        ({"mask_ratio_min_max": (0.1, 1.1)}, "smallest <= largest"),
        ({"mask_probability": 1.5}, r"must lie in 0\.\.1"),
        ({}, "empty list of samples"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        PretrainingCollate(mask_generator=MaskingGenerator(4), **options)([])
