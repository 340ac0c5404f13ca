"""Coresets against the plain greedy algorithm, scores against definitions, files."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from eval_stand_ins import tiny_transformer
from PIL import Image
from scipy.spatial.distance import cdist, mahalanobis
from torch.nn.functional import normalize

import dinov2
from dinov2.eval.anomaly.coreset import greedy_coreset
from dinov2.eval.anomaly.memory import MemoryOrigin, PatchGaussian, PatchMemory
from dinov2.eval.anomaly.patches import (
    PatchFeatures,
    PatchStatistics,
    Turned,
    anomaly_map,
    find_foreground,
    fingerprint,
    grid_of,
)
from dinov2.models.heads.anomaly import is_foreground

ORIGIN = MemoryOrigin(backbone="0" * 64, image_size=(28, 56), blocks=(0, 1))


def rows(count: int, width: int = 6, seed: int = 0) -> torch.Tensor:
    """Rows of unit length in clusters of different widths, all different."""
    generator = torch.Generator().manual_seed(seed)
    middle = torch.randn(7, width, generator=generator)[torch.randint(0, 7, (count,), generator=generator)]
    return normalize(middle + 0.3 * torch.rand(count, 1, generator=generator) * torch.randn(count, width), dim=1)


def slow_coreset(features: np.ndarray, count: int, known: np.ndarray | None = None) -> list[int]:
    """One centre at a time, every row compared with every centre, in double precision."""
    if known is None:
        chosen = [int(cdist(features, features.mean(axis=0)[None])[:, 0].argmax())]
        nearest = cdist(features, features[chosen])[:, 0]
    else:
        chosen, nearest = [], cdist(features, known).min(axis=1)
    while len(chosen) < count:
        chosen.append(int(nearest.argmax()))
        nearest = np.minimum(nearest, cdist(features, features[chosen[-1:]])[:, 0])
    return chosen


@pytest.mark.parametrize("block_rows", [1, 7, 64, 1000])
def test_coreset_is_that_of_the_plain_greedy_algorithm(block_rows: int) -> None:
    torch.manual_seed(0)
    features = rows(300)
    found, radius = greedy_coreset(features, 60, block_rows=block_rows)
    expected = slow_coreset(features.double().numpy(), 60)
    assert found.tolist() == expected
    distances = cdist(features.double().numpy(), features[expected].double().numpy()).min(axis=1)
    assert radius == pytest.approx(distances.max(), abs=1e-5)
    known = rows(10, seed=5)
    more, _ = greedy_coreset(features, 40, known=known, block_rows=block_rows)
    assert more.tolist() == slow_coreset(features.double().numpy(), 40, known.double().numpy())


def test_coreset_stops_when_all_rows_are_near() -> None:
    torch.manual_seed(0)
    features = rows(50)
    assert len(greedy_coreset(features.repeat(4, 1), 200)[0]) == 50, "copies need no centre of their own"
    found, radius = greedy_coreset(features, 50, radius=0.3)
    assert len(found) < 50
    assert radius <= 0.3
    projected, _ = greedy_coreset(features, 10, projection=4, seed=1)
    assert len(set(projected.tolist())) == 10
    with pytest.raises(ValueError, match="at least one row"):
        greedy_coreset(features[:0], 1)


def two_kinds(grid: tuple[int, int], count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Patches ``[count * N, 8]`` of drawn images, a part in the middle of a background, and which show the part."""
    part = torch.zeros(grid, dtype=torch.bool)
    part[1:-1, 2:-1] = True
    kinds = torch.eye(8)[:2]
    shown = part.flatten().repeat(count)
    return normalize(kinds[shown.long()] + 0.1 * torch.randn(len(shown), 8), dim=1), shown


@pytest.mark.parametrize("flip", [1.0, -1.0])
def test_the_foreground_is_what_borders_do_not_show(flip: float, tmp_path: Path) -> None:
    torch.manual_seed(0)
    grid = (5, 6)
    patches, shown = two_kinds(grid, 20)
    foreground = find_foreground(flip * patches, grid)
    assert torch.equal(is_foreground(flip * patches, foreground), shown)
    memory = PatchMemory.fit(flip * patches, ORIGIN, share=0.2, foreground=foreground)
    assert memory.num_patches == int(shown.sum())
    assert is_foreground(memory.centres, foreground).all()
    images, _ = two_kinds(grid, 2)
    images = flip * images.view(2, 30, 8)
    images[0, 0] = normalize(images[0, 0] + flip * 0.8 * torch.eye(8)[5], dim=0)  # in the background
    images[1, 14] = normalize(images[1, 14] + flip * 0.8 * torch.eye(8)[5], dim=0)  # on the part
    scores, found = memory.score(images)
    assert scores[:, ~shown[:30]].abs().max() == 0
    assert scores[1].argmax() == 14
    assert found[1] > 2 * found[0]
    memory.save(tmp_path / "memory.safetensors")
    loaded = PatchMemory.load(tmp_path / "memory.safetensors")
    assert torch.equal(loaded.score(images)[1], found)
    assert loaded.add(flip * patches).num_patches == 2 * memory.num_patches
    with pytest.raises(ValueError, match="a memory of good parts without its network"):
        dinov2.load(tmp_path / "memory.safetensors")


def test_a_foreground_that_is_not_clear(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    patches = normalize(torch.randn(160, 8), dim=1)
    with caplog.at_level("WARNING", logger="dinov2"):
        find_foreground(patches, (4, 4))
    assert "the foreground is a guess" in caplog.text
    with pytest.raises(ValueError, match="of 3 patches a side at least"):
        find_foreground(patches, (2, 8))
    with pytest.raises(ValueError, match="all patches of the good images are equal"):
        find_foreground(torch.ones(32, 8), (4, 4))


def test_images_score_as_published() -> None:
    torch.manual_seed(0)
    memory = PatchMemory.fit(rows(200), ORIGIN, share=0.2)
    assert memory.centres.shape == (40, 6)
    patches = normalize(torch.randn(3, 8, 6), dim=2)
    scores, images = memory.score(patches)
    centres = memory.centres.double().numpy()
    for number in range(3):
        distances = cdist(patches[number].double().numpy(), centres)
        assert scores[number].numpy() == pytest.approx(distances.min(axis=1), abs=1e-3)
        patch = distances.min(axis=1).argmax()
        around = np.argsort(cdist(centres[[distances[patch].argmin()]], centres)[0])[:9]
        exponents = np.exp(distances[patch, around])
        weight = 1 - np.exp(distances[patch].min()) / exponents.sum()
        assert float(images[number]) == pytest.approx(weight * distances[patch].min(), abs=1e-3)


def test_memory_grows_and_comes_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    features = rows(200)
    memory = replace(PatchMemory.fit(features, ORIGIN, share=0.2), thresholds={"pixel": 0.25})
    assert len(memory.add(features).centres) == 40, "all of it is known already"
    new = normalize(torch.randn(30, 6), dim=1)
    grown = memory.add(new)
    assert 40 < len(grown.centres) <= 70
    assert grown.num_patches == 230
    assert grown.thresholds == {}
    assert cdist(new.numpy(), grown.centres.numpy()).min(axis=1).max() <= memory.radius + 1e-5
    path = tmp_path / "memory.safetensors"
    memory.save(path)
    again = PatchMemory.load(path, ORIGIN)
    assert torch.equal(again.centres, memory.centres)
    assert (again.radius, again.num_patches, again.origin) == (memory.radius, 200, ORIGIN)
    assert again.thresholds == {"pixel": 0.25}
    for name, other in {"backbone": "1" * 64, "image_size": (28, 28), "blocks": (1,), "light": "standardized"}.items():
        with pytest.raises(ValueError, match=f"made with something else: the backbone's|image size|{name}"):
            PatchMemory.load(path, replace(ORIGIN, **{name: other}))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="no memory of good parts"):
        PatchMemory.load(path)
    with pytest.raises(FileNotFoundError, match="no memory"):
        PatchMemory.load(tmp_path / "other")
    with pytest.raises(ValueError, match="share"):
        PatchMemory.fit(features, ORIGIN, share=0.0)


def test_statistics_and_their_distance() -> None:
    images = torch.rand(2, 3, 6, 8, generator=torch.Generator().manual_seed(0))
    patches = PatchStatistics((3, 4))(images).view(2, 4, 6)
    grey = images[1].mean(dim=0).numpy()
    slopes = np.hypot(*np.gradient(grey))[3:, :4]
    corner = grey[3:, :4]
    expected = [corner.mean(), corner.std(), corner.min(), corner.max(), slopes.mean(), slopes.max()]
    assert patches[1, 2].numpy() == pytest.approx(expected, abs=1e-5)
    good = torch.randn(100, 6, generator=torch.Generator().manual_seed(1))
    scores, highest = PatchGaussian.fit(good).score(patches)
    inverse = np.linalg.inv(np.cov(good.double().numpy().T))
    assert float(scores[1, 2]) == pytest.approx(
        mahalanobis(patches[1, 2].double(), good.double().mean(0), inverse), rel=1e-4
    )
    assert torch.equal(highest, scores.amax(dim=1))
    assert PatchGaussian.fit(torch.ones(5, 3)).score(torch.ones(1, 1, 3))[1].tolist() == [0.0]


def test_patches_of_several_blocks() -> None:
    model = tiny_transformer()
    images = torch.rand(2, 3, 28, 42, generator=torch.Generator().manual_seed(0))
    found = PatchFeatures(model, (1, 0))(images).view(2, 6, 48)
    expected = model.get_intermediate_layers(images, n=(1, 0))
    torch.testing.assert_close(found[..., :24], normalize(expected[0], dim=2) / 2**0.5)
    torch.testing.assert_close(found.norm(dim=2), torch.ones(2, 6))
    assert PatchFeatures(model).blocks == (0, 1)
    assert grid_of((28, 42), model.patch_size) == (2, 3)
    with pytest.raises(ValueError, match="multiple of the patch"):
        grid_of((28, 43), model.patch_size)
    with pytest.raises(ValueError, match="from 0 to 1"):
        PatchFeatures(model, (2,))
    before = fingerprint(model)
    model.cls_token.data[0, 0, 0] += 1
    assert fingerprint(model) != before


def test_maps_and_turns() -> None:
    scores = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    found = anomaly_map(scores, (28, 28), (4, 8), smoothing=0)
    assert found.shape == (4, 8)
    assert found[0].tolist() == [0, 0, 0.125, 0.375, 0.625, 0.875, 1, 1]
    smooth = anomaly_map(scores, (28, 28), (28, 56))
    assert 0 < smooth[0, 0] < smooth[0, -1] < 1
    pixels = np.random.default_rng(0).integers(0, 256, (5, 5, 3)).astype(np.uint8)
    turned = Turned(np.asarray, 90)(Image.fromarray(pixels))
    assert np.array_equal(turned, np.rot90(pixels))
