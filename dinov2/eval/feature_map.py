"""A map of the features of all images: a point per image or part, for people to look at."""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from torch import Tensor, nn

from dinov2.eval.features import Features
from dinov2.logging.plots import GREY, MARKERS, PALETTE

Points = npt.NDArray[np.float64]  # [N, 2]

MAP_METHODS = ("pca", "tsne")
MAP_LEVELS = ("photo", "part")
_MAX_NAMED_CLASSES = 16  # in the legend
_MIN_TSNE_POINTS = 4
_MAP_INCHES = 6.0


def principal_components(rows: Tensor, count: int) -> tuple[Tensor, float]:
    """Projections ``[N, count]`` of rows ``[N, D]``, on the CPU, and the share of variance in them, in [0, 1]."""
    rows = rows.detach().cpu().double()
    rows = rows - rows.mean(dim=0)
    variances, directions = torch.linalg.eigh(rows.T @ rows)  # ascending
    variances, directions = variances.clamp_min(0).flip(0), directions.flip(1)[:, :count]  # [D], [D, count]
    # Each points where its largest loading is positive, so that the same rows always give the same values.
    largest = directions.gather(0, directions.abs().argmax(dim=0, keepdim=True))  # [1, count]
    projected = rows @ (directions * largest.sign())
    total = float(variances.sum())
    share = float(variances[:count].sum()) / total if total > 0 else 0.0
    return nn.functional.pad(projected, (0, count - projected.shape[1])), share


def class_name(classes: Sequence[str], label: int) -> str:
    return "no label" if label < 0 else classes[label] if classes else f"class {label}"


def map_points(embeddings: Tensor, method: str = "pca", *, seed: int = 0) -> tuple[Points, float | None]:
    """Places features in the plane; the same features give the same places.

    Args:
        embeddings: ``[N, D]``, finite.
        method: ``pca`` keeps distances as far as two directions can; ``tsne`` keeps neighbourhoods, and its distances
            and sizes of groups mean nothing.
        seed: of t-SNE, which starts from the principal components.

    Returns:
        Places ``[N, 2]``, and the share of variance that they hold, in [0, 1]; None for t-SNE.

    Raises:
        ValueError: for too few features for t-SNE.
    """
    if method == "pca":
        points, explained = principal_components(embeddings, 2)
        return points.numpy(), explained
    if len(embeddings) < _MIN_TSNE_POINTS:
        raise ValueError(f"t-SNE needs {_MIN_TSNE_POINTS} or more points, found {len(embeddings)}")
    from sklearn.manifold import TSNE  # slow to import, and seldom needed

    # A perplexity above a third of the points would ask for more neighbours than there are.
    perplexity = min(30.0, (len(embeddings) - 1) / 3)
    tsne = TSNE(n_components=2, init="pca", perplexity=perplexity, random_state=seed)
    return np.asarray(tsne.fit_transform(embeddings.cpu().double().numpy()), dtype=np.float64), None


def mean_features_of_parts(features: Features) -> Features:
    """One row per part, sorted by its id: the mean of its images.

    A part's label is the largest among its images: with two classes, it is defective where any image is.
    """
    names, codes = np.unique(np.array(features.group_ids), return_inverse=True)
    index = torch.from_numpy(codes)
    sums = torch.zeros(len(names), features.embeddings.shape[1]).index_add_(0, index, features.embeddings)
    labels = torch.full((len(names),), -1).scatter_reduce_(0, index, features.labels, "amax")
    parts = [str(name) for name in names]
    return Features(sums / index.bincount()[:, None], labels, parts, parts)


def draw_part_map(
    features: Mapping[str, Features],
    classes: Sequence[str],
    *,
    method: str = "pca",
    level: str = "photo",
    seed: int = 0,
) -> Figure:
    """Draws one map per backbone side by side; colours and shapes of points are the classes.

    Args:
        features: of the same images, by name of the backbone.
        classes: names by label; may be empty.
        method: see `map_points`.
        level: ``photo`` draws a point per image and lines from the images of a part to their middle, ``part`` a point
            per part (see `mean_features_of_parts`).
        seed: see `map_points`.

    Raises:
        ValueError: as in `map_points`.
    """
    figure = Figure(figsize=(_MAP_INCHES * len(features), _MAP_INCHES + 0.9), dpi=120, layout="constrained")
    for number, (name, found) in enumerate(features.items()):
        rows = mean_features_of_parts(found) if level == "part" else found
        points, explained = map_points(rows.embeddings, method, seed=seed)
        axes = figure.add_subplot(1, len(features), number + 1)
        if level == "photo":
            _, codes, counts = np.unique(np.array(rows.group_ids), return_inverse=True, return_counts=True)
            middles = np.stack([np.bincount(codes, points[:, axis]) / counts for axis in (0, 1)], axis=1)
            lines = np.stack([points, middles[codes]], axis=1)[counts[codes] > 1]  # [n, 2, 2]
            axes.add_collection(LineCollection(list(lines), colors="#8884", linewidths=0.7))
        labels, sizes = np.unique(rows.labels.numpy(), return_counts=True)
        for label, size in zip(labels.tolist(), sizes.tolist(), strict=True):
            places = points[rows.labels.numpy() == label]
            colour = GREY if label < 0 else PALETTE[label % len(PALETTE)]
            marker = "." if label < 0 else MARKERS[(label + label // len(PALETTE)) % len(MARKERS)]
            kind = f"{class_name(classes, label)} ({size})"
            kind = f" {kind}" if kind.startswith("_") else kind  # a legend leaves out what begins with an underscore
            label_of_points = kind if len(labels) <= _MAX_NAMED_CLASSES else None
            x, y = places.T
            axes.scatter(x, y, s=22, c=colour, marker=marker, linewidths=0, alpha=0.8, label=label_of_points)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_color("#c8ccd0")
        if len(labels) > _MAX_NAMED_CLASSES:
            axes.set_xlabel(f"{len(labels)} classes; colours repeat", fontsize=9)
        how = "t-SNE" if explained is None else f"PCA, {100 * explained:.0f} % of variance"
        axes.set_title(f"{name}\n{how}", fontsize=11, parse_math=False)
        if explained is not None:  # distances on a t-SNE map mean nothing
            axes.set_aspect("equal", adjustable="datalim")
    things = f"{len(rows)} {'parts' if level == 'part' else 'images, lines join those of a part'}"
    figure.suptitle(f"map of features: {things}", fontsize=11)
    handles, names = figure.axes[0].get_legend_handles_labels()
    if names:
        legend = figure.legend(handles, names, loc="outside lower center", ncols=min(len(names), 6), frameon=False)
        for text in legend.get_texts():
            text.set_parse_math(False)
    return figure
