"""Retrieval of the images of a part."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from eval_stand_ins import Backbone, MemoryDataset, random_set, read_csv
from slow_retrieval import slowly
from torch import Tensor, nn

from dinov2.data.datasets.base import ImageDataset
from dinov2.eval.results import EvaluationResults
from dinov2.eval.retrieval import RetrievalSettings, eval_retrieval
from dinov2.eval.retrieval.ranking import IGNORED, RELEVANT, WRONG, fit_learned_whitening

KS = (1, 2, 5)


def settings(**values: Any) -> RetrievalSettings:
    return RetrievalSettings(**{"ks": KS, "num_workers": 0, "batch_size": 7, "num_resamples": 0, **values})


def photos(
    parts: Sequence[str], seed: int = 0, name: str = "val", unreadable: frozenset[int] = frozenset()
) -> MemoryDataset:
    generator = np.random.default_rng(seed)
    colours = [tuple(int(value) for value in row) for row in generator.integers(0, 256, (len(parts), 3))]
    return MemoryDataset(colours, [None] * len(parts), parts, name=name, unreadable=unreadable)


def features_of(dataset: ImageDataset, model: nn.Module) -> Tensor:
    with torch.no_grad():
        return F.normalize(torch.cat([model(dataset[index][0][None]) for index in range(len(dataset))]), dim=1)


def slow_rows(queries: Sequence[int], features: Tensor, parts: Sequence[str]) -> list[Any]:
    """The slow measures of gallery images as queries; a query ignores itself."""
    rows = []
    for query in queries:
        kinds = [RELEVANT if part == parts[query] else WRONG for part in parts]
        kinds[query] = IGNORED
        rows.append(slowly((features @ features[query]).tolist(), kinds, KS))
    return rows


def found_within(k: int, query: int, features: Tensor, parts: Sequence[str]) -> bool:
    """Recall@k of metric learning, as it reads: is one of the k nearest others of the same part?"""
    similarities = features @ features[query]
    similarities[query] = -torch.inf
    nearest = similarities.sort(descending=True, stable=True).indices[:k].tolist()
    return any(parts[other] == parts[query] for other in nearest)


def values_of(results: EvaluationResults, level: str = "image") -> dict[str, float]:
    scores = getattr(results.scores["parts"], level)
    return {name: figure.value for name, figure in scores.metrics.items()}


def test_metrics_are_the_means_of_the_slow_definition(tmp_path: Path) -> None:
    parts = list("aaabbbbcdefghijkkllllllmn")
    val, model = photos(parts), Backbone()
    results = eval_retrieval(model, None, val, settings=settings(), output_dir=tmp_path)
    queries = [index for index, part in enumerate(parts) if parts.count(part) > 1]
    rows = slow_rows(queries, features_of(val, model), parts)
    expected = {"map": np.mean([row[0] for row in rows])}
    expected |= {f"mp@{k}": np.mean([row[1][place] for row in rows]) for place, k in enumerate(KS)}
    expected |= {f"recall@{k}": np.mean([row[2][place] for row in rows]) for place, k in enumerate(KS)}
    expected |= {
        f"hit@{k}": np.mean([found_within(k, query, features_of(val, model), parts) for query in queries]) for k in KS
    }
    assert values_of(results) == pytest.approx(expected, abs=1e-6)
    of_part = {
        part: np.mean([row[0] for query, row in zip(queries, rows, strict=True) if parts[query] == part])
        for part in "abkl"
    }
    assert values_of(results, "part")["map"] == pytest.approx(np.mean(list(of_part.values())), abs=1e-6)
    scores = results.scores["parts"]
    assert (scores.image.count, scores.part.count) == (len(queries), 4)
    assert results.extra["num_skipped_queries"] == {"parts": 10}
    assert results.extra["num_gallery"] == {"parts": 25}

    written = read_csv((tmp_path / "predictions.csv").read_text())
    assert [row["image"] for row in written] == [f"val/{query}.png" for query in queries]
    assert [row["part"] for row in written] == [parts[query] for query in queries]
    assert [float(row["score"]) for row in written] == pytest.approx([row[0] for row in rows], abs=1e-5)
    assert [int(row["first_hit"]) for row in written] == [row[3] for row in rows]
    assert [row["best_wrong_image"] for row in written] == [f"val/{row[4]}.png" for row in rows]
    read_back = EvaluationResults.from_dict(json.loads((tmp_path / "results.json").read_text()))
    assert read_back.as_dict() == results.as_dict()
    assert read_back.evaluator == "retrieval"


def test_predictions_begin_with_the_columns_of_every_evaluator(tmp_path: Path) -> None:
    """Labels are written for the reader only: the figures are those of the same images without labels."""
    colours = [(index * 20, 0, 255 - index * 30) for index in range(6)]
    labelled = MemoryDataset(colours, [1, None, 0, 1, 1, 0], list("aabbcd"), ("good", "defect"), name="val")
    results = eval_retrieval(Backbone(), None, labelled, settings=settings(), output_dir=tmp_path)
    rows = read_csv((tmp_path / "predictions.csv").read_text())
    assert list(rows[0])[:4] == ["image", "part", "label", "score"]
    assert [row["label"] for row in rows] == ["defect", "", "good", "defect"]
    unlabelled = MemoryDataset(colours, [None] * 6, list("aabbcd"), name="val")
    assert values_of(results) == values_of(eval_retrieval(Backbone(), None, unlabelled, settings=settings()))


def test_images_of_the_training_set_join_the_gallery_but_do_not_ask() -> None:
    val_parts, train_parts = list("aabc"), list("bdda")
    val, train, model = photos(val_parts), photos(train_parts, seed=1, name="train"), Backbone()
    results = eval_retrieval(model, train, val, gallery="train+val", settings=settings())
    features = torch.cat([features_of(val, model), features_of(train, model)])
    rows = slow_rows([0, 1, 2], features, val_parts + train_parts)
    assert values_of(results)["map"] == pytest.approx(np.mean([row[0] for row in rows]), abs=1e-6)
    assert results.scores["parts"].image.count == 3  # b has its other image in the training set, c has none
    assert results.extra["num_gallery"] == {"parts": 8}
    assert list(results.datasets) == ["val", "train"]
    alone = eval_retrieval(model, train, val, settings=settings())
    assert alone.scores["parts"].image.count == 2
    assert list(alone.datasets) == ["val"]


def test_a_file_named_twice_does_not_find_itself() -> None:
    val, model = photos(list("aabb")), Backbone()
    once = eval_retrieval(model, None, val, settings=settings())
    twice = eval_retrieval(model, val, val, gallery="train+val", settings=settings())
    assert values_of(twice) == values_of(once)
    assert twice.settings["num_files_named_twice"] == 4


def test_intervals_are_those_of_drawing_whole_parts() -> None:
    parts = list("aaabbcccccddee")
    val, model = photos(parts), Backbone()
    results = eval_retrieval(model, None, val, settings=settings(num_resamples=4000, seed=3))
    rows = slow_rows(range(len(parts)), features_of(val, model), parts)
    by_part: dict[str, list[float]] = {}
    for part, row in zip(parts, rows, strict=True):
        by_part.setdefault(part, []).append(row[0])
    names = sorted(by_part)
    generator = np.random.default_rng(0)
    images, of_parts = [], []
    for _ in range(4000):
        drawn = generator.choice(names, len(names))
        images.append(np.mean([value for part in drawn for value in by_part[part]]))
        of_parts.append(np.mean([np.mean(by_part[part]) for part in drawn]))
    for level, values in (("image", images), ("part", of_parts)):
        figure = getattr(results.scores["parts"], level).metrics["map"]
        assert (figure.low, figure.high) == pytest.approx(tuple(np.percentile(values, (2.5, 97.5))), abs=0.02)
        assert figure.low < figure.value < figure.high
    again = eval_retrieval(model, None, val, settings=settings(num_resamples=4000, seed=3))
    assert again.as_dict() == results.as_dict()
    alone = eval_retrieval(model, None, photos(list("aab")), settings=settings(num_resamples=50))
    figure = alone.scores["parts"].image.metrics["map"]
    assert (figure.low, figure.high) == (None, None)


def test_whitening_is_fitted_on_the_other_set_only(caplog: pytest.LogCaptureFixture) -> None:
    parts = list("aaabbcccdd")
    val, model = photos(parts), Backbone()
    other = random_set(40, 2, seed=5, photos_per_part=4, name="other")
    results = eval_retrieval(
        model, None, val, settings=settings(whitening=other, whitening_kind="learned", whitening_dim=2)
    )
    whitening = fit_learned_whitening(features_of(other, model), other.get_group_ids(), dim=2)
    rows = slow_rows(range(len(parts)), whitening(features_of(val, model)), parts)
    assert values_of(results)["map"] == pytest.approx(np.mean([row[0] for row in rows]), abs=1e-6)
    assert results.settings["whitening"] == "learned"
    assert results.datasets["whitening"]["num_images"] == 40
    assert "whitening" not in caplog.text
    eval_retrieval(model, None, val, settings=settings(whitening=val))
    assert "4 parts are in both the set of the whitening and the queries" in caplog.text


def test_a_gallery_that_was_asked_for_is_no_fault(caplog: pytest.LogCaptureFixture) -> None:
    val, model = photos(list("aabbccdd")), Backbone()
    train = random_set(40, 2, seed=5, photos_per_part=4, name="train")
    eval_retrieval(model, train, val, gallery="train+val", settings=settings(whitening=train))
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    eval_retrieval(model, val, val, gallery="train+val", settings=settings())
    assert "8 images are named twice in the gallery; each counts once" in caplog.text


def test_rankings_stand_beside_chance_statistics_and_a_random_backbone(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "dinov2")
    val = photos([f"{index // 2}" for index in range(24)] + ["alone"])
    results = eval_retrieval(
        Backbone(), None, val, settings=settings(num_resamples=200), random_backbone=Backbone(seed=9)
    )
    assert list(results.yardsticks) == ["chance", "image statistics", "random backbone"]
    chance = {name: metric.value for name, metric in results.yardsticks["chance"].image.metrics.items()}
    assert chance["hit@1"] == pytest.approx(1 / 24)
    assert chance["recall@5"] == pytest.approx(5 / 24)
    assert [(one.yardstick, one.level) for one in results.comparisons] == [
        (name, level) for name in results.yardsticks for level in ("image", "part")
    ]
    assert {one.verdict for one in results.comparisons} == {"not distinguishable"}, "colours are drawn at random"
    assert "per query (24)" in caplog.messages[-1]
    assert "parts: 1 of 25 queries have nothing to find and are left out" in caplog.messages[-1]
    two = eval_retrieval(Backbone(), None, photos(list("aabb")), settings=settings(num_resamples=20))
    assert {one.verdict for one in two.comparisons} == {"too few parts to tell (2 that ask)"}


@pytest.mark.parametrize(
    ("dataset", "arguments", "message"),
    [
        (photos("abc"), {}, "no part of the validation set has a second image in the gallery"),
        (photos("aab"), {"gallery": "all"}, "gallery 'all' is not one of val, train"),
        (photos("aab"), {"gallery": "train+val"}, "needs a training set"),
        (photos("aab", unreadable=frozenset([1])), {}, r"val/1\.png: truncated"),
        (photos([]), {}, "no part of the validation set"),
    ],
)
def test_bad_input(dataset: MemoryDataset, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        eval_retrieval(Backbone(), None, dataset, settings=settings(), **arguments)
