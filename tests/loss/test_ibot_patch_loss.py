"""The iBOT loss against a loop over images and patches, reference values, and its edges."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2.loss.ibot_patch_loss import iBOTPatchLoss

B, N, K = 4, 6, 5


def literal_ibot_loss(student: Tensor, teacher: Tensor, masks: Tensor) -> Tensor:
    """The mean over every image's masked patches, averaged over all images."""
    total = student.new_zeros(())
    for image in range(len(masks)):
        patches = masks[image].nonzero().flatten().tolist()
        losses = [F.cross_entropy(student[image, patch] / 0.1, teacher[image, patch]) for patch in patches]
        total = total + (sum(losses) / len(losses) if losses else 0.0)
    return total / len(masks)


def example() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(B, N, K, generator=generator, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(B, N, K, generator=generator, dtype=torch.float64).softmax(-1)
    masks = torch.rand(B, N, generator=generator) < 0.4
    masks[1] = False
    return student, teacher, masks


def test_both_forms_equal_a_loop_with_its_gradient() -> None:
    student, teacher, masks = example()
    expected = literal_ibot_loss(student, teacher, masks)
    torch.testing.assert_close(iBOTPatchLoss(K)(student, teacher, masks), expected, rtol=1e-12, atol=0)
    # Default weights are float32: they carry its rounding.
    loss = iBOTPatchLoss(K).forward_masked(student[masks], teacher[masks], masks)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(loss, student)[0], torch.autograd.grad(expected, student)[0], rtol=1e-6, atol=1e-8
    )


def test_padding_has_no_influence_and_no_gradient() -> None:
    student, teacher, masks = example()
    rows = student[masks].detach()
    padded = torch.cat([rows, torch.full((3, K), torch.nan, dtype=torch.float64)]).requires_grad_()
    padded_teacher = torch.cat([teacher[masks], torch.zeros(3, K, dtype=torch.float64)])
    loss = iBOTPatchLoss(K).forward_masked(padded, padded_teacher, masks, n_masked_patches=len(rows))
    torch.testing.assert_close(loss, iBOTPatchLoss(K).forward_masked(rows, teacher[masks], masks), rtol=0, atol=0)
    gradient = torch.autograd.grad(loss, padded)[0]
    assert torch.equal(gradient[len(rows) :], torch.zeros(3, K, dtype=torch.float64))
    assert gradient.isfinite().all()


def test_nothing_masked_is_zero_everywhere() -> None:
    loss_module, masks = iBOTPatchLoss(K), torch.zeros(B, N, dtype=torch.bool)
    student, empty = torch.randn(0, K, requires_grad=True), torch.zeros(0, K)
    centred = loss_module.softmax_center_teacher(empty, 0.05)
    balanced = loss_module.sinkhorn_knopp_teacher(empty, 0.05, torch.tensor([0]))
    loss_module.update_center(empty)
    assert centred.shape == balanced.shape == (0, K)
    assert loss_module.center.isfinite().all()
    assert loss_module.next_center.isfinite().all()
    loss = loss_module.forward_masked(student, centred, masks, n_masked_patches=0, masks_weight=torch.zeros(0))
    loss.backward()
    assert loss.item() == 0
    dense = torch.randn(B, N, K)
    assert loss_module(dense, dense.softmax(-1), masks).item() == 0
    assert loss_module.state_dict()["center"].shape == (1, 1, K)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_three_consecutive_steps_equal_the_reference(reference, dtype: torch.dtype, tolerance: float) -> None:
    fixture = reference("loss_fixture_ibot.pt")
    loss_module = iBOTPatchLoss(fixture["patch_out_dim"], fixture["student_temp"], fixture["center_momentum"])
    loss_module.to(dtype)
    run = fixture["runs"][str(dtype).removeprefix("torch.")]
    for step in run["steps"]:
        teacher = step["teacher_masked"]
        centred = loss_module.softmax_center_teacher(teacher, step["teacher_temp"])
        torch.testing.assert_close(loss_module.center, step["center_used"], rtol=0, atol=min(tolerance, 1e-6))
        torch.testing.assert_close(centred, step["p_softmax_center"], rtol=0, atol=min(tolerance, 1e-6))
        loss_module.update_center(teacher)
        count = torch.tensor([step["n_masked"]])
        balanced = loss_module.sinkhorn_knopp_teacher(teacher, step["teacher_temp"], count)
        torch.testing.assert_close(balanced, step["p_sinkhorn"], rtol=0, atol=1e-6)
        assert count.item() == step["n_masked"]
        for name, probabilities in (("centering", centred), ("sinkhorn", step["p_sinkhorn"])):
            check_masked_loss(loss_module, step, step[name], probabilities, tolerance)
        check_variants(loss_module, step, centred, tolerance)
    loss_module.softmax_center_teacher(run["steps"][0]["teacher_masked"], 0.04)
    torch.testing.assert_close(loss_module.center, run["final_center"], rtol=0, atol=min(tolerance, 1e-6))


def check_masked_loss(
    loss_module: iBOTPatchLoss, step: dict, expected: dict, probabilities: Tensor, tolerance: float
) -> None:
    student = step["student_masked"].requires_grad_()
    loss = loss_module.forward_masked(student, probabilities, step["masks"], masks_weight=step["masks_weight"])
    torch.testing.assert_close(loss, expected["loss"], rtol=0, atol=tolerance)
    torch.testing.assert_close(torch.autograd.grad(loss, student)[0], expected["grad"], rtol=0, atol=tolerance)
    default_weights = loss_module.forward_masked(student, probabilities, step["masks"])
    torch.testing.assert_close(default_weights, expected["loss"], rtol=0, atol=tolerance)


def check_variants(loss_module: iBOTPatchLoss, step: dict, probabilities: Tensor, tolerance: float) -> None:
    student, masks = step["student_masked"], step["masks"]
    ones = torch.ones_like(step["masks_weight"])
    unit = loss_module.forward_masked(student, probabilities, masks, masks_weight=ones)
    torch.testing.assert_close(unit, step["loss_unit_weights_centering"], rtol=tolerance, atol=tolerance)
    truncated = loss_module.forward_masked(
        student, probabilities, masks, step["truncated"]["k"], masks_weight=step["masks_weight"]
    )
    torch.testing.assert_close(truncated, step["truncated"]["loss"], rtol=0, atol=tolerance)
    if step["dense"] is not None:
        dense_student = step["dense"]["student"].requires_grad_()
        dense = loss_module(dense_student, step["dense"]["teacher_probs"], masks)
        torch.testing.assert_close(dense, step["dense"]["loss"], rtol=0, atol=tolerance)
        norm = torch.autograd.grad(dense, dense_student)[0].norm()
        torch.testing.assert_close(norm, step["dense"]["grad_norm"], rtol=0, atol=tolerance)
