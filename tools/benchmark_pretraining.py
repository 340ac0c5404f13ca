"""Pretrains for several lengths and on several numbers of images, and shows the scores against minutes and images."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import dinov2
from dinov2.config import load_config
from dinov2.config.command_line import option, parse
from dinov2.config.schema import TrainOptions
from dinov2.data.datasets.base import ImageDataset, Split
from dinov2.data.loaders import make_dataset
from dinov2.data.prepare.grouped_json_writer import GroupedItem, write_grouped_set
from dinov2.eval import knn, log_regression
from dinov2.eval.results import RESULTS_FILE, EvaluationResults, read_results
from dinov2.eval.yardsticks import IMAGE_STATISTICS, RANDOM_BACKBONE
from dinov2.logging.plots import Chart, Curve, draw_charts, save_png
from dinov2.run.launch import exit_with
from dinov2.utils.files import write_text_atomically

SCORERS = {"k-NN": (knn.main, ("--nb-knn", "20")), "logistic regression": (log_regression.main, ())}
METRIC = "balanced_accuracy"


@dataclass(frozen=True, kw_only=True)
class CurveOptions:
    """Options of the command."""

    config: Path = option(help="recipe of pretraining; its images, length and folder are replaced")
    train_dataset: str = option(help="images to pretrain on, whose labels evaluators learn from, as a dataset string")
    val_dataset: str = option(help="labelled images to evaluate on, as a dataset string")
    steps: tuple[int, ...] = option((150, 300, 600), help="lengths of runs on all images; whole epochs of the recipe")
    images: tuple[int, ...] = option((50, 200), help="numbers of images; the smaller sets lie in the larger")
    images_steps: int = option(600, help="length of the runs on fewer images; one of --steps")
    seed: int = option(0, help="of the runs, and of which images are kept")
    autocast: str = option("none", help="precision of the evaluated networks", choices=("none", "bf16", "fp16"))
    output_dir: Path = option(
        Path("outputs/benchmark_pretraining"), help="folder for runs and tables; a finished run or evaluation stays"
    )


@dataclass(frozen=True)
class Point:
    """A run of so many ``steps`` on so many ``images``, in its ``folder``."""

    steps: int
    images: int
    folder: Path


def main(argv: Sequence[str] | None = None) -> int:
    """Trains and evaluates what is not there yet, and writes ``curve.json``, ``curve.md`` and ``curve.png``."""
    options = parse(
        CurveOptions,
        argv,
        description="Scores pretraining against its length and its number of images, beside yardsticks.",
        example=(
            "python tools/benchmark_pretraining.py --config configs/train/cpu_10min.yaml "
            "--train-dataset GroupedJSON:split=TRAIN:root=data/neu --val-dataset GroupedJSON:split=VAL:root=data/neu"
        ),
    )
    recipe = load_config(options.config).train
    epoch_length = recipe.OFFICIAL_EPOCH_LENGTH
    uneven = [steps for steps in (*options.steps, options.images_steps) if steps < 1 or steps % epoch_length]
    if uneven:
        raise ValueError(f"--steps {uneven[0]} is not a multiple of an epoch of {options.config}, {epoch_length} steps")
    if options.images and options.images_steps not in options.steps:
        raise ValueError(f"--images-steps {options.images_steps} is not among --steps, so that all images lack a run")
    dataset = make_dataset(dataset_str=options.train_dataset)
    too_many = [count for count in options.images if not 1 <= count < len(dataset)]
    if too_many:
        raise ValueError(f"--images {too_many[0]} is not from 1 to {len(dataset) - 1}: {options.train_dataset}")
    all_images = len(dataset)
    points = [Point(steps, all_images, options.output_dir / f"steps_{steps}") for steps in options.steps]
    points += [
        Point(options.images_steps, count, options.output_dir / f"images_{count}_steps_{options.images_steps}")
        for count in options.images
    ]
    rows: list[dict[str, Any]] = []
    yardsticks: dict[str, dict[str, float]] = {}
    for point in points:
        weights = point.folder / f"eval/training_{point.steps - 1}/teacher_checkpoint.pth"
        if not weights.is_file():
            images = options.train_dataset
            if point.images < all_images:
                images = write_subset(
                    dataset, options.output_dir / f"images_{point.images}", point.images, options.seed
                )
            pretrain(options, point, images, recipe)
        results = evaluate(options, point, weights, num_workers=recipe.num_workers, compare_random=not rows)
        records = map(json.loads, (point.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
        seconds = [record["timing"]["seconds"] for record in records if "timing" in record][-1]
        row: dict[str, Any] = {"steps": point.steps, "images": point.images, "minutes": seconds / 60}
        for name, result in results.items():
            row[name] = result.scores[result.chosen].image.metrics[METRIC].value
            yardsticks.setdefault(name, {}).update(
                (yardstick, scores.image.metrics[METRIC].value)
                for yardstick, scores in result.yardsticks.items()
                if METRIC in scores.image.metrics
            )
        rows.append(row)
        write_tables(options, rows, yardsticks, all_images)
    print((options.output_dir / "curve.md").read_text(encoding="utf-8"))
    return 0


def write_subset(dataset: ImageDataset, folder: Path, count: int, seed: int) -> str:
    """Writes a grouped set with links to ``count`` images without labels; returns its dataset string."""
    paths, groups = dataset.get_image_paths(), dataset.get_group_ids()
    items = []
    for index in sorted(np.random.default_rng(seed).permutation(len(dataset))[:count].tolist()):
        name = f"train/{index}{Path(paths[index]).suffix}"
        items.append(
            (Split.TRAIN, GroupedItem({"img_path": name, "group_id": groups[index]}, {name: Path(paths[index])}))
        )
    settings = {"images": count, "seed": seed}
    write_grouped_set(
        folder,
        items,
        metainfo={"classes": list(dataset.classes)},
        tool="benchmark_pretraining",
        settings=settings,
        link=True,
    )
    return f"GroupedJSON:split=TRAIN:root={folder}"


def pretrain(options: CurveOptions, point: Point, images: str, recipe: TrainOptions) -> None:
    """Trains one run, or goes on with it; a set that is smaller than the recipe's batch is one batch."""
    print(f"{point.steps} steps on {point.images} images: {point.folder}", flush=True)
    dinov2.pretrain(
        options.config,
        train={
            "dataset_path": images,
            "output_dir": str(point.folder),
            "seed": options.seed,
            "batch_size_per_gpu": min(recipe.batch_size_per_gpu, point.images),
        },
        optim={"epochs": point.steps // recipe.OFFICIAL_EPOCH_LENGTH},
    )


def evaluate(
    options: CurveOptions, point: Point, weights: Path, *, num_workers: int, compare_random: bool
) -> dict[str, EvaluationResults]:
    """What each evaluator finds in a run's weights; once is enough for the random network, which is always the same."""
    found = {}
    for name, (evaluator, flags) in SCORERS.items():
        out = options.output_dir / f"scores_{point.folder.name}" / name.replace(" ", "_")
        if not (out / RESULTS_FILE).is_file():
            words = ["--config-file", str(point.folder / "config.yaml"), "--pretrained-weights", str(weights)]
            words += ["--train-dataset", options.train_dataset, "--val-dataset", options.val_dataset]
            words += ["--num-workers", str(num_workers), "--output-dir", str(out)]
            words += ["--autocast", options.autocast, *flags]
            evaluator([*words, "--compare-random"] if compare_random else words)
        found[name] = read_results(out / RESULTS_FILE)
    return found


def write_tables(
    options: CurveOptions,
    rows: Sequence[Mapping[str, Any]],
    yardsticks: Mapping[str, Mapping[str, float]],
    all_images: int,
) -> None:
    """Writes the scores so far: as values, as a table in Markdown, and as charts."""
    written = {"metric": METRIC, "runs": list(rows), "yardsticks": dict(yardsticks)}
    write_text_atomically(options.output_dir / "curve.json", json.dumps(written, indent=2))
    lines = [["steps", "images", "minutes", *SCORERS], ["---"] * (3 + len(SCORERS))]
    lines += [
        [str(row["steps"]), str(row["images"]), f"{row['minutes']:.1f}", *(f"{row[name]:.3f}" for name in SCORERS)]
        for row in rows
    ]
    names = dict.fromkeys(name for values in yardsticks.values() for name in values)
    lines += [
        [name, "", "", *(f"{yardsticks[scorer].get(name, float('nan')):.3f}" for scorer in SCORERS)] for name in names
    ]
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    write_text_atomically(options.output_dir / "curve.md", text)
    charts = []
    of_length = [row for row in rows if row["images"] == all_images]
    of_images = [row for row in rows if row["steps"] == options.images_steps]
    for title, axis, chosen in (
        ("all images", "minutes", of_length),
        (f"{options.images_steps} steps", "images", of_images),
    ):
        ordered = sorted(chosen, key=lambda row: row[axis])
        places = np.array([row[axis] for row in ordered], dtype=float)
        charts += [
            Chart(
                title=f"{name}, {title}: {METRIC.replace('_', ' ')}",
                x_label=axis,
                curves=[Curve(name, places, np.array([row[name] for row in ordered]))],
                lines=[
                    (yardstick, value)
                    for yardstick, value in yardsticks[name].items()
                    if yardstick in (IMAGE_STATISTICS, RANDOM_BACKBONE)
                ],
            )
            for name in SCORERS
            if len(ordered) > 1
        ]
    if charts:
        save_png(draw_charts(charts), options.output_dir / "curve.png")


if __name__ == "__main__":
    exit_with(main)
