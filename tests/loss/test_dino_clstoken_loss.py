"""The DINO loss against a loop over all pairs, reference values, and its edges."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2.loss.dino_clstoken_loss import DINOLoss


def literal_dino_loss(students: list[Tensor], teachers: list[Tensor]) -> Tensor:
    """One cross-entropy per pair of crops, one image after another."""
    total = students[0].new_zeros(())
    for student in students:
        for teacher in teachers:
            pair = [F.cross_entropy(s / 0.1, t) for s, t in zip(student, teacher, strict=True)]
            total = total + sum(pair) / len(pair)
    return total


def random_crops() -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    students = [torch.randn(4, 9, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    teachers = [torch.randn(4, 9, generator=generator, dtype=torch.float64).softmax(-1) for _ in range(2)]
    return students, teachers


def test_equals_a_loop_over_pairs_with_its_gradients() -> None:
    students, teachers = random_crops()
    loss, expected = DINOLoss(9)(students, teachers), literal_dino_loss(students, teachers)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    assert torch.equal(DINOLoss(9)(students, torch.stack(teachers)), loss)
    for ours, theirs in zip(torch.autograd.grad(loss, students), torch.autograd.grad(expected, students), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_three_consecutive_steps_equal_the_reference(reference, dtype: torch.dtype, tolerance: float) -> None:
    fixture = reference("loss_fixture_dino.pt")
    loss_module = DINOLoss(fixture["out_dim"], fixture["student_temp"], fixture["center_momentum"]).to(dtype)
    run = fixture["runs"][str(dtype).removeprefix("torch.")]
    for step in run["steps"]:
        centred = loss_module.softmax_center_teacher(step["teacher"], step["teacher_temp"])
        torch.testing.assert_close(loss_module.center, step["center_used"], rtol=0, atol=min(tolerance, 1e-6))
        torch.testing.assert_close(centred, step["p_softmax_center"], rtol=0, atol=min(tolerance, 1e-6))
        loss_module.update_center(step["teacher"])
        for iterations, name in ((3, "p_sinkhorn"), (1, "p_sinkhorn_1iter")):
            balanced = loss_module.sinkhorn_knopp_teacher(step["teacher"], step["teacher_temp"], iterations)
            torch.testing.assert_close(balanced, step[name], rtol=0, atol=1e-6)
        for name, probabilities in (("centering", centred), ("sinkhorn", step["p_sinkhorn"])):
            check_losses(loss_module, step, step[name], probabilities, tolerance)
    loss_module.softmax_center_teacher(run["steps"][0]["teacher"], 0.04)
    torch.testing.assert_close(loss_module.center, run["final_center"], rtol=0, atol=min(tolerance, 1e-6))


def check_losses(loss_module: DINOLoss, step: dict, expected: dict, probabilities: Tensor, tolerance: float) -> None:
    students = [student.requires_grad_() for student in step["student_local"]]
    local = loss_module(students, probabilities.chunk(2))
    # float32 losses of about 100: the tolerance is relative there, absolute below 1.
    torch.testing.assert_close(local, expected["loss_local"], rtol=tolerance, atol=tolerance)
    for ours, theirs in zip(torch.autograd.grad(local, students), expected["grad_local"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)
    student = step["student_global"].requires_grad_()
    both = loss_module([student], [probabilities])
    torch.testing.assert_close(both, expected["loss_global"], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(torch.autograd.grad(both, student)[0], expected["grad_global"], rtol=0, atol=tolerance)


def test_no_student_crop_is_zero_no_teacher_crop_is_an_error_and_the_state_has_its_known_names() -> None:
    assert DINOLoss(9)([], [torch.full((4, 9), 1 / 9)]).item() == 0
    with pytest.raises(ValueError, match="at least one teacher crop"):
        DINOLoss(9)([torch.zeros(4, 9)], [])
    state = DINOLoss(9).state_dict()
    assert state["center"].shape == (1, 9)
    assert set(state) == {"center", "next_center"}
