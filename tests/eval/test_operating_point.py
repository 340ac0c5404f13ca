"""Thresholds from good parts and from labelled ones: what they promise holds as often as stated."""

import numpy as np
import pytest
from scipy.stats import binom, norm

from dinov2.eval.anomaly.operating_point import (
    OperatingPoint,
    independent_scores,
    threshold_from_good,
    threshold_from_labelled,
)

OLD = ("threshold", "false_alarm_rate", "low", "high", "num_good", "rank", "margin")  # of the first version


def draw(generator: np.random.Generator, parts: int, alike: float) -> tuple[np.ndarray, np.ndarray]:
    """Normal scores of 1 to 6 images a part, and the part of each; of a part so much of the variance is common."""
    part = np.repeat(np.arange(parts), generator.integers(1, 7, parts))
    common = generator.standard_normal(parts)[part]
    return np.sqrt(alike) * common + np.sqrt(1 - alike) * generator.standard_normal(len(part)), part.astype(str)


@pytest.mark.parametrize("alike", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("parts", [25, 80])
def test_images_of_a_part_are_no_independent_witnesses(parts: int, alike: float) -> None:
    generator = np.random.default_rng(parts)
    inside, naive, rates, promised = 0, 0, [], []
    for _ in range(150):
        scores, part = draw(generator, parts, alike)
        point = threshold_from_good(scores, group_ids=part, false_alarm_rate=0.1)
        assert point.num_independent <= point.num_good == len(scores)
        rate = float(norm.sf(point.threshold))
        inside += point.low <= rate <= point.high
        other = threshold_from_good(scores, false_alarm_rate=0.1)
        naive += other.low <= float(norm.sf(other.threshold)) <= other.high
        rates.append(rate)
        promised.append(point.false_alarm_rate)
    assert inside >= binom(150, 0.95).ppf(0.01)
    assert np.mean(rates) <= np.mean(promised) + 0.01
    if alike > 0.5:
        assert naive < 150 * 0.9, "the interval that takes images for independent is too narrow"
    else:
        assert np.mean(rates) == pytest.approx(np.mean(promised), abs=0.015)


@pytest.mark.parametrize("alike", [0.0, 0.7])
def test_the_rate_on_unseen_good_parts_lies_inside_the_stated_interval(alike: float) -> None:
    """Over 50 random splits of good parts, per image and per part, as often as stated."""
    generator = np.random.default_rng(7)
    scores, part = draw(generator, 200, alike)
    scores = np.exp(scores)  # of any distribution
    inside = {"image": 0, "part": 0}
    names = np.unique(part)
    highest = np.array([scores[part == name].max() for name in names])
    for _ in range(50):
        seen = generator.permutation(len(names)) < 100
        image_seen = np.isin(part, names[seen])
        for level, values, taken, groups in (("image", scores, image_seen, part), ("part", highest, seen, names)):
            point = threshold_from_good(values[taken], group_ids=groups[taken].tolist(), false_alarm_rate=0.05)
            low, high = point.predict(int((~taken).sum()))
            inside[level] += low <= float((values[~taken] > point.threshold).mean()) <= high
    assert min(inside.values()) >= binom(50, 0.95).ppf(0.02), inside


def test_how_many_independent_images_there_are() -> None:
    generator = np.random.default_rng(0)
    scores = generator.random(40)
    parts = np.arange(40).astype(str)
    assert independent_scores(scores, parts.tolist(), 0.05) == 40
    assert independent_scores(np.repeat(scores, 5), np.repeat(parts, 5).tolist(), 0.05) == 40, "copies say nothing"
    assert independent_scores(scores, ["one"] * 40, 0.05) == 1
    assert independent_scores(np.ones(40), np.repeat(parts[:10], 4).tolist(), 0.05) == 40, "even scores tell nothing"


def test_threshold_keeps_its_promise() -> None:
    """The stated intervals hold as often as stated, for scores of any kind."""
    generator = np.random.default_rng(0)
    inside, within, rates = 0, 0, []
    for _ in range(400):
        point = threshold_from_good(generator.exponential(size=80), false_alarm_rate=0.1)
        true_rate = float(np.exp(-point.threshold))
        unseen = float((generator.exponential(size=60) > point.threshold).mean())
        low, high = point.predict(60)
        inside += point.low <= true_rate <= point.high
        within += low <= unseen <= high
        rates.append(true_rate)
    assert point.rank == 8
    assert inside >= 400 * 0.92
    assert within >= 400 * 0.92
    assert np.mean(rates) == pytest.approx(point.false_alarm_rate, abs=0.01)


def test_thresholds_of_few_parts_and_with_a_margin() -> None:
    scores = np.arange(1.0, 11.0)
    few = threshold_from_good(scores, false_alarm_rate=0.01)
    assert (few.threshold, few.rank) == (10.0, 1)
    assert few.false_alarm_rate == pytest.approx(1 / 11)
    raised = threshold_from_good(scores, false_alarm_rate=0.2, margin=0.1)
    assert raised.threshold == pytest.approx(9 * 1.1)
    assert (raised.low, raised.predict(10)[0]) == (0.0, 0.0)
    for wrong in ({"false_alarm_rate": 0.0}, {"margin": -1.0}):
        with pytest.raises(ValueError, match="must be in"):
            threshold_from_good(scores, **wrong)
    with pytest.raises(ValueError, match="needs finite scores"):
        threshold_from_good(np.array([np.nan]))


def test_labelled_parts_let_nothing_escape() -> None:
    good, bad = np.arange(100) / 100, np.array([0.75, 0.895, 0.895, 2.0])
    scores, anomalous = np.concatenate([good, bad]), np.arange(104) >= 100
    none = threshold_from_labelled(scores, anomalous)
    assert (scores[anomalous] > none.threshold).all()
    assert none.false_alarm_rate == pytest.approx(0.25)
    assert none.low < 0.25 < none.high
    assert (none.escape_rate, none.num_anomalous) == (0.2, 4)
    some = threshold_from_labelled(scores, anomalous, recall=0.75)
    assert (scores[anomalous] > some.threshold).sum() == 3
    assert some.false_alarm_rate == pytest.approx(0.10)
    assert some.escape_rate == pytest.approx(0.4)
    low, high = some.predict(50)
    assert low < 0.1 < high
    for labels in (anomalous & False, anomalous | True):
        with pytest.raises(ValueError, match="needs good and anomalous parts"):
            threshold_from_labelled(scores, labels)
    with pytest.raises(ValueError, match="recall"):
        threshold_from_labelled(scores, anomalous, recall=0.0)


def test_escapes_happen_as_seldom_as_promised() -> None:
    generator = np.random.default_rng(1)
    escapes, expected, inside = [], [], 0
    for _ in range(300):
        scores = np.concatenate([generator.standard_normal(50), generator.standard_normal(20) + 3])
        point = threshold_from_labelled(scores, np.arange(70) >= 50)
        escapes.append(norm.cdf(point.threshold - 3))
        expected.append(point.escape_rate)
        inside += escapes[-1] <= point.escape_high
    assert np.mean(escapes) == pytest.approx(np.mean(expected), abs=0.01)
    assert inside >= binom(300, 0.95).ppf(0.01)


def test_points_are_kept_as_numbers() -> None:
    point = threshold_from_good(np.arange(30.0), group_ids=[str(number // 3) for number in range(30)], margin=0.5)
    values = {**point.as_thresholds("image"), "part": 0.5}
    assert values["image"] == point.threshold
    assert OperatingPoint.of_thresholds("image", values) == point
    assert OperatingPoint.of_thresholds("part", values) is None
    assert "at most" in point.promise()
    old = {name: value for name, value in point.as_dict().items() if name in OLD}
    assert OperatingPoint.from_dict(old).num_independent == 0
