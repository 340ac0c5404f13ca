"""Fine-tunes classifiers on few labels, from scratch, on random and pretrained backbones, and tabulates scores."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import dinov2
from dinov2.config.command_line import option, parse
from dinov2.data.datasets.base import ImageDataset, Split
from dinov2.data.loaders import make_dataset
from dinov2.data.prepare.grouped_json_writer import GroupedItem, write_grouped_set
from dinov2.eval.features import few_shot_subset
from dinov2.eval.results import RESULTS_FILE, read_results
from dinov2.logging.plots import Chart, Curve, draw_charts, save_png
from dinov2.run.launch import exit_with
from dinov2.tasks import TASKS, load_task_config
from dinov2.utils.files import write_text_atomically

METHODS: Mapping[str, tuple[str, bool]] = {  # mode of the backbone, and whether it is the pretrained one
    "scratch": ("full", False),
    "random_frozen": ("frozen", False),
    "pretrained_frozen": ("frozen", True),
    "pretrained_lora": ("lora", True),
    "pretrained_full": ("full", True),
}


@dataclass(frozen=True, kw_only=True)
class LabelsOptions:
    """Options of the command."""

    config: Path = option(help="recipe of fine-tuning; its training set, weights, mode and length are replaced")
    weights: str = option(help="pretrained backbone")
    labels: tuple[int, ...] = option((5, 20, 180), help="labelled images per class; the smaller sets lie in the larger")
    seeds: tuple[int, ...] = option((0,), help="of head, order, and of which images are labelled")
    methods: tuple[str, ...] = option(tuple(METHODS), help="what is compared", choices=tuple(METHODS))
    steps: int = option(300, help="optimiser steps of every run")
    metric: str = option("balanced_accuracy", help="that is shown, as in results.json")
    split: str = option("val", help="that is shown", choices=("val", "test"))
    output_dir: Path = option(Path("outputs/benchmark_labels"), help="folder for runs and tables; a finished run stays")


def main(argv: Sequence[str] | None = None) -> int:
    """Trains what is not trained yet, and writes ``labels.json``, ``labels.md`` and ``labels.png``."""
    options = parse(
        LabelsOptions,
        argv,
        description="Scores fine-tuning with few labels: from scratch, on random and on pretrained backbones.",
        example=(
            "python tools/benchmark_labels.py --config configs/task/neu_classification.yaml "
            "--weights outputs/cpu_10min/eval/training_599/teacher_checkpoint.pth --seeds 0 1 2"
        ),
    )
    config = load_task_config(options.config, [], TASKS)
    dataset = make_dataset(dataset_str=config.data.train_dataset_path)
    scores: dict[str, list[float]] = {}
    for seed in options.seeds:
        for count in options.labels:
            subset = options.output_dir / f"labels_{count}_seed_{seed}"
            number = write_subset(dataset, subset, count, seed)
            for method in options.methods:
                run = options.output_dir / f"{method}_{count}_seed_{seed}"
                results = run / options.split / RESULTS_FILE
                if not results.is_file():
                    print(f"{method}, {count} labels a class, seed {seed}: {run}", flush=True)
                    epochs = max(math.ceil(options.steps / math.ceil(number / config.train.batch_size_per_gpu)), 1)
                    dinov2.finetune(options.config, **overrides(options, method, subset, run, seed, epochs))
                found = read_results(results).scores["classification"].image.metrics[options.metric].value
                scores.setdefault(f"{method} {count}", []).append(found)
                write_tables(options, scores)
    print(table(options, scores))
    return 0


def write_subset(dataset: ImageDataset, folder: Path, count: int, seed: int) -> int:
    """Writes a grouped set with links to ``count`` images of every class, drawn by the seed; returns how many.

    The draws of a class are a fixed order of its images, so that smaller sets lie in larger ones.
    """
    labels = dataset.get_targets()
    groups, paths = dataset.get_group_ids(), dataset.get_image_paths()
    chosen = few_shot_subset(torch.as_tensor(np.asarray(labels)), count, seed).tolist()
    items = []
    for index in (index for index in chosen if labels[index] >= 0):
        name = f"train/{index}{Path(paths[index]).suffix}"
        row = {"img_path": name, "group_id": groups[index], "gt_label": int(labels[index])}
        items.append((Split.TRAIN, GroupedItem(row, {name: Path(paths[index])})))
    settings = {"labels": count, "seed": seed, "images": len(labels)}
    metainfo = {"classes": list(dataset.classes)}
    write_grouped_set(folder, items, metainfo=metainfo, tool="benchmark_labels", settings=settings, link=True)
    return len(items)


def overrides(options: LabelsOptions, method: str, subset: Path, run: Path, seed: int, epochs: int) -> dict[str, Any]:
    """Options of one run that differ from the recipe; val is looked at once, at the end, and chooses nothing."""
    mode, pretrained = METHODS[method]
    optim: dict[str, Any] = {"epochs": epochs, "warmup_epochs": epochs / 10}
    if method == "scratch":  # nothing below has learnt anything that slow steps would keep
        optim |= {"backbone_lr_mult": 1.0, "layerwise_decay": 1.0}
    return {
        "backbone": {"mode": mode, "pretrained_weights": options.weights if pretrained else ""},
        "data": {"train_dataset_path": f"GroupedJSON:split=TRAIN:root={subset}"},
        "optim": optim,
        "train": {"seed": seed, "output_dir": str(run), "save_epochs": epochs, "keep_last": 1},
        "evaluation": {"every_epochs": epochs, "num_pictures": 0},
    }


def table(options: LabelsOptions, scores: Mapping[str, Sequence[float]]) -> str:
    """Mean and standard deviation over seeds, methods below each other, in Markdown."""

    def cell(values: Sequence[float]) -> str:
        spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.3f}{spread}" if values else "-"

    heads = [f"{count} a class" for count in options.labels]
    lines = [[f"{options.split}, {options.metric}", *heads], ["---"] * (len(heads) + 1)]
    lines += [
        [name, *(cell(scores.get(f"{name} {count}", ())) for count in options.labels)] for name in options.methods
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def write_tables(options: LabelsOptions, scores: Mapping[str, Sequence[float]]) -> None:
    """Writes the scores so far."""
    write_text_atomically(options.output_dir / "labels.json", json.dumps(scores, indent=2))
    write_text_atomically(options.output_dir / "labels.md", table(options, scores))
    curves = []
    for name in options.methods:
        places = [count for count in sorted(options.labels) if f"{name} {count}" in scores]
        means = [statistics.mean(scores[f"{name} {count}"]) for count in places]
        if places:
            curves.append(Curve(name, np.array(places, dtype=float), np.array(means)))
    chart = Chart(title=f"{options.metric} on {options.split}", curves=curves, x_label="labels per class")
    save_png(draw_charts([chart]), options.output_dir / "labels.png")


if __name__ == "__main__":
    exit_with(main)
