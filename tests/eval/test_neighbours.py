import pytest
import torch

from dinov2.eval.neighbours import nearest_neighbours


def slow_neighbours(queries: torch.Tensor, bank: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition: sort the rows by similarity, equals by their place."""
    similarities = (queries @ bank.T).tolist()
    rows = [sorted(range(len(bank)), key=lambda index: (-row[index], index))[:k] for row in similarities]
    values = [[row[index] for index in order] for row, order in zip(similarities, rows, strict=True)]
    return torch.tensor(values), torch.tensor(rows)


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
    expected_similarities, expected_rows = slow_neighbours(queries, bank, k)
    similarities, rows = nearest_neighbours(
        queries, bank, k, query_chunk=query_chunk, bank_chunk=bank_chunk, bank_on_cpu=bank_on_cpu
    )
    torch.testing.assert_close(similarities, expected_similarities, rtol=0, atol=0)
    assert torch.equal(rows, expected_rows)


def test_similarities_come_back_bit_for_bit() -> None:
    values = torch.tensor([0.0, -0.0, 1e-42, -1e-42, 1e-30, -1e-30, 0.1, -0.1, 1.0, -1.0, 3e38, -3e38])
    similarities, rows = nearest_neighbours(torch.ones(1, 1), values[:, None], len(values), bank_chunk=5)
    assert similarities[0].tolist() == sorted(values.tolist(), reverse=True)
    assert rows[0].tolist() == [10, 8, 6, 4, 2, 0, 1, 3, 5, 7, 9, 11]


def test_random_features_agree_with_topk() -> None:
    generator = torch.Generator().manual_seed(0)
    queries, bank = torch.randn(20, 16, generator=generator), torch.randn(300, 16, generator=generator)
    similarities, rows = nearest_neighbours(queries, bank, 9, query_chunk=8, bank_chunk=64)
    expected = (queries @ bank.T).topk(9)
    torch.testing.assert_close(similarities, expected.values)
    assert torch.equal(rows, expected.indices)


@pytest.mark.parametrize("k", [0, 6])
def test_too_many_or_no_neighbours(k: int) -> None:
    with pytest.raises(ValueError, match=f"cannot find {k} neighbours in a bank of 5 rows"):
        nearest_neighbours(torch.ones(2, 3), torch.ones(5, 3), k)


@pytest.mark.parametrize(("queries", "bank"), [((0, 3), (5, 3)), ((2, 3), (0, 3)), ((2, 3), (5, 4))])
def test_sets_that_do_not_fit(queries: tuple[int, int], bank: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"must be \[M, D\] and \[N, D\]"):
        nearest_neighbours(torch.ones(queries), torch.ones(bank), 1)
