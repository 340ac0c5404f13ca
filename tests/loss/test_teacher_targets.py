"""The centre's lag, its moving average, and what a saved state keeps of it."""

import copy

import pytest
import torch
from torch import Tensor

from dinov2.loss.teacher_targets import LaggedCenter, cross_entropy, sinkhorn_knopp

K = 6


def make_center() -> LaggedCenter:
    return LaggedCenter((1, K), student_temp=0.1, center_momentum=0.9)


def batches(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(5, K, generator=generator) for _ in range(count)]


def test_an_update_of_the_moving_average_of_row_means_becomes_visible_at_the_next_softmax() -> None:
    module, expected = make_center(), torch.zeros(K)
    for batch in batches(4):
        centred = module.softmax_center_teacher(batch, 0.05)
        torch.testing.assert_close(centred, torch.softmax((batch - expected) / 0.05, -1))
        module.update_center(batch)
        torch.testing.assert_close(module.center[0], expected)
        expected = 0.9 * expected + 0.1 * batch.mean(dim=0)
    torch.testing.assert_close(module.next_center[0], expected)


def test_leading_axes_are_all_rows_and_no_row_changes_nothing() -> None:
    one, other = make_center(), make_center()
    tokens = torch.randn(3, 4, K, generator=torch.Generator().manual_seed(1))
    one.update_center(tokens)
    other.update_center(tokens.flatten(0, 1))
    assert torch.equal(one.next_center, other.next_center)
    assert one.softmax_center_teacher(tokens, 0.1).shape == tokens.shape
    before = one.next_center.clone()
    one.update_center(torch.zeros(0, K))
    assert torch.equal(one.next_center, before)
    assert one.softmax_center_teacher(torch.zeros(0, K), 0.1).shape == (0, K)


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    student, teacher = (10 * torch.randn(3, 50)).to(dtype), torch.randn(3, 50).softmax(-1)
    torch.testing.assert_close(cross_entropy(student, teacher, 0.1), cross_entropy(student.float(), teacher, 0.1))


def test_bad_input() -> None:
    with pytest.raises(RuntimeError, match="center"):
        make_center().load_state_dict({})
    with pytest.raises(ValueError, match="student_temp must be above 0"):
        LaggedCenter((1, K), student_temp=0.0, center_momentum=0.9)
    with pytest.raises(ValueError, match=r"center_momentum must lie in \[0, 1\]"):
        LaggedCenter((1, K), student_temp=0.1, center_momentum=1.5)
    with pytest.raises(ValueError, match=r"one shape, found \(1, 7\) and \(4, 7\)"):
        cross_entropy(torch.zeros(1, 7), torch.zeros(4, 7), 0.1)
    for temperature, n_iterations, message in ((0.1, 0, "n_iterations"), (0.0, 3, "temperature")):
        with pytest.raises(ValueError, match=f"{message} must be"):
            sinkhorn_knopp(torch.zeros(2, 2), temperature, n_iterations)


def literal_sinkhorn(scores: Tensor, temperature: float, n_iterations: int) -> Tensor:
    """Rows and columns normalised in turn, in float64, with logarithms so that nothing can overflow."""
    log_q = scores.double() / temperature  # [M, K]
    for _ in range(n_iterations):
        log_q = log_q - log_q.logsumexp(dim=0, keepdim=True)
        log_q = log_q - log_q.logsumexp(dim=1, keepdim=True)
    return log_q.exp()


@pytest.mark.parametrize("scale", [1.0, 4.0, 100.0, 10_000.0])
@pytest.mark.parametrize("n_iterations", [1, 3, 10])
def test_equals_the_definition_at_any_spread_of_scores(scale: float, n_iterations: int) -> None:
    scores = scale * torch.randn(12, 20, generator=torch.Generator().manual_seed(0))
    # Logits of large magnitude carry rounding of that magnitude.
    tolerance = 1e-6 * max(1.0, scale)
    expected = literal_sinkhorn(scores, 0.04, n_iterations).float()
    torch.testing.assert_close(sinkhorn_knopp(scores, 0.04, n_iterations), expected, rtol=0, atol=min(tolerance, 1e-2))


def test_an_outlying_sample_and_an_outlying_prototype_stay_finite() -> None:
    scores = torch.zeros(4, 6)
    scores[1] = -1e6
    scores[:, 2] -= 1e6
    probabilities = sinkhorn_knopp(scores, 0.04)
    torch.testing.assert_close(probabilities, torch.full((4, 6), 1 / 6))  # constants per row and column cancel


def test_finite_where_upstream_overflows(reference) -> None:
    case = reference("loss_fixture_dino.pt")["sinkhorn_overflow"]
    assert case["out"].isnan().all()
    probabilities = sinkhorn_knopp(case["teacher"], case["teacher_temp"])
    torch.testing.assert_close(probabilities, literal_sinkhorn(case["teacher"], case["teacher_temp"], 3).float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_runs_in_float32_also_under_autocast(dtype: torch.dtype) -> None:
    scores = torch.randn(6, 9, generator=torch.Generator().manual_seed(2)).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        probabilities = sinkhorn_knopp(scores, 0.1)
    assert probabilities.dtype == torch.float32
    torch.testing.assert_close(probabilities, sinkhorn_knopp(scores.float(), 0.1), rtol=0, atol=0)


@pytest.mark.parametrize("fill", [0.0, 50.0, float("nan")])
def test_padding_has_no_influence(fill: float) -> None:
    scores = torch.randn(5, 8, generator=torch.Generator().manual_seed(3))
    padded = torch.cat([scores, torch.full((3, 8), fill)])
    probabilities = sinkhorn_knopp(padded, 0.1, num_rows=torch.tensor([5]))
    torch.testing.assert_close(probabilities[:5], sinkhorn_knopp(scores, 0.1))
    assert torch.equal(probabilities[5:], torch.zeros(3, 8))
    assert torch.equal(padded[:5], scores), "the scores are left alone"
    assert sinkhorn_knopp(torch.zeros(0, 4), 0.1).shape == (0, 4)
    assert torch.equal(sinkhorn_knopp(torch.ones(2, 4), 0.1, num_rows=torch.tensor(0)), torch.zeros(2, 4))


def test_a_nan_among_the_scores_is_not_hidden() -> None:
    scores = torch.zeros(3, 4)
    scores[1, 2] = torch.nan
    assert sinkhorn_knopp(scores, 0.1).isnan().any()
