"""The shared cross-entropy against torch's own, its dtypes and its checks."""

import pytest
import torch
import torch.nn.functional as F

from dinov2.loss.teacher_targets import cross_entropy


def test_equals_torch_cross_entropy_with_probability_targets() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(5, 7, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64).softmax(-1)
    expected = F.cross_entropy(student / 0.1, teacher, reduction="none")
    torch.testing.assert_close(cross_entropy(student, teacher, 0.1), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    student, teacher = (10 * torch.randn(3, 50)).to(dtype), torch.randn(3, 50).softmax(-1)
    torch.testing.assert_close(cross_entropy(student, teacher, 0.1), cross_entropy(student.float(), teacher, 0.1))


def test_rejects_shapes_that_would_broadcast() -> None:
    with pytest.raises(ValueError, match=r"one shape, found \(1, 7\) and \(4, 7\)"):
        cross_entropy(torch.zeros(1, 7), torch.zeros(4, 7), 0.1)
