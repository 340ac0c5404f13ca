"""Mosaics and pasted objects: every pixel and its targets come from one place of one image; no draw is lost."""

import pytest
import torch
from data_stand_ins import MemoryTargets, Options, coded_sample, decode_depth
from torchvision import tv_tensors

from dinov2.data.datasets.boxes import boxes_of_mask
from dinov2.data.mixing import Mixing, make_mosaic, paste_objects
from dinov2.data.pretraining import SampleKey
from dinov2.data.task_dataset import TaskDataset, mask_targets
from dinov2.data.task_transforms import MultiScale, make_train_transform


def sample_of(number, *, with_reference=True, **options):
    """A `coded_sample` whose blue, label and index are its number; the reference's blue is 100 more."""
    sample = coded_sample(**options)
    sample["image"][2] = number
    sample["box_labels"] = torch.tensor([number])
    sample["index"] = number
    if with_reference:
        sample["reference"] = tv_tensors.Image(
            sample["image"] + torch.tensor([0, 0, 100], dtype=torch.uint8)[:, None, None]
        )
    return sample


@pytest.mark.parametrize("sizes", [((90, 120),) * 4, ((90, 120), (40, 125), (64, 64), (110, 30))])
def test_a_mosaic_keeps_scale_and_targets(sizes):
    seen = set()
    for seed in range(20):
        torch.manual_seed(seed)
        samples = [
            sample_of(number, height=height, width=width, box=(8, 9, 28, 33))
            for number, (height, width) in enumerate(sizes)
        ]
        mixed = make_mosaic(samples)
        image, mask, depth = (mixed[key].as_subclass(torch.Tensor) for key in ("image", "mask", "depth"))
        assert (image.shape, mixed["index"], type(mixed["mask"])) == ((3, *sizes[0]), 0, tv_tensors.Mask)
        inside = ~depth.isnan()
        assert torch.equal(inside, mask != 255)
        rows, columns = decode_depth(depth)
        assert torch.equal(image[:2, inside].float(), 2 * torch.stack([columns, rows])[:, inside])
        assert torch.equal(mixed["reference"][2, inside], image[2, inside] + 100)
        expected = (rows >= 9) & (rows < 33) & (columns >= 8) & (columns < 28)
        assert torch.equal(mask[inside] == 3, expected[inside])
        visible = 0
        for box, label in zip(mixed["boxes"].int().tolist(), mixed["box_labels"].tolist(), strict=True):
            left, top, right, bottom = box
            assert (mask[top:bottom, left:right] == 3).all()
            assert (image[2, top:bottom, left:right] == label).all()
            visible += (right - left) * (bottom - top)
        assert 0 <= (mask == 3).sum() - visible < 4 * 0.25 * 20 * 24
        seen.update(image[2, inside].unique().tolist())
    assert seen == {0, 1, 2, 3}


@pytest.mark.parametrize("by", ["boxes", "mask"])
def test_pasted_objects_bring_their_surroundings_and_cover_no_other(by):
    pasted = 0
    for seed in range(20):
        torch.manual_seed(seed)
        sample, donor = sample_of(10, box=(20, 20, 60, 50)), sample_of(50, height=60, width=70, box=(30, 20, 45, 32))
        if by == "mask":
            del sample["boxes"], donor["boxes"], sample["box_labels"]
        before = {key: value.clone() for key, value in sample.items() if isinstance(value, torch.Tensor)}
        mixed = paste_objects(sample, donor)
        assert all(torch.equal(sample[key], value) for key, value in before.items())
        image, mask = mixed["image"].as_subclass(torch.Tensor), mixed["mask"].as_subclass(torch.Tensor)
        boxes = torch.from_numpy(boxes_of_mask(mask.numpy())[0]).int().tolist()
        assert [20, 20, 60, 50] in boxes
        assert torch.equal(image[:, 20:50, 20:60], sample["image"][:, 20:50, 20:60])
        if len(boxes) == 1:
            continue
        pasted += 1
        left, top, right, bottom = next(box for box in boxes if box != [20, 20, 60, 50])
        assert (right - left, bottom - top) == (15, 12)
        for key in ("image", "reference"):
            assert torch.equal(mixed[key][:, top:bottom, left:right], donor[key][:, 20:32, 30:45])
        changed = (image[2] != 10).nonzero()
        (first_row, first_column), (last_row, last_column) = changed.min(dim=0).values, changed.max(dim=0).values
        assert top - 3 <= first_row <= top
        assert bottom - 1 <= last_row < bottom + 3
        assert left - 3 <= first_column <= left
        assert right - 1 <= last_column < right + 3
        assert {10, 50} < set(image[2].unique().tolist()), "the surroundings fade"
        if by == "boxes":
            assert mixed["boxes"].int().tolist() == [[20, 20, 60, 50], [left, top, right, bottom]]
            assert mixed["box_labels"].tolist() == [10, 50]
    assert pasted > 15


def test_what_cannot_be_pasted_changes_nothing():
    sample = sample_of(10, height=30, width=40, box=(0, 0, 5, 5))
    empty = sample_of(50)
    empty["boxes"], empty["box_labels"] = empty["boxes"][:0], empty["box_labels"][:0]
    for donor in (empty, sample_of(50, box=(10, 10, 100, 80))):
        mixed = paste_objects(sample, donor)
        assert all(torch.equal(mixed[key], sample[key]) for key in ("image", "mask", "boxes", "box_labels"))


@pytest.mark.parametrize(("position", "mixes"), [(9, True), (10, False)])
def test_mosaics_end_before_the_run(position, mixes):
    drawn = []
    mixing = Mixing(mosaic=1.0, mosaic_until=10)
    mixed = mixing(sample_of(0), lambda: drawn.append(1) or sample_of(len(drawn)), position)
    assert (len(drawn), len(mixed["boxes"]) > 1 or mixed["image"][2].unique().numel() > 1) == (3 * mixes, mixes)


def make_dataset(broken=(), **mixing):
    source = MemoryTargets([0] * 8, broken=broken)
    dataset = TaskDataset(source, mask_targets(source, 3), make_train_transform(Options(), (14, 14)), training=True)
    dataset.mix = Mixing(mosaic_until=1000, **mixing)
    return dataset


def test_a_position_repeats_its_mixture():
    dataset = make_dataset(mosaic=0.5, copy_paste=0.5)
    first = [dataset[SampleKey(position, 3)] for position in range(12)]
    torch.manual_seed(5)
    for position, sample in enumerate(first):
        again = make_dataset(mosaic=0.5, copy_paste=0.5)[SampleKey(position, 3)]
        assert all(torch.equal(again[key], sample[key]) for key in ("image", "mask"))
    assert len({sample["image"].sum().item() for sample in first}) > 5


def test_images_that_cannot_be_mixed_in_are_told_and_replaced(caplog):
    dataset = make_dataset(broken=[0, 1, 2, 4], mosaic=1.0)
    found = {name for position in range(20) for name in dataset[SampleKey(position, 3)]["unreadable"]}
    assert found == {f"image_{index}.png" for index in (0, 1, 2, 4)}
    assert caplog.text.count("image_1.png cannot be read and is replaced") == 1
    dataset = make_dataset(broken=[index for index in range(8) if index != 3], mosaic=1.0, copy_paste=1.0)
    assert dataset[SampleKey(0, 3)]["image"].shape == (3, 14, 14)


def test_image_sizes_follow_from_the_batch():
    scale = MultiScale(
        options=Options(multi_scale=(0.5, 2.0)),
        image_size=(56, 112),
        resize="stretch",
        unit=(14, 14),
        batch=4,
        start=6,
        seed=0,
    )
    sizes = [tuple(scale(position)(coded_sample())["image"].shape[-2:]) for position in range(6, 126)]
    batches = [set(sizes[first : first + 4]) for first in range(0, 120, 4)]
    assert all(len(batch) == 1 for batch in batches)
    heights, widths = (sorted({size[axis] for size in sizes}) for axis in (0, 1))
    assert heights == [28, 42, 56, 70, 84, 98, 112]
    assert min(widths) < 70 < 196 < max(widths)
    assert all(side % 14 == 0 for side in (*heights, *widths))
