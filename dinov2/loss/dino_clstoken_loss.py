"""The image-level objective of DINO: agreement of class tokens between crops."""

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from dinov2.loss.teacher_targets import LaggedCenter, cross_entropy, sinkhorn_knopp


class DINOLoss(LaggedCenter):
    """Cross-entropy between the prototype scores of a student's crops and the probabilities of a teacher's crops.

    Args:
        out_dim: number of prototypes ``K``.
        student_temp: what student logits are divided by, above 0.
        center_momentum: share of the old centre that an update keeps, in [0, 1].

    Reference:
        Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", section 3.1;
        Oquab et al., "DINOv2: Learning Robust Visual Features without Supervision", section 4.
    """

    def __init__(self, out_dim: int, student_temp: float = 0.1, center_momentum: float = 0.9) -> None:
        super().__init__((1, out_dim), student_temp=student_temp, center_momentum=center_momentum)

    def sinkhorn_knopp_teacher(self, teacher_output: Tensor, teacher_temp: float, n_iterations: int = 3) -> Tensor:
        """Teacher probabilities ``[B, K]`` float32, balanced over the prototypes; see ``sinkhorn_knopp``."""
        return sinkhorn_knopp(teacher_output, teacher_temp, n_iterations)

    def forward(
        self, student_output_list: Sequence[Tensor], teacher_out_softmaxed_centered_list: Sequence[Tensor] | Tensor
    ) -> Tensor:
        """Sums the cross-entropy over all pairs of a student crop and a teacher crop.

        Args:
            student_output_list: logits ``[B, K]``, one tensor per student crop; may be empty.
            teacher_out_softmaxed_centered_list: probabilities ``[B, K]``, one tensor per teacher crop (or all of them
                as ``[crops, B, K]``).

        Returns:
            Scalar: every pair's mean over the batch, summed, not divided by the number of pairs. 0 without a crop.

        Raises:
            ValueError: there is no teacher crop, or the shapes differ.
        """
        if len(teacher_out_softmaxed_centered_list) == 0:
            raise ValueError("the DINO loss needs the probabilities of at least one teacher crop, found none")
        # Cross-entropy is linear in the teacher: one pass per student crop does for all its pairs.
        teachers = teacher_out_softmaxed_centered_list
        stacked = teachers if isinstance(teachers, Tensor) else torch.stack(tuple(teachers))  # [crops, B, K]
        dtypes = (stacked.dtype, *(student.dtype for student in student_output_list))
        teacher = stacked.sum(dim=0, dtype=reduce(torch.promote_types, dtypes, torch.float32))
        loss = teacher.new_zeros(())
        for student in student_output_list:
            loss = loss + cross_entropy(student, teacher, self.student_temp).mean()
        return loss
