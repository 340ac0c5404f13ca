"""Loaders: the same batches whatever the number of workers and processes, exact resume, and clear refusals."""

import itertools
import random

import numpy as np
import pytest
import torch
from data_stand_ins import Numbers, make_collate, make_pretraining_dataset
from PIL import Image

from dinov2.data.loaders import SamplerType, make_data_loader, make_dataset, make_pretraining_loader

INFINITE = [SamplerType.INFINITE, SamplerType.SHARDED_INFINITE, SamplerType.SHARDED_INFINITE_NEW]


def make_loader(num_workers=0, batch_size=4, size=13, broken=(), **options):
    return make_pretraining_loader(
        dataset=make_pretraining_dataset(size, broken=broken),
        collate=make_collate(),
        batch_size=batch_size,
        num_workers=num_workers,
        **options,
    )


def first(loader, count):
    return list(itertools.islice(loader, count))


def same(left, right):
    pairs = [(left.global_crops, right.global_crops), (left.local_crops, right.local_crops), (left.masks, right.masks)]
    return left.names == right.names and left.unreadable == right.unreadable and all(torch.equal(*p) for p in pairs)


def save_floats(folder, scale=1.0, *, count=4):
    """Ramps of values, and one bright pixel in the first image."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        values = np.linspace(0, scale, 48 * 48, dtype=np.float32).reshape(48, 48)
        values[0, 0] = scale * (100 if number == 0 else 0)
        Image.fromarray(values).save(folder / f"{number}.tif")
    return f"ImageFolder:root={folder}:labels=none"


class TestValueRange:
    def test_a_set_has_one_range_and_another_that_of_the_trained_one(self, tmp_path, caplog):
        caplog.set_level("INFO", "dinov2")
        train = make_dataset(dataset_str=save_floats(tmp_path / "train", 300))
        assert train.value_range.low == 0
        assert 299 < train.value_range.high <= 300
        assert sum(f"range={train.value_range}, estimated" in record.message for record in caplog.records) == 1
        means = [np.asarray(train.get_image(index)).mean() for index in range(4)]
        assert max(means) - min(means) < 1
        val = make_dataset(dataset_str=save_floats(tmp_path / "val", 150), value_range=train.value_range)
        assert np.asarray(val.get_image(1)).max() in (127, 128), "half as bright as what was trained on"
        named = make_dataset(
            dataset_str=save_floats(tmp_path / "val", 150) + ":range=0,150", value_range=train.value_range
        )
        assert np.asarray(named.get_image(1)).max() == 255
        assert f"in training it was {train.value_range}" in caplog.text

    def test_levels_of_8_and_16_bits_need_none(self, tmp_path):
        Image.new("RGB", (8, 8), 90).save(tmp_path / "a.png")
        Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(tmp_path / "b.png")
        dataset = make_dataset(dataset_str=f"ImageFolder:root={tmp_path}:labels=none")
        assert dataset.value_range is None
        assert dataset.describe_light() == ""

    @pytest.mark.parametrize(
        ("bits", "word"), [(8, "nearly black"), (10, "nearly black"), (12, "nearly black"), (14, "dark")]
    )
    def test_few_bits_in_files_of_16_are_told_and_mended(self, tmp_path, bits, word):
        values = np.linspace(0, 2**bits - 1, 32 * 32).reshape(32, 32).astype(np.uint16)
        Image.fromarray(values).save(tmp_path / "a.png")
        text = f"ImageFolder:root={tmp_path}:labels=none"
        found = make_dataset(dataset_str=text).describe_light()
        highest = round((2**bits - 1) / 257)
        assert f"images are {word}: the highest level found is {highest} of 255" in found
        assert f"add bits={bits} to the dataset string" in found
        mended = make_dataset(dataset_str=f"{text}:bits={bits}")
        assert mended.describe_light() == ""
        assert np.asarray(mended.get_image(0)).max() == 255
        Image.new("RGB", (8, 8), 255).save(tmp_path / "bright.png")  # of 8 bits, which need no advice
        found = make_dataset(dataset_str=text).describe_light()
        assert f"1 of the 2 images looked at are {word}: the highest level found is {highest} of 255" in found

    @pytest.mark.parametrize(
        ("span", "word"), [("5,6", "nearly black: the highest level found is 0"), ("-2,-1", "white")]
    )
    def test_a_range_beside_the_values_is_told(self, tmp_path, span, word):
        found = make_dataset(dataset_str=f"{save_floats(tmp_path, count=8)}:range={span}").describe_light()
        assert word in found
        assert f"values of {span} become black and white" in found


def test_workers_do_not_change_the_batches():
    state = torch.get_rng_state()
    alone, shared = (first(make_loader(workers, broken=[3]), 8) for workers in (0, 2))
    assert torch.equal(torch.get_rng_state(), state), "the caller's generator is left alone"
    assert all(same(a, b) for a, b in zip(alone, shared, strict=True))
    assert any(batch.unreadable for batch in alone)


@pytest.mark.parametrize("sampler_type", INFINITE)
def test_two_processes_take_the_stream_of_one(sampler_type):
    whole = first(make_loader(batch_size=8, sampler_type=sampler_type), 5)
    parts = [first(make_loader(sampler_type=sampler_type, rank=rank, world_size=2), 5) for rank in range(2)]
    for batch, left, right in zip(whole, *parts, strict=True):
        assert batch.names[0::2] == left.names
        assert batch.names[1::2] == right.names
        crops = batch.global_crops.unflatten(0, (2, 8))
        assert torch.equal(crops[:, 0::2].flatten(0, 1), left.global_crops)
        assert torch.equal(crops[:, 1::2].flatten(0, 1), right.global_crops)


@pytest.mark.parametrize("sampler_type", INFINITE)
@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (1, 2)])
def test_resume_equals_the_uninterrupted_run(sampler_type, rank, world_size):
    options = {"sampler_type": sampler_type, "rank": rank, "world_size": world_size}
    whole = first(make_loader(**options), 9)
    resumed = first(make_loader(start_position=5 * 4 * world_size, **options), 4)
    assert all(same(a, b) for a, b in zip(whole[5:], resumed, strict=True))


def test_resume_with_another_number_of_processes():
    names = [name for batch in first(make_loader(batch_size=6), 4) for name in batch.names]
    parts = [first(make_loader(batch_size=3, start_position=6, rank=rank, world_size=2), 3) for rank in range(2)]
    left, right = ([name for batch in part for name in batch.names] for part in parts)
    assert (left, right) == (names[6::2], names[7::2])


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("shuffle", [False, True])
def test_distributed_goes_through_the_set_once(num_workers, shuffle):
    loader = make_data_loader(
        dataset=Numbers(11),
        batch_size=4,
        num_workers=num_workers,
        shuffle=shuffle,
        sampler_type=SamplerType.DISTRIBUTED,
        drop_last=False,
    )
    values = torch.cat(list(loader)).tolist()
    assert sorted(values) == list(range(11))
    assert (values == list(range(11))) is not shuffle


def test_epochs_and_endless_passes_go_on_after_an_advance():
    options = {"dataset": Numbers(5), "num_workers": 0}
    epoch = {**options, "batch_size": 3, "sampler_type": SamplerType.EPOCH, "sampler_size": 12}
    whole = make_data_loader(**epoch)
    assert len(whole) == 4
    values = torch.cat(list(whole)).tolist()
    assert len(values) == 12
    assert torch.cat(list(make_data_loader(**epoch, sampler_advance=6))).tolist() == values[6:]
    endless = torch.cat(first(make_data_loader(**options, batch_size=2), 10)).tolist()
    resumed = make_data_loader(**options, batch_size=2, sampler_advance=6)
    assert torch.cat(first(resumed, 7)).tolist() == endless[6:]
    one_pass = make_data_loader(**options, batch_size=2, shuffle=False, sampler_type=None, drop_last=False)
    assert [batch.tolist() for batch in one_pass] == [[0, 1], [2, 3], [4]]


class RandomNumbers(Numbers):
    """Draws from all three global generators."""

    def __getitem__(self, index):
        return torch.tensor([random.random(), np.random.rand(), torch.rand(()).item()])  # noqa: NPY002


def test_workers_are_seeded():
    def draw(seed):
        loader = make_data_loader(dataset=RandomNumbers(8), batch_size=2, num_workers=2, seed=seed)
        return torch.cat(first(loader, 4))

    values = draw(1)
    assert torch.equal(values, draw(1))
    assert not torch.equal(values, draw(2))
    assert values.unique().numel() == values.numel()  # no worker repeats another


@pytest.mark.parametrize(
    ("size", "options", "message"),
    [
        (5, {"batch_size": 64}, "dataset has 5 images, fewer than one batch of 64"),
        (0, {}, "the dataset has no images"),
        (5, {"batch_size": 0}, "batch_size must be at least 1, got 0"),
        (5, {"num_workers": -1}, "num_workers must be at least 0"),
        (5, {"sampler_size": 10}, "sampler_size goes with the EPOCH sampler only"),
        (5, {"sampler_type": SamplerType.DISTRIBUTED, "sampler_advance": 2}, "sampler_advance needs an EPOCH"),
        (5, {"sampler_type": SamplerType.EPOCH, "sampler_size": 1}, "each process gets 1 of the dataset's 5 images"),
    ],
)
def test_refusals(size, options, message):
    with pytest.raises(ValueError, match=message):
        make_data_loader(**{"dataset": Numbers(size), "batch_size": 2, "num_workers": 0, **options})


def test_pretraining_refusals():
    for options, message in (
        ({"size": 3, "world_size": 4, "rank": 0, "batch_size": 1}, "fewer than the 4 processes"),
        ({"start_position": -1}, "must be at least 0, got -1"),
        ({"sampler_type": SamplerType.DISTRIBUTED}, "pretraining needs an endless sampler .* got DISTRIBUTED"),
        ({"batch_size": 14}, "dataset has 13 images, fewer than one batch of 14"),
    ):
        with pytest.raises(ValueError, match=message):
            make_loader(**options)


def test_make_dataset_opens_what_the_string_names(tmp_path):
    for name in ("bad", "good"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 6)).save(tmp_path / name / "1.png")
    transforms = {"transform": lambda image: image.size, "target_transform": lambda target: target + 10}
    dataset = make_dataset(dataset_str=f"ImageFolder:root={tmp_path}", **transforms)
    assert [dataset[index] for index in range(len(dataset))] == [((8, 6), 10), ((8, 6), 11)]
    with pytest.raises(ValueError, match="Nothing"):
        make_dataset(dataset_str="Nothing:split=TRAIN")
