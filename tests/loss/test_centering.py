"""The centre's lag, its moving average, and what a saved state keeps of it."""

import copy

import pytest
import torch

from dinov2.loss.teacher_targets import LaggedCenter

K = 6


def make_center() -> LaggedCenter:
    return LaggedCenter((1, K), student_temp=0.1, center_momentum=0.9)


def batches(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(5, K, generator=generator) for _ in range(count)]


def test_an_update_becomes_visible_at_the_next_softmax() -> None:
    module, (first, second) = make_center(), batches(2)
    torch.testing.assert_close(module.softmax_center_teacher(first, 0.05), torch.softmax(first / 0.05, -1))
    module.update_center(first)
    assert torch.equal(module.center, torch.zeros(1, K))
    expected = 0.1 * first.mean(dim=0)
    torch.testing.assert_close(
        module.softmax_center_teacher(second, 0.05), torch.softmax((second - expected) / 0.05, -1)
    )
    torch.testing.assert_close(module.center, expected[None])


def test_updates_form_an_exponential_moving_average_of_row_means() -> None:
    module = make_center()
    expected = torch.zeros(K)
    for batch in batches(4):
        module.softmax_center_teacher(batch, 0.05)
        module.update_center(batch)
        expected = 0.9 * expected + 0.1 * batch.mean(dim=0)
    torch.testing.assert_close(module.next_center[0], expected)


def test_leading_axes_are_all_rows() -> None:
    one, other = make_center(), make_center()
    tokens = torch.randn(3, 4, K, generator=torch.Generator().manual_seed(1))
    one.update_center(tokens)
    other.update_center(tokens.flatten(0, 1))
    assert torch.equal(one.next_center, other.next_center)
    assert one.softmax_center_teacher(tokens, 0.1).shape == tokens.shape


def test_no_row_changes_nothing() -> None:
    module, (batch,) = make_center(), batches(1)
    module.update_center(batch)
    before = module.next_center.clone()
    module.update_center(torch.zeros(0, K))
    assert torch.equal(module.next_center, before)
    assert module.softmax_center_teacher(torch.zeros(0, K), 0.1).shape == (0, K)


@pytest.mark.parametrize("save_after_update", [True, False])
def test_a_loaded_state_continues_identically(save_after_update: bool) -> None:
    module, resumed = make_center(), make_center()
    first, second, third = batches(3)
    module.softmax_center_teacher(first, 0.05)
    module.update_center(first)
    if not save_after_update:
        module.softmax_center_teacher(second, 0.05)
    resumed.load_state_dict(copy.deepcopy(module.state_dict()))
    for each in (second, third):
        assert torch.equal(module.softmax_center_teacher(each, 0.05), resumed.softmax_center_teacher(each, 0.05))
        module.update_center(each)
        resumed.update_center(each)
    assert torch.equal(module.next_center, resumed.next_center)


@pytest.mark.parametrize("assign", [False, True])
def test_a_file_with_the_centre_alone_loads(assign: bool) -> None:
    parent = torch.nn.ModuleDict({"loss": make_center()})
    center = torch.randn(1, K)
    state = {"loss.center": center.clone()}
    parent.load_state_dict(state, strict=True, assign=assign)
    assert list(state) == ["loss.center"]
    module, (batch,) = parent["loss"], batches(1)
    module.update_center(batch)
    torch.testing.assert_close(module.center, center)  # the update is pending, also where tensors are taken over
    torch.testing.assert_close(module.next_center, 0.9 * center + 0.1 * batch.mean(dim=0))


def test_a_missing_centre_is_still_reported() -> None:
    with pytest.raises(RuntimeError, match="center"):
        make_center().load_state_dict({})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rows_are_averaged_in_float32(dtype: torch.dtype) -> None:
    module = make_center()
    rows = torch.full((4096, K), 30.0, dtype=dtype)  # the sum, 122,880, overflows in float16
    module.update_center(rows)
    torch.testing.assert_close(module.next_center, torch.full((1, K), 3.0))
    assert module.softmax_center_teacher(rows, 0.05).dtype == torch.float32


def test_gradients_do_not_pass() -> None:
    module, rows = make_center(), torch.randn(2, K, requires_grad=True)
    assert not module.softmax_center_teacher(rows, 0.1).requires_grad
    module.update_center(rows)
    assert not module.next_center.requires_grad


@pytest.mark.parametrize(
    ("student_temp", "center_momentum", "message"),
    [(0.0, 0.9, "student_temp must be above 0"), (0.1, 1.5, r"center_momentum must lie in \[0, 1\]")],
)
def test_rejects_bad_arguments(student_temp: float, center_momentum: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LaggedCenter((1, K), student_temp=student_temp, center_momentum=center_momentum)
