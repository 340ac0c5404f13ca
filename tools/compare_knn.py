"""Door: k-NN results of several backbones side by side."""

from dataclasses import dataclass

from dinov2.config.command_line import option, parse
from dinov2.eval.compare import compare_knn, read_named_results
from dinov2.utils.errors import exit_with


@dataclass(frozen=True)
class CompareOptions:
    """Options of the command."""

    results: tuple[str, ...] = option(
        help="name=folder pairs; each folder holds results_eval_knn.json", positional=True
    )


def main() -> int:
    """Prints the table."""
    options = parse(
        CompareOptions,
        description="Shows k-NN results of several backbones side by side.",
        example="python tools/compare_knn.py random=outputs/knn_random pretrained=outputs/knn_pretrained",
    )
    print(compare_knn(read_named_results(options.results)))
    return 0


if __name__ == "__main__":
    exit_with(main)
