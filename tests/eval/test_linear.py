"""The whole linear evaluation on small sets, and what can be wrong with them."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from eval_stand_ins import MemoryDataset, TokenBackbone, noisy, random_set, two_sets

from dinov2.eval import linear_training as linear_run
from dinov2.eval.linear import LinearProtocol, eval_linear
from dinov2.eval.linear_classifiers import FeatureKind, LastBlocks, choose
from dinov2.eval.linear_training import TrainingRun
from dinov2.eval.results import EvaluationResults

SHORT = LinearProtocol(
    learning_rates=(0.1, 0.01), epochs=2, epoch_length=15, batch_size=16, num_resamples=20, n_last_blocks=(1, 4)
)


def evaluate(*args: Any, protocol: LinearProtocol = SHORT, **kwargs: Any) -> EvaluationResults:
    return eval_linear(TokenBackbone(), *args, protocol, num_workers=0, **kwargs)


def relabelled(dataset: MemoryDataset, labels: list[int], classes: tuple[str, ...]) -> MemoryDataset:
    return MemoryDataset(dataset.colours, labels, dataset.groups, classes, name=dataset.name)


def test_results_of_all_classifiers_and_of_the_best(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train, val = two_sets()
    test = random_set(24, 2, seed=2, photos_per_part=2, name="test")
    with caplog.at_level(logging.INFO, logger="dinov2"):
        results = evaluate(train, val, test_datasets={"test": test}, output_dir=tmp_path, settings={"arch": "stand-in"})
    accuracy = {name: scores.image.metrics["accuracy"].value for name, scores in results.scores.items()}
    on_test = f"{results.chosen} on test"
    on_val = {name: value for name, value in accuracy.items() if name != on_test}
    assert len(on_val) == len(SHORT.grid) == 8
    assert on_val[results.chosen] == max(on_val.values()), "of equal AUROC, the best balanced accuracy"
    assert results.chosen == next(name for name, value in on_val.items() if value == max(on_val.values()))
    assert accuracy[results.chosen] > 0.8
    for name, scores in results.scores.items():
        has_interval = scores.image.metrics["accuracy"].low is not None
        assert has_interval == (name in (results.chosen, on_test)), "intervals take time: only of the chosen one"
    assert (results.scores[on_test].image.count, results.scores[on_test].part.count) == (24, 12)
    assert "only a test set gives honest figures" in results.settings["chosen_by"]
    assert (results.settings["arch"], results.settings["epoch_length"]) == ("stand-in", 15)
    assert set(results.datasets) == {"train", "val", "test"}
    assert results.weights == {"path": "", "random": True}
    written = json.loads((tmp_path / "results.json").read_text())
    assert EvaluationResults.from_dict(written).as_dict() == results.as_dict()
    table = caplog.messages[-1]
    assert "chosen by auroc on the validation set itself" in table
    assert f"{results.chosen}, per part" in table
    assert len((tmp_path / "predictions.csv").read_text().splitlines()) == 21
    assert len((tmp_path / "predictions_test.csv").read_text().splitlines()) == 25
    records = [json.loads(line) for line in (tmp_path / "linear_metrics.jsonl").read_text().splitlines()]
    assert [record["iteration"] for record in records] == [15, 30]
    assert records[-1]["auroc"] == results.scores[results.chosen].image.metrics["auroc"].value


def test_the_head_gives_the_predictions(tmp_path: Path) -> None:
    train, val = two_sets(3)
    results = evaluate(train, val, output_dir=tmp_path)
    head = torch.load(tmp_path / "linear_head.pth", weights_only=True)
    assert sorted(head) == ["avgpool", "bias", "blocks", "classes", "weight"]
    assert head["classes"] == ["class 0", "class 1", "class 2"]
    images = torch.stack([val[index][0] for index in range(len(val))])
    rows = LastBlocks(TokenBackbone(), 4).eval()(images)
    features = FeatureKind(head["blocks"], head["avgpool"]).select(rows, 6)
    expected = torch.nn.functional.linear(features, head["weight"], head["bias"]).softmax(dim=1)
    assert results.predictions is not None
    np.testing.assert_allclose(results.predictions.probabilities, expected.numpy(), atol=1e-5)


class StoppedError(Exception):
    """Stands for a killed process."""


@pytest.mark.parametrize("augment", [False, True])
def test_a_resumed_evaluation_equals_an_undisturbed_one(
    augment: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transform = {"train_transform": noisy} if augment else {}
    protocol = replace(SHORT, eval_period_iterations=6)
    whole = evaluate(*two_sets(), protocol=protocol, output_dir=tmp_path / "whole", **transform)
    real, looks = linear_run.best_of, []

    def stop_at_the_third_look(*args: Any) -> Any:
        looks.append(1)
        if len(looks) == 3:
            raise StoppedError
        return real(*args)

    monkeypatch.setattr(linear_run, "best_of", stop_at_the_third_look)
    with pytest.raises(StoppedError):
        evaluate(*two_sets(), protocol=protocol, output_dir=tmp_path / "stopped", **transform)
    assert torch.load(tmp_path / "stopped" / "linear_checkpoint.pth", weights_only=True)["trainer"]["iteration"] == 12
    resumed = evaluate(*two_sets(), protocol=protocol, output_dir=tmp_path / "stopped", **transform)
    assert resumed.as_dict() == whole.as_dict()
    for name in ("linear_head.pth", "linear_checkpoint.pth"):
        first, second = (torch.load(tmp_path / run / name, weights_only=True) for run in ("whole", "stopped"))
        assert first.pop("classes", None) == second.pop("classes", None)
        assert first.pop("settings", None) == second.pop("settings", None)
        torch.testing.assert_close(first, second, rtol=0, atol=0)
    metrics = [(tmp_path / run / "linear_metrics.jsonl").read_text() for run in ("whole", "stopped")]
    assert metrics[0] == metrics[1]


def test_a_finished_evaluation_is_not_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = evaluate(*two_sets(), output_dir=tmp_path)
    with pytest.raises(ValueError, match="cannot be resumed from, as seed is 0 there and 1 now"):
        evaluate(*two_sets(), protocol=replace(SHORT, seed=1), output_dir=tmp_path)
    other = evaluate(*two_sets(), protocol=replace(SHORT, seed=1), output_dir=tmp_path, resume=False)
    assert other.as_dict()["scores"] != first.as_dict()["scores"]
    with pytest.raises(ValueError, match="the backbone is another"):
        eval_linear(TokenBackbone(seed=1), *two_sets(), replace(SHORT, seed=1), num_workers=0, output_dir=tmp_path)
    monkeypatch.setattr(linear_run.LinearTrainer, "step", None)
    again = evaluate(*two_sets(), protocol=replace(SHORT, seed=1), output_dir=tmp_path)
    assert again.as_dict() == other.as_dict()


@pytest.mark.parametrize("file", ["linear_head.pth", "linear_checkpoint.pth"])
def test_trained_classifiers_are_evaluated_without_training(file: str, tmp_path: Path) -> None:
    train, val = two_sets()
    trained = evaluate(train, val, output_dir=tmp_path)
    judged = evaluate(None, val, classifier_fpath=tmp_path / file, output_dir=tmp_path / "judged")
    best = judged.scores[judged.chosen].image
    assert best == trained.scores[trained.chosen].image
    assert len(judged.scores) == (1 if file == "linear_head.pth" else 8)
    assert judged.settings["classifier_fpath"].endswith(file)
    assert "epochs" not in judged.settings
    assert set(judged.datasets) == {"val"}
    assert not (tmp_path / "judged" / "linear_checkpoint.pth").exists()
    with pytest.raises(ValueError, match="for backbones of width 6, this one has 12"):
        eval_linear(TokenBackbone(embed_dim=12), None, val, SHORT, num_workers=0, classifier_fpath=tmp_path / file)
    with pytest.raises(ValueError, match="are not those of the classifiers"):
        evaluate(None, two_sets(3)[1], classifier_fpath=tmp_path / file)


def test_features_are_computed_once_without_augmentation_and_every_step_with() -> None:
    model = TokenBackbone()
    protocol = replace(SHORT, epochs=1, epoch_length=3)
    eval_linear(model, *two_sets(), protocol, num_workers=0)
    assert sum(model.forwards) == 30 + 20
    model.forwards.clear()
    eval_linear(model, *two_sets(), protocol, num_workers=0, train_transform=noisy)
    assert sum(model.forwards) == 20 + 3 * 16


def test_the_epoch_is_a_pass_unless_that_is_too_short(caplog: pytest.LogCaptureFixture) -> None:
    def epoch_length(num_images: int, batch: int, **protocol: int) -> int:
        labels = np.zeros(num_images, dtype=np.int64)
        run = TrainingRun(protocol=LinearProtocol(**protocol), labels=labels, num_classes=2, global_batch_size=batch)
        return run.epoch_length

    assert epoch_length(1_281_167, 1024) == 1252
    assert epoch_length(812, 128) == 400
    assert epoch_length(812, 128, epoch_length=3) == 3
    with caplog.at_level(logging.INFO, logger="dinov2"):
        evaluate(*two_sets(), protocol=replace(SHORT, epoch_length=3))
    assert "8 linear classifiers: 2 epochs of 3 iterations of 16 images (3.2 passes over 30 images)" in caplog.text


def test_class_mapping_restricts_and_renames_the_classes(tmp_path: Path) -> None:
    train, val = two_sets(4, num_train=60)
    first_of_val = [index for index, label in enumerate(val.labels) if label in (3, 1)]
    subset = MemoryDataset(
        [val.colours[index] for index in first_of_val],
        [(3, 1).index(val.labels[index]) for index in first_of_val],
        classes=("third", "first"),
    )
    np.save(tmp_path / "mapping.npy", np.array([3, 1]))
    with pytest.raises(ValueError, match=r"classes of the test set, .* a class mapping can say"):
        evaluate(train, val, test_datasets={"test": subset})
    results = evaluate(
        train,
        val,
        test_datasets={"test": subset},
        class_mapping_fpaths={"test": tmp_path / "mapping.npy"},
        output_dir=tmp_path,
    )
    header, *lines = (tmp_path / "predictions_test.csv").read_text().splitlines()
    assert header.endswith("probability of third,probability of first")
    assert len(lines) == len(subset)
    assert "auroc" in results.scores[f"{results.chosen} on test"].image.metrics, "two classes are left"
    assert results.predictions is not None
    whole = results.predictions.probabilities[first_of_val][:, [3, 1]]
    expected = whole / whole.sum(axis=1, keepdims=True)
    shown = np.array([[float(cell) for cell in line.split(",")[-2:]] for line in lines])
    np.testing.assert_allclose(shown, expected, rtol=1e-5)
    on_val = evaluate(train, subset, class_mapping_fpaths={"val": tmp_path / "mapping.npy"})
    assert on_val.classes == ("third", "first")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (np.array([0, 4]), r"must hold classes in \[0, 2\), found \[0, 4\]"),
        (np.array([0.5, 1]), "must hold integers"),
        (np.array([1, 1]), "names a class twice"),
        (np.array([0]), "the class mapping has 1 classes, the test set has 2"),
        ("0 1", r"is not a .npy file of integers"),
    ],
)
def test_class_mappings_that_are_wrong(content: Any, message: str, tmp_path: Path) -> None:
    if isinstance(content, str):
        (tmp_path / "mapping.npy").write_text(content)
    else:
        np.save(tmp_path / "mapping.npy", content)
    train, val = two_sets()
    with pytest.raises(ValueError, match=message):
        evaluate(train, val, test_datasets={"test": val}, class_mapping_fpaths={"test": tmp_path / "mapping.npy"})
    with pytest.raises(ValueError, match="a class mapping for 'tests', but the sets are val"):
        evaluate(train, val, class_mapping_fpaths={"tests": tmp_path / "mapping.npy"})


def test_two_classes_with_three_images_each() -> None:
    dark, bright = (0, 0, 0), (255, 255, 255)
    colours, labels = [dark, bright] * 3, [0, 1] * 3
    train = MemoryDataset(colours, labels, [f"t{i}" for i in range(6)], ("good", "defect"))
    val = MemoryDataset(colours, labels, [f"v{i}" for i in range(6)], ("good", "defect"))
    results = evaluate(train, val)
    figures = results.scores[results.chosen].image.metrics
    assert figures["accuracy"].value == figures["auroc"].value == 1.0


def test_classes_that_are_absent_somewhere(caplog: pytest.LogCaptureFixture) -> None:
    train, val = two_sets()
    good = relabelled(val, [0] * len(val), val.classes)
    results = evaluate(train, good)
    assert "auroc" not in results.scores[results.chosen].image.metrics
    assert results.scores[results.chosen].image.metrics["accuracy"].value > 0.4
    with pytest.raises(ValueError, match="auroc needs two classes that both occur in the validation set; it shows 1"):
        evaluate(train, good, protocol=replace(SHORT, val_metric="auroc"))
    three = ("class 0", "class 1", "class 2")
    many = relabelled(train, list(train.labels), three)
    evaluate(many, relabelled(val, [2] * len(val), three), protocol=replace(SHORT, epochs=1))
    assert "no training image shows class 2: it will never be predicted" in caplog.text


def test_parts_in_several_sets_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    train, val = two_sets()
    assert evaluate(train, val).extra["num_parts_in_both"] == 0
    assert not caplog.records
    results = evaluate(train, train, test_datasets={"test": val, "again": train})
    assert results.extra["num_parts_in_both"] == 15
    assert "15 parts are in both the training and the validation set" in caplog.text
    assert "15 parts are in both the training or the validation set and again" in caplog.text
    assert "validation set and test" not in caplog.text


def test_missing_labels_and_differing_classes_are_refused() -> None:
    train, val = two_sets()
    with pytest.raises(ValueError, match="1 of 2 images of the test set have no label"):
        evaluate(train, val, test_datasets={"test": MemoryDataset([(0, 0, 0)] * 2, [0, None], classes=val.classes)})
    for name in ("", "train", "val", "a/b"):
        with pytest.raises(ValueError, match=f"a test set cannot be named {name!r}"):
            evaluate(train, val, test_datasets={name: val})
    with pytest.raises(ValueError, match="training images of at least two classes, found only 'class 0'"):
        evaluate(relabelled(train, [0] * len(train), train.classes), val)
    with pytest.raises(ValueError, match="without a training set, trained classifiers"):
        evaluate(None, val)


def test_balanced_weights_raise_the_recall_of_the_rare_class() -> None:
    rare = [int(index % 10 == 0) for index in range(60)]
    sets = [random_set(60, 2, seed=seed, name=f"set {seed}") for seed in (0, 1)]
    train, val = (relabelled(dataset, rare, dataset.classes) for dataset in sets)  # colours say nothing
    recalls = {}
    for weighting in ("none", "balanced"):
        protocol = replace(SHORT, learning_rates=(1.0,), epoch_length=100, class_weighting=weighting)
        results = evaluate(train, val, protocol=protocol)
        recalls[weighting] = results.scores[results.chosen].image.metrics["recall"].value
    assert recalls["balanced"] > recalls["none"] + 0.2


def test_classifiers_that_diverge_are_left_out() -> None:
    values = {
        name: {"auroc": 1.0, "accuracy": 0.5 + (name != "a") / 5, "balanced_accuracy": ord(name)} for name in "abc"
    }
    assert choose(values, "accuracy") == "b"  # of equal ones the first, as published
    assert choose(values, "auroc") == "c"  # of equal rankings the one whose threshold lies best
    results = evaluate(*two_sets(), protocol=replace(SHORT, learning_rates=(0.1, 1e40)))
    assert len(results.extra["diverged"]) == 4
    assert not set(results.extra["diverged"]) & set(results.scores)
    with pytest.raises(ValueError, match="every classifier has diverged: lower the learning rates"):
        evaluate(*two_sets(), protocol=replace(SHORT, learning_rates=(1e40,)))


@pytest.mark.parametrize("metric", ["balanced_accuracy", "auroc", "average_precision"])
def test_the_best_is_chosen_by_the_metric_asked_for(metric: str) -> None:
    train, val = two_sets()
    hard = relabelled(val, [(int(label or 0) + (i % 7 == 0)) % 2 for i, label in enumerate(val.labels)], val.classes)
    results = evaluate(train, hard, protocol=replace(SHORT, val_metric=metric))
    values = {name: scores.image.metrics[metric].value for name, scores in results.scores.items()}
    assert values[results.chosen] == max(values.values())
    assert results.settings["chosen_by"].startswith(metric.replace("_", " "))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epoch_length": 0}, "epoch_length must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"num_resamples": -1}, "num_resamples must be at least 0"),
        ({"val_metric": "kappa"}, "val_metric 'kappa' is not one of accuracy"),
        ({"class_weighting": "some"}, "class_weighting 'some' is not one of none, balanced"),
        ({"part_aggregation": "min"}, "part aggregation 'min'"),
        ({"learning_rates": ()}, "learning rates must be one or more"),
        ({"learning_rates": (0.1, float("nan"))}, "learning rates must be one or more positive"),
        ({"n_last_blocks": (0,)}, "numbers of last blocks must be"),
        ({"learning_rates": (0.1, 0.2, 0.1)}, "learning rates hold a value twice"),
        ({"n_last_blocks": (4, 4)}, "numbers of last blocks hold a value twice"),
    ],
)
def test_protocols_that_make_no_sense(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SHORT, **change)
