import logging

import pytest
import torch
from eval_stand_ins import MemoryDataset

from dinov2.eval.features import (
    check_finite_features,
    common_classes,
    shared_parts,
    warn_of_idle_aggregation,
    warn_of_shared_parts,
    warn_of_unseen_classes,
)

IMAGE = (1, 2, 3)


def test_classes_of_both_sets() -> None:
    named = MemoryDataset([IMAGE], [0], classes=("good", "defect"))
    assert common_classes(named, named) == ("good", "defect")
    assert common_classes(MemoryDataset([IMAGE], [0]), MemoryDataset([IMAGE], [2])) == ("0", "1", "2")


def test_shared_parts_are_told_once_and_shortened(caplog: pytest.LogCaptureFixture) -> None:
    train, val = [f"p{index}" for index in range(9)] * 2, [f"p{index}" for index in range(2, 12)]
    expected = [f"p{index}" for index in range(2, 9)]
    assert shared_parts(train, val) == expected
    assert caplog.text == ""
    with caplog.at_level(logging.WARNING, "dinov2"):
        assert warn_of_shared_parts(train, val) == expected
        assert warn_of_shared_parts(["a"], ["b"]) == []
    assert [record.getMessage() for record in caplog.records] == [
        "7 parts are in both the training and the validation set, so the scores are too good: p2, p3, p4, p5, p6, …"
    ]


def test_features_that_are_not_finite_are_named() -> None:
    embeddings = torch.zeros(4, 2, 3)
    names = list("abcd")
    check_finite_features(embeddings, names)
    embeddings[1, 0, 2], embeddings[3, 1, 0] = float("nan"), float("inf")
    with pytest.raises(ValueError, match=r"features of 2 of 4 images of the test set are NaN or infinite: b, d$"):
        check_finite_features(embeddings, names, "test")


def test_classes_without_a_training_image_are_named(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "dinov2"):
        warn_of_unseen_classes([0, 1, 1], ("a", "b"))
        assert caplog.text == ""
        warn_of_unseen_classes([2, 0, 2], ("a", "b", "c", "d"))
    assert "no training image shows b, d: it will never be predicted" in caplog.text


@pytest.mark.parametrize(
    ("aggregation", "num_classes", "told"), [("topk_mean", 3, True), ("topk_mean", 2, False), ("mean", 3, False)]
)
def test_a_part_aggregation_that_does_nothing_is_told(
    caplog: pytest.LogCaptureFixture, aggregation: str, num_classes: int, told: bool
) -> None:
    with caplog.at_level(logging.WARNING, "dinov2"):
        warn_of_idle_aggregation(aggregation, ("a", "b", "c")[:num_classes])
    assert ("part_aggregation=topk_mean has no effect with 3 classes" in caplog.text) == told
