"""Samples of a task: targets as the dataset has them, repeatable randomness, unreadable images, batches."""

import functools
import itertools
import logging
import pickle
import time
from collections import Counter

import numpy as np
import pytest
import torch
from data_stand_ins import EVERYTHING, MemoryLabels, MemoryTargets, Options
from torchvision import tv_tensors

from dinov2.data.datasets.dense_targets import BadTargetError
from dinov2.data.loaders import make_keyed_loader
from dinov2.data.pretraining import SampleKey
from dinov2.data.reading import UnreadableImageError
from dinov2.data.task_dataset import (
    PartBags,
    TaskDataset,
    collate_task,
    depth_targets,
    label_targets,
    mask_targets,
    part_label,
)
from dinov2.data.task_transforms import make_eval_transform, make_train_transform
from dinov2.eval.metrics.classification import score_parts
from dinov2.utils.errors import RunError

EVALUATION = make_eval_transform((20, 24), "original")
TRAINING = make_train_transform(EVERYTHING, (14, 28), "stretch")


READERS = {
    "segmentation": mask_targets,
    "depth": lambda dataset, num_classes: depth_targets(dataset),
    "classification": label_targets,
    "multi_label": functools.partial(label_targets, multi_label=True),
}


def make(task="segmentation", transform=EVALUATION, labels=(0, 1, None, 2), num_classes=3, **options):
    kept = {key: options.pop(key) for key in ("label_sets", "broken", "sizes") if key in options}
    source = MemoryTargets(list(labels), **kept)
    return TaskDataset(source, READERS[task](source, num_classes), transform, **options)


def same(left, right):
    return left.keys() == right.keys() and all(
        torch.equal(left[key], right[key]) if isinstance(left[key], torch.Tensor) else left[key] == right[key]
        for key in left
    )


def test_targets_are_those_of_the_dataset():
    source = MemoryTargets([0, 1])
    sample = make("segmentation")[1]
    assert torch.equal(sample["mask"], torch.from_numpy(source.get_mask(1)).long())
    assert sample["index"] == 1
    assert {"depth", "label"}.isdisjoint(sample)
    depth = make("depth", num_classes=0)[1]["depth"]
    assert torch.equal(depth, torch.from_numpy(source.get_depth(1)))
    labels = [make("classification")[index]["label"] for index in range(4)]
    assert [label.item() for label in labels] == [0, 1, -1, 2]
    assert {label.dtype for label in labels} == {torch.int64}
    dataset = make("multi_label", label_sets=[(), (0, 2), (1,), (2,)])
    rows = torch.stack([dataset[index]["label"] for index in range(4)])
    assert torch.equal(rows, torch.tensor([[0, 0, 0], [1, 0, 1], [0, 1, 0], [0, 0, 1]], dtype=torch.float32))


def test_transforms_see_images_and_masks_as_the_dataset_has_them():
    seen = []
    make(transform=lambda sample: seen.append(sample) or sample)[2]
    image, mask = seen[0]["image"], seen[0]["mask"]
    assert (type(image), type(mask), mask.dtype) == (tv_tensors.Image, tv_tensors.Mask, torch.uint8)
    assert np.array_equal(image.permute(1, 2, 0).numpy(), np.asarray(MemoryTargets([0] * 3).get_image(2)))


def test_a_key_fixes_everything_random():
    dataset = make(transform=TRAINING, training=True, seed=1)
    sample = dataset[SampleKey(17, 3)]
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert same(pickle.loads(pickle.dumps(dataset))[SampleKey(17, 3)], sample)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(dataset[SampleKey(18, 3)]["image"], sample["image"])
    other_seed = make(transform=TRAINING, training=True, seed=2)[SampleKey(17, 3)]
    assert not torch.equal(other_seed["image"], sample["image"])
    torch.manual_seed(5)
    plain = dataset[3]
    torch.manual_seed(5)
    assert same(dataset[3], plain)
    assert not torch.equal(dataset[3]["image"], plain["image"])


def test_batches_do_not_depend_on_workers_and_go_on_after_a_resume():
    dataset = make(labels=[0, 1, 2] * 4, transform=TRAINING, training=True, broken={5})

    def batches(num_workers, start, count=3):
        loader = make_keyed_loader(
            dataset=dataset,
            collate=collate_task,
            stream=itertools.islice(itertools.cycle(range(12)), start, None),
            start_position=start,
            batch_size=4,
            num_workers=num_workers,
        )
        return list(itertools.islice(loader, count))

    alone, shared, resumed = batches(0, 0), batches(2, 0), batches(0, 8, 1)
    assert all(same(left, right) for left, right in zip(alone, shared, strict=True))
    assert same(alone[2], resumed[0])
    assert sum((batch["unreadable"] for batch in alone), ()) == ("image_5.png",)
    first, second = (
        {index: image for batch in epoch for index, image in zip(batch["index"].tolist(), batch["image"], strict=True)}
        for epoch in (alone, batches(0, 12))
    )
    assert not any(torch.equal(first[index], second[index]) for index in first.keys() & second.keys())


def test_training_replaces_unreadable_images_by_spares_if_there_are_any(caplog):
    dataset = make(labels=[0] * 12, broken={2, 3, 4}, training=True, seed=3)
    with caplog.at_level(logging.WARNING, logger="dinov2"):
        samples = [dataset[SampleKey(position, 2)] for position in range(30)]
    names = set().union(*(sample["unreadable"] for sample in samples))
    assert {"image_2.png"} <= names <= {f"image_{index}.png" for index in (2, 3, 4)}
    assert all(sample["unreadable"][0] == "image_2.png" for sample in samples)
    assert {sample["index"] for sample in samples} <= set(range(12)) - {2, 3, 4}
    assert len({sample["index"] for sample in samples}) > 5
    assert same(dataset[SampleKey(4, 2)], samples[4])
    assert sum("image_2.png cannot be read" in record.message for record in caplog.records) == 1
    assert dataset[0]["unreadable"] == ()
    dataset.spares = [5, 9]
    assert {dataset[SampleKey(position, 2)]["index"] for position in range(20)} == {5, 9}
    assert dataset[SampleKey(0, 7)]["index"] == 7


def test_what_cannot_be_read_ends_evaluation_and_in_the_end_training():
    with pytest.raises(RunError, match=r"no readable image after 16 substitutes: image_0.png"):
        make(labels=[0], broken={0}, training=True)[0]
    with pytest.raises(UnreadableImageError, match=r"image_1.png: it is truncated"):
        make(broken={1})[1]


def test_slow_images_are_given_up():
    dataset = make(training=True, read_timeout=0.05)
    read = dataset.dataset.get_image
    dataset.dataset.get_image = lambda index: time.sleep(0.5) if index == 1 else read(index)
    assert dataset[1]["unreadable"] == ("image_1.png",)


def test_wrong_targets_name_the_image(monkeypatch):
    with pytest.raises(ValueError, match=r"image_3.png: label 2 is outside the 2 classes"):
        make("classification", num_classes=2)[3]
    with pytest.raises(ValueError, match=r"image_0.png: label -3 is outside"):
        make("classification", labels=[-3])[0]
    with pytest.raises(ValueError, match=r"image_0.png: label 7 is outside"):
        make("multi_label", label_sets=[(0, 7)])[0]
    with pytest.raises(ValueError, match=r"image_1.png: an image of 20 x 24 pixels would be resized"):
        make(transform=make_eval_transform((100_000, 100_000), "shorter_side"))[1]
    dataset = make()
    monkeypatch.setattr(dataset.dataset, "get_mask", lambda index: np.zeros((5, 6), dtype=np.uint8))
    for training in (False, True):
        dataset.training = training
        with pytest.raises(BadTargetError, match=r"image_0.png: its target has 5 x 6 pixels .*the image 20 x 24"):
            dataset[0]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: make(labels=[]), "dataset MemoryTargets has no images"),
        (lambda: make(num_classes=2), "masks of MemoryTargets have 3 classes, the task 2"),
        (lambda: mask_targets(MemoryLabels(), 2), "dataset MemoryLabels has no masks"),
        (lambda: depth_targets(MemoryLabels()), "dataset MemoryLabels has no depth maps"),
        (lambda: READERS["multi_label"](MemoryLabels(), 2), "MemoryLabels knows one class per image only"),
        (lambda: collate_task([]), "cannot collate an empty list"),
    ],
)
def test_bad_arguments(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_batches():
    dataset = make("segmentation", make_eval_transform((14, 28), "stretch"))
    batch = collate_task([dataset[index] for index in (3, 1)])
    assert batch["image"].shape == (2, 3, 14, 28)
    assert batch["mask"].shape == (2, 14, 28)
    assert batch["index"].tolist() == [3, 1]
    assert torch.equal(batch["mask"][1], dataset[1]["mask"])
    assert batch["unreadable"] == ()
    transform = make_train_transform(Options(hflip=0.5), (14, 28), "stretch")
    training = make("classification", transform, labels=[0, 1] * 8, broken={0, 1}, training=True)
    batch = collate_task([training[SampleKey(0, 0)], training[SampleKey(1, 1)], training[SampleKey(2, 2)]])
    assert batch["label"].shape == (3,)
    assert set(batch["unreadable"]) == {"image_0.png", "image_1.png"}


def test_boxes_stay_lists_and_images_of_different_sizes_are_refused():
    samples = [
        {"image": torch.zeros(3, 4, 4), "boxes": torch.zeros(n, 4), "box_labels": torch.zeros(n)} for n in (0, 3)
    ]
    batch = collate_task(samples)
    assert [len(boxes) for boxes in batch["boxes"]] == [len(labels) for labels in batch["box_labels"]] == [0, 3]
    dataset = make("segmentation", labels=[0] * 5, sizes=((20, 24), (30, 18)))
    with pytest.raises(ValueError, match=r"differ in size \(20 x 24, 30 x 18, or their targets do\)"):
        collate_task([dataset[index] for index in range(5)])


PARTS = ["a", "b", "a", "a", "c", "a", "b", "a"]  # five images of a, two of b, one of c
LABELS = [0, 1, 0, 1, None, 0, None, 0]
WHOLE = make_eval_transform((20, 24), "stretch")


def make_bags(max_images=3, *, training=False, transform=WHOLE, labels=LABELS, parts=PARTS, num_classes=2, **options):
    source = MemoryTargets(labels, group_ids=parts, **options)
    images = TaskDataset(source, label_targets(source, num_classes), transform, training=training, seed=4)
    return PartBags(images, num_classes=num_classes, max_images=max_images)


@functools.cache
def numbers_by_sum(bags):
    readable = set(range(len(bags.images))) - bags.images.dataset.broken
    return {bags.images.load(index)["image"].sum().item(): index for index in readable}


def images_of(bag, bags):
    """Numbers of the images in a bag that was not augmented."""
    return [numbers_by_sum(bags)[image.sum().item()] for image in bag["image"][bag["valid"]]]


def test_parts_images_and_labels():
    bags = make_bags()
    assert len(bags) == 3
    assert bags.part_ids == ("a", "b", "c")
    assert bags.labels.tolist() == [1, 1, -1]
    assert bags.num_mixed == 1
    assert [bags[part]["label"].item() for part in range(3)] == [1, 1, -1]
    assert [bags[part]["index"] for part in range(3)] == [0, 1, 2]


def test_evaluation_spreads_evenly():
    for count, expected in {1: [0], 2: [0, 7], 3: [0, 3, 7], 5: [0, 2, 3, 5, 7]}.items():
        bags = make_bags(count)
        assert images_of(bags[0], bags) == expected
        assert bags[0]["image"].shape == (count, 3, 20, 24)


def test_training_draws_every_image_as_often():
    bags = make_bags(2, training=True)
    drawn = [images_of(bags[SampleKey(position, 0)], bags) for position in range(300)]
    assert all(len(set(images)) == 2 for images in drawn)
    counts = Counter(image for images in drawn for image in images)
    assert counts.keys() == {0, 2, 3, 5, 7}
    assert all(count / 300 == pytest.approx(0.4, abs=0.1) for count in counts.values())


def test_a_key_fixes_the_images_of_a_bag():
    transform = make_train_transform(Options(rotation=90, noise=0.1), (14, 14), "stretch")
    bags = make_bags(2, training=True, transform=transform)
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
        bags = make_bags(labels=labels.tolist(), parts=parts, num_classes=num_classes)
        scores = score_parts(np.full((60, num_classes), 1 / num_classes), labels, parts)
        found = dict(zip(bags.part_ids, bags.labels.tolist(), strict=True))
        assert found == dict(zip(scores.group_ids, scores.labels.tolist(), strict=True))
        assert bags.num_mixed == scores.num_mixed


def test_images_without_a_label_do_not_count():
    assert part_label(np.array([-1, 0, -1]), 2) == 0
    assert part_label(np.array([-1, -1, 2, 2, 1]), 3) == 2
    assert part_label(np.array([-1, -1]), 3) == -1


def test_unreadable_images_are_left_out_of_training():
    bags = make_bags(3, training=True, broken={0, 2, 3, 4})
    bag = bags[SampleKey(0, 0)]
    assert sorted(images_of(bag, bags)) == [5, 7]
    assert set(bag["unreadable"]) == {"image_0.png", "image_2.png", "image_3.png"}
    replaced = [bags[SampleKey(position, 2)] for position in range(10)]  # part c has no image left
    assert {bag["index"] for bag in replaced} == {0, 1}
    assert all("image_4.png" in bag["unreadable"] for bag in replaced)
    bags.spares = [1]
    assert {bags[SampleKey(position, 2)]["index"] for position in range(10)} == {1}
    with pytest.raises(RunError, match="no part with a readable image after 16 substitutes"):
        make_bags(training=True, broken=set(range(8)))[0]
    with pytest.raises(UnreadableImageError, match=r"image_7.png"):
        make_bags(3, broken={7})[0]


def test_batches_of_bags():
    bags = make_bags(3)
    batch = collate_task([bags[part] for part in range(3)])
    assert batch["image"].shape == (3, 3, 3, 20, 24)
    assert batch["valid"].tolist() == [[True, True, True], [True, True, False], [True, False, False]]
    assert (batch["image"].flatten(2) != 0).any(dim=2).equal(batch["valid"]), "small parts are filled up with zeros"
    assert batch["label"].tolist() == [1, 1, -1]
    assert batch["index"].tolist() == [0, 1, 2]


def test_bad_bags():
    with pytest.raises(ValueError, match="max_photos must be at least 1, got 0"):
        make_bags(0)
    bags = make_bags(transform=make_eval_transform((20, 20), "original"), sizes=((20, 24), (30, 18)))
    with pytest.raises(ValueError, match=r"images of part 'a' have the sizes \[\(20, 24\), \(30, 18\)\]"):
        bags[0]
