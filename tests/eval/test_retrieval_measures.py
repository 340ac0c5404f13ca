from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch
from slow_retrieval import slowly

from dinov2.eval.retrieval.ranking import IGNORED, RELEVANT, WRONG, QueryMeasures, measure_retrieval

KS = (1, 5, 10)
R, W, J = RELEVANT, WRONG, IGNORED


def assert_as_slow(found: QueryMeasures, similarities: npt.NDArray[np.float64], kinds: npt.NDArray[np.int8]) -> None:
    rows = [slowly(list(row), list(of), KS) for row, of in zip(similarities, kinds, strict=True)]
    expected = [np.array([row[place] for row in rows]) for place in range(5)]
    np.testing.assert_allclose(found.average_precision, expected[0], rtol=0, atol=1e-12)
    np.testing.assert_allclose(found.precision, expected[1], rtol=0, atol=1e-12)
    np.testing.assert_allclose(found.recall, expected[2], rtol=0, atol=1e-12)
    np.testing.assert_array_equal(found.first_hit, expected[3])
    np.testing.assert_array_equal(found.best_wrong, expected[4])


def lookup(kinds: npt.NDArray[np.int8]) -> Callable[[npt.NDArray[np.int64]], npt.NDArray[np.int8]]:
    return lambda rows: kinds[rows]


def measure(similarities: npt.NDArray[np.float64], kinds: npt.NDArray[np.int8], **arguments: int) -> QueryMeasures:
    """Measures given similarities: the gallery are the unit vectors, so inner products are exact."""
    gallery = torch.eye(similarities.shape[1])
    return measure_retrieval(torch.from_numpy(similarities).float(), gallery, lookup(kinds), KS, **arguments)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("num_levels", [2, 5, 1000])
def test_random_rankings_with_ties_and_junk(seed: int, num_levels: int) -> None:
    generator = np.random.default_rng(seed)
    num_queries, num_gallery = 23, int(generator.integers(1, 60))
    similarities = generator.integers(-num_levels, num_levels, (num_queries, num_gallery)).astype(np.float64)
    shares = generator.dirichlet([1, 1, 1], num_queries)  # also queries with hardly anything relevant, or all of it
    kinds = np.stack([generator.choice([W, R, J], num_gallery, p=share) for share in shares]).astype(np.int8)
    kinds[0], kinds[1], kinds[2] = W, R, J
    entries = int(generator.integers(1, 5 * num_gallery))
    assert_as_slow(measure(similarities, kinds, entries_at_a_time=entries), similarities, kinds)


@pytest.mark.parametrize(
    ("ranking", "average_precision", "precision", "recall"),
    [
        ([R], 1.0, [1, 1, 1], [1, 1, 1]),
        ([R, R, W], 1.0, [1, 1, 1], [1 / 2, 1, 1]),
        ([J, R, J, R, J], 1.0, [1, 1, 1], [1 / 2, 1, 1]),
        ([W, R], (0 + 1 / 2) / 2, [0, 1 / 2, 1 / 2], [0, 1, 1]),
        ([J, W, J, R], (0 + 1 / 2) / 2, [0, 1 / 2, 1 / 2], [0, 1, 1]),
        ([R, W, R], (1 + (1 / 2 + 2 / 3) / 2) / 2, [1, 2 / 3, 2 / 3], [1 / 2, 1, 1]),
        ([W] * 5 + [R], (0 + 1 / 6) / 2, [0, 0, 1 / 6], [0, 0, 1]),
        ([R] + [W] * 18 + [R], (1 + (1 / 19 + 2 / 20) / 2) / 2, [1, 1 / 5, 1 / 10], [1 / 2] * 3),
    ],
)
def test_rankings_measured_by_hand(
    ranking: list[int], average_precision: float, precision: list[float], recall: list[float]
) -> None:
    similarities = -np.arange(len(ranking), dtype=np.float64)[None]
    found = measure(similarities, np.array([ranking], dtype=np.int8))
    assert found.average_precision[0] == pytest.approx(average_precision, abs=1e-12)
    assert found.precision[0] == pytest.approx(precision, abs=1e-12)
    assert found.recall[0] == pytest.approx(recall, abs=1e-12)


def test_equal_similarities_rank_in_the_order_of_the_gallery() -> None:
    found = measure(np.zeros((2, 4)), np.array([[W, R, W, W], [W, W, W, R]], dtype=np.int8))
    assert found.first_hit.tolist() == [2, 4]
    assert found.best_wrong.tolist() == [0, 0]


def test_zero_and_minus_zero_are_equal() -> None:
    found = measure(np.array([[-0.0, 0.0]]), np.array([[R, W]], dtype=np.int8))
    assert found.first_hit.tolist() == [1]


def test_junk_changes_nothing_wherever_it_stands() -> None:
    generator = np.random.default_rng(0)
    similarities = generator.normal(size=(8, 40))
    kinds = generator.choice([W, R], (8, 40)).astype(np.int8)
    junk = generator.normal(size=(8, 30)) * 3
    alone = measure(similarities, kinds)
    mixed = measure(np.hstack([similarities, junk]), np.hstack([kinds, np.full((8, 30), J, dtype=np.int8)]))
    for name in ("average_precision", "precision", "recall", "first_hit", "best_wrong"):
        np.testing.assert_array_equal(getattr(alone, name), getattr(mixed, name))


def test_memory_is_bounded_by_the_entries_at_a_time() -> None:
    asked: list[int] = []

    def relevance(rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int8]:
        asked.extend([len(rows)])
        return np.ones((len(rows), 50), dtype=np.int8)

    measure_retrieval(torch.randn(21, 4), torch.randn(50, 4), relevance, KS, entries_at_a_time=420)
    assert asked == [8, 8, 5]
    asked.clear()
    measure_retrieval(torch.randn(3, 4), torch.randn(50, 4), relevance, KS, entries_at_a_time=10)
    assert asked == [1, 1, 1]  # never less than a row


@pytest.mark.parametrize(
    ("queries", "gallery", "ks", "message"),
    [
        (torch.zeros(0, 3), torch.zeros(2, 3), (1,), r"queries \(0, 3\) and gallery \(2, 3\)"),
        (torch.zeros(2, 3), torch.zeros(0, 3), (1,), r"gallery \(0, 3\)"),
        (torch.zeros(2, 3), torch.zeros(2, 4), (1,), r"must be \[Q, D\] and \[N, D\]"),
        (torch.zeros(2, 3), torch.zeros(2, 3), (), "ks must be one or more different numbers from 1 up"),
        (torch.zeros(2, 3), torch.zeros(2, 3), (0, 1), "ks must be"),
        (torch.zeros(2, 3), torch.zeros(2, 3), (5, 5), "ks must be"),
    ],
)
def test_bad_input(queries: torch.Tensor, gallery: torch.Tensor, ks: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measure_retrieval(queries, gallery, lookup(np.zeros((2, 2), dtype=np.int8)), ks)
