"""Door: results of several backbones side by side."""

from dataclasses import dataclass

from dinov2.config.command_line import option, parse
from dinov2.eval.results import compare_results, read_named_results
from dinov2.run.launch import exit_with


@dataclass(frozen=True)
class CompareOptions:
    """Options of the command."""

    results: tuple[str, ...] = option(help="name=folder pairs; each folder holds results.json", positional=True)
    intervals: bool = option(False, help="show 95 % intervals")
    yardsticks: bool = option(False, help="show what has learnt nothing below each, and how it compares")


def main() -> int:
    """Prints the table."""
    options = parse(
        CompareOptions,
        description="Shows the results of an evaluator on several backbones side by side.",
        example="python tools/compare_knn.py random=outputs/knn_random pretrained=outputs/knn_pretrained",
    )
    results = read_named_results(options.results)
    print(compare_results(results, intervals=options.intervals, yardsticks=options.yardsticks))
    return 0


if __name__ == "__main__":
    exit_with(main)
