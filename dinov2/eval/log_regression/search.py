"""Fitting a logistic regression whose penalty is chosen by parts of the training set that are held out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.metrics import average_precision_score, roc_auc_score

from dinov2.eval.features import Features
from dinov2.eval.log_regression.hold_out import HoldOut, hold_out_parts
from dinov2.eval.log_regression.model import Array, LogRegressionModel, fit_path
from dinov2.eval.log_regression.settings import LogRegressionSettings
from dinov2.eval.metrics import FloatArray, IntArray
from dinov2.eval.progress import report_progress


@dataclass(frozen=True, kw_only=True, eq=False)
class ChoiceOfC:
    """The C to fit with, and what it was chosen by.

    Attributes:
        c: the choice.
        chosen_by: in words.
        metric: that judged the held-out parts.
        cs: ``[G]`` candidates from small to large.
        values: ``[R, G]`` the metric on the held-out images of each repeat, larger is better (so minus a log loss).
        log_losses: ``[R, G]`` the log loss of the same.
        converged: ``[R, G]`` whether the fits did.
    """

    c: float
    chosen_by: str
    metric: str
    cs: Array
    values: Array
    log_losses: Array
    converged: Array

    def as_dict(self) -> dict[str, Any]:
        """Plain values: one entry per candidate, means over the repeats."""
        repeats, _ = self.values.shape
        candidates = []
        for number, c in enumerate(self.cs.tolist()) if repeats else ():
            candidate: dict[str, Any] = {"c": c, "log_loss": float(self.log_losses[:, number].mean())}
            if self.metric != "log_loss":
                candidate[self.metric] = float(self.values[:, number].mean())
            candidates.append(candidate | {"not_converged": int((self.converged[:, number] == 0).sum())})
        return {"metric": self.metric, "repeats": repeats, "candidates": candidates}


@dataclass(frozen=True, kw_only=True, eq=False)
class FittedLogRegression:
    """A model fitted to all rows, and how its C was found.

    Attributes:
        model: the fit with the chosen C.
        choice: of C.
        path_converged: of each of the fits that led from the smallest C to the chosen one, whether it did.
    """

    model: LogRegressionModel
    choice: ChoiceOfC
    path_converged: tuple[bool, ...]

    @property
    def converged(self) -> bool:
        """Whether the final fit did."""
        return self.path_converged[-1]

    @property
    def num_fits(self) -> int:
        """Fits that judged candidates, and those of the final path."""
        return self.choice.converged.size + len(self.path_converged)

    @property
    def num_not_converged(self) -> int:
        """Of `num_fits`."""
        return int((self.choice.converged == 0).sum()) + self.path_converged.count(False)

    def as_dict(self) -> dict[str, Any]:
        """Plain values on the fits, without the model."""
        return {
            "c": self.model.c,
            "converged": self.converged,
            "num_fits": self.num_fits,
            "num_not_converged": self.num_not_converged,
            "choice_of_c": self.choice.as_dict(),
        }


def choose_c(
    embeddings: FloatArray,
    labels: IntArray,
    group_ids: Sequence[str],
    classes: Sequence[str],
    settings: LogRegressionSettings,
    *,
    progress: str = "",
) -> ChoiceOfC:
    """Chooses C by fits to a part of the rows, judged on the whole parts that were held out.

    Candidates that the repeats cannot tell from the best (their mean deficit is at most one standard error, from the
    differences within each repeat) count as equal to it; of these the one with the smallest log loss is taken, and of
    equal ones the smallest, which is the strongest penalty. The plain best of a ranking metric is a matter of luck on
    few parts, and may be a C so small that every probability is that of the larger class.

    With two classes the default is the AUROC: what an inspection asks of features is that defects rank above the rest,
    and where their signal is weak, the log loss prefers to predict the frequency of defects for every image. A balanced
    ``class_weighting`` weighs the log loss, too.

    Args:
        embeddings: ``[N, D]``, finite.
        labels: ``[N]`` in ``[0, len(classes))``, at least two different ones.
        group_ids: the part of every row.
        classes: names.
        settings: of the fits and the choice.
        progress: name of the loop in the log; empty for silence.

    Raises:
        ValueError: for a metric that these classes do not have.
    """
    metric = settings.metric_for(len(classes))

    def choice(c: float, chosen_by: str, judged: Array) -> ChoiceOfC:
        values, log_losses, converged = judged
        cs = np.array(settings.cs)
        return ChoiceOfC(
            c=c, chosen_by=chosen_by, metric=metric, cs=cs, values=values, log_losses=log_losses, converged=converged
        )

    nothing = np.empty((3, 0, len(settings.cs)))
    if len(settings.cs) == 1:
        return choice(settings.cs[0], "being the only one", nothing)
    divisions = hold_out_parts(
        labels, group_ids, fraction=settings.hold_out_fraction, repeats=settings.hold_out_repeats, seed=settings.seed
    )
    if not divisions:
        why = "falling back, as fewer than two classes have a part to hold out"
        return choice(settings.fallback_c, why, nothing)
    judged = _judge(embeddings, labels, classes, divisions, metric, settings, progress)
    best = settings.cs[best_candidate(judged[0], judged[1])]
    return choice(best, f"{metric} on held-out parts of the training set, {len(divisions)} times", judged)


def fit_log_regression(
    train: Features, classes: Sequence[str], settings: LogRegressionSettings, *, progress: str = ""
) -> FittedLogRegression:
    """Chooses C within the training set and fits to all of it.

    Args:
        train: labelled features of at least two classes.
        classes: names.
        settings: of the fits.
        progress: name of the choosing fits in the log; empty for silence.

    Raises:
        ValueError: for a training set of one class, or a metric that these classes do not have.
    """
    embeddings, labels = train.embeddings.numpy(), train.labels.numpy()
    check_two_classes(labels, classes)
    choice = choose_c(embeddings, labels, train.group_ids, classes, settings, progress=progress)
    # Along the smaller candidates, as the held-out parts judged it: from zero, a large C takes far more iterations.
    smaller = [c for c in settings.cs if c < choice.c] if len(choice.values) else []
    *_, (model, _) = path = list(fit_path(embeddings, labels, classes, [*smaller, choice.c], settings))
    return FittedLogRegression(model=model, choice=choice, path_converged=tuple(converged for _, converged in path))


def check_two_classes(labels: IntArray, classes: Sequence[str]) -> None:
    """Raises ValueError unless the training labels ``[N]`` show at least two of the classes."""
    seen = np.unique(labels)
    if len(seen) < 2:
        only = ", ".join(repr(classes[label]) for label in seen)
        raise ValueError(f"logistic regression needs training images of at least two classes, found only {only}")


def best_candidate(values: Array, log_losses: Array) -> int:
    """Number of the candidate that `choose_c` takes, from ``[R, G]`` values and log losses."""
    deficits = values[:, [values.mean(axis=0).argmax()]] - values
    errors = deficits.std(axis=0, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.zeros(values.shape[1])
    equal = deficits.mean(axis=0) <= errors
    return int(np.where(equal, log_losses.mean(axis=0), np.inf).argmin())


def _judge(
    embeddings: FloatArray,
    labels: IntArray,
    classes: Sequence[str],
    divisions: Sequence[HoldOut],
    metric: str,
    settings: LogRegressionSettings,
    progress: str,
) -> Array:
    """Value, log loss and convergence of every fit ``[3, R, G]``."""
    judged = np.empty((3, len(divisions), len(settings.cs)))

    def fits() -> Any:
        for repeat, division in enumerate(divisions):
            path = fit_path(embeddings[division.fit], labels[division.fit], classes, settings.cs, settings)
            for number, fitted in enumerate(path):
                yield repeat, number, fitted

    steps = report_progress(fits(), progress, 1, judged[0].size) if progress else fits()
    for repeat, number, (model, converged) in steps:
        held = divisions[repeat].held
        log_probabilities = model.log_probabilities(embeddings[held])
        loss = _log_loss(log_probabilities, labels[held], balanced=settings.class_weighting == "balanced")
        value = -loss if metric == "log_loss" else VALUES[metric](log_probabilities, labels[held])
        judged[:, repeat, number] = value, loss, converged
    return judged


def _log_loss(log_probabilities: Array, labels: IntArray, *, balanced: bool) -> float:
    losses = -np.take_along_axis(log_probabilities, labels[:, None], axis=1)[:, 0]
    return _mean_of_classes(losses, labels) if balanced else float(losses.mean())


def _accuracy(log_probabilities: Array, labels: IntArray) -> float:
    return float((log_probabilities.argmax(axis=1) == labels).mean())


def _balanced_accuracy(log_probabilities: Array, labels: IntArray) -> float:
    return _mean_of_classes((log_probabilities.argmax(axis=1) == labels).astype(np.float64), labels)


def _mean_of_classes(values: Array, labels: IntArray) -> float:
    """Mean over the classes that occur of the mean value ``[N]`` of their rows."""
    counts = np.bincount(labels)
    sums = np.bincount(labels, weights=values)
    return float((sums[counts > 0] / counts[counts > 0]).mean())


def _logits(log_probabilities: Array) -> Array:
    """Of class 1: probabilities that all round to 1 would tie."""
    return np.asarray(log_probabilities[:, 1] - log_probabilities[:, 0])


VALUES: dict[str, Callable[[Array, IntArray], float]] = {
    "accuracy": _accuracy,
    "balanced_accuracy": _balanced_accuracy,
    "auroc": lambda log_probabilities, labels: float(roc_auc_score(labels, _logits(log_probabilities))),
    "average_precision": lambda log_probabilities, labels: float(
        average_precision_score(labels, _logits(log_probabilities))
    ),
}
