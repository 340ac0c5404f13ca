"""The teacher follows the student."""

import torch
from torch import nn

from dinov2.fsdp import release_gathered_parameters
from dinov2.fsdp.shards import local_part


@torch.no_grad()
def update_teacher(student: nn.Module, teacher: nn.Module, momentum: float) -> None:
    """Moves every teacher parameter to ``momentum * teacher + (1 - momentum) * student``.

    Both must be sharded alike: each process moves the rows that it holds.
    """
    release_gathered_parameters(teacher)
    for ours, theirs in zip(teacher.parameters(), student.parameters(), strict=True):
        local_part(ours).lerp_(local_part(theirs), 1 - momentum)
