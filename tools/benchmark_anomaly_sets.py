"""Compares anomaly detection by a pretrained backbone, a random one and statistics, with and without preprocessing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dinov2.config.command_line import option, parse
from dinov2.data.loaders import make_dataset
from dinov2.eval.anomaly.evaluation import main as evaluate
from dinov2.eval.metrics.classification import Scores
from dinov2.eval.results import RESULTS_FILE, EvaluationResults, read_results
from dinov2.run.launch import exit_with
from dinov2.utils.files import write_text_atomically

COLUMNS = {  # level and metric
    "part AUROC": ("part", "auroc"),
    "image AUROC": ("image", "auroc"),
    "alarms at 0 escapes": ("part", "false_alarms_at_zero_escapes"),
    "pixel AP": ("image", "pixel_average_precision"),
    "AUPRO 0.3": ("image", "pixel_aupro_0.3"),
    "AUPRO 0.05": ("image", "pixel_aupro_0.05"),
}
AS_IT_IS = "none"


@dataclass(frozen=True, kw_only=True)
class SetsOptions:
    """Options of the command."""

    weights: str = option(help="pretrained backbone")
    config_file: str = option("", help="describes it, such as OUT/config.yaml; none: told from the weights")
    train_dataset: str = option(help="its good parts teach")
    val_dataset: str = option(help="chooses the preprocessing")
    test_dataset: str = option("", help="scored once, with the preprocessing that val has chosen")
    preprocessing: tuple[Path, ...] = option((), help="files of preprocessing, each tried beside none")
    each_class: bool = option(False, help="takes every class as the good one in turn, all others as anomalies")
    image_size: int = option(224, help="square image in pixels")
    num_workers: int = option(1, help="image-decoding processes")
    num_resamples: int = option(1000, help="resamples of parts behind the intervals")
    output_dir: Path = option(Path("outputs/benchmark_anomaly"), help="folder; what is evaluated in it stays")


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluates what is not evaluated yet, and writes ``anomaly.md``."""
    options = parse(
        SetsOptions,
        argv,
        description="Tabulates anomaly detection by a pretrained backbone beside a random one and statistics.",
        example=(
            "python tools/benchmark_anomaly_sets.py --weights outputs/mine/eval/best/teacher_checkpoint.pth "
            "--train-dataset GroupedJSON:split=TRAIN:root=data/magnetic_tile "
            "--val-dataset GroupedJSON:split=VAL:root=data/magnetic_tile "
            "--test-dataset GroupedJSON:split=TEST:root=data/magnetic_tile --preprocessing clahe.yaml lbp.yaml"
        ),
    )
    classes = make_dataset(dataset_str=options.train_dataset).classes
    lines = [
        f"| good | set | preprocessing | scores from | {' | '.join(COLUMNS)} |\n",
        "|---" * (4 + len(COLUMNS)) + "|\n",
    ]
    for good in range(len(classes)) if options.each_class else (0,):
        name = classes[good] if classes else "all"
        chains: dict[str, Path | None] = {AS_IT_IS: None, **{path.stem: path for path in options.preprocessing}}
        found = {chain: results(options, good, path, "val") for chain, path in chains.items()}
        for chain, values in found.items():
            lines += rows((name, "val", chain), values)
        if options.test_dataset:
            best = max(found, key=lambda chain: rank(found[chain]))
            lines += rows((name, "test", best), results(options, good, chains[best], "test"))
        write_text_atomically(options.output_dir / "anomaly.md", "".join(lines))
    print("".join(lines), end="")
    return 0


def results(options: SetsOptions, good_class: int, chain: Path | None, split: str) -> EvaluationResults:
    """Of one evaluation, which is done where it is not there yet."""
    folder = options.output_dir / f"{split}_{good_class}_{AS_IT_IS if chain is None else chain.stem}"
    if not (folder / RESULTS_FILE).is_file():
        words = [
            f"--pretrained-weights={options.weights}",
            f"--train-dataset={options.train_dataset}",
            f"--val-dataset={getattr(options, f'{split}_dataset')}",
            f"--good-class={good_class}",
            f"--image-size={options.image_size}",
            f"--num-workers={options.num_workers}",
            f"--num-resamples={options.num_resamples}",
            f"--output-dir={folder}",
            "--compare-random",
        ]
        words += [f"--config-file={options.config_file}"] if options.config_file else []
        words += [f"--preprocessing={chain}"] if chain is not None else []
        evaluate(words)
    return read_results(folder / RESULTS_FILE)


def rank(found: EvaluationResults) -> float:
    """By what val chooses: the AUROC of parts."""
    return found.scores[found.chosen].part.metrics["auroc"].value


def rows(names: Sequence[str], found: EvaluationResults) -> list[str]:
    """A row for the backbone, a random one and the statistics, with intervals where there are some."""
    shown: Mapping[str, Scores] = {"pretrained backbone": found.scores[found.chosen], **found.yardsticks}
    lines = []
    for source, scores in shown.items():
        cells = []
        for level, metric in COLUMNS.values():
            value = getattr(scores, level).metrics.get(metric)
            interval = "" if value is None or value.low is None else f" [{value.low:.2f}, {value.high:.2f}]"
            cells.append("-" if value is None else f"{value.value:.3f}{interval}")
        lines.append(f"| {' | '.join((*names, source, *cells))} |\n")
    return lines


if __name__ == "__main__":
    exit_with(main)
