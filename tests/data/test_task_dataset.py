"""Samples of a task: targets as the dataset has them, repeatable randomness, unreadable photos, batches."""

import itertools
import logging
import pickle
import time

import numpy as np
import pytest
import torch
from task_stand_ins import EVERYTHING, MemoryLabels, MemoryTargets, Options
from torchvision import tv_tensors

from dinov2.data.datasets.dense_targets import BadTargetError
from dinov2.data.decoding import UnreadableImageError
from dinov2.data.loaders import make_keyed_loader
from dinov2.data.pretraining import SampleKey
from dinov2.data.task_dataset import DepthTargets, LabelTargets, MaskTargets, TaskDataset, collate_task
from dinov2.data.task_transforms import make_eval_transform, make_train_transform
from dinov2.utils.errors import RunError

EVALUATION = make_eval_transform((20, 24), "original")
TRAINING = make_train_transform(EVERYTHING, (14, 28), "stretch")


def make(task="segmentation", transform=EVALUATION, labels=(0, 1, None, 2), num_classes=3, **options):
    kept = {key: options.pop(key) for key in ("label_sets", "broken", "sizes") if key in options}
    source = MemoryTargets(list(labels), **kept)
    return TaskDataset(
        source, reader(source, task, num_classes, options.pop("multi_label", False)), transform, **options
    )


def reader(source, task, num_classes, multi_label=False):
    if task == "segmentation":
        return MaskTargets(source, num_classes)
    if task == "depth":
        return DepthTargets(source)
    return LabelTargets(source, num_classes, multi_label=multi_label)


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


def test_images_are_those_of_the_dataset():
    seen = []
    make(transform=lambda sample: seen.append(sample) or sample)[2]
    image = seen[0]["image"]
    assert isinstance(image, tv_tensors.Image)
    assert np.array_equal(image.permute(1, 2, 0).numpy(), np.asarray(MemoryTargets([0] * 3).get_image(2)))
    assert isinstance(seen[0]["mask"], tv_tensors.Mask)
    assert seen[0]["mask"].dtype == torch.uint8


def test_several_labels_at_once():
    dataset = make("classification", label_sets=[(), (0, 2), (1,), (2,)], multi_label=True)
    rows = torch.stack([dataset[index]["label"] for index in range(4)])
    assert torch.equal(rows, torch.tensor([[0, 0, 0], [1, 0, 1], [0, 1, 0], [0, 0, 1]], dtype=torch.float32))


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
        stream = itertools.islice(itertools.cycle(range(12)), start, None)
        loader = make_keyed_loader(
            dataset=dataset,
            collate=collate_task,
            stream=stream,
            start_position=start,
            batch_size=4,
            num_workers=num_workers,
        )
        return [
            (batch["image"], batch["mask"], batch["index"], batch["unreadable"])
            for batch in itertools.islice(loader, count)
        ]

    def equal(left, right):
        return all(torch.equal(a, b) for a, b in zip(left[:3], right[:3], strict=True)) and left[3] == right[3]

    alone, shared, resumed = batches(0, 0), batches(2, 0), batches(0, 8, 1)
    assert all(equal(left, right) for left, right in zip(alone, shared, strict=True))
    assert equal(alone[2], resumed[0])
    assert sum((batch[3] for batch in alone), ()) == ("photo_5.png",)
    first_of_all = {
        index: image for images, _, indices, _ in alone for index, image in zip(indices.tolist(), images, strict=True)
    }
    for images, _, indices, _ in batches(0, 12):
        for index, image in zip(indices.tolist(), images, strict=True):
            assert not torch.equal(image, first_of_all.get(index, torch.zeros(0))), "every epoch augments anew"


def test_training_replaces_unreadable_photos(caplog):
    dataset = make(labels=[0] * 12, broken={2, 3, 4}, training=True, seed=3)
    with caplog.at_level(logging.WARNING, logger="dinov2"):
        samples = [dataset[SampleKey(position, 2)] for position in range(30)]
    assert (
        {"photo_2.png"}
        <= set().union(*(sample["unreadable"] for sample in samples))
        <= {f"photo_{index}.png" for index in (2, 3, 4)}
    )
    assert all(sample["unreadable"][0] == "photo_2.png" for sample in samples)
    assert {sample["index"] for sample in samples} <= set(range(12)) - {2, 3, 4}
    assert len({sample["index"] for sample in samples}) > 5
    assert same(dataset[SampleKey(4, 2)], samples[4])
    assert sum("photo_2.png cannot be read" in record.message for record in caplog.records) == 1
    assert dataset[0]["unreadable"] == ()


def test_only_spares_take_the_place_of_unreadable_photos():
    dataset = make(labels=[0] * 12, broken={2}, training=True)
    dataset.spares = [4, 9]
    assert {dataset[SampleKey(position, 2)]["index"] for position in range(20)} == {4, 9}
    assert dataset[SampleKey(0, 7)]["index"] == 7


def test_nothing_readable_ends_training():
    with pytest.raises(RunError, match=r"no readable photo after 16 substitutes: photo_0.png"):
        make(labels=[0], broken={0}, training=True)[0]


def test_evaluation_names_the_unreadable_photo():
    with pytest.raises(UnreadableImageError, match=r"photo_1.png: it is truncated"):
        make(broken={1})[1]


def test_slow_photos_are_given_up():
    dataset = make(training=True, read_timeout=0.05)
    read = dataset.dataset.get_image
    dataset.dataset.get_image = lambda index: time.sleep(0.5) if index == 1 else read(index)
    assert dataset[1]["unreadable"] == ("photo_1.png",)


def test_wrong_targets_name_the_photo(monkeypatch):
    with pytest.raises(ValueError, match=r"photo_3.png: label 2 is outside the 2 classes"):
        make("classification", num_classes=2)[3]
    with pytest.raises(ValueError, match=r"photo_0.png: label -3 is outside"):
        make("classification", labels=[-3])[0]
    with pytest.raises(ValueError, match=r"photo_0.png: label 7 is outside"):
        make("classification", label_sets=[(0, 7)], multi_label=True)[0]
    dataset = make()
    monkeypatch.setattr(dataset.dataset, "get_mask", lambda index: np.zeros((5, 6), dtype=np.uint8))
    for training in (False, True):
        dataset.training = training
        with pytest.raises(BadTargetError, match=r"photo_0.png: its target has 5 x 6 pixels .*the photo 20 x 24"):
            dataset[0]


def test_what_the_transform_refuses_is_named():
    transform = make_eval_transform((100_000, 100_000), "shorter_side")
    with pytest.raises(ValueError, match=r"photo_1.png: an image of 20 x 24 pixels would be resized"):
        make(transform=transform)[1]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: make(labels=[]), "dataset MemoryTargets has no images"),
        (lambda: make(num_classes=2), "masks of MemoryTargets have 3 classes, the task 2"),
        (lambda: reader(MemoryLabels(), "segmentation", 2), "dataset MemoryLabels has no masks"),
        (lambda: reader(MemoryLabels(), "depth", 2), "dataset MemoryLabels has no depth maps"),
        (lambda: reader(MemoryLabels(), "classification", 2, True), "MemoryLabels knows one class per image only"),
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
    assert set(batch["unreadable"]) == {"photo_0.png", "photo_1.png"}


def test_boxes_stay_lists():
    samples = [
        {
            "image": torch.zeros(3, 4, 4),
            "boxes": torch.zeros(count, 4),
            "box_labels": torch.zeros(count),
            "index": count,
        }
        for count in (0, 3)
    ]
    batch = collate_task(samples)
    assert [len(boxes) for boxes in batch["boxes"]] == [len(labels) for labels in batch["box_labels"]] == [0, 3]


def test_photos_of_different_sizes():
    dataset = make("segmentation", labels=[0] * 5, sizes=((20, 24), (30, 18)))
    samples = [dataset[index] for index in range(5)]
    with pytest.raises(ValueError, match=r"differ in size \(20 x 24, 30 x 18, or their targets do\)"):
        collate_task(samples)
