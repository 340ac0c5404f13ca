"""Bags of photos: the photos and the label of one part, random in training and fixed in evaluation."""

from collections import Counter

import numpy as np
import pytest
import torch
from task_stand_ins import MemoryTargets, Options

from dinov2.data.decoding import UnreadableImageError
from dinov2.data.pretraining import SampleKey
from dinov2.data.task_dataset import LabelTargets, PartBags, TaskDataset, collate_task, part_label
from dinov2.data.task_transforms import make_eval_transform, make_train_transform
from dinov2.eval.metrics.classification import score_parts
from dinov2.utils.errors import RunError

PARTS = ["a", "b", "a", "a", "c", "a", "b", "a"]  # five photos of a, two of b, one of c
LABELS = [0, 1, 0, 1, None, 0, None, 0]
WHOLE = make_eval_transform((20, 24), "stretch")


def make(max_photos=3, *, training=False, transform=WHOLE, labels=LABELS, parts=PARTS, num_classes=2, **options):
    source = MemoryTargets(labels, group_ids=parts, **options)
    photos = TaskDataset(source, LabelTargets(source, num_classes), transform, training=training, seed=4)
    return PartBags(photos, num_classes=num_classes, max_photos=max_photos)


def photos_of(bag, bags):
    """Numbers of the photos in a bag that was not augmented."""
    known = {bags.photos.load(index)["image"].sum().item(): index for index in range(len(bags.photos))}
    return [known[image.sum().item()] for image in bag["image"][bag["valid"]]]


def test_parts_photos_and_labels():
    bags = make()
    assert len(bags) == 3
    assert bags.part_ids == ("a", "b", "c")
    assert bags.labels.tolist() == [1, 1, -1]
    assert bags.num_mixed == 1
    assert bags.members(0).tolist() == [0, 2, 3, 5, 7]
    assert [bags[part]["label"].item() for part in range(3)] == [1, 1, -1]
    assert [bags[part]["index"] for part in range(3)] == [0, 1, 2]


@pytest.mark.parametrize(("most", "expected"), [(1, [0]), (2, [0, 7]), (3, [0, 3, 7]), (5, [0, 2, 3, 5, 7])])
def test_evaluation_spreads_evenly(most, expected):
    bags = make(most)
    assert photos_of(bags[0], bags) == expected
    assert bags[0]["image"].shape == (most, 3, 20, 24)


def test_small_parts_are_filled_up():
    bag = make(3)[1]
    assert bag["valid"].tolist() == [True, True, False]
    assert (bag["image"][2] == 0).all()
    assert (bag["image"][:2] != 0).any()


def test_training_draws_every_photo_as_often():
    bags = make(2, training=True)
    drawn = [photos_of(bags[SampleKey(position, 0)], bags) for position in range(300)]
    assert all(len(set(photos)) == 2 for photos in drawn)
    counts = Counter(photo for photos in drawn for photo in photos)
    assert counts.keys() == {0, 2, 3, 5, 7}
    assert all(count / 300 == pytest.approx(0.4, abs=0.1) for count in counts.values())


def test_a_key_fixes_everything_random():
    transform = make_train_transform(Options(rotation=90, noise=0.1), (14, 14), "stretch")
    bags = make(2, training=True, transform=transform)
    bag = bags[SampleKey(3, 0)]
    torch.manual_seed(9)
    again = bags[SampleKey(3, 0)]
    assert torch.equal(again["image"], bag["image"])
    assert not torch.equal(bags[SampleKey(4, 0)]["image"], bag["image"])
    assert not torch.equal(bag["image"][0], bag["image"][1])


def test_labels_are_those_that_parts_are_scored_by():
    rng = np.random.default_rng(0)
    for num_classes in (2, 3, 5):
        labels = rng.integers(0, num_classes, 60)
        parts = [f"part_{number:02d}" for number in rng.integers(0, 15, 60)]
        bags = make(labels=labels.tolist(), parts=parts, num_classes=num_classes)
        scores = score_parts(np.full((60, num_classes), 1 / num_classes), labels, parts)
        found = dict(zip(bags.part_ids, bags.labels.tolist(), strict=True))
        assert found == dict(zip(scores.group_ids, scores.labels.tolist(), strict=True))
        assert bags.num_mixed == scores.num_mixed


def test_photos_without_a_label_do_not_count():
    assert part_label(np.array([-1, 0, -1]), 2) == 0
    assert part_label(np.array([-1, -1, 2, 2, 1]), 3) == 2
    assert part_label(np.array([-1, -1]), 3) == -1


def test_unreadable_photos_are_left_out_of_training():
    bags = make(3, training=True, broken={0, 2, 3, 4})
    bag = bags[SampleKey(0, 0)]
    assert sorted(photos_of_readable(bag, bags)) == [5, 7]
    assert set(bag["unreadable"]) == {"photo_0.png", "photo_2.png", "photo_3.png"}
    replaced = [bags[SampleKey(position, 2)] for position in range(10)]  # part c has no photo left
    assert {bag["index"] for bag in replaced} == {0, 1}
    assert all("photo_4.png" in bag["unreadable"] for bag in replaced)
    bags.spares = [1]
    assert {bags[SampleKey(position, 2)]["index"] for position in range(10)} == {1}
    with pytest.raises(RunError, match="no part with a readable photo after 16 substitutes"):
        make(training=True, broken=set(range(8)))[0]


def photos_of_readable(bag, bags):
    readable = [index for index in range(8) if index not in bags.photos.dataset.broken]
    known = {bags.photos.load(index)["image"].sum().item(): index for index in readable}
    return [known[image.sum().item()] for image in bag["image"][bag["valid"]]]


def test_unreadable_photos_stop_evaluation():
    with pytest.raises(UnreadableImageError, match=r"photo_7.png"):
        make(3, broken={7})[0]


def test_batches_of_bags():
    bags = make(3)
    batch = collate_task([bags[part] for part in range(3)])
    assert batch["image"].shape == (3, 3, 3, 20, 24)
    assert batch["valid"].sum(dim=1).tolist() == [3, 2, 1]
    assert batch["label"].tolist() == [1, 1, -1]
    assert batch["index"].tolist() == [0, 1, 2]


def test_bad_arguments():
    with pytest.raises(ValueError, match="max_photos must be at least 1, got 0"):
        make(0)
    bags = make(transform=make_eval_transform((20, 20), "original"), sizes=((20, 24), (30, 18)))
    with pytest.raises(ValueError, match=r"photos of part 'a' have the sizes \[\(20, 24\), \(30, 18\)\]"):
        bags[0]
