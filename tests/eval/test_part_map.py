"""The map of parts: places, means of parts, lines, and what is drawn."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.manifold import trustworthiness

from dinov2.eval.features import Features
from dinov2.eval.visualize import _spokes, draw_part_map, map_points, mean_features_of_parts


def clusters(num: int = 40, width: int = 16, seed: int = 0) -> Features:
    """Two distant clouds; four photos per part, every other part in the second cloud."""
    generator = torch.Generator().manual_seed(seed)
    parts = torch.arange(num) // 4
    labels = parts % 2
    centres = 3 * torch.randn(2, width, generator=generator)
    rows = centres[labels] + 0.3 * torch.randn(num, width, generator=generator)
    return Features(rows, labels, [f"part {part}" for part in parts.tolist()], [f"{row}.png" for row in range(num)])


def test_components_are_those_of_scikit_learn() -> None:
    rows = torch.randn(50, 12, generator=torch.Generator().manual_seed(1)) * torch.arange(1, 13)
    points, explained = map_points(rows)
    reference = PCA(n_components=2).fit(rows.double().numpy())
    expected = reference.transform(rows.double().numpy())
    signs = np.sign((points * expected).sum(axis=0))
    np.testing.assert_allclose(points, expected * signs, atol=1e-9)
    assert explained == pytest.approx(reference.explained_variance_ratio_.sum())


def test_tsne_keeps_neighbourhoods_and_repeats_exactly() -> None:
    features = clusters()
    points, explained = map_points(features.embeddings, "tsne", seed=3)
    again, _ = map_points(features.embeddings, "tsne", seed=3)
    assert explained is None
    assert points.shape == (40, 2)
    np.testing.assert_array_equal(points, again)
    assert trustworthiness(features.embeddings.numpy(), points, n_neighbors=5) > 0.85
    distances = np.linalg.norm(points[:, None] - points[None], axis=2) + np.diag(np.full(40, np.inf))
    nearest = distances.argmin(axis=1)
    assert (features.labels.numpy()[nearest] == features.labels.numpy()).all()


def test_few_points_and_narrow_features_have_a_place() -> None:
    assert map_points(torch.ones(1, 4))[0].tolist() == [[0, 0]]
    assert map_points(torch.ones(3, 4)) == (pytest.approx(np.zeros((3, 2))), 0.0)
    points, explained = map_points(torch.tensor([[1.0], [3.0]]))
    assert points.tolist() == [[-1, 0], [1, 0]]
    assert explained == 1.0


def test_a_part_is_the_mean_of_its_photos_and_bad_where_one_is() -> None:
    features = Features(
        torch.tensor([[0.0, 2.0], [4.0, 4.0], [2.0, 0.0], [9.0, 9.0]]),
        torch.tensor([0, -1, 1, -1]),
        ["b", "a", "b", "a"],
        list("wxyz"),
    )
    parts = mean_features_of_parts(features)
    assert parts.group_ids == ["a", "b"]
    torch.testing.assert_close(parts.embeddings, torch.tensor([[6.5, 6.5], [1.0, 1.0]]))
    assert parts.labels.tolist() == [-1, 1]


def test_lines_join_the_photos_of_a_part_in_its_middle() -> None:
    points = np.array([[0.0, 0.0], [5.0, 5.0], [2.0, 4.0]])
    lines = _spokes(points, ["a", "b", "a"])
    np.testing.assert_allclose(lines, [[[0, 0], [1, 2]], [[2, 4], [1, 2]]])


@pytest.mark.parametrize("level", ["photo", "part"])
@pytest.mark.parametrize("method", ["pca", "tsne"])
def test_pictures_repeat_exactly(tmp_path: Path, method: str, level: str) -> None:
    for name in ("a", "b"):
        path = tmp_path / "new" / f"{name}.png"
        models = {"random $": clusters(seed=5), "pretrained": clusters()}
        draw_part_map(models, ("good $x", "_bad"), path=path, method=method, level=level)
    first = (tmp_path / "new" / "a.png").read_bytes()
    assert first == (tmp_path / "new" / "b.png").read_bytes()
    draw_part_map(clusters(seed=9), ("good $x", "_bad"), path=tmp_path / "c.png", method=method, level=level)
    assert first != (tmp_path / "c.png").read_bytes()


def test_many_classes_and_no_labels_are_drawn(tmp_path: Path) -> None:
    rows = clusters(40)
    many = Features(rows.embeddings, torch.arange(40) - 1, rows.group_ids, rows.paths)
    draw_part_map(many, (), path=tmp_path / "many.png")
    none = Features(rows.embeddings, torch.full((40,), -1), rows.group_ids, rows.paths)
    draw_part_map(none, (), path=tmp_path / "none.png")
    assert len(list(tmp_path.iterdir())) == 2


def test_bad_input_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown method 'umap'; allowed: pca, tsne"):
        map_points(torch.ones(4, 4), "umap")
    with pytest.raises(ValueError, match="t-SNE needs 4 or more points, found 3"):
        map_points(torch.ones(3, 4), "tsne")
    with pytest.raises(ValueError, match="must be finite"):
        map_points(torch.full((4, 4), torch.nan))
    with pytest.raises(ValueError, match=r"shape \[N, D\], found \(0, 4\)"):
        map_points(torch.ones(0, 4))
    with pytest.raises(ValueError, match="unknown level 'box'; allowed: photo, part"):
        draw_part_map(clusters(), (), path=tmp_path / "m.png", level="box")
    assert list(tmp_path.iterdir()) == []
