"""Choosing photos for pictures."""

import pytest
from eval_stand_ins import MemoryDataset, random_set

from dinov2.eval.visualize import PhotoSelection, spread_positions, whole_parts


def test_a_selection_is_the_dataset_at_its_positions() -> None:
    dataset = random_set(12, 3, seed=0, photos_per_part=2)
    chosen = PhotoSelection(dataset, [7, 0])
    assert len(chosen) == 2
    assert chosen.classes == dataset.classes
    assert chosen.get_targets().tolist() == [dataset.get_target(7), dataset.get_target(0)]
    assert chosen.get_group_ids() == ["set-3", "set-0"]
    assert chosen.get_image_path(0) == dataset.get_image_path(7)
    image, target = chosen[0]
    assert (image == dataset[7][0]).all()
    assert target == dataset[7][1]


def test_parts_are_taken_whole_and_from_everywhere() -> None:
    dataset = random_set(400, 2, seed=0, photos_per_part=4)
    groups = dataset.get_group_ids()
    chosen = whole_parts(dataset, 43)
    assert len(chosen) == 40
    assert chosen == sorted(set(chosen))
    parts = {groups[position] for position in chosen}
    assert len(parts) == 10
    numbers = sorted(int(part.removeprefix("set-")) for part in parts)
    gaps = [after - before for before, after in zip([-1, *numbers], [*numbers, 100], strict=True)]
    assert max(gaps) < 25  # ten of a hundred parts; no quarter of the set is left out
    assert whole_parts(dataset, 400) == list(range(400))
    assert len(whole_parts(dataset, 1)) == 4  # the first part is taken whatever its size


def test_nothing_to_choose_is_an_error() -> None:
    with pytest.raises(ValueError, match="cannot choose 3 photos from a dataset of 0"):
        whole_parts(MemoryDataset([], []), 3)
    with pytest.raises(ValueError, match="cannot choose 0 photos from a dataset of 4"):
        spread_positions(random_set(4, 2, seed=0), 0)
