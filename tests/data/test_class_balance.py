"""Class balance: weights against their definitions and scikit-learn, draws against their shares."""

from collections import Counter

import numpy as np
import pytest
from sklearn.utils.class_weight import compute_class_weight

from dinov2.data.class_balance import BALANCE_RULES, WeightedSampler, class_weights, sample_weights

COUNTS = [900, 90, 10]
TARGETS = np.repeat([0, 1, 2], COUNTS)


@pytest.mark.parametrize("rule", BALANCE_RULES)
def test_mean_weight_of_the_samples_is_one_and_empty_classes_have_none(rule):
    weights = class_weights(COUNTS, rule)
    assert weights[TARGETS].mean() == pytest.approx(1)
    assert weights[0] < weights[1] < weights[2]
    assert class_weights([5, 5, 5, 5], rule).tolist() == pytest.approx([1, 1, 1, 1])
    with_empty = class_weights([10, 0, 30], rule)
    assert with_empty.tolist() == pytest.approx(np.insert(class_weights([10, 30], rule), 1, 0).tolist())
    huge = class_weights(np.array([3 * 10**12, 7]), rule)
    assert np.isfinite(huge).all()
    assert (huge > 0).all()


def test_weights_equal_their_definitions():
    expected = compute_class_weight("balanced", classes=np.arange(3), y=TARGETS)
    assert class_weights(COUNTS, "inverse") == pytest.approx(expected)
    roots = class_weights(COUNTS, "sqrt_inverse")
    assert roots[2] / roots[0] == pytest.approx(np.sqrt(90))
    beta = 0.9999
    effective = [(1 - beta) / (1 - beta**count) for count in COUNTS]
    found = class_weights(COUNTS, "effective")
    assert found / found[0] == pytest.approx(np.array(effective) / effective[0])
    few, many = class_weights([10, 20], "effective"), class_weights([10**7, 2 * 10**7], "effective")
    assert few[0] / few[1] == pytest.approx(2, rel=0.01)
    assert many[0] / many[1] == pytest.approx(1, rel=0.01)


SINGLE = [(value,) for value in TARGETS.tolist()]
WEIGHTS = sample_weights(SINGLE)


def test_samples_of_all_classes_are_drawn_as_often():
    assert [WEIGHTS[value == TARGETS].sum() for value in range(3)] == pytest.approx([1000 / 3] * 3)
    assert WEIGHTS.mean() == pytest.approx(1)


def test_samples_of_several_classes_follow_their_rarest():
    labels = [(0,), (0,), (0, 1), (), (), (), (), ()]
    weights = sample_weights(labels)
    by_class = class_weights([3, 1, 5], "inverse")
    expected = by_class[[0, 0, 1, 2, 2, 2, 2, 2]]
    assert weights == pytest.approx(expected / expected.mean())
    assert sample_weights([(1, 1), (0,)]).tolist() == pytest.approx([1, 1])
    assert sample_weights(SINGLE, "sqrt_inverse") == pytest.approx(class_weights(COUNTS, "sqrt_inverse")[TARGETS])


def draw(epoch=0, **options):
    sampler = WeightedSampler(**{"weights": WEIGHTS, "size": 300, "seed": 7} | options)
    sampler.set_epoch(epoch)
    return list(sampler)


def test_draws_are_as_even_as_they_can_be():
    weights = np.array([0.0, 0.1, 0.4, 1.0, 2.3, 4.2, 0.0])
    shares = 8 * weights / weights.sum()
    totals = Counter()
    for epoch in range(1000):
        counts = Counter(draw(epoch, weights=weights, size=8))
        assert sum(counts.values()) == 8
        assert all(np.floor(share) <= counts[index] <= np.ceil(share) for index, share in enumerate(shares))
        totals += counts
    for index, share in enumerate(shares):
        assert totals[index] / 1000 == pytest.approx(share, abs=0.05)


def test_classes_come_equally_often_and_mixed():
    drawn = TARGETS[draw()]
    assert np.bincount(drawn).tolist() == pytest.approx([100, 100, 100], abs=12)
    assert all(count > 5 for count in np.bincount(drawn[:50]))
    even = draw(weights=np.ones(50), size=50)
    assert sorted(even) == list(range(50)) != even


def test_copies_are_spread():
    common = [draw(epoch, weights=[5.0, 1, 1, 1, 1, 1], size=10) for epoch in range(50)]
    assert all(order.count(0) == 5 for order in common)
    together = [order for order in common if order[order.index(0) :][:5] == [0] * 5]
    assert len(together) < 10, "copies of a sample would fill whole batches"
    pairs = {frozenset(draw(epoch, weights=np.ones(4), size=2)) for epoch in range(200)}
    assert len(pairs) == 6, "any two samples may come together"


def test_orders_follow_seed_and_epoch():
    assert draw() == draw()
    assert draw(3) == draw(3)
    assert len({tuple(draw(epoch, seed=seed)) for epoch in range(4) for seed in range(4)}) == 16


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: class_weights([1, 2], "none"), "unknown rule of class balance 'none'; allowed: inverse, sqrt_inverse"),
        (lambda: class_weights([1, -2], "inverse"), "none negative and not all 0"),
        (lambda: class_weights([0, 0], "inverse"), "none negative and not all 0"),
        (lambda: draw(weights=[0.0, 0.0]), "not all 0"),
        (lambda: draw(weights=[1.0, -1.0]), "none negative"),
        (lambda: draw(weights=[1.0, float("nan")]), "must be finite"),
        (lambda: draw(size=0), "at least one sample, got size=0"),
    ],
)
def test_bad_counts_and_weights(make, message):
    with pytest.raises(ValueError, match=message):
        make()
