"""Cross-entropy of a student against a teacher's probabilities, the term that the DINO and iBOT losses share."""

import torch
import torch.nn.functional as F
from torch import Tensor


def at_least_float32(tensor: Tensor) -> Tensor:
    """Returns half-precision tensors as float32, and others as they are."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def cross_entropy(student_logits: Tensor, teacher_probabilities: Tensor, student_temp: float) -> Tensor:
    """Cross-entropy of every row, in float32 or wider.

    Args:
        student_logits: ``[..., K]``, any floating dtype.
        teacher_probabilities: ``[..., K]``, same shape; rows need not sum to 1 (they may be sums of distributions).
        student_temp: what the logits are divided by.

    Returns:
        ``[...]``, one value per row.

    Raises:
        ValueError: the shapes differ.
    """
    if student_logits.shape != teacher_probabilities.shape:
        raise ValueError(
            f"student logits and teacher probabilities must have one shape, "
            f"found {tuple(student_logits.shape)} and {tuple(teacher_probabilities.shape)}"
        )
    log_probabilities = F.log_softmax(at_least_float32(student_logits) / student_temp, dim=-1)
    return -(teacher_probabilities * log_probabilities).sum(dim=-1)
