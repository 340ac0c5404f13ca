import json
import logging
import math
from pathlib import Path

import pytest
import torch
from eval_stand_ins import Backbone, MemoryDataset, random_set
from torch import Tensor

from dinov2.eval.features import Features
from dinov2.eval.knn import RESULTS_FILE, clip_nb_knn, eval_knn, knn_votes, score_features
from dinov2.eval.neighbours import nearest_neighbours
from dinov2.eval.results import KnnResults


def reference_features(values: dict, subset: Tensor | slice = slice(None)) -> tuple[Features, Features]:
    def features(name: str, rows: Tensor | slice) -> Features:
        embeddings, labels = values[f"{name}_features"][rows], values[f"{name}_labels"][rows]
        names = [f"{name} {index}" for index in range(len(labels))]
        return Features(embeddings, labels, names, names)

    return features("train", subset), features("test", slice(None))


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
    results = score_features(*reference_features(values), classes(5), temperature=values["T"])
    assert [scores.k for scores in results.scores] == [10, 20, 100, 200]
    for scores in results.scores:
        assert scores.image.accuracy == pytest.approx(values["accuracy"][f"micro_k{scores.k}"]["top-1"], abs=1e-5)
        assert scores.image.balanced_accuracy == pytest.approx(
            values["accuracy"][f"macro_k{scores.k}"]["top-1"], abs=1e-5
        )
        assert scores.image == scores.part  # every image is its own part


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("per_class", [1, 5])
def test_reference_few_shot_banks(reference, seed: int, per_class: int) -> None:
    values = reference("eval_fixture.pt")["knn"]
    subset = values["few_shot_indices"][f"n{per_class}_seed{seed}"]
    expected = values["few_shot_accuracy"].get(f"{per_class} per class/{seed}")
    results = score_features(
        *reference_features(values, subset), classes(5), nb_knn=(per_class,), temperature=values["T"]
    )
    if expected is None:
        nearest = (values["test_features"] @ values["train_features"][subset].T).argmax(dim=1)
        hits = values["train_labels"][subset][nearest] == values["test_labels"]
        assert results.best.image.accuracy == pytest.approx(hits.float().mean().item())
    else:
        assert results.best.image.accuracy == pytest.approx(expected[per_class], abs=1e-5)


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
    # Part a is good; b has a defect on one photo; c has one too, but looks good; d is good.
    val = two_colours(["a", "a", "b", "b", "c", "d"], [0, 0, 0, 1, 1, 0], "new", wrong=4)
    results = eval_knn(
        Backbone(), train, val, nb_knn=[2], num_workers=0, output_dir=tmp_path / "knn", weights="here.pth"
    )
    (scores,) = results.scores
    assert (scores.image.count, scores.part.count) == (6, 4)
    assert scores.image.accuracy == pytest.approx(5 / 6)
    assert scores.image.balanced_accuracy == pytest.approx((1 + 1 / 2) / 2)
    assert scores.image.auroc == pytest.approx((1 + 1 / 2) / 2)  # c's photo ties with the four good ones
    assert scores.part.accuracy == pytest.approx(3 / 4)
    assert scores.part.balanced_accuracy == pytest.approx((1 + 1 / 2) / 2)
    assert scores.part.auroc == pytest.approx(3 / 4)
    assert (results.num_train_images, results.num_train_parts) == (4, 2)
    assert (results.num_val_parts_in_train, results.num_val_parts_mixed) == (0, 1)
    written = json.loads((tmp_path / "knn" / RESULTS_FILE).read_text())
    assert written == results.as_dict()
    assert KnnResults.from_dict(written) == results
    assert written["weights"] == "here.pth"
    assert written["best_k"] == 2
    assert "top5" not in written["scores"][0]["image"]


def test_fewer_neighbours_are_scored_by_shares_of_their_votes() -> None:
    """Class 1 has 0.55 of image 0's two nearest votes and 0.60 of image 1's, but the plain sums are the other way."""
    bank = Features(torch.eye(6), torch.tensor([1, 0, 1, 0, 0, 0]), list("abcdef"), list("abcdef"))
    queries = torch.tensor([[1.0, 0.8, 0, 0, 0, 0], [0, 0, 1.0, 0.6, 0.59, 0.58]])
    similarities, rows = nearest_neighbours(queries, bank.embeddings, 6)
    votes = knn_votes(similarities, bank.labels[rows], 2, 1.0, 2)
    assert votes[0, 1] > votes[1, 1]
    val = Features(queries, torch.tensor([0, 1]), ["x", "y"], ["x", "y"])
    results = score_features(bank, val, ("good", "defect"), nb_knn=(2, 6), temperature=1.0)
    assert results.scores[0].image.auroc == 1.0


def test_bank_smaller_than_k(caplog: pytest.LogCaptureFixture) -> None:
    train, val = random_set(50, 3, seed=0, name="a"), random_set(9, 3, seed=1, name="b")
    with caplog.at_level(logging.INFO, "dinov2"):
        results = eval_knn(Backbone(), train, val, num_workers=0)
    assert [scores.k for scores in results.scores] == [10, 20, 50]
    assert "clipped to the 50 training images: [10, 20, 50]" in caplog.text


def test_three_images_per_class() -> None:
    train, val = random_set(9, 3, seed=0, name="a"), random_set(30, 3, seed=1, name="b")
    results = eval_knn(Backbone(), train, val, num_workers=0)
    assert [scores.k for scores in results.scores] == [9]
    assert results.best.image.balanced_accuracy > 0.6
    assert results.best.image.auroc is None


def test_one_class_only() -> None:
    train = MemoryDataset([(1, 2, 3)] * 3, [0] * 3, classes=("good", "defect"), name="a")
    val = MemoryDataset([(3, 2, 1)] * 2, [0] * 2, classes=("good", "defect"), name="b")
    (scores,) = eval_knn(Backbone(), train, val, num_workers=0).scores
    assert scores.image.accuracy == 1.0
    assert scores.image.auroc is None
    assert scores.part.auroc is None


def test_class_absent_from_validation() -> None:
    train = random_set(30, 3, seed=0, name="a")
    val = MemoryDataset(train.colours[:2], [0, 1], classes=train.classes, name="b")
    (scores,) = eval_knn(Backbone(), train, val, nb_knn=[1], num_workers=0).scores
    assert scores.image.balanced_accuracy == 1.0


def test_labels_without_class_names() -> None:
    train = MemoryDataset([(255, 0, 0), (0, 255, 0)], [0, 2], name="a")
    val = MemoryDataset([(250, 0, 0), (0, 250, 0)], [0, 2], name="b")
    results = eval_knn(Backbone(), train, val, nb_knn=[1], num_workers=0)
    assert results.classes == ("0", "1", "2")
    assert results.best.image.accuracy == 1.0


def test_part_in_both_sets_is_counted_and_told(caplog: pytest.LogCaptureFixture) -> None:
    train = two_colours(["p", "q"], [0, 1], "a")
    val = two_colours(["q", "r"], [1, 0], "b")
    with caplog.at_level(logging.WARNING, "dinov2"):
        results = eval_knn(Backbone(), train, val, num_workers=0)
    assert results.num_val_parts_in_train == 1
    assert "1 parts are in both the training and the validation set, so the scores are too good: q" in caplog.text


def test_table_shows_every_k_and_marks_the_best() -> None:
    results = eval_knn(
        Backbone(), random_set(40, 2, seed=0, name="a"), random_set(20, 2, seed=1, name="b"), num_workers=0
    )
    heading, names, *rows = results.table().splitlines()
    assert "bank of 40 images (40 parts), 20 images (20 parts) classified" in heading
    assert names.split() == ["k"] + [
        word
        for level in ("image", "part")
        for name in ("accuracy", "balanced_accuracy", "auroc")
        for word in (level, name)
    ]
    assert [row.split()[0].rstrip("*") for row in rows] == ["10", "20", "40"]
    (marked,) = [row.split()[0] for row in rows if "*" in row]
    assert marked == f"{results.best.k}*"
    assert len({len(row) for row in rows}) == 1


def test_many_classes_have_top5() -> None:
    train, val = random_set(80, 8, seed=0, name="a"), random_set(16, 8, seed=1, name="b")
    best = eval_knn(Backbone(), train, val, num_workers=0).best
    assert best.image.top5 is not None
    assert best.image.top5 >= best.image.accuracy


@pytest.mark.parametrize(("name", "labels"), [("training", ([0, None], [0, 1])), ("validation", ([0, 1], [None, 1]))])
def test_missing_labels(name: str, labels: tuple[list[int | None], list[int | None]]) -> None:
    train, val = (MemoryDataset([(1, 2, 3)] * 2, values, classes=("a", "b")) for values in labels)
    with pytest.raises(ValueError, match=f"1 of 2 images of the {name} set have no label"):
        eval_knn(Backbone(), train, val, num_workers=0)


def test_classes_that_differ() -> None:
    train = MemoryDataset([(1, 2, 3)], [0], classes=("good", "defect"))
    val = MemoryDataset([(1, 2, 3)], [0], classes=("defect", "good"))
    with pytest.raises(ValueError, match=r"differ: training \['good', 'defect'\], validation \['defect', 'good'\]"):
        eval_knn(Backbone(), train, val, num_workers=0)


def test_label_outside_the_classes() -> None:
    train = MemoryDataset([(1, 2, 3)], [2], classes=("good", "defect"))
    with pytest.raises(ValueError, match="label 2 is outside the 2 classes"):
        eval_knn(Backbone(), train, train, num_workers=0)


def test_empty_sets() -> None:
    full, empty = MemoryDataset([(1, 2, 3)], [0]), MemoryDataset([], [])
    with pytest.raises(ValueError, match="training set has no images"):
        eval_knn(Backbone(), empty, full, num_workers=0)
    with pytest.raises(ValueError, match="validation set has no images"):
        eval_knn(Backbone(), full, empty, num_workers=0)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_bad_temperature(temperature: float) -> None:
    dataset = MemoryDataset([(1, 2, 3)], [0])
    with pytest.raises(ValueError, match="temperature must be above 0"):
        eval_knn(Backbone(), dataset, dataset, temperature=temperature, num_workers=0)


@pytest.mark.parametrize("nb_knn", [(), (0,), (-3, 5)])
def test_bad_numbers_of_neighbours(nb_knn: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="nb_knn must be one or more numbers from 1 up"):
        clip_nb_knn(nb_knn, 10)
