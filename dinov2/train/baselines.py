"""What k-NN of a run has to beat: a random backbone, simple image statistics, the weights that the run began with."""

import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dinov2.config import Config
from dinov2.distributed import all_gather_objects, is_main_process
from dinov2.eval.command import build_frozen_backbone, build_random_backbone
from dinov2.eval.learning import BASELINE_NAMES, RANDOM, START, STATISTICS, score_of
from dinov2.eval.metrics.classification import (
    MAX_DRAWS,
    Float64Array,
    FloatArray,
    IntArray,
    Level,
    classification_metrics,
    interval,
    levels_of,
    too_few_parts,
)
from dinov2.eval.results import EvaluationResults, Predictions
from dinov2.eval.yardsticks import extract_statistics, guess, knn_by_statistics
from dinov2.train.evaluation import (
    evaluate_backbone,
    evaluation_size,
    flat_metrics,
    open_evaluation_sets,
    random_state_untouched,
)
from dinov2.utils.files import write_text_atomically

logger = logging.getLogger("dinov2")

BASELINES_FILE = "baselines.json"  # under eval/
NUM_RESAMPLES = 1000  # fewer where there are more than 10,000 parts


@dataclass(frozen=True)
class ResampledMetric:
    """A metric, and its values ``[R]`` in resamples of the parts, which are the same for all predictions of a set."""

    value: float
    resamples: Float64Array

    def as_dict(self) -> dict[str, Any]:
        """Plain values; None where a resample does not have the metric."""
        return {"score": self.value, "resamples": [None if np.isnan(one) else float(one) for one in self.resamples]}


def compare_with_baselines(
    config: Config,
    results: EvaluationResults,
    output_dir: Path,
    device: torch.device,
    *,
    check_folder: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Compares a teacher's k-NN, at the k that its bank chose, with what it has to beat; every process must call it.

    The baselines are computed once and kept in ``eval/baselines.json``; they are computed anew when sets, options of
    the evaluation or the metric have changed. The interval of a gain comes from resamples of whole parts, in each of
    which teacher and baseline are scored on the same draws.

    Args:
        config: options of the run.
        results: of the teacher.
        output_dir: folder of the run.
        device: where to compute.
        check_folder: called before anything is written; an `OSError` counts as one of writing.

    Returns:
        ``metric``, ``variant``, ``score`` with ``low`` and ``high``, ``chance``, ``count`` (images or parts),
        ``too_few`` (why no interval says much, where that is so), and for each baseline a mapping of ``score``,
        ``gain``, ``low`` and ``high``; empty where the labels have no metric.

    Raises:
        OSError: the baselines cannot be written.
        ValueError: an image cannot be read, or features are not finite; raised by all processes together.
    """
    found, predictions = score_of(flat_metrics(results), config.evaluation.best_metric), results.predictions
    if found is None or not isinstance(predictions, Predictions):
        return {}
    metric = re.sub(r"_k\d+$", "", found[0])
    level, _, name = metric.partition("_")

    def rows(probabilities: FloatArray) -> dict[str, Level]:
        return levels_of(probabilities, predictions.labels, predictions.group_ids)

    own_rows = rows(predictions.probabilities)
    too_few = too_few_parts(own_rows["part"].labels)
    own = resample_metric(own_rows[level], name)
    if own is None:
        return {}
    path = output_dir / "eval" / BASELINES_FILE
    asked = {
        "metric": metric,
        "settings": {name: value for name, value in results.settings.items() if name != "chosen_by"},
        "datasets": {name: values.get("sha256") for name, values in results.datasets.items()},
        "started_from": config.student.pretrained_weights,
    }
    baselines = all_gather_objects(_read_baselines(path, asked) if is_main_process() else {})[0]
    if not baselines:
        scored = {
            baseline: resample_metric(rows(probabilities)[level], name)
            for baseline, probabilities in _predict_baselines(config, len(results.classes), device)
        }
        baselines = {baseline: one for baseline, one in scored.items() if one is not None}
        if is_main_process():
            content = asked | {"baselines": {name: one.as_dict() for name, one in baselines.items()}}
            check_folder()
            path.parent.mkdir(exist_ok=True)
            write_text_atomically(path, json.dumps(content, ensure_ascii=False) + "\n")
    low, high = interval(own.resamples)
    labels = own_rows[level].labels
    return {
        "metric": metric,
        "variant": results.chosen,
        "score": own.value,
        **_bounds(low, high),
        "chance": _chance(labels, len(results.classes), name),
        "count": len(labels),
        **({"too_few": too_few} if too_few else {}),
        **{name: _gain(own, baseline) for name, baseline in baselines.items()},
    }


def _chance(labels: IntArray, num_classes: int, name: str) -> float:
    """What guessing gives, or naming the most frequent class for all, which takes no learning either."""
    value = guess(labels, num_classes).metrics[name].value
    return max(value, float(np.bincount(labels).max() / len(labels))) if name == "accuracy" else value


def resample_metric(level: Level, name: str) -> ResampledMetric | None:
    """Scores the images or parts by a metric such as ``auroc``; None where the labels do not have it."""
    value = classification_metrics(level.probabilities, level.labels).get(name)
    if value is None:
        return None
    resamples = level.resampled(min(NUM_RESAMPLES, MAX_DRAWS // level.num_parts), 0)
    return ResampledMetric(value, resamples.get(name, np.zeros(0)))


def _bounds(low: float | None, high: float | None) -> dict[str, float]:
    return {} if low is None or high is None else {"low": low, "high": high}


def _gain(own: ResampledMetric, baseline: ResampledMetric) -> dict[str, float]:
    low, high = interval(own.resamples - baseline.resamples)
    return {"score": baseline.value, "gain": own.value - baseline.value, **_bounds(low, high)}


def _predict_baselines(config: Config, num_classes: int, device: torch.device) -> Iterator[tuple[str, FloatArray]]:
    """Name and class probabilities ``[N, C]`` of every baseline, one after the other."""
    sets = open_evaluation_sets(config.evaluation, evaluation_size(config))
    assert sets is not None
    weights = config.student.pretrained_weights
    for name in (STATISTICS, RANDOM, *([START] if weights else [])):
        if is_main_process():
            logger.info("measured once, as k-NN has to beat it: %s", BASELINE_NAMES[name])
        with random_state_untouched():
            if name == STATISTICS:
                statistics = [
                    extract_statistics(
                        images,
                        batch_size=config.evaluation.batch_size,
                        num_workers=config.train.num_workers,
                        device=device,
                    )
                    for images in sets
                ]
                yield name, knn_by_statistics(statistics[0], statistics[1], num_classes, device=device)
                continue
            fault, backbone = "", None
            try:
                if name == START:
                    backbone = build_frozen_backbone(config, weights, device)
                else:
                    backbone = build_random_backbone(config, device, seed=config.train.seed)
            except (OSError, ValueError) as error:
                fault = str(error)
            if faults := [one for one in all_gather_objects(fault) if one]:
                logger.warning("%s cannot be compared with: %s", BASELINE_NAMES[name], faults[0])
                continue
            assert backbone is not None
            predictions = evaluate_backbone(config, backbone, sets, device, weights=weights).predictions
            assert isinstance(predictions, Predictions)
            yield name, predictions.probabilities


def _read_baselines(path: Path, asked: Mapping[str, Any]) -> dict[str, ResampledMetric]:
    """What was measured before for the same question; empty where there is nothing, or nothing sound."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if any(content[name] != json.loads(json.dumps(value)) for name, value in asked.items()):
            logger.info("sets or options of the evaluation have changed: what k-NN has to beat is measured anew")
            return {}
        return {
            name: ResampledMetric(float(one["score"]), np.array(one["resamples"], dtype=np.float64))
            for name, one in content["baselines"].items()
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        logger.warning("%s cannot be used, what k-NN has to beat is measured anew: %s", path, error)
        return {}
