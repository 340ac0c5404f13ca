"""Neighbour pictures: the right photos, in the right order, with the right frames."""

from pathlib import Path

import numpy as np
import pytest
import torch
from eval_stand_ins import MemoryDataset
from PIL import Image
from torch.nn import functional as F

from dinov2.eval.features import Features
from dinov2.eval.visualize import draw_neighbours, find_neighbours
from dinov2.logging.plots import RIGHT, WRONG

RGB = {name: tuple(int(name[index : index + 2], 16) for index in (1, 3, 5)) for name in (RIGHT, WRONG)}


def features_of(dataset: MemoryDataset, embeddings: torch.Tensor) -> Features:
    return Features(
        F.normalize(embeddings, dim=1),
        torch.from_numpy(dataset.get_targets()),
        dataset.get_group_ids(),
        [str(dataset.get_image_path(index)) for index in range(len(dataset))],
    )


def angles(*degrees: float) -> torch.Tensor:
    radians = torch.tensor(degrees) * torch.pi / 180
    return torch.stack([radians.cos(), radians.sin()], dim=1)


def bank_set() -> MemoryDataset:
    colours = [(200, 0, 0), (0, 200, 0), (0, 0, 200), (200, 200, 0), (0, 200, 200)]
    return MemoryDataset(colours, [0, 0, 1, 1, None], ["a", "a", "b", "c", "d"], ("good", "bad"), name="bank")


def test_they_are_what_a_full_sort_gives() -> None:
    generator = torch.Generator().manual_seed(0)
    groups = [f"part {index // 3}" for index in range(30)]
    dataset = MemoryDataset([(0, 0, 0)] * 30, [0] * 30, groups, ("good",))
    bank = features_of(dataset, torch.randn(30, 8, generator=generator))
    for other_parts in (True, False):
        found = find_neighbours(bank, bank, 5, other_parts=other_parts)
        for query in range(30):
            allowed = [
                index for index in range(30) if index != query and (not other_parts or groups[index] != groups[query])
            ]
            similarity = bank.embeddings @ bank.embeddings[query]
            expected = sorted(allowed, key=lambda index: (-float(similarity[index]), index))[:5]
            assert [neighbour.position for neighbour in found[query]] == expected
            assert found[query][0].similarity == pytest.approx(float(similarity[expected[0]]), abs=1e-6)


def test_a_part_is_named_for_other_queries_too() -> None:
    """Only the query's own part is passed over, whatever other parts have many photos."""
    dataset = bank_set()
    bank = features_of(dataset, angles(0, 10, 20, 30, 40))
    found = find_neighbours(bank, bank, 4)
    assert [neighbour.position for neighbour in found[0]] == [2, 3, 4]  # of a's two photos none; three are left
    assert [neighbour.position for neighbour in found[2]] == [1, 3, 0, 4]


def test_another_set_is_searched_whole() -> None:
    query = MemoryDataset([(1, 2, 3)], [1], ["x"], ("good", "bad"), name="queries")
    bank = bank_set()
    found = find_neighbours(features_of(query, angles(21)), features_of(bank, angles(0, 10, 20, 30, 40)), 2)
    assert [neighbour.position for neighbour in found[0]] == [2, 3]


def test_frames_say_which_are_right(tmp_path: Path) -> None:
    query = MemoryDataset([(90, 90, 90), (9, 9, 9)], [1, None], ["x$", "y"], ("good", "bad"), name="queries")
    bank = bank_set()
    draw_neighbours(
        features_of(query, angles(0, 0)),
        features_of(bank, angles(10, 20, 30, 40, 50)),
        query,
        bank,
        path=tmp_path / "new" / "n.png",
        num_neighbours=5,
    )
    with Image.open(tmp_path / "new" / "n.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    upper, lower = np.array_split(pixels, 2)

    def columns(rows: np.ndarray, colour: tuple[int, ...]) -> np.ndarray:
        return np.flatnonzero((np.abs(rows - np.array(colour)).max(axis=2) < 3).any(axis=0))

    width = pixels.shape[1] / 6
    assert set((columns(upper, RGB[WRONG]) // width).astype(int)) == {1, 2}  # the two good ones are nearest
    assert set((columns(upper, RGB[RIGHT]) // width).astype(int)) == {3, 4}
    assert len(columns(lower, RGB[WRONG])) == len(columns(lower, RGB[RIGHT])) == 0  # a query without a label
    for place, colour in enumerate(bank.colours):
        assert int(np.median(columns(upper, colour)) // width) == 1 + place


def test_a_bank_smaller_than_asked_leaves_places_empty(tmp_path: Path) -> None:
    dataset = MemoryDataset([(0, 0, 0), (9, 9, 9)], [None, None], ["a", "b"])
    rows = features_of(dataset, angles(0, 1))
    for name in ("a", "b"):
        draw_neighbours(rows, rows, dataset, dataset, path=tmp_path / f"{name}.png", num_neighbours=3)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    only = MemoryDataset([(0, 0, 0)], [0], ["a"])
    alone = features_of(only, angles(0))
    draw_neighbours(alone, alone, only, only, path=tmp_path / "alone.png")  # no neighbour at all
    assert (tmp_path / "alone.png").is_file()


def test_bad_input_is_named(tmp_path: Path) -> None:
    bank = bank_set()
    rows = features_of(bank, angles(0, 1, 2, 3, 4))
    other = MemoryDataset([(0, 0, 0)] * 5, [0] * 5, None, ("ok", "bad"))
    with pytest.raises(ValueError, match=r"classes differ: queries \['ok', 'bad'\], bank \['good', 'bad'\]"):
        draw_neighbours(rows, rows, other, bank, path=tmp_path / "n.png")
    with pytest.raises(ValueError, match="5 and 1 queries"):
        draw_neighbours(rows, rows, MemoryDataset([(0, 0, 0)], [0]), bank, path=tmp_path / "n.png")
    with pytest.raises(ValueError, match="cannot draw 0 neighbours of 5 queries"):
        draw_neighbours(rows, rows, bank, bank, path=tmp_path / "n.png", num_neighbours=0)
    assert list(tmp_path.iterdir()) == []
