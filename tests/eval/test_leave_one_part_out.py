import pytest
import torch
from torch import Tensor

from dinov2.eval.neighbours import nearest_of_other_parts, num_rows_of_other_parts


def slow(query: Tensor, part: str, bank: Tensor, parts: list[str], k: int) -> tuple[list[float], list[int]]:
    """The definition: one query against every row of another part, equals in the order of the bank."""
    similarities = {row: float(query @ bank[row]) for row in range(len(bank)) if parts[row] != part}
    order = sorted(similarities, key=lambda row: (-similarities[row], row))[:k]
    return [similarities[row] for row in order], order


@pytest.mark.parametrize("k", [1, 4, 13])
@pytest.mark.parametrize("seed", range(4))
def test_neighbours_equal_the_definition_with_ties(k: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    bank = torch.randint(-2, 3, (40, 3), generator=generator).float()
    queries = torch.randint(-2, 3, (15, 3), generator=generator).float()
    # Parts of 1, 3, 9 and 27 photos; some queries are of parts that the bank does not have.
    parts = ["tiny"] + ["small"] * 3 + ["large"] * 9 + ["huge"] * 27
    parts = [parts[index] for index in torch.randperm(40, generator=generator)]
    asked = ["tiny", "small", "large", "huge", "new"] * 3
    similarities, rows = nearest_of_other_parts(queries, asked, bank, parts, k)
    for query, part, found_similarities, found_rows in zip(queries, asked, similarities, rows, strict=True):
        expected_similarities, expected_rows = slow(query, part, bank, parts, k)
        assert found_rows.tolist() == expected_rows
        assert found_similarities.tolist() == expected_similarities


def test_a_bank_judges_itself_without_own_photos() -> None:
    features = torch.nn.functional.normalize(torch.randn(30, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    parts = [f"{index // 5}" for index in range(30)]
    _, rows = nearest_of_other_parts(features, parts, features, parts, 25)
    for index, neighbours in enumerate(rows.tolist()):
        assert sorted(neighbours) == [row for row in range(30) if parts[row] != parts[index]]


def test_rows_that_are_left() -> None:
    assert num_rows_of_other_parts(["a", "b"], ["a", "a", "b", "c", "c", "c"]) == 4
    assert num_rows_of_other_parts(["new"], ["a", "a"]) == 2
    assert num_rows_of_other_parts(["a"], ["a", "a"]) == 0


@pytest.mark.parametrize("k", [0, 3])
def test_too_few_other_rows(k: int) -> None:
    with pytest.raises(ValueError, match=f"cannot find {k} neighbours of other parts; some query has only 2"):
        nearest_of_other_parts(torch.ones(1, 2), ["a"], torch.ones(4, 2), ["a", "a", "b", "c"], k)
