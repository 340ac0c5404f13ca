"""Samplers: reference orders, conservation of samples, sharing, skipping."""

import itertools
from collections import Counter

import pytest
import torch

from dinov2.data import samplers
from dinov2.data.samplers import EpochSampler, InfiniteSampler, ShardedInfiniteSampler

SHARDED = [{}, {"use_new_shuffle_tensor_slice": True}, {"shuffle": False}]


def first(sampler, count):
    return list(itertools.islice(sampler, count))


def test_orders_equal_the_reference(reference):
    rows = reference("schedule_fixture.json")["samplers"]
    for row in rows:
        if row["sampler"] == "ShardedInfiniteSampler" and row["args"].get("step", 1) > 1:
            continue  # upstream drops images there
        sampler = getattr(samplers, row["sampler"])(**row["args"])
        assert first(sampler, 24) == row["first_24"], row


@pytest.mark.parametrize("seed", [0, 3, 2**40 + 7])
@pytest.mark.parametrize("count", [1, 2, 37, 3000])
def test_infinite_order_equals_single_draws_of_torch(count, seed):
    generator = torch.Generator().manual_seed(seed)
    expected = []
    for _ in range(2):
        values = list(range(count))
        for i in range(count):
            j = int(torch.randint(i, count, (1,), generator=generator))
            values[i], values[j] = values[j], values[i]
        expected += values
    assert first(InfiniteSampler(sample_count=count, shuffle=True, seed=seed), 2 * count) == expected


@pytest.mark.parametrize("count", [1, 2, 37, 3000])
def test_sharded_order_equals_single_draws_of_torch(count):
    seed, epoch = 11, 5
    base = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    generator = torch.Generator().manual_seed(seed + (epoch << 24))
    expected = []
    for i, value in enumerate(base):
        j = int(torch.randint(0, i + 1, (1,), generator=generator)) if i > 0 else 0
        expected.append(value)
        expected[i], expected[j] = expected[j], value
    sampler = ShardedInfiniteSampler(sample_count=count, shuffle=True, seed=seed)
    assert sampler.order(epoch).tolist() == expected


@pytest.mark.parametrize("options", SHARDED)
@pytest.mark.parametrize("step", [2, 3, 5, 17])
def test_processes_share_one_stream(options, step):
    options = {"sample_count": 7, "shuffle": True, "seed": 3, **options}
    whole = first(ShardedInfiniteSampler(start=0, step=1, **options), 20 * step)
    for start in range(step):
        assert first(ShardedInfiniteSampler(start=start, step=step, **options), 20) == whole[start::step]


@pytest.mark.parametrize("options", SHARDED)
def test_every_pass_holds_every_image_once(options):
    sampler = ShardedInfiniteSampler(sample_count=50, **{"shuffle": True, "seed": 1, **options})
    for epoch in (0, 1, 255, 256, 10_000):
        assert sorted(sampler.order(epoch).tolist()) == list(range(50))
    orders = {tuple(sampler.order(epoch).tolist()) for epoch in range(0, 600, 3)}
    assert len(orders) == (200 if sampler.shuffle else 1)


@pytest.mark.parametrize("advance", [0, 1, 6, 7, 8, 50])
@pytest.mark.parametrize(("start", "step"), [(0, 1), (1, 3)])
@pytest.mark.parametrize("kind", [InfiniteSampler, ShardedInfiniteSampler])
def test_advance_goes_on_where_the_process_stopped(kind, start, step, advance):
    options = {"sample_count": 7, "shuffle": True, "seed": 3, "start": start, "step": step}
    whole = first(kind(**options), advance + 30)
    resumed = kind(**options, advance=advance)
    assert first(resumed, 30) == first(resumed, 30) == whole[advance:]


def test_far_positions_need_no_replay():
    sampler = ShardedInfiniteSampler(sample_count=5, shuffle=True, start=0, step=1, advance=5 * 10**12 + 2)
    assert first(sampler, 3) == sampler.order(10**12).tolist()[2:]


def test_epoch_sampler_shares_one_order():
    options = {"size": 23, "sample_count": 5, "shuffle": True, "seed": 1}
    whole = list(EpochSampler(**options))
    parts = [EpochSampler(**options, start=start, step=3) for start in range(3)]
    assert [list(part) for part in parts] == [whole[start::3] for start in range(3)]
    assert [len(part) for part in parts] == [8, 8, 7]
    assert max(Counter(whole).values()) <= 5  # five copies of the dataset cover 23 samples


@pytest.mark.parametrize(("start", "step"), [(0, 1), (1, 2)])
def test_epoch_sampler_skips_in_the_first_epoch_only(start, step):
    options = {"size": 10, "sample_count": 5, "shuffle": True, "seed": 1, "start": start, "step": step}
    whole, resumed = EpochSampler(**options), EpochSampler(**options, advance=4)
    for epoch, skipped in ((3, 4), (4, 0)):
        for sampler in (whole, resumed):
            sampler.set_epoch(epoch)
        assert len(resumed) == 10 // step - skipped
        assert list(resumed) == list(whole)[skipped:]


def test_epoch_seeds_collide_upstream_but_not_when_independent():
    def order(seed, epoch, independent):
        sampler = EpochSampler(size=50, sample_count=50, shuffle=True, seed=seed, independent_epochs=independent)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(1, 0, False) == order(2, 0, False)
    assert order(1, 0, True) != order(2, 0, True)
    assert order(2, 3, False) == order(3, 2, False)
    assert order(2, 3, True) != order(3, 2, True)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: InfiniteSampler(sample_count=0), "no images"),
        (lambda: InfiniteSampler(sample_count=2, start=2, step=3), "process 2 would never get one of 2 images"),
        (lambda: ShardedInfiniteSampler(sample_count=2, advance=-1), "advance must be at least 0, got -1"),
        (lambda: EpochSampler(size=0, sample_count=2), "got size=0"),
        (lambda: EpochSampler(size=4, sample_count=2, start=0, step=0), "step at least 1"),
    ],
)
def test_bad_options(make, message):
    with pytest.raises(ValueError, match=message):
        make()
