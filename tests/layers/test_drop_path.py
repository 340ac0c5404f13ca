"""Stochastic depth: which samples are touched, how they are scaled, and what is not computed."""

import pytest
import torch
from torch import Tensor

from dinov2.layers.attention import GroupShapes, pack_groups, split_groups
from dinov2.layers.block import Block, add_residual_of_subset, drop_path


def test_plain_drop_path_zeroes_whole_samples_and_keeps_the_expectation() -> None:
    torch.manual_seed(0)
    dropped = drop_path(torch.ones(20_000, 3, 2), 0.25)
    per_sample = dropped.flatten(1)
    assert torch.equal(per_sample.min(1).values, per_sample.max(1).values)
    torch.testing.assert_close(per_sample[:, 0].unique(), torch.tensor([0.0, 1 / 0.75]))
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize(("batch", "rate", "num_kept"), [(10, 0.3, 7), (4, 0.4, 2), (1, 0.9, 1), (3, 0.99, 1)])
def test_exactly_the_kept_samples_change_and_the_branch_sees_no_other(batch: int, rate: float, num_kept: int) -> None:
    seen: list[GroupShapes] = []

    def branch(rows: Tensor, shapes: GroupShapes) -> Tensor:
        seen.append(shapes)
        assert rows.shape[0] == sum(b * n for b, n in shapes)
        return torch.ones_like(rows)

    groups = [torch.zeros(batch, 5, 2), torch.zeros(2 * batch, 3, 2)]
    rows, shapes = pack_groups(groups)
    first, second = split_groups(add_residual_of_subset(rows, shapes, branch, rate), shapes)
    num_kept_of_second = max(int(2 * batch * (1 - rate)), 1)
    assert seen == [((num_kept, 5), (num_kept_of_second, 3))]
    for group, kept in ((first, num_kept), (second, num_kept_of_second)):
        per_sample = group.flatten(1)
        assert torch.equal(per_sample.min(1).values, per_sample.max(1).values)
        assert (per_sample[:, 0] > 0).sum() == kept
        assert per_sample.sum().item() == pytest.approx(per_sample.numel(), rel=1e-6)


def test_subset_residual_is_unbiased() -> None:
    torch.manual_seed(1)
    rows, shapes = pack_groups([torch.randn(5, 2, 3, dtype=torch.float64)])
    mean = torch.stack([add_residual_of_subset(rows, shapes, lambda x, _: x.sin(), 0.4) for _ in range(4000)]).mean(0)
    torch.testing.assert_close(mean, rows + rows.sin(), atol=0.06, rtol=0)


def test_subset_residual_equals_a_loop_over_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    permutations = {4: torch.tensor([2, 0, 3, 1]), 3: torch.tensor([1, 2, 0])}
    monkeypatch.setattr(torch, "randperm", lambda n, **_: permutations[n])
    groups = [torch.randn(4, 3, 2, dtype=torch.float64), torch.randn(3, 5, 2, dtype=torch.float64)]
    rows, shapes = pack_groups(groups)
    results = split_groups(add_residual_of_subset(rows, shapes, lambda x, _: x * x, 0.4), shapes)
    for group, result in zip(groups, results, strict=True):
        expected = group.clone()
        batch = len(group)
        kept = permutations[batch][: int(batch * 0.6)]
        for sample in kept:
            expected[sample] += group[sample] ** 2 * batch / len(kept)
        torch.testing.assert_close(result, expected)


def test_gradients_of_subset_residual() -> None:
    shapes = ((3, 2), (2, 1))
    rows = torch.randn(8, 2, dtype=torch.float64, requires_grad=True)

    def apply(x: Tensor) -> Tensor:
        torch.manual_seed(3)
        return add_residual_of_subset(x, shapes, lambda kept, _: kept.sin(), 0.4)

    assert torch.autograd.gradcheck(apply, (rows,))


def test_scale_is_not_rounded_in_bfloat16() -> None:
    rows, shapes = pack_groups([torch.zeros(128, 1, 128, dtype=torch.bfloat16)])
    values = torch.arange(128, 256).to(torch.bfloat16)
    result = add_residual_of_subset(rows, shapes, lambda x, _: values.expand_as(x), 0.3).max(0).values
    assert torch.equal(result, (values.double() * 128 / 89).to(torch.bfloat16))
    assert not torch.equal(result, values * torch.tensor(128 / 89).to(torch.bfloat16))


@pytest.mark.parametrize(
    ("rate", "training", "packed", "expected"),
    [
        (0.4, True, True, [4, 6, 4, 6]),
        (0.05, True, True, [4, 6, 4, 6]),
        (0.4, True, False, [4, 4]),
        (0.1, True, False, []),
        (0.0, True, True, []),
        (0.4, False, True, []),
        (0.4, False, False, []),
    ],
)
def test_when_a_block_draws_permutations(
    rate: float, training: bool, packed: bool, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []

    def spy(n: int, **_: object) -> Tensor:
        drawn.append(n)
        return torch.arange(n)

    monkeypatch.setattr(torch, "randperm", spy)
    block = Block(8, 2, drop_path_rate=rate).train(training)
    groups = [torch.randn(4, 5, 8), torch.randn(6, 3, 8)]
    rows, shapes = pack_groups(groups)
    output = block(rows, shapes) if packed else block(groups[0])
    assert output.shape == (rows.shape if packed else groups[0].shape)
    assert drawn == expected


def test_skipped_samples_cost_nothing() -> None:
    block = Block(8, 2, drop_path_rate=0.5)
    rows_seen: list[int] = []
    block.mlp.register_forward_hook(lambda _, args, __: rows_seen.append(args[0].shape[0]))
    block(torch.randn(8, 5, 8))
    assert rows_seen == [4 * 5]
