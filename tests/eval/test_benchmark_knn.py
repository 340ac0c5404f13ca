import dataclasses

import numpy as np
import pytest

from tools.benchmark_knn import OURS, KnnBenchmark, Search, SearchProblem, benchmark_knn


def search(seconds: float, rows: list[list[int]], similarities: list[list[float]]) -> Search:
    return Search(
        similarities=np.array(similarities, dtype=np.float32),
        rows=np.array(rows),
        seconds=seconds,
        cpu_seconds=2 * seconds,
        peak_bytes=3 * 2**30,
        start_bytes=2**30,
    )


def test_ours_is_compared_with_the_fastest_rival() -> None:
    result = KnnBenchmark(
        problem=SearchProblem(num_rows=9, num_queries=2, width=4, num_neighbours=2),
        num_threads=1,
        searches={
            OURS: search(2.0, [[0, 1], [2, 3]], [[0.5, 0.25], [0.5, 0.25]]),
            "slow": search(9.0, [[7, 8], [7, 8]], [[9.0, 9.0], [9.0, 9.0]]),
            "fast": search(3.0, [[1, 0], [2, 4]], [[0.5, 0.25], [0.5, 0.125]]),
        },
    )
    assert (result.rival, result.speedup) == ("fast", 1.5)
    assert (result.largest_difference, result.agreement) == (0.125, 0.75)
    table = str(result)
    assert "9 rows x 4, 2 queries, k = 2, 1 thread(s)" in table
    assert "dinov2 is 1.50 times as fast as fast" in table
    assert "1.2e-01, same neighbours 75.0000 %" in table


def test_features_are_unit_vectors_and_depend_on_the_seed_alone() -> None:
    problem = SearchProblem(num_rows=5000, num_queries=3, width=8, num_neighbours=1)
    queries, bank = problem.draw()
    assert (queries.shape, bank.shape, bank.dtype) == ((3, 8), (5000, 8), np.float32)
    np.testing.assert_allclose(np.linalg.norm(bank, axis=1), 1, rtol=1e-6)
    np.testing.assert_array_equal(bank, problem.draw()[1])
    assert not np.array_equal(bank, dataclasses.replace(problem, seed=1).draw()[1])


@pytest.mark.slow
def test_every_contender_finds_the_same() -> None:
    problem = SearchProblem(num_rows=5000, num_queries=20, width=16, num_neighbours=50)
    result = benchmark_knn(problem, num_threads=1, metrics=("cosine",))
    assert list(result.searches) == [OURS, "sklearn cosine"]
    for found in result.searches.values():
        # Float32 rounding may swap rows that are nearly as far as each other.
        np.testing.assert_allclose(found.similarities, result.searches[OURS].similarities, atol=1e-6)
        assert found.seconds > 0
        assert found.peak_bytes >= found.start_bytes > 5000 * 16 * 4
    assert result.agreement > 0.99


def test_problems_that_cannot_be_searched() -> None:
    with pytest.raises(ValueError, match="found 5 rows, 10000 queries, 384 wide, 6 neighbours"):
        SearchProblem(num_rows=5, num_neighbours=6)
    problem = SearchProblem(num_rows=5, num_queries=1, num_neighbours=1)
    with pytest.raises(ValueError, match="metrics must be among euclidean, cosine, found manhattan"):
        benchmark_knn(problem, metrics=("manhattan",))
    with pytest.raises(ValueError, match="metrics must be among euclidean, cosine, found none"):
        benchmark_knn(problem, metrics=())
    with pytest.raises(ValueError, match="threads and repeats must be at least 1, found 0 and 1"):
        benchmark_knn(problem, num_threads=0)
