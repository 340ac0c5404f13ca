"""A run's folder as training and evaluators leave it, with names that would break a careless page."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from dinov2.config import load_config, render_config
from dinov2.eval.metrics.classification import Scores, score_predictions
from dinov2.eval.results import EvaluationResults, Predictions
from dinov2.eval.retrieval.evaluation import RankedQueries, Rankings, score_rankings
from dinov2.eval.retrieval.ranking import QueryMeasures, measure_names

GOOD, BAD = "good <b>", "bad & \"worn\" <script>alert('class')</script>"
HOSTILE_IMAGE = "<img src=x onerror=alert(1)> ü.png"
HOSTILE_WARNING = "<script>alert('log')</script> see https://example.org/help"
PLANNED, DONE = 50, 40


def make_images(folder: Path, count: int) -> list[Path]:
    """Grey images with a dark spot, wider than a thumbnail; the first has a hostile name."""
    folder.mkdir(parents=True)
    paths = []
    for number in range(count):
        pixels = np.full((300, 400, 3), 90 + 10 * (number % 12), dtype=np.uint8)
        pixels[100:140, 40 + 20 * (number % 10) : 90 + 20 * (number % 10)] = 20
        path = folder / (HOSTILE_IMAGE if number == 0 else f"image_{number:02}.png")
        Image.fromarray(pixels).save(path)
        paths.append(path)
    return paths


def make_results(
    paths: Sequence[Path | str],
    positive: Sequence[float],
    labels: Sequence[int],
    *,
    evaluator: str = "knn",
    variants: Sequence[str] = ("k=10", "k=20"),
    num_resamples: int = 20,
    weights: str = "outputs/run/teacher_checkpoint.pth",
) -> EvaluationResults:
    """Results of two classes; images 0 and 1 are of part 0, and so on. The first variant is the chosen one."""
    probabilities = np.stack([1 - np.array(positive), np.array(positive)], axis=1)
    targets, groups = np.array(labels), [f"part {number // 2} <i>" for number in range(len(paths))]
    scores: dict[str, Scores] = {
        variant: score_predictions(probabilities, targets, groups, num_resamples=num_resamples) for variant in variants
    }
    counts = {"num_images": len(paths), "num_parts": len(set(groups)), "num_labelled": len(paths), "sha256": "ab" * 32}
    return EvaluationResults(
        evaluator=evaluator,
        settings={"chosen_by": "leaving one part out", "features": "cls", "temperature": 0.07},
        classes=(GOOD, BAD),
        scores=scores,
        chosen=variants[0],
        datasets={"train": counts, "val": counts},
        weights={"path": weights, "sha256": "cd" * 32, "bytes": 123},
        revision="0123456789abcdef",
        extra={"num_parts_in_both": 0},
        predictions=Predictions(
            paths=[str(path) for path in paths], group_ids=groups, labels=targets, probabilities=probabilities
        ),
    )


def make_retrieval(
    paths: Sequence[Path | str], first_hit: Sequence[int], variants: Sequence[str] = ("parts",)
) -> EvaluationResults:
    """A retrieval whose queries find their part at these ranks, and before it the next image but one."""
    count = len(paths)
    ranks = np.array(first_hit)
    found = (ranks[:, None] <= np.array([1, 5, 10])).astype(float)
    rankings = Rankings(
        measures=QueryMeasures(1 / ranks, found, found, ranks, (np.arange(count) + 2) % count),
        queries=[str(path) for path in paths],
        parts=[f"part {number // 2} <i>" for number in range(count)],
        labels=[BAD] * count,
        gallery=[str(path) for path in paths],
        num_skipped=0,
        chance=np.full((count, 10), 0.1),
    )
    ks = (1, 5, 10)
    scores = score_rankings(
        rankings.measures.values(ks), parts=rankings.parts, names=measure_names(ks), num_resamples=20, seed=0
    )
    return EvaluationResults(
        evaluator="retrieval",
        settings={"features": "cls"},
        classes=(),
        scores=dict.fromkeys(variants, scores),
        weights={"path": "outputs/run/teacher_checkpoint.pth"},
        predictions=RankedQueries(dict.fromkeys(variants, rankings)),
    )


def make_run(root: Path) -> Path:
    """A run that stopped after 40 of 50 iterations, evaluated by k-NN twice; returns its folder."""
    run = root / "run <u>7"
    run.mkdir(parents=True)
    config = load_config(
        None,
        [
            "optim.epochs=5",
            "optim.warmup_epochs=1",
            "train.OFFICIAL_EPOCH_LENGTH=10",
            "train.dataset_path=GroupedJSON:split=TRAIN:root=/data/<parts> & more",
            "student.arch=vit_small",
        ],
    )
    (run / "config.yaml").write_text(render_config(config))
    _write_metrics(run / "metrics.jsonl")
    _write_log(run / "log")
    paths = make_images(root / "images", 16)
    generator = np.random.default_rng(0)
    labels = [number // 2 % 2 for number in range(16)]
    for iteration in (19, 39):
        positive = np.clip(0.35 * np.array(labels) + generator.uniform(0, 0.8, 16), 0.01, 0.99).tolist()
        make_results(paths, positive, labels).write(run / "eval" / f"training_{iteration}")
    (run / "eval" / "best").mkdir()
    best = {"iteration": 39, "metric": "part_auroc", "score": 0.875, "teacher": "eval/training_39/teacher.pth"}
    (run / "eval" / "best" / "best.json").write_text(json.dumps(best))
    (run / "plots").mkdir()
    for name in ("losses", "patch_pca"):
        Image.new("RGB", (320, 200), (200, 220, 240)).save(run / "plots" / f"{name}.png")
    return run


def _write_metrics(path: Path) -> None:
    records: list[dict[str, object]] = []
    for iteration in range(1, DONE, 2):
        loss = None if iteration == 11 else 8 * np.exp(-iteration / 20) + 2
        rest = {"lr": 1e-3 * iteration / DONE, "last_layer_lr": 0.0, "momentum": 0.99, "batch_size": 32}
        shares = {"teacher_entropy_cls": 0.9, "teacher_entropy_patch": 0.8, "grad_norm_backbone": 1.5}
        timing = {"images_per_second": 200 + iteration, "memory_gib": 1.2, "eta_seconds": 4.0}
        warned = {"warnings": ["COLLAPSE: effective rank fell"]} if iteration == 31 else {}
        records.append({"iteration": iteration, **warned, "total_loss": loss, **rest, **shares, "timing": timing})
    for iteration in (19, 39):
        knn = {f"knn_part_auroc_k{k}": 0.6 + iteration / 200 + k / 1000 for k in (10, 20, 100)}
        probe = {"probe_cls_rank": 30.0 - iteration / 4, "probe_patch_rank": 60.0, "probe_patch_drift": iteration / 100}
        records.append({"iteration": iteration, "evaluation": {**knn, **probe}})
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def _write_log(folder: Path) -> None:
    folder.mkdir()
    lines = ["2026-01-02 10:00:00,001 INFO    command.py:58 1 process(es) on cpu"]
    for second in range(3):
        lines.append(f"2026-01-02 10:00:1{second},002 WARNING data.py:9 image {second} is unreadable ({second}.5 %)")
    lines += [
        f"2026-01-02 10:01:00,003 WARNING monitors.py:20 {HOSTILE_WARNING}",
        "  with a second line",
        "2026-01-02 10:01:30,003 WARNING monitors.py:20 COLLAPSE: effective rank fell to 3.1 of 192",
        "2026-01-02 10:02:00,004 INFO    run_log.py:47 iteration 40/50",
        "2026-01-02 10:03:00,005 ERROR   setup.py:80 the command failed",
        "Traceback (most recent call last):",
        "ValueError: boom",
    ]
    (folder / "log.txt").write_text("\n".join(lines) + "\n")
