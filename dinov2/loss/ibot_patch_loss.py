"""The patch-level objective of iBOT: masked patches of the student predict the teacher's view of them."""

from torch import Tensor

from dinov2.loss.teacher_targets import LaggedCenter, cross_entropy, sinkhorn_knopp


class iBOTPatchLoss(LaggedCenter):
    """Cross-entropy between student and teacher on masked patches, each image weighing the same.

    Args:
        patch_out_dim: number of prototypes ``K``.
        student_temp: what student logits are divided by, above 0.
        center_momentum: share of the old centre that an update keeps, in [0, 1].

    Reference:
        Zhou et al., "iBOT: Image BERT Pre-Training with Online Tokenizer", section 3.2;
        Oquab et al., "DINOv2: Learning Robust Visual Features without Supervision", section 4.
    """

    def __init__(self, patch_out_dim: int, student_temp: float = 0.1, center_momentum: float = 0.9) -> None:
        super().__init__((1, 1, patch_out_dim), student_temp=student_temp, center_momentum=center_momentum)

    def sinkhorn_knopp_teacher(
        self, teacher_output: Tensor, teacher_temp: float, n_masked_patches_tensor: Tensor, n_iterations: int = 3
    ) -> Tensor:
        """Teacher probabilities, balanced over the prototypes; see ``sinkhorn_knopp``.

        Args:
            teacher_output: logits ``[M, K]`` of this process's masked patches, which may be padded at the end.
            teacher_temp: above 0.
            n_masked_patches_tensor: integer tensor with one element, the number of masked patches of this process;
                rows after them are padding. It is not changed.
            n_iterations: at least 1.

        Returns:
            ``[M, K]`` float32; rows sum to 1, rows of padding are 0.
        """
        return sinkhorn_knopp(teacher_output, teacher_temp, n_iterations, num_rows=n_masked_patches_tensor)

    def forward(self, student_patch_tokens: Tensor, teacher_patch_tokens: Tensor, student_masks_flat: Tensor) -> Tensor:
        """The loss from the scores of all patches.

        Args:
            student_patch_tokens: logits ``[B, N, K]``.
            teacher_patch_tokens: probabilities ``[B, N, K]``.
            student_masks_flat: ``[B, N]`` bool, true where a patch is masked.

        Returns:
            Scalar: the mean over an image's masked patches (0 where there is none), averaged over all images.
        """
        loss = cross_entropy(student_patch_tokens, teacher_patch_tokens, self.student_temp)  # [B, N]
        loss = loss.masked_fill(~student_masks_flat, 0.0).sum(dim=-1) / student_masks_flat.sum(dim=-1).clamp_min(1)
        return loss.mean()

    def forward_masked(
        self,
        student_patch_tokens_masked: Tensor,
        teacher_patch_tokens_masked: Tensor,
        student_masks_flat: Tensor,
        n_masked_patches: int | None = None,
        masks_weight: Tensor | None = None,
    ) -> Tensor:
        """The loss from the scores of masked patches alone.

        Args:
            student_patch_tokens_masked: logits ``[M, K]``, image after image; may be padded at the end.
            teacher_patch_tokens_masked: probabilities ``[M, K]``; may be padded at the end.
            student_masks_flat: ``[B, N]`` bool, true where a patch is masked.
            n_masked_patches: how many leading rows count; ``None`` takes all.
            masks_weight: ``[M]`` weight of every masked patch; ``None`` is 1 / (masked patches of its image).

        Returns:
            Scalar: the weighted sum over the patches, divided by ``B``, images without a mask included.
        """
        if masks_weight is None:
            weights = 1.0 / student_masks_flat.sum(dim=-1, keepdim=True).clamp_min(1)  # [B, 1] float32
            masks_weight = weights.expand_as(student_masks_flat)[student_masks_flat]
        # Rows of padding are cut off before the softmax: they cost nothing and cannot bring in a NaN.
        rows = slice(n_masked_patches)
        loss = cross_entropy(
            student_patch_tokens_masked[rows], teacher_patch_tokens_masked[rows], self.student_temp
        )  # [M]
        return (loss * masks_weight[rows]).sum() / student_masks_flat.shape[0]
