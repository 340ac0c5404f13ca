"""Door: how fast neighbours are found, and in how much memory, beside scikit-learn."""

from dataclasses import dataclass

from dinov2.config.command_line import option, parse
from dinov2.eval.benchmark_knn import SKLEARN_METRICS, SearchProblem, benchmark_knn
from dinov2.run.launch import exit_with


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
