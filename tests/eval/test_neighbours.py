import pytest
import torch

from dinov2.eval import neighbours
from dinov2.eval.neighbours import nearest_neighbours, nearest_of_other_parts, num_rows_of_other_parts


def stable_neighbours(queries: torch.Tensor, bank: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition: sort the rows by similarity, equals by their place."""
    values, rows = (queries @ bank.T).sort(dim=1, descending=True, stable=True)
    return values[:, :k], rows[:, :k]


def small_integers(*shape: int, seed: int) -> torch.Tensor:
    """Inner products of small integers are exact and often equal."""
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).float()


@pytest.mark.parametrize(("query_chunk", "bank_chunk"), [(1, 1), (3, 7), (5, 50), (512, 32_768)])
@pytest.mark.parametrize("k", [1, 6, 50])
@pytest.mark.parametrize("bank_on_cpu", [False, True])
def test_equals_the_definition_with_ties_for_every_chunk_size(
    query_chunk: int, bank_chunk: int, k: int, bank_on_cpu: bool
) -> None:
    queries, bank = small_integers(11, 4, seed=0), small_integers(50, 4, seed=1)
    expected_similarities, expected_rows = stable_neighbours(queries, bank, k)
    similarities, rows = nearest_neighbours(
        queries, bank, k, query_chunk=query_chunk, bank_chunk=bank_chunk, bank_on_cpu=bank_on_cpu
    )
    torch.testing.assert_close(similarities, expected_similarities, rtol=0, atol=0)
    assert torch.equal(rows, expected_rows)


def search_inputs() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Queries ``[7, 4]`` and banks ``[900, 4]``. Inner products are exact, so every order of adding gives the same."""
    queries, bank, other = (small_integers(rows, 4, seed=rows) for rows in (7, 900, 901))
    ones, place = torch.ones(7, 4), torch.arange(900.0)[:, None]
    return {
        "few different": (queries, bank),
        "nearly all different": (queries, bank * 4096 + other[:900] * 64 + bank.flip(0)),
        "all equal": (ones, torch.ones(900, 4)),
        "all zero of both signs": (ones * 0, bank),
        "ascending": (ones, place.expand(-1, 4)),
        "ascending below zero": (ones, place.expand(-1, 4) - 1000),
        "ascending in steps": (ones, (place // 50).expand(-1, 4)),
        "descending": (ones, -place.expand(-1, 4)),
        "ascending for one query": (ones * torch.tensor([-1, -1, -1, 1, -1, -1, -1])[:, None], place.expand(-1, 4)),
        "best rows together": (queries, bank * (1 + 9 * ((place > 500) & (place < 700)))),
    }


@pytest.mark.parametrize("bank_chunk", [16, 50, 32_768])
@pytest.mark.parametrize("k", [1, 30, 500, 900])
@pytest.mark.parametrize("name", search_inputs())
def test_equals_a_stable_sort_whatever_the_order_of_the_bank(
    name: str, k: int, bank_chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighbours, "TILE_ROWS", 100)
    monkeypatch.setattr(neighbours, "CANDIDATES", 40)
    queries, bank = search_inputs()[name]
    expected_similarities, expected_rows = stable_neighbours(queries, bank, k)
    similarities, rows = nearest_neighbours(queries, bank, k, query_chunk=3, bank_chunk=bank_chunk)
    assert torch.equal(similarities, expected_similarities)
    assert torch.equal(rows, expected_rows)


def test_the_search_that_sorts_everything_finds_the_same() -> None:
    """Other devices take it; both must agree on one machine."""
    queries, bank = small_integers(7, 4, seed=6), small_integers(5000, 4, seed=7)
    for k in (1, 300):
        keys = [search(queries, bank, k, 700) for search in (neighbours._search, neighbours._search_on_cpu)]
        assert torch.equal(*keys)


def test_few_similarities_are_sorted_where_the_bank_has_no_order(monkeypatch: pytest.MonkeyPatch) -> None:
    sorted_ones = []
    merge = neighbours._merge

    def counting_merge(keys: torch.Tensor, similarities: torch.Tensor, *args: int) -> torch.Tensor:
        sorted_ones.append(similarities.numel())
        return merge(keys, similarities, *args)

    monkeypatch.setattr(neighbours, "_merge", counting_merge)
    monkeypatch.setattr(neighbours, "TILE_ROWS", 256)
    generator = torch.Generator().manual_seed(0)
    queries, bank = torch.randn(10, 8, generator=generator), torch.randn(51_200, 8, generator=generator)
    nearest_neighbours(queries, bank, 100)
    assert sum(sorted_ones) < 0.05 * 10 * 51_200  # each query sorts about 5 of the 200 tiles
    sorted_ones.clear()
    nearest_neighbours(queries, bank[:1].repeat(51_200, 1), 100)
    assert sum(sorted_ones) == 10 * 256  # no equal row can displace an earlier one


def test_neither_the_features_nor_their_gradients_are_touched() -> None:
    queries, bank = small_integers(7, 4, seed=6).requires_grad_(), small_integers(50, 4, seed=7).requires_grad_()
    copies = queries.detach().clone(), bank.detach().clone()
    similarities, _ = nearest_neighbours(queries, bank, 5)
    assert not similarities.requires_grad
    assert torch.equal(queries, copies[0])
    assert torch.equal(bank, copies[1])


def test_similarities_come_back_bit_for_bit() -> None:
    values = torch.tensor([0.0, -0.0, 1e-42, -1e-42, 1e-30, -1e-30, 0.1, -0.1, 1.0, -1.0, 3e38, -3e38])
    similarities, rows = nearest_neighbours(torch.ones(1, 1), values[:, None], len(values), bank_chunk=5)
    assert similarities[0].tolist() == sorted(values.tolist(), reverse=True)
    assert rows[0].tolist() == [10, 8, 6, 4, 2, 0, 1, 3, 5, 7, 9, 11]


def test_bad_input() -> None:
    for k in (0, 6):
        with pytest.raises(ValueError, match=f"cannot find {k} neighbours in a bank of 5 rows"):
            nearest_neighbours(torch.ones(2, 3), torch.ones(5, 3), k)
    for queries, bank in (((0, 3), (5, 3)), ((2, 3), (0, 3)), ((2, 3), (5, 4))):
        with pytest.raises(ValueError, match=r"must be \[M, D\] and \[N, D\]"):
            nearest_neighbours(torch.ones(queries), torch.ones(bank), 1)
    for k in (0, 3):
        with pytest.raises(ValueError, match=f"cannot find {k} neighbours of other parts; some query has only 2"):
            nearest_of_other_parts(torch.ones(1, 2), ["a"], torch.ones(4, 2), ["a", "a", "b", "c"], k)


@pytest.mark.parametrize("k", [1, 4, 13])
@pytest.mark.parametrize("seed", range(4))
def test_neighbours_equal_the_definition_with_ties(k: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    bank = torch.randint(-2, 3, (40, 3), generator=generator).float()
    queries = torch.randint(-2, 3, (15, 3), generator=generator).float()
    # Parts of 1, 3, 9 and 27 images; some queries are of parts that the bank does not have.
    parts = ["tiny"] + ["small"] * 3 + ["large"] * 9 + ["huge"] * 27
    parts = [parts[index] for index in torch.randperm(40, generator=generator)]
    asked = ["tiny", "small", "large", "huge", "new"] * 3
    similarities, rows = nearest_of_other_parts(queries, asked, bank, parts, k)
    for query, part, found_similarities, found_rows in zip(queries, asked, similarities, rows, strict=True):
        others = torch.tensor([row for row in range(40) if parts[row] != part])
        expected_similarities, places = stable_neighbours(query[None], bank[others], k)
        assert torch.equal(found_rows, others[places[0]])
        assert torch.equal(found_similarities, expected_similarities[0])


def test_rows_that_are_left() -> None:
    assert num_rows_of_other_parts(["a", "b"], ["a", "a", "b", "c", "c", "c"]) == 4
    assert num_rows_of_other_parts(["new"], ["a", "a"]) == 2
    assert num_rows_of_other_parts(["a"], ["a", "a"]) == 0
