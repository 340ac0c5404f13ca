"""Logistic regression on the features of a frozen backbone: fitted by scikit-learn, kept as plain arrays."""

import math
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, roc_auc_score
from sklearn.model_selection import RepeatedKFold
from sklearn.preprocessing import StandardScaler, normalize

from dinov2.eval.features import ALL, ROWS_AT_A_TIME, Features, check_few_shot, report_progress
from dinov2.eval.metrics.classification import Float64Array, FloatArray, IntArray, ScoringSettings, number_parts
from dinov2.utils.files import write_atomically
from dinov2.utils.seeds import derive_seed


@dataclass(frozen=True)
class HoldOut:
    """One division of a set: row numbers to fit on and row numbers held out, each from small to large."""

    fit: IntArray
    held: IntArray


def hold_out_parts(
    labels: IntArray, group_ids: Sequence[str], *, fraction: float = 0.2, repeats: int = 5, seed: int = 0
) -> tuple[HoldOut, ...]:
    """Divides a labelled set several times, never dividing a part, and with every class left to fit on.

    Of the parts of each class about ``fraction`` are held out: at least one where there are two, never the last.
    Successive repeats are the folds of a shuffled cross-validation, which is shuffled anew when it is used up: five
    repeats of a fifth hold out every part once. The result depends on the parts, their labels and the seed, not on the
    order of the rows.

    scikit-learn's `RepeatedKFold` divides the parts of each class by itself: its `StratifiedGroupKFold` counts rows, so
    that with few parts a fold may lack a class, or hold out the last part that shows one.

    Results of versions that drew the parts themselves have other divisions of the same sizes, so that C may have come
    out as another of those that the held-out parts cannot tell apart.

    Args:
        labels: ``[N]``, from 0 up.
        group_ids: the part of every row. A part counts as `score_parts` has it: of class 1 if any of its rows is, with
            more than two classes of the most frequent one.
        fraction: in (0, 1), of the parts of a class.
        repeats: divisions to try, at least 1.
        seed: of the shuffled orders.

    Returns:
        The divisions whose held-out rows show at least two classes; another could not tell a good setting from one that
        always answers the same. Empty when fewer than two classes have a part to spare.

    Raises:
        ValueError: for settings out of range, or rows that differ in number.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"the fraction to hold out must be between 0 and 1, found {fraction}")
    if repeats < 1:
        raise ValueError(f"hold-out repeats must be at least 1, found {repeats}")
    if len(labels) != len(group_ids) or len(labels) == 0:
        raise ValueError(f"{len(labels)} labels and {len(group_ids)} parts must be equally many, and at least one")
    part_of_row = number_parts(group_ids)[1]
    pairs, counts = np.unique(np.stack([part_of_row, labels], axis=1), axis=0, return_counts=True)  # part and label
    precedence = -pairs[:, 1] if labels.max() < 2 else -counts  # sorted so that the label of a part comes first
    order = np.lexsort((pairs[:, 1], precedence, pairs[:, 0]))
    part_labels = pairs[order[np.unique(pairs[order, 0], return_index=True)[1]], 1]
    held_parts = np.zeros((repeats, len(part_labels)), dtype=np.bool_)
    for label in np.unique(part_labels):
        members = np.flatnonzero(part_labels == label)
        if len(members) == 1:
            continue
        size = min(max(round(fraction * len(members)), 1), len(members) - 1)
        folds = max(len(members) // min(size, len(members) - size), 2)
        random_state = derive_seed(seed, "hold-out", int(label)) % 2**32
        splitter = RepeatedKFold(n_splits=folds, n_repeats=-(-repeats // folds), random_state=random_state)
        for held, (others, fold) in zip(held_parts, splitter.split(members), strict=False):
            held[members[fold if 2 * size <= len(members) else others]] = True
    divisions = []
    for held in held_parts:
        for label in np.unique(labels):  # images of a part need not agree, so a class may be left without a part
            having = pairs[pairs[:, 1] == label, 0]
            if held[having].all():
                held[having[0]] = False
        rows = held[part_of_row]
        if len(np.unique(labels[rows])) >= 2:
            divisions.append(HoldOut(fit=np.flatnonzero(~rows), held=np.flatnonzero(rows)))
    return tuple(divisions)


C_GRID = tuple(10 ** (-6 + 11 * step / 44) for step in range(45))  # as published
METRICS = ("log_loss", "auroc", "average_precision", "balanced_accuracy", "accuracy")
TWO_CLASS_METRICS = ("auroc", "average_precision")
CLASS_WEIGHTINGS = ("none", "balanced")
TRAIN_DTYPES = ("float64", "float32")


@dataclass(frozen=True, kw_only=True)
class LogRegressionSettings(ScoringSettings):
    """Everything but the features that decides the metrics.

    Attributes:
        cs: inverse strengths of the L2 penalty to choose from, kept from small to large.
        metric: by which the held-out parts choose C: one of `METRICS`; empty for ``auroc`` with two classes and
            ``log_loss`` with more, see `choose_c`.
        hold_out_fraction: of the parts of each class, see `hold_out_parts`.
        hold_out_repeats: how often parts are held out.
        fallback_c: used where no part can be held out. 0.001 was best with 2 to 8 images of each of two classes, whose
            384 features a larger C overfits; a smaller one ranks alike, with probabilities that say nothing.
        class_weighting: ``balanced`` gives each class the same total weight; with ``none`` every image has the same.
        max_iter: of L-BFGS, per fit.
        train_dtype: precision of the fit; ``float32`` needs half the memory and time.
        n_per_class_list: images per class of few-shot training sets; -1 for the whole set.
        n_tries: few-shot training sets per number, drawn with seeds 0, 1, ….
        seed: of the parts that are held out, and of the resamples.
    """

    cs: tuple[float, ...] = C_GRID
    metric: str = ""
    hold_out_fraction: float = 0.2
    hold_out_repeats: int = 5
    fallback_c: float = 1e-3
    class_weighting: str = "none"
    max_iter: int = 1000
    train_dtype: str = "float64"
    n_per_class_list: tuple[int, ...] = (ALL,)
    n_tries: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.cs or not all(0 < c < math.inf for c in self.cs):
            raise ValueError(f"cs must be one or more finite numbers above 0, found {self.cs}")
        if not 0 < self.fallback_c < math.inf:
            raise ValueError(f"fallback_c must be finite and above 0, found {self.fallback_c}")
        if not 0 < self.hold_out_fraction < 1:
            raise ValueError(f"hold_out_fraction must be between 0 and 1, found {self.hold_out_fraction}")
        for name in ("hold_out_repeats", "max_iter"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, found {getattr(self, name)}")
        choices = {"metric": ("", *METRICS), "class_weighting": CLASS_WEIGHTINGS, "train_dtype": TRAIN_DTYPES}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} {getattr(self, name)!r} is not one of {', '.join(map(repr, allowed))}")
        check_few_shot(self.n_per_class_list, self.n_tries)
        object.__setattr__(self, "cs", tuple(sorted(set(self.cs))))

    def metric_for(self, num_classes: int) -> str:
        """The metric that chooses C among so many classes.

        Raises:
            ValueError: for a metric that exists for two classes only.
        """
        if not self.metric:
            return "auroc" if num_classes == 2 else "log_loss"
        if num_classes != 2 and self.metric in TWO_CLASS_METRICS:
            raise ValueError(f"{self.metric} exists for two classes; to choose C among {num_classes}, take log_loss")
        return self.metric

    def as_dict(self) -> dict[str, Any]:
        """Plain values for the results."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


ARRAYS = ("weights", "bias", "mean", "std", "c", "classes")  # of a file


@dataclass(frozen=True, kw_only=True, eq=False)
class LogRegressionModel:
    """A fitted logistic regression; a row ``x`` of features has the logits ``weights @ (x / |x| - mean) / std + bias``.

    Attributes:
        weights: ``[C, D]``; with two classes, all zero for the first.
        bias: ``[C]``; minus infinity for a class without a training image, whose probability is then 0.
        mean: ``[D]`` of the training features of unit length.
        std: ``[D]`` of the same, 1 where they do not vary.
        c: inverse strength of the L2 penalty.
        classes: names.
    """

    weights: Float64Array
    bias: Float64Array
    mean: Float64Array
    std: Float64Array
    c: float
    classes: tuple[str, ...]

    def probabilities(self, embeddings: FloatArray) -> Float64Array:
        """Class probabilities ``[N, C]`` of features ``[N, D]`` of any length, as the backbone gives them."""
        return np.exp(self.log_probabilities(embeddings))

    def log_probabilities(self, embeddings: FloatArray) -> Float64Array:
        """Logarithms of `probabilities`, exact also where those round to 0 or 1."""
        if embeddings.ndim != 2 or embeddings.shape[1] != len(self.mean):
            raise ValueError(f"the model takes features [N, {len(self.mean)}], not {list(embeddings.shape)}")
        pieces = [np.empty((0, len(self.classes)))]
        for start in range(0, len(embeddings), ROWS_AT_A_TIME):
            rows = normalize(embeddings[start : start + ROWS_AT_A_TIME].astype(np.float64))
            logits = (rows - self.mean) / self.std @ self.weights.T + self.bias
            logits -= logits.max(axis=1, keepdims=True)
            pieces.append(logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)))
        return np.concatenate(pieces)

    def save(self, path: str | Path) -> None:
        """Writes an ``.npz`` file of plain arrays, atomically; `load_log_regression` reads it."""
        arrays: Any = {name: np.asarray(getattr(self, name)) for name in ARRAYS}
        write_atomically(path, lambda file: np.savez(file, **arrays))


def load_log_regression(path: str | Path) -> LogRegressionModel:
    """Reads what `LogRegressionModel.save` wrote; nothing in the file can run code.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it is not such a file.
    """
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in ARRAYS}
    except (EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:  # TypeError: a single array
        raise ValueError(f"{path} is not a fitted logistic regression: {error}") from error
    shapes = {name: array.shape for name, array in arrays.items()}
    num_classes, num_features = len(np.atleast_1d(arrays["classes"])), np.atleast_1d(arrays["mean"]).size
    of_class, of_feature = (num_classes,), (num_features,)
    if shapes != dict(
        zip(ARRAYS, (of_class + of_feature, of_class, of_feature, of_feature, (), of_class), strict=True)
    ):
        raise ValueError(f"{path} is not a fitted logistic regression: arrays of shapes {shapes}")
    return LogRegressionModel(
        **{name: arrays[name] for name in ("weights", "bias", "mean", "std")},
        c=float(arrays["c"]),
        classes=tuple(str(name) for name in arrays["classes"]),
    )


def fit_path(
    embeddings: FloatArray,
    labels: IntArray,
    classes: Sequence[str],
    cs: Iterable[float],
    settings: LogRegressionSettings,
) -> Iterator[tuple[LogRegressionModel, bool]]:
    """Fits one model per C, each starting where the one before ended: from small to large C, neighbours are near.

    Features are brought to unit length, then each is standardised by mean and deviation of these rows alone.

    Args:
        embeddings: ``[N, D]``, finite.
        labels: ``[N]`` in ``[0, len(classes))``, at least two different ones.
        classes: names.
        cs: inverse strengths of the L2 penalty.
        settings: of the fit; its own ``cs`` do not count here.

    Yields:
        The model, and whether the fit converged within ``max_iter``.
    """
    rows = normalize(embeddings.astype(settings.train_dtype))
    scaler = StandardScaler().fit(rows)
    rows = scaler.transform(rows)
    estimator = LogisticRegression(
        max_iter=settings.max_iter,
        class_weight=None if settings.class_weighting == "none" else settings.class_weighting,
        warm_start=True,
    )
    for c in cs:
        estimator.C = c
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", ConvergenceWarning)
            estimator.fit(rows, labels)
        others = [warning for warning in caught if not issubclass(warning.category, ConvergenceWarning)]
        for warning in others:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
        seen: Any = estimator.classes_
        weights, bias = np.zeros((len(classes), rows.shape[1])), np.full(len(classes), -np.inf)
        if len(seen) == 2:  # scikit-learn has one row of weights then, the logit of the second class against the first
            weights[seen[1]], bias[seen[0]], bias[seen[1]] = estimator.coef_[0], 0.0, estimator.intercept_[0]
        else:
            weights[seen], bias[seen] = estimator.coef_, estimator.intercept_
        model = LogRegressionModel(
            weights=weights,
            bias=bias,
            mean=np.array(scaler.mean_, dtype=np.float64),
            std=np.array(scaler.scale_, dtype=np.float64),
            c=float(c),
            classes=tuple(classes),
        )
        yield model, len(others) == len(caught)


@dataclass(frozen=True, kw_only=True, eq=False)
class ChoiceOfC:
    """The C to fit with, and what it was chosen by.

    Attributes:
        c: the choice.
        chosen_by: in words.
        metric: of the held-out images.
        cs: ``[G]`` candidates from small to large.
        values: ``[R, G]`` the metric on the held-out images of each repeat, larger is better (so minus a log loss).
        log_losses: ``[R, G]`` the log loss of the same.
        converged: ``[R, G]`` whether the fits did, as 1 or 0.
    """

    c: float
    chosen_by: str
    metric: str
    cs: Float64Array
    values: Float64Array
    log_losses: Float64Array
    converged: Float64Array

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
        """Fits that compared candidates, and those of the final path."""
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
    """Chooses C by fits to a part of the rows, evaluated on the whole parts that were held out.

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
    found = np.empty((3, 0, len(settings.cs)))  # value, log loss and convergence of every fit
    if len(settings.cs) == 1:
        c, chosen_by = settings.cs[0], "being the only one"
    elif divisions := hold_out_parts(
        labels, group_ids, fraction=settings.hold_out_fraction, repeats=settings.hold_out_repeats, seed=settings.seed
    ):
        found = np.empty((3, len(divisions), len(settings.cs)))
        fits = (
            (repeat, number, fitted)
            for repeat, division in enumerate(divisions)
            for number, fitted in enumerate(
                fit_path(embeddings[division.fit], labels[division.fit], classes, settings.cs, settings)
            )
        )
        for repeat, number, (model, converged) in (
            report_progress(fits, progress, 1, found[0].size) if progress else fits
        ):
            held = divisions[repeat].held
            log_probabilities = model.log_probabilities(embeddings[held])
            losses = -np.take_along_axis(log_probabilities, labels[held, None], axis=1)[:, 0]
            balanced = settings.class_weighting == "balanced"
            loss = _mean_of_classes(losses, labels[held]) if balanced else float(losses.mean())
            value = -loss if metric == "log_loss" else VALUES[metric](log_probabilities, labels[held])
            found[:, repeat, number] = value, loss, converged
        c = settings.cs[best_candidate(found[0], found[1])]
        chosen_by = f"{metric} on held-out parts of the training set, {len(divisions)} times"
    else:
        c, chosen_by = settings.fallback_c, "falling back, as fewer than two classes have a part to hold out"
    return ChoiceOfC(
        c=c,
        chosen_by=chosen_by,
        metric=metric,
        cs=np.array(settings.cs),
        values=found[0],
        log_losses=found[1],
        converged=found[2],
    )


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
    # Along the smaller candidates, as it was on the held-out parts: from zero, a large C takes far more iterations.
    smaller = [c for c in settings.cs if c < choice.c] if len(choice.values) else []
    *_, (model, _) = path = list(fit_path(embeddings, labels, classes, [*smaller, choice.c], settings))
    return FittedLogRegression(model=model, choice=choice, path_converged=tuple(converged for _, converged in path))


def check_two_classes(labels: IntArray, classes: Sequence[str]) -> None:
    """Raises ValueError unless the training labels ``[N]`` show at least two of the classes."""
    seen = np.unique(labels)
    if len(seen) < 2:
        only = ", ".join(repr(classes[label]) for label in seen)
        raise ValueError(f"logistic regression needs training images of at least two classes, found only {only}")


def best_candidate(values: Float64Array, log_losses: Float64Array) -> int:
    """Number of the candidate that `choose_c` takes, from ``[R, G]`` values and log losses."""
    deficits = values[:, [values.mean(axis=0).argmax()]] - values
    errors = deficits.std(axis=0, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.zeros(values.shape[1])
    equal = deficits.mean(axis=0) <= errors
    return int(np.where(equal, log_losses.mean(axis=0), np.inf).argmin())


def _mean_of_classes(values: Float64Array, labels: IntArray) -> float:
    """Mean over the classes that occur of the mean value ``[N]`` of their rows."""
    counts = np.bincount(labels)
    sums = np.bincount(labels, weights=values)
    return float((sums[counts > 0] / counts[counts > 0]).mean())


def _logits(log_probabilities: Float64Array) -> Float64Array:
    """Of class 1: probabilities that all round to 1 would tie."""
    return np.asarray(log_probabilities[:, 1] - log_probabilities[:, 0])


VALUES: dict[str, Callable[[Float64Array, IntArray], float]] = {
    "accuracy": lambda rows, labels: float((rows.argmax(axis=1) == labels).mean()),
    "balanced_accuracy": lambda rows, labels: _mean_of_classes((rows.argmax(axis=1) == labels) * 1.0, labels),
    "auroc": lambda rows, labels: float(roc_auc_score(labels, _logits(rows))),
    "average_precision": lambda rows, labels: float(average_precision_score(labels, _logits(rows))),
}
