"""From trained linear classifiers to results: every classifier on the validation set, the best one on all sets."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dinov2.eval.linear.checkpoint import write_head
from dinov2.eval.linear.classifiers import ClassifierStack
from dinov2.eval.linear.protocol import LinearProtocol
from dinov2.eval.linear.scoring import JudgedSet, choose, probabilities_of, score_all
from dinov2.eval.linear.sets import VAL
from dinov2.eval.metrics import Figure
from dinov2.eval.result_tables import align
from dinov2.eval.results import PREDICTIONS_FILE, EvaluationResults, Predictions
from dinov2.eval.scoring import Scores, score_predictions
from dinov2.utils.files import write_text_atomically


@dataclass(frozen=True, eq=False)
class Verdict:
    """What became of a linear evaluation.

    Attributes:
        results: of all classifiers on the validation set, and of the chosen one on the test sets.
        chosen: the chosen classifier: its stack and its place there.
        classes: that it knows.
        best_of_kinds: names of the best classifier of each kind of features.
        test_predictions: of the chosen classifier, by test set, with the classes of that set.
    """

    results: EvaluationResults
    chosen: tuple[ClassifierStack, int]
    classes: tuple[str, ...]
    best_of_kinds: tuple[str, ...]
    test_predictions: Mapping[str, tuple[Predictions, tuple[str, ...]]]

    def table(self) -> str:
        """Text for people: the best classifier of each kind of features, and the chosen one on the test sets.

        The results hold the others too; a table of all would be longer than a screen.
        """
        chosen = self.results.chosen
        tests = {name: f"{chosen} on {name}" for name in self.test_predictions}
        shown = {name: self.results.scores[name] for name in (*self.best_of_kinds, *tests.values())}
        blocks = [replace(self.results, scores=shown).table()]
        if tests:
            columns = {name: self.results.scores[variant] for name, variant in {VAL: chosen, **tests}.items()}
            blocks.append(side_by_side(chosen, columns))
        return "\n".join(blocks)

    def write(self, output_dir: str | Path) -> None:
        """Writes the chosen classifier, its predictions and, last, the results into a folder, made if needed."""
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        write_head(folder, *self.chosen, self.classes)
        for name, (predictions, classes) in self.test_predictions.items():
            write_text_atomically(folder / test_predictions_file(name), predictions.to_csv(classes))
        self.results.write(folder)


def test_predictions_file(name: str) -> str:
    """Name of the file with the predictions of a test set."""
    path = Path(PREDICTIONS_FILE)
    return f"{path.stem}_{name.replace(' ', '_')}{path.suffix}"


def judge_classifiers(
    stacks: Sequence[ClassifierStack],
    judged: Mapping[str, JudgedSet],
    classes: tuple[str, ...],
    protocol: LinearProtocol,
) -> Verdict:
    """Scores all classifiers on the validation set, chooses the best, and scores that one on every set with intervals.

    Args:
        stacks: the classifiers.
        judged: ``val`` and the test sets, by name.
        classes: that the classifiers know.
        protocol: says by which metric to choose, and how parts are scored.

    Raises:
        ValueError: when all classifiers have diverged.
    """
    val = judged[VAL]
    scores, diverged = score_all(stacks, val, aggregation=protocol.part_aggregation, top_k=protocol.part_top_k)
    figures = {name: levels.image.figures[protocol.val_metric].value for name, levels in scores.items()}
    chosen = choose(figures)
    stack, place = _find(stacks, chosen)
    predictions = {}
    for name, entry in judged.items():
        predictions[name] = _predict(stack, place, entry)
        scores[chosen if name == VAL else f"{chosen} on {name}"] = _score(predictions[name], protocol)
    results = EvaluationResults(
        evaluator="linear",
        settings={**protocol.judging(), "chosen_by": _chosen_by(protocol, len(figures))},
        classes=val.classes,
        scores=scores,
        chosen=chosen,
        extra={"diverged": diverged},
        predictions=predictions[VAL],
    )
    return Verdict(
        results=results,
        chosen=(stack, place),
        classes=classes,
        best_of_kinds=_best_of_kinds(stacks, figures),
        test_predictions={name: (predictions[name], judged[name].classes) for name in judged if name != VAL},
    )


def side_by_side(title: str, columns: Mapping[str, Scores]) -> str:
    """The figures of one classifier on several sets with their intervals, per image and per part, as text."""
    blocks = []
    for level in ("image", "part"):
        scored = {name: getattr(scores, level) for name, scores in columns.items()}
        names = dict.fromkeys(figure for entry in scored.values() for figure in entry.figures)
        rows = [
            [f"{title}, per {level}", *(f"{name} ({entry.count})" for name, entry in scored.items())],
            *([f"  {figure}", *(_cell(entry.figures.get(figure)) for entry in scored.values())] for figure in names),
        ]
        blocks.append("\n".join(align(rows)))
    return "\n".join(blocks)


def _best_of_kinds(stacks: Sequence[ClassifierStack], figures: Mapping[str, float]) -> tuple[str, ...]:
    best = []
    for stack in stacks:
        own = {settings.name: figures[settings.name] for settings in stack.settings if settings.name in figures}
        best += [choose(own)] if own else []
    return tuple(best)


def _chosen_by(protocol: LinearProtocol, num_classifiers: int) -> str:
    if num_classifiers == 1:
        return "being the only one"
    metric = protocol.val_metric.replace("_", " ")
    return f"{metric} on the validation set itself, which flatters it there: only a test set gives honest figures"


def _find(stacks: Sequence[ClassifierStack], name: str) -> tuple[ClassifierStack, int]:
    for stack in stacks:
        for place, settings in enumerate(stack.settings):
            if settings.name == name:
                return stack, place
    raise AssertionError(f"no classifier is named {name}")


def _predict(stack: ClassifierStack, place: int, judged: JudgedSet) -> Predictions:
    return Predictions(
        paths=judged.features.paths,
        group_ids=judged.features.group_ids,
        labels=judged.labels,
        probabilities=probabilities_of(stack, place, judged),
    )


def _score(predictions: Predictions, protocol: LinearProtocol) -> Scores:
    return score_predictions(
        predictions.probabilities,
        predictions.labels,
        predictions.group_ids,
        aggregation=protocol.part_aggregation,
        top_k=protocol.part_top_k,
        num_resamples=protocol.num_resamples,
        seed=protocol.seed,
    )


def _cell(figure: Figure | None) -> str:
    if figure is None:
        return "-"
    bounds = "" if figure.low is None or figure.high is None else f" [{figure.low:.4f}, {figure.high:.4f}]"
    return f"{figure.value:.4f}{bounds}"
