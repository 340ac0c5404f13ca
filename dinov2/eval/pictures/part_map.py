"""A map of parts: features of photos as points in the plane, alike ones close together."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from dinov2.eval.features import Features
from dinov2.eval.pictures.principal_components import principal_components
from dinov2.utils.files import write_atomically

MAP_METHODS = ("pca", "tsne")
MAP_LEVELS = ("photo", "part")

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f4f24", "#6a4c93")
_MARKERS = "os^DvP*X"
_NO_LABEL = "#9aa0a6"
_MOST_NAMED = 16  # classes in the legend
_PERPLEXITY = 30.0
_FEWEST_FOR_TSNE = 4
_PANEL_INCHES = 6.0

Points = npt.NDArray[np.float64]  # [N, 2]
Labels = npt.NDArray[np.int64]  # [N], -1 where there is none


def map_points(embeddings: torch.Tensor, method: str = "pca", *, seed: int = 0) -> tuple[Points, float | None]:
    """Places features in the plane; the same features give the same places.

    Args:
        embeddings: ``[N, D]``, finite.
        method: ``pca`` keeps distances as far as two directions can; ``tsne`` keeps neighbourhoods, and its distances
            and sizes of groups mean nothing.
        seed: of t-SNE, which starts from the principal components.

    Returns:
        Places ``[N, 2]``, and the share of variance that they hold, in [0, 1]; None for t-SNE.

    Raises:
        ValueError: for no features, an unknown method, features that are not finite, or too few for t-SNE.
    """
    if method not in MAP_METHODS:
        raise ValueError(f"unknown method {method!r}; allowed: {', '.join(MAP_METHODS)}")
    if embeddings.ndim != 2 or 0 in embeddings.shape or not embeddings.isfinite().all():
        raise ValueError(f"features must be finite and of shape [N, D], found {tuple(embeddings.shape)}")
    if method == "tsne":
        return _tsne(embeddings, seed), None
    points, variances = principal_components(embeddings, min(2, embeddings.shape[1]))
    points = torch.nn.functional.pad(points, (0, 2 - points.shape[1]))
    total = float(variances.sum())
    return points.numpy(), float(variances[:2].sum()) / total if total > 0 else 0.0


def mean_features_of_parts(features: Features) -> Features:
    """One row per part, sorted by its id: the mean of its photos.

    A part's label is the largest among its photos: with two classes, it is defective where any photo is.
    """
    names, codes = np.unique(np.array(features.group_ids), return_inverse=True)
    index = torch.from_numpy(codes)
    sums = torch.zeros(len(names), features.embeddings.shape[1]).index_add_(0, index, features.embeddings)
    labels = torch.full((len(names),), -1).scatter_reduce_(0, index, features.labels, "amax")
    parts = [str(name) for name in names]
    return Features(sums / index.bincount()[:, None], labels, parts, parts)


def draw_part_map(
    features: Features | Mapping[str, Features],
    classes: Sequence[str],
    *,
    path: str | Path,
    method: str = "pca",
    level: str = "photo",
    seed: int = 0,
) -> None:
    """Draws one map per backbone side by side; colours and shapes of points are the classes.

    Args:
        features: of one backbone, or of several by name.
        classes: names by label; may be empty.
        path: PNG file to write; its folder is created where needed.
        method: see `map_points`.
        level: ``photo`` draws a point per photo and lines from the photos of a part to their middle, ``part`` a point
            per part (see `mean_features_of_parts`).
        seed: see `map_points`.

    Raises:
        ValueError: for an unknown level or as in `map_points`.
    """
    if level not in MAP_LEVELS:
        raise ValueError(f"unknown level {level!r}; allowed: {', '.join(MAP_LEVELS)}")
    named = {"": features} if isinstance(features, Features) else dict(features)
    figure = Figure(figsize=(_PANEL_INCHES * len(named), _PANEL_INCHES + 0.9), dpi=120, layout="constrained")
    for number, (name, drawn) in enumerate(named.items()):
        rows = mean_features_of_parts(drawn) if level == "part" else drawn
        points, explained = map_points(rows.embeddings, method, seed=seed)
        axes = figure.add_subplot(1, len(named), number + 1)
        if level == "photo":
            axes.add_collection(LineCollection(_spokes(points, rows.group_ids), colors="#8884", linewidths=0.7))
        _scatter(axes, points, rows.labels.numpy(), classes)
        how = "t-SNE" if explained is None else f"PCA, {100 * explained:.0f} % of variance"
        axes.set_title(f"{name}\n{how}".strip(), fontsize=11, parse_math=False)
        if explained is not None:  # distances on a t-SNE map mean nothing
            axes.set_aspect("equal", adjustable="datalim")
    things = f"{len(rows)} {'parts' if level == 'part' else 'photos, lines join those of a part'}"
    figure.suptitle(f"map of features: {things}", fontsize=11)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if labels:
        legend = figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 6), frameon=False)
        for text in legend.get_texts():
            text.set_parse_math(False)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, partial(figure.savefig, format="png"))


def _tsne(embeddings: torch.Tensor, seed: int) -> Points:
    if len(embeddings) < _FEWEST_FOR_TSNE:
        raise ValueError(f"t-SNE needs {_FEWEST_FOR_TSNE} or more points, found {len(embeddings)}")
    from sklearn.manifold import TSNE  # slow to import, and seldom needed

    # A perplexity above a third of the points would ask for more neighbours than there are.
    perplexity = min(_PERPLEXITY, (len(embeddings) - 1) / 3)
    tsne = TSNE(n_components=2, init="pca", perplexity=perplexity, random_state=seed)
    return np.asarray(tsne.fit_transform(embeddings.cpu().double().numpy()), dtype=np.float64)


def _spokes(points: Points, group_ids: Sequence[str]) -> list[Points]:
    """Lines ``[2, 2]`` from every photo to the middle of its part, for parts with several photos."""
    _, codes, counts = np.unique(np.array(group_ids), return_inverse=True, return_counts=True)
    middles = np.stack([np.bincount(codes, weights=points[:, axis]) / counts for axis in (0, 1)], axis=1)
    return [np.stack([point, middles[code]]) for point, code in zip(points, codes, strict=True) if counts[code] > 1]


def _scatter(axes: Axes, points: Points, labels: Labels, classes: Sequence[str]) -> None:
    counts = {int(label): int(count) for label, count in zip(*np.unique(labels, return_counts=True), strict=True)}
    for label, count in counts.items():
        rows = points[labels == label]
        if label < 0:
            colour, marker, name = _NO_LABEL, ".", "no label"
        else:
            colour = _COLOURS[label % len(_COLOURS)]
            marker = _MARKERS[(label + label // len(_COLOURS)) % len(_MARKERS)]
            name = classes[label] if classes else f"class {label}"
        # A legend leaves out what begins with an underscore.
        text = f"{' ' if name.startswith('_') else ''}{name} ({count})" if len(counts) <= _MOST_NAMED else None
        axes.scatter(rows[:, 0], rows[:, 1], s=22, c=colour, marker=marker, linewidths=0, alpha=0.8, label=text)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_color("#c8ccd0")
    if len(counts) > _MOST_NAMED:
        axes.set_xlabel(f"{len(counts)} classes; colours repeat", fontsize=9)
