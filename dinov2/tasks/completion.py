"""The end of a supervised run: the best weights, scored on val and test, with results, predictions and plots."""

import logging
from dataclasses import replace
from typing import Any

from dinov2.config import render_config
from dinov2.distributed import barrier, is_main_process
from dinov2.eval.fingerprints import find_origins
from dinov2.eval.metrics import Figure
from dinov2.eval.results import EvaluationResults
from dinov2.eval.scoring import LevelScores, Scores
from dinov2.logging.metrics_file import read_metrics
from dinov2.tasks.judging import Verdict, judge_set
from dinov2.tasks.package import load_task_package
from dinov2.tasks.pictures import draw_end
from dinov2.tasks.preparation import BEST, TaskRun

logger = logging.getLogger("dinov2")


def complete(run: TaskRun) -> dict[str, EvaluationResults]:
    """Scores ``best.pth`` on val and test, and writes ``OUT/val``, ``OUT/test`` and ``OUT/plots``.

    Every process must call it. Doing it again writes the same.

    Returns:
        Results by set.
    """
    barrier()  # the main process may still be writing it
    package = load_task_package(run.output_dir / BEST, run.learner.networks.device)
    logger.info("best weights: %s", run.best.describe())
    origins = find_origins(run.sets.named(), str(run.output_dir / BEST))
    results = {}
    verdicts: dict[str, Verdict] = {}
    for name, dataset in (("val", run.sets.val), ("test", run.sets.test)):
        if dataset is None:
            continue
        verdict = judge_set(run.learner.task, package, dataset, run.judging)
        verdicts[name] = verdict
        results[name] = make_results(run, name, verdict, origins)
        if is_main_process():
            results[name].write(run.output_dir / name)
            logger.info("%s\n%s", name, results[name].table())
    if is_main_process():
        draw_end(
            run.output_dir,
            read_metrics(run.output_dir / "metrics.jsonl"),
            verdicts,
            package,
            steps_per_epoch=run.steps_per_epoch,
            best_epoch=run.best.epoch,
        )
    barrier()
    return results


def make_results(run: TaskRun, name: str, verdict: Verdict, origins: dict[str, Any]) -> EvaluationResults:
    """Results of a set in the form that all evaluators share.

    Figures with intervals over parts come from the judge where it has them; all others stand under ``figures``.
    """
    scores = dict(verdict.judge.scores())
    plain = {key: Figure(value=value) for key, value in verdict.figures.items()}
    count = origins["datasets"][name]["num_images"]
    level = LevelScores(count=count, figures=plain)
    if not scores or run.learner.task.name == "segmentation":
        scores = {run.learner.task.name: Scores(image=level, part=replace(level, figures={})), **scores}
    return EvaluationResults(
        evaluator=f"finetune {run.learner.task.name}",
        settings={"set": name, "metric": run.metric, "best_epoch": run.best.epoch, "config": render_config(run.config)},
        classes=run.sets.facts.classes,
        scores=scores,
        extra={"figures": verdict.figures, "confusion": verdict.judge.confusion()},
        predictions=verdict.judge.predictions(),
        **origins,
    )
