"""Drift of scores, batches, and images that are kept."""

import json
import math
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from dinov2.deploy.batching import Batcher
from dinov2.deploy.monitoring import LeastSure, ServiceMetrics, read_scores, score_histogram
from dinov2.tasks.predictions import ClassPrediction, NamedPredictions


def of_score(score: float) -> ClassPrediction:
    return ClassPrediction(np.array([score, 1 - score], dtype=np.float32), multi_label=True)


def test_drift_is_the_distance_of_both_histograms() -> None:
    generator = np.random.default_rng(0)
    validation = generator.beta(8, 2, 500)
    metrics = ServiceMetrics({"": validation.tolist()})
    for score in np.maximum(validation, 0.5)[:99]:
        metrics.add_scores(of_score(score))
    assert math.isnan(metrics.drift()), "too few"
    alike, lower = (
        np.maximum(scores, 1 - scores) for scores in (generator.beta(8, 2, 1000), generator.beta(5, 5, 1000))
    )
    for recent in (alike, lower):
        for score in recent:
            metrics.add_scores(of_score(score))
        p, q = score_histogram(recent.astype(np.float32)), score_histogram(validation)
        mean = (p + q) / 2
        pairs = [*zip(p, mean, strict=True), *zip(q, mean, strict=True)]
        bits = sum(share * math.log2(share / middle) for share, middle in pairs if share) / 2
        assert metrics.drift() == pytest.approx(math.sqrt(bits), abs=0.01)
    text = metrics.text().decode()
    assert f'dinov2_score_drift{{head=""}} {metrics.drift()}' in text
    assert 'dinov2_validation_score_share{head="",le="1"} 1.0' in text
    assert 'dinov2_score_count{head=""} 2099.0' in text


def test_equal_and_disjoint_scores_are_the_ends_of_drift() -> None:
    metrics = ServiceMetrics({"": [0.99] * 10})
    for head, score in (("", 0.98), ("", 0.52)):
        for _ in range(1000):
            metrics.add_scores(NamedPredictions({head: of_score(score)}))
        assert metrics.drift() == pytest.approx(0.0 if score > 0.9 else 1.0)
    assert math.isnan(metrics.drift("other"))


def test_scores_are_read_from_the_lines_of_inference(tmp_path: Path) -> None:
    lines = [
        {"image": "a", "score": 0.5, "label": "x"},
        {"image": "b", "defect_score": 0.25, "scores": {"x": 1.0}},
        {"image": "c", "error": "no image"},
        {"image": "d", "masks": {"defect_score": 0.75}, "classes": {"score": 1}},
    ]
    path = tmp_path / "predictions.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    assert read_scores(path) == {"": [0.5, 0.25], "masks": [0.75], "classes": [1.0]}
    for content in ("[]\n", "no json", '{"image": "a", "error": "b"}\n', '{"score": "high"}'):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"predictions\.jsonl"):
            read_scores(path)


def test_the_least_sure_of_all_runs_are_kept(tmp_path: Path) -> None:
    certainties = np.random.default_rng(0).random(30).round(4)
    for number, certainty in enumerate(certainties):
        if number % 10 == 0:
            kept = LeastSure(tmp_path / "kept", 4)  # as after a restart
        kept.add(b"\xff\xd8" + bytes([number]), float(certainty), {"certainty": float(certainty)})
    kept.add(b"anything", None, {})
    least = int(certainties.argmin())
    kept.add(b"\xff\xd8" + bytes([least]), float(certainties[least]), {})  # again
    found = sorted(path.name for path in (tmp_path / "kept").glob("*.json"))
    assert [float(name[:6]) for name in found] == sorted(certainties)[:4]
    assert len(list((tmp_path / "kept").glob("*.jpg"))) == 4
    (tmp_path / "kept" / "0.note_of somebody.json").touch()
    LeastSure(tmp_path / "kept", 1)  # a restart with fewer
    assert [path.name[:6] for path in (tmp_path / "kept").glob("*.jpg")] == [f"{certainties.min():.4f}"]


def test_an_error_hits_the_item_that_causes_it_alone() -> None:
    calls: list[list[int]] = []
    begin = threading.Event()

    def halve(items: Sequence[int]) -> list[float]:
        begin.wait(10)
        calls.append(list(items))
        if 0 in items:
            raise ValueError("zero")
        return [1 / item for item in items]

    with Batcher(halve, lambda: 3) as batcher:
        futures = [batcher.submit(item) for item in (5, 1, 0, 2, 4)]
        cancelled = batcher.submit(9)
        while batcher._jobs.qsize() == 6:
            pass
        assert cancelled.cancel()
        begin.set()
        assert [futures[place].result(10) for place in (0, 1, 3, 4)] == [0.2, 1.0, 0.5, 0.25]
        with pytest.raises(ValueError, match="zero"):
            futures[2].result(10)
    assert not any(9 in call for call in calls)
    assert max(map(len, calls)) <= 3


def test_leaving_finishes_what_was_submitted_and_batches_wait_for_more() -> None:
    sizes: list[int] = []
    with Batcher(list, lambda: 8, wait_s=5, observe=sizes.append) as batcher:
        first = batcher.submit(0)
        others = [batcher.submit(number) for number in range(1, 20)]
    assert [future.result(0) for future in (first, *others)] == list(range(20))
    assert sizes == [8, 8, 4]
