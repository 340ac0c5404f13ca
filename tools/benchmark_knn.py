"""Measures how fast neighbours are found, and in how much memory, beside scikit-learn's brute force."""

import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.neighbors import NearestNeighbors
from threadpoolctl import threadpool_limits

from dinov2.config.command_line import option, parse
from dinov2.eval.neighbours import nearest_neighbours
from dinov2.run.launch import exit_with
from dinov2.utils.errors import RunError

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]

OURS = "dinov2"
SKLEARN_METRICS = ("euclidean", "cosine")
ROWS_PER_DRAW = 4096
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class SearchProblem:
    """A synthetic search among unit vectors; directions are uniform on the sphere."""

    num_rows: int = 1_000_000
    num_queries: int = 10_000
    width: int = 384
    num_neighbours: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.num_rows, self.num_queries, self.width) < 1 or not 1 <= self.num_neighbours <= self.num_rows:
            raise ValueError(
                "rows, queries and width must be at least 1 and the neighbours from 1 to the number of rows, found "
                f"{self.num_rows} rows, {self.num_queries} queries, {self.width} wide, {self.num_neighbours} neighbours"
            )

    def draw(self) -> tuple[FloatArray, FloatArray]:
        """Queries ``[M, D]`` and bank ``[N, D]``; nothing larger than the two is in memory meanwhile."""
        generator = np.random.default_rng(self.seed)
        return self._draw(self.num_queries, generator), self._draw(self.num_rows, generator)

    def _draw(self, num_rows: int, generator: np.random.Generator) -> FloatArray:
        features = np.empty((num_rows, self.width), dtype=np.float32)
        for start in range(0, num_rows, ROWS_PER_DRAW):
            rows = features[start : start + ROWS_PER_DRAW]
            generator.standard_normal(dtype=np.float32, out=rows)
            rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        return features


@dataclass(frozen=True, kw_only=True)
class Search:
    """What one contender found, and what it took.

    Attributes:
        similarities: ``[M, k]`` from large to small.
        rows: places in the bank, ``[M, k]``.
        seconds: of the search alone.
        cpu_seconds: of all threads together; far below ``seconds * threads`` where the machine had other work.
        peak_bytes: largest memory of the whole process, with its libraries and the features.
        start_bytes: largest memory of the process until the search began.
    """

    similarities: FloatArray
    rows: IntArray
    seconds: float
    cpu_seconds: float
    peak_bytes: int
    start_bytes: int


@dataclass(frozen=True, kw_only=True)
class KnnBenchmark:
    """The fastest search of each contender, by name; `OURS` first."""

    problem: SearchProblem
    num_threads: int
    searches: dict[str, Search]

    @property
    def rival(self) -> str:
        """The fastest contender that is not ours."""
        return min((name for name in self.searches if name != OURS), key=lambda name: self.searches[name].seconds)

    @property
    def speedup(self) -> float:
        """Seconds of the rival per second of ours; 1 and more is at least as fast."""
        return self.searches[self.rival].seconds / self.searches[OURS].seconds

    @property
    def largest_difference(self) -> float:
        """Between the similarities of the same place, ours and the rival's."""
        ours, rival = self.searches[OURS], self.searches[self.rival]
        return float(np.abs(ours.similarities - rival.similarities).max())

    @property
    def agreement(self) -> float:
        """Share of a query's neighbours that ours and the rival both found, over all queries, in ``[0, 1]``."""
        ours, rival = self.searches[OURS], self.searches[self.rival]
        common = [
            np.intersect1d(own, other, assume_unique=True).size
            for own, other in zip(ours.rows, rival.rows, strict=True)
        ]
        return float(np.mean(common)) / self.problem.num_neighbours

    def __str__(self) -> str:
        problem = self.problem
        lines = [
            f"{problem.num_rows:,} rows x {problem.width}, {problem.num_queries:,} queries, "
            f"k = {problem.num_neighbours}, {self.num_threads} thread(s)",
            f"{'':22}{'seconds':>10}{'CPU s':>10}{'peak GiB':>10}{'before GiB':>12}",
        ]
        for name, search in self.searches.items():
            memory = f"{search.peak_bytes / GIB:>10.2f}{search.start_bytes / GIB:>12.2f}"
            lines.append(f"{name:22}{search.seconds:>10.2f}{search.cpu_seconds:>10.2f}{memory}")
        return "\n".join(
            [
                *lines,
                f"{OURS} is {self.speedup:.2f} times as fast as {self.rival}; largest difference of similarities "
                f"{self.largest_difference:.1e}, same neighbours {100 * self.agreement:.4f} %",
            ]
        )


def benchmark_knn(
    problem: SearchProblem,
    *,
    num_threads: int | None = None,
    metrics: Sequence[str] = SKLEARN_METRICS,
    repeats: int = 1,
) -> KnnBenchmark:
    """Runs every contender in a new process on the same features.

    Args:
        problem: what is searched.
        num_threads: of every contender; by default as many as torch would use.
        metrics: of scikit-learn's searches. On unit vectors all find the same neighbours, at different speeds.
        repeats: rounds in which all contenders run one after the other; the fastest run of each counts.

    Raises:
        ValueError: for a metric that scikit-learn's search is not compared with, or a number below 1.
        RunError: a contender's process failed; its own message stands on stderr.
    """
    num_threads = torch.get_num_threads() if num_threads is None else num_threads
    if not metrics or not set(metrics) <= set(SKLEARN_METRICS):
        raise ValueError(f"metrics must be among {', '.join(SKLEARN_METRICS)}, found {', '.join(metrics) or 'none'}")
    if min(num_threads, repeats) < 1:
        raise ValueError(f"threads and repeats must be at least 1, found {num_threads} and {repeats}")
    contenders = {OURS: "", **{f"sklearn {metric}": metric for metric in metrics}}
    searches: dict[str, Search] = {}
    for _ in range(repeats):
        for name, metric in contenders.items():
            search = _run_in_new_process(problem, metric, num_threads)
            if name not in searches or search.seconds < searches[name].seconds:
                searches[name] = search
    return KnnBenchmark(problem=problem, num_threads=num_threads, searches=searches)


def _run_in_new_process(problem: SearchProblem, metric: str, num_threads: int) -> Search:
    """The peak of a process never falls, so each contender needs its own."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "search.npz"
        process = multiprocessing.get_context("spawn").Process(target=_run, args=(problem, metric, num_threads, result))
        process.start()
        process.join()
        if process.exitcode != 0:
            raise RunError(f"the search of {metric or OURS} ended with code {process.exitcode}")
        with np.load(result) as values:
            return Search(
                similarities=values["similarities"],
                rows=values["rows"],
                seconds=float(values["seconds"]),
                cpu_seconds=float(values["cpu_seconds"]),
                peak_bytes=int(values["peak_bytes"]),
                start_bytes=int(values["start_bytes"]),
            )


def _run(problem: SearchProblem, metric: str, num_threads: int, result: Path) -> None:
    torch.set_num_threads(num_threads)
    with threadpool_limits(num_threads):
        queries, bank = problem.draw()
        start_bytes = _peak_bytes()
        start, cpu_start = time.perf_counter(), time.process_time()
        found = _search_ours(problem, queries, bank) if not metric else _search_sklearn(problem, metric, queries, bank)
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
        peak_bytes = _peak_bytes()
    similarities, rows = found if not metric else (_as_similarities(found[0], metric), found[1])
    values: dict[str, Any] = {
        "similarities": similarities.astype(np.float32),
        "rows": rows,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "peak_bytes": peak_bytes,
        "start_bytes": start_bytes,
    }
    np.savez(result, **values)


def _search_ours(problem: SearchProblem, queries: FloatArray, bank: FloatArray) -> tuple[NDArray[Any], IntArray]:
    similarities, rows = nearest_neighbours(torch.from_numpy(queries), torch.from_numpy(bank), problem.num_neighbours)
    return similarities.numpy(), rows.numpy()


def _search_sklearn(
    problem: SearchProblem, metric: str, queries: FloatArray, bank: FloatArray
) -> tuple[NDArray[Any], IntArray]:
    search = NearestNeighbors(n_neighbors=problem.num_neighbours, algorithm="brute", metric=metric)
    distances, rows = search.fit(bank).kneighbors(queries)
    return distances, rows


def _as_similarities(distances: NDArray[Any], metric: str) -> NDArray[Any]:
    """Inner products of unit vectors from their distances."""
    distances = distances.astype(np.float64)
    return 1 - distances if metric == "cosine" else 1 - distances**2 / 2


def _peak_bytes() -> int:
    """Largest resident memory of this process so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@dataclass(frozen=True)
class BenchmarkOptions:
    """Options of the command."""

    num_rows: int = option(1_000_000, help="features in the bank")
    num_queries: int = option(10_000, help="features whose neighbours are searched")
    width: int = option(384, help="numbers per feature")
    nb_knn: int = option(200, help="neighbours per query")
    num_threads: int | None = option(None, help="threads of every contender; by default those torch would use")
    metrics: tuple[str, ...] = option(SKLEARN_METRICS, help="scikit-learn's searches to compare with")
    repeats: int = option(1, help="rounds of all contenders; the fastest run of each counts")
    seed: int = option(0, help="of the random features")


def main() -> int:
    """Measures and prints."""
    options = parse(
        BenchmarkOptions,
        description="Measures seconds and peak memory of the k-NN search, each contender in a new process.",
        example="python tools/benchmark_knn.py --num-rows 100000 --num-queries 1000 --metrics euclidean",
    )
    problem = SearchProblem(
        num_rows=options.num_rows,
        num_queries=options.num_queries,
        width=options.width,
        num_neighbours=options.nb_knn,
        seed=options.seed,
    )
    print(benchmark_knn(problem, num_threads=options.num_threads, metrics=options.metrics, repeats=options.repeats))
    return 0


if __name__ == "__main__":
    exit_with(main)
