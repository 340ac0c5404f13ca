"""Nearest neighbours as classifiers: votes, scores, the choice of their number, few-shot banks."""

import json
import logging
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from eval_stand_ins import Backbone, MemoryDataset, random_set
from torch import Tensor, nn

from dinov2.eval import knn as neighbour_votes
from dinov2.eval.features import Features
from dinov2.eval.knn import (
    KnnSettings,
    choose_k,
    eval_knn,
    knn_votes,
    neighbour_probabilities,
    score_features,
)
from dinov2.eval.metrics.classification import FloatArray, LevelScores, MetricValue
from dinov2.eval.neighbours import nearest_neighbours
from dinov2.eval.results import PREDICTIONS_FILE, RESULTS_FILE, EvaluationResults


def knn_settings(nb_knn: tuple[int, ...] = (10, 20, 100, 200), temperature: float = 0.07, **others) -> KnnSettings:
    return KnnSettings(nb_knn=nb_knn, temperature=temperature, num_resamples=0, **others)


def value(level: LevelScores, name: str) -> float:
    return level.metrics[name].value


def reference_features(values: dict) -> tuple[Features, Features]:
    def features(name: str) -> Features:
        embeddings, labels = values[f"{name}_features"], values[f"{name}_labels"]
        names = [f"{name} {index}" for index in range(len(labels))]
        return Features(embeddings, labels, names, names)

    return features("train"), features("test")


def classes(count: int) -> tuple[str, ...]:
    return tuple(str(index) for index in range(count))


def test_reference_probabilities_and_neighbours(reference) -> None:
    values = reference("eval_fixture.pt")["knn"]
    similarities, rows = nearest_neighbours(values["test_features"], values["train_features"], 200, bank_chunk=700)
    labels = values["train_labels"][rows]
    torch.testing.assert_close(similarities[:, :20], values["top_sims"], rtol=0, atol=1e-5)
    assert torch.equal(labels[:, :20], values["top_labels"])
    for k, expected in values["probabilities"].items():
        votes = knn_votes(similarities, labels, k, values["T"], 5)
        torch.testing.assert_close(votes, expected, rtol=0, atol=1e-5)
        assert torch.equal(votes.argmax(dim=1), values["predictions"][k])


def test_reference_accuracy(reference) -> None:
    values = reference("eval_fixture.pt")["knn"]
    bank, queries = reference_features(values)
    settings = knn_settings(temperature=values["T"])
    results = score_features(bank, queries, classes(5), settings)
    assert results.chosen == f"k={choose_k(bank, 5, settings)}", "the evaluated images have no say"
    assert results.settings["chosen_by"] == "balanced accuracy over the training images, each without its own part"
    assert list(results.scores) == ["k=10", "k=20", "k=100", "k=200"]
    for k, expected in values["probabilities"].items():
        scores = results.scores[f"k={k}"]
        for name, kind in (("accuracy", "micro"), ("balanced_accuracy", "macro")):
            assert value(scores.image, name) == pytest.approx(values["accuracy"][f"{kind}_k{k}"]["top-1"], abs=1e-5)
        assert scores.image == scores.part  # every image is its own part
        if results.chosen == f"k={k}":
            shares = expected / expected.sum(dim=1, keepdim=True)
            torch.testing.assert_close(
                torch.from_numpy(results.predictions.probabilities).float(), shares, rtol=0, atol=1e-5
            )


def test_reference_few_shot_accuracy(reference) -> None:
    values = reference("eval_fixture.pt")["knn"]
    settings = knn_settings(temperature=values["T"], n_per_class_list=(-1, 5, 50), n_tries=2)
    results = score_features(*reference_features(values), classes(5), settings)
    expected = {f"k={k}": [accuracy] for k, accuracy in values["few_shot_accuracy"]["full/1"].items()}
    for n in (5, 50):
        for k in values["few_shot_k_lists"][f"{n} per class"]["0"]:
            expected[f"n={n} k={k}"] = [values["few_shot_accuracy"][f"{n} per class/{seed}"][k] for seed in (0, 1)]
    assert list(results.scores) == list(expected)
    for variant, accuracies in expected.items():
        mean = sum(accuracies) / len(accuracies)
        assert value(results.scores[variant].image, "accuracy") == pytest.approx(mean, abs=1e-5)
        if len(accuracies) > 1:
            tries = results.extra["few_shot"][variant]["image"]["accuracy"]
            assert tries["values"] == pytest.approx(accuracies, abs=1e-5)
            assert tries["std"] == pytest.approx(abs(accuracies[0] - accuracies[1]) / math.sqrt(2), abs=1e-5)


def slow_votes(queries: Tensor, bank: Tensor, labels: list[int], k: int, largest: int, num_classes: int) -> Tensor:
    """The definition at temperature 0.5, one query and one neighbour at a time."""
    votes = torch.zeros(len(queries), num_classes)
    for index, query in enumerate(queries):
        similarities = [float(query @ row) for row in bank]
        order = sorted(range(len(bank)), key=lambda row: (-similarities[row], row))[:largest]
        total = sum(math.exp(similarities[row] / 0.5) for row in order)
        for row in order[:k]:
            votes[index, labels[row]] += math.exp(similarities[row] / 0.5) / total
    return votes


def test_votes_equal_the_definition_with_ties() -> None:
    generator = torch.Generator().manual_seed(0)
    queries, bank = (torch.randint(-1, 2, (count, 3), generator=generator).float() for count in (9, 40))
    labels = torch.randint(0, 4, (40,), generator=generator)
    similarities, rows = nearest_neighbours(queries, bank, 12, query_chunk=4, bank_chunk=11)
    for k in (1, 5, 12):
        votes = knn_votes(similarities, labels[rows], k, 0.5, 4)
        torch.testing.assert_close(votes, slow_votes(queries, bank, labels.tolist(), k, 12, 4))
    assert not torch.allclose(knn_votes(similarities, labels[rows], 5, 0.5, 4).sum(dim=1), torch.ones(9))


def two_colours(groups: list[str], labels: list[int], name: str, wrong: int | None = None) -> MemoryDataset:
    """Red images of class 0 and blue ones of class 1; one image may have the other's colour."""
    colours = [(255, 0, 0) if (label == 0) != (index == wrong) else (0, 0, 255) for index, label in enumerate(labels)]
    return MemoryDataset(colours, labels, groups, ("good", "defect"), name=name)


def test_hand_made_parts(tmp_path: Path) -> None:
    train = two_colours(["p", "p", "q", "q"], [0, 0, 1, 1], "bank")
    # Part a is good; b has a defect on one image; c has one too, but looks good; d is good.
    val = two_colours(["a", "a", "b", "b", "c", "d"], [0, 0, 0, 1, 1, 0], "new", wrong=4)
    results = eval_knn(
        Backbone(), train, val, nb_knn=[2], num_workers=0, output_dir=tmp_path / "knn", settings={"image_size": 4}
    )
    (scores,) = results.scores.values()
    assert (scores.image.count, scores.part.count) == (6, 4)
    assert value(scores.image, "auroc") == pytest.approx((1 + 1 / 2) / 2)  # c's image ties with the four good ones
    assert (scores.image.confusion, scores.part.confusion) == (((4, 0), (1, 1)), ((2, 0), (1, 1)))
    assert scores.part.metrics["accuracy"].low < 3 / 4 < scores.part.metrics["accuracy"].high
    assert results.extra == {"num_parts_in_both": 0, "num_parts_of_several_labels": 1}
    assert results.chosen == "k=2"
    written = json.loads((tmp_path / "knn" / RESULTS_FILE).read_text())
    assert written == results.as_dict()
    assert EvaluationResults.from_dict(written).scores == results.scores
    assert written["weights"] == {"path": "", "random": True}
    assert written["settings"]["image_size"] == 4
    assert (written["datasets"]["train"]["num_parts"], written["datasets"]["val"]["num_images"]) == (2, 6)
    lines = (tmp_path / "knn" / PREDICTIONS_FILE).read_text().splitlines()
    assert len(lines) == 7
    assert lines[5].startswith("new/4.png,c,defect,good,0,")


def test_fewer_neighbours_are_scored_by_shares_of_their_votes() -> None:
    """Class 1 has 0.55 of image 0's two nearest votes and 0.60 of image 1's, but the plain sums are the other way."""
    bank = Features(torch.eye(6), torch.tensor([1, 0, 1, 0, 0, 0]), list("abcdef"), list("abcdef"))
    queries = torch.tensor([[1.0, 0.8, 0, 0, 0, 0], [0, 0, 1.0, 0.6, 0.59, 0.58]])
    similarities, rows = nearest_neighbours(queries, bank.embeddings, 6)
    votes = knn_votes(similarities, bank.labels[rows], 2, 1.0, 2)
    assert votes[0, 1] > votes[1, 1]
    val = Features(queries, torch.tensor([0, 1]), ["x", "y"], ["x", "y"])
    results = score_features(bank, val, ("good", "defect"), knn_settings((2, 6), temperature=1.0))
    assert value(results.scores["k=2"].image, "auroc") == 1.0


def test_bank_smaller_than_k(caplog: pytest.LogCaptureFixture) -> None:
    train, val = random_set(50, 3, seed=0, name="a"), random_set(9, 3, seed=1, name="b")
    with caplog.at_level(logging.INFO, "dinov2"):
        results = eval_knn(Backbone(), train, val, num_workers=0)
    assert list(results.scores) == ["k=10", "k=20", "k=50"]
    assert "clipped to the 50 images that can vote: [10, 20, 50]" in caplog.text


def test_few_shot_bank_smaller_than_k(caplog: pytest.LogCaptureFixture) -> None:
    """Three images of the only class that occurs are all that ten per class can give."""
    train = MemoryDataset([(1, 2, 3)] * 3, [1] * 3, classes=("good", "defect"), name="a")
    val = random_set(8, 2, seed=1, name="b")
    val.classes = train.classes
    with caplog.at_level(logging.INFO, "dinov2"):
        results = eval_knn(Backbone(), train, val, n_per_class_list=[10], num_workers=0)
    assert list(results.scores) == ["n=10 k=3"]
    assert "nb_knn [10] clipped to the 3 images that can vote: [3]" in caplog.text
    assert value(results.scores["n=10 k=3"].image, "accuracy") == 0.5
    assert results.chosen == ""
    assert results.predictions is None


def test_two_classes_of_three_images_each() -> None:
    train = two_colours(["p", "q", "r", "s", "t", "u"], [0, 0, 0, 1, 1, 1], "bank")
    val = two_colours(["a", "b", "c", "d", "e", "f"], [0, 0, 0, 1, 1, 1], "new")
    results = eval_knn(Backbone(), train, val, num_workers=0, n_per_class_list=[-1, 1, 3])
    assert list(results.scores) == ["k=6", "n=1 k=1", "n=3 k=3"]
    for scores in results.scores.values():
        assert value(scores.image, "balanced_accuracy") == value(scores.part, "auroc") == 1.0
        assert value(scores.part, "escape_rate_at_0.1") == 0.0


def test_one_class_only(caplog: pytest.LogCaptureFixture) -> None:
    train = MemoryDataset([(1, 2, 3)] * 3, [0] * 3, classes=("good", "defect"), name="a")
    val = MemoryDataset([(3, 2, 1)] * 2, [0] * 2, classes=("good", "defect"), name="b")
    (scores,) = eval_knn(Backbone(), train, val, num_workers=0).scores.values()
    assert "no training image shows defect: it will never be predicted" in caplog.text
    for level in (scores.image, scores.part):
        assert level.metrics.keys() == {"accuracy", "balanced_accuracy"}
        assert value(level, "accuracy") == value(level, "balanced_accuracy") == 1.0
        assert level.confusion == ((2, 0), (0, 0))


def test_a_part_of_both_sets_does_not_vote_on_itself_when_parts_are_left_out(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Part q looks good but is labelled a defect: its own image would say so, the others cannot."""
    train = two_colours(["p", "q", "r"], [0, 1, 1], "a", wrong=1)
    val = two_colours(["q"], [1], "b", wrong=0)
    seen = eval_knn(Backbone(), train, val, nb_knn=[2], num_workers=0)
    unseen = eval_knn(Backbone(), train, val, nb_knn=[1], leave_one_part_out=True, num_workers=0)
    assert seen.predictions.probabilities[0, 1] == pytest.approx(0.5)
    assert unseen.predictions.probabilities[0, 1] == 0
    assert caplog.text.count("the scores are too good") == 1
    assert unseen.extra["num_parts_in_both"] == 1
    eval_knn(Backbone(), train, two_colours(["z"], [1], "b"), leave_one_part_out=True, num_workers=0)
    assert "leave_one_part_out has no effect" in caplog.text


def test_a_bank_of_one_part_cannot_choose_and_has_no_voters_without_it() -> None:
    train = two_colours(["p", "p", "p", "p"], [0, 0, 1, 1], "a")
    results = eval_knn(Backbone(), train, two_colours(["r"], [1], "b"), nb_knn=[1, 2], num_workers=0)
    assert results.chosen == "k=1"
    assert "single part" in results.settings["chosen_by"]
    with pytest.raises(ValueError, match="no image that can vote; leaving one part out needs at least two parts"):
        eval_knn(Backbone(), train, leave_one_part_out=True, num_workers=0)


def test_the_part_aggregation_and_the_resamples_are_those_asked_for() -> None:
    train, val = random_set(40, 2, seed=0, name="a"), random_set(40, 2, seed=1, photos_per_part=4, name="b")
    asked = [
        eval_knn(Backbone(), train, val, nb_knn=[5], num_workers=0, **options)
        for options in (
            {"part_aggregation": "max"},
            {"part_aggregation": "topk_mean", "part_top_k": 1},
            {"part_aggregation": "mean", "num_resamples": 0},
        )
    ]
    maximum, top1, mean = (results.scores["k=5"].part.metrics for results in asked)
    assert maximum == top1
    assert mean["auroc"] != maximum["auroc"]
    assert mean["accuracy"] == MetricValue(value=mean["accuracy"].value)
    assert asked[2].settings["part_aggregation"] == "mean"
    assert asked[2].settings["num_resamples"] == 0


class NeverAsked(nn.Module):
    """Must not see an image."""

    def forward(self, images: Tensor) -> Tensor:
        raise AssertionError("features were computed")


def test_features_that_are_not_finite_name_their_images() -> None:
    bad = Features(torch.tensor([[1.0], [float("inf")]]), torch.tensor([0, 1]), ["p", "q"], ["0.png", "1.png"])
    good = Features(torch.ones(2, 1), bad.labels, bad.group_ids, bad.paths)
    with pytest.raises(ValueError, match=r"1 of 2 images of the validation set are NaN or infinite: 1\.png"):
        score_features(good, bad, classes(2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"temperature": float("nan")}, "temperature must be above 0"),
        ({"nb_knn": ()}, "nb_knn must be one or more numbers from 1 up"),
        ({"nb_knn": (-3, 5)}, "nb_knn must be one or more numbers from 1 up"),
        ({"val_dataset": None}, "without a validation set needs leave_one_part_out"),
        ({"n_per_class_list": ()}, "numbers from 1 up, or -1"),
        ({"n_tries": 0}, "n_tries must be at least 1"),
        ({"part_aggregation": "median"}, "part aggregation 'median' is not one of max, mean, topk_mean"),
        ({"part_top_k": 0}, "top_k of the part aggregation must be at least 1"),
        ({"num_resamples": -1}, "num_resamples must be at least 0, found -1"),
    ],
)
def test_bad_settings_are_noticed_before_an_image_is_read(options: dict, message: str) -> None:
    dataset = MemoryDataset([(1, 2, 3)], [0])
    with pytest.raises(ValueError, match=message):
        eval_knn(NeverAsked(), **({"train_dataset": dataset, "val_dataset": dataset} | options))


def random_bank(num_images: int = 60, photos_per_part: int = 3, seed: int = 0) -> Features:
    generator = torch.Generator().manual_seed(seed)
    parts = torch.arange(num_images) // photos_per_part
    labels = parts % 3
    embeddings = torch.randn(num_images, 6, generator=generator) + 1.5 * F.one_hot(labels, 6)
    names = [f"{index}.png" for index in range(num_images)]
    return Features(F.normalize(embeddings, dim=1), labels, [f"part {part}" for part in parts], names)


def slow_balanced_accuracy(bank: Features, k: int, largest: int, temperature: float) -> float:
    """The definition: part by part, the rest of the bank votes on its images."""
    hits: dict[int, list[bool]] = {}
    for index, part in enumerate(bank.group_ids):
        others = torch.tensor([row for row, other in enumerate(bank.group_ids) if other != part])
        similarities, order = (bank.embeddings[others] @ bank.embeddings[index]).sort(descending=True)
        labels = bank.labels[others][order]
        votes = knn_votes(similarities[None, :largest], labels[None, :largest], k, temperature, 3)
        label = int(bank.labels[index])
        hits.setdefault(label, []).append(int(votes.argmax()) == label)
    return float(np.mean([np.mean(values) for values in hits.values()]))


@pytest.mark.parametrize("seed", range(4))
def test_the_chosen_number_is_best_by_the_definition(seed: int) -> None:
    bank = random_bank(seed=seed)
    ks = (1, 4, 15, 57)
    balanced = {k: slow_balanced_accuracy(bank, k, 57, 0.2) for k in ks}
    chosen = choose_k(bank, 3, KnnSettings(nb_knn=ks, temperature=0.2))
    assert chosen == max(ks, key=lambda k: balanced[k])
    assert len(set(balanced.values())) > 1


def test_numbers_that_a_bank_without_a_part_lacks_stand_for_all_it_has() -> None:
    bank = random_bank(6)
    assert choose_k(bank, 3, KnnSettings(nb_knn=(3, 5))) == 3  # three others can vote
    assert choose_k(bank, 3, KnnSettings(nb_knn=(5, 4))) == 4


@pytest.mark.parametrize("most", [2, 10, 59])
def test_a_large_bank_is_evaluated_by_whole_parts(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Features] = []

    def record(bank: Features, queries: Features, num_classes: int, settings: KnnSettings) -> dict[int, FloatArray]:
        asked.append(queries)
        return neighbour_probabilities(bank, queries, num_classes, settings)

    monkeypatch.setattr(neighbour_votes, "MAX_IMAGES_FOR_CHOICE", most)
    monkeypatch.setattr(neighbour_votes, "neighbour_probabilities", record)
    bank = random_bank()
    for seed in (0, 0, 1):
        choose_k(bank, 3, KnnSettings(nb_knn=(1, 2), seed=seed))
    first, again, other = asked
    assert len(first) == max(3, most // 3 * 3)
    assert all(first.group_ids.count(part) == 3 for part in first.group_ids)
    assert first.paths == again.paths
    assert first.paths != other.paths
