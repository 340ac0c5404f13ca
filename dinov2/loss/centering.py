"""The teacher's centre: a moving average of its outputs that becomes visible one update late."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2.distributed import all_reduce_sum


class LaggedCenter(nn.Module):
    """Centres and sharpens teacher outputs with an exponential moving average of their batch means.

    An update lies in the buffer ``next_center`` until the next call of ``softmax_center_teacher``, which moves it to
    ``center``; so the probabilities of a step use the centre known before that step. Both buffers are in the state
    dict, and a resumed run goes on exactly. A state dict that holds ``center`` alone (an upstream file) loads too, as
    a centre with nothing pending.

    The batch mean is the mean of all rows of all processes, also where their numbers differ (upstream averages the
    means of the processes). An update without a row anywhere changes nothing (upstream's centre becomes NaN).

    Args:
        center_shape: shape of the buffers; the last entry is the number of prototypes ``K``.
        student_temp: what student logits are divided by, above 0.
        center_momentum: share of the old centre that an update keeps, in [0, 1].

    Raises:
        ValueError: ``student_temp`` or ``center_momentum`` is out of range.

    Reference:
        Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", section 3.1, equation 4.
    """

    center: Tensor
    next_center: Tensor

    def __init__(self, center_shape: tuple[int, ...], *, student_temp: float, center_momentum: float) -> None:
        super().__init__()
        if not student_temp > 0:
            raise ValueError(f"student_temp must be above 0, found {student_temp}")
        if not 0 <= center_momentum <= 1:
            raise ValueError(f"center_momentum must lie in [0, 1], found {center_momentum}")
        self.student_temp = student_temp
        self.center_momentum = center_momentum
        self.register_buffer("center", torch.zeros(center_shape))
        self.register_buffer("next_center", torch.zeros(center_shape))
        self.register_load_state_dict_pre_hook(_take_center_for_missing_next_center)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def softmax_center_teacher(self, teacher_output: Tensor, teacher_temp: float) -> Tensor:
        """Makes the pending centre visible, then returns ``softmax((teacher_output - center) / teacher_temp)``.

        Args:
            teacher_output: ``[..., K]`` logits; half precision is computed in float32.
            teacher_temp: above 0.

        Returns:
            Probabilities ``[..., K]``, float32 or wider.
        """
        self.center.copy_(self.next_center)
        return F.softmax((teacher_output - self.center.flatten()) / teacher_temp, dim=-1)

    @torch.no_grad()
    def update_center(self, teacher_output: Tensor) -> None:
        """Enters the mean row of all processes' ``teacher_output`` ``[..., K]`` into the centre of the next step.

        All processes must call it together; any of them may have no row.
        """
        rows = teacher_output.flatten(0, -2)  # [M, K]
        # Sum and count travel in one tensor: one collective, and no process has to wait for a number on the host.
        row_sum = rows.sum(dim=0, dtype=self.next_center.dtype)
        total = all_reduce_sum(torch.cat([row_sum, row_sum.new_full((1,), rows.shape[0])]))
        count = total[-1]
        mean = (total[:-1] / count).view_as(self.next_center)
        updated = self.next_center * self.center_momentum + mean * (1 - self.center_momentum)
        self.next_center.copy_(torch.where(count > 0, updated, self.next_center))


def _take_center_for_missing_next_center(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Mapping[str, Any] | bool | list[str]
) -> None:
    """Loading a file that knows no pending update: the centre stays what it is at the next step."""
    center = state_dict.get(f"{prefix}center")
    if center is not None and f"{prefix}next_center" not in state_dict:
        state_dict[f"{prefix}next_center"] = center.clone()  # with assign=True both would be one tensor
