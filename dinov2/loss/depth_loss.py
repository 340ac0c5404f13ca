"""The objective of a depth model: a weighted sum of depth losses."""

from torch import Tensor, nn

from dinov2.loss.depth_alignment import check_alignment
from dinov2.loss.depth_losses import GradientLoss, SigLoss, masked_l1_loss, masked_mse_loss
from dinov2.loss.weights import positive_weights


class DepthLoss(nn.Module):
    """Weighted sum of depth losses; a term of weight 0 is not computed.

    Args:
        scale_invariant_log: weight of `SigLoss`, for metric depth above 0.
        gradient: weight of `GradientLoss`.
        mse: weight of `masked_mse_loss`.
        l1: weight of `masked_l1_loss`.
        alignment: what ``mse`` and ``l1`` take out of each image: ``none`` for metric depth, ``least_squares`` or
            ``median`` for relative depth, see `align_depth`.
        max_depth: largest target that counts, in its unit; None for no limit.
        warm_up_iterations: how many training calls leave the variance out of `SigLoss`.
        upstream_slicing: of `GradientLoss`.

    Raises:
        ValueError: no weight is above 0, one is negative, or a setting has no effect or is out of range.
    """

    def __init__(
        self,
        *,
        scale_invariant_log: float = 1.0,
        gradient: float = 0.0,
        mse: float = 0.0,
        l1: float = 0.0,
        alignment: str = "none",
        max_depth: float | None = None,
        warm_up_iterations: int = 0,
        upstream_slicing: bool = False,
    ) -> None:
        super().__init__()
        self.weights = positive_weights(scale_invariant_log=scale_invariant_log, gradient=gradient, mse=mse, l1=l1)
        check_alignment(alignment)
        if alignment != "none" and not {"mse", "l1"} & self.weights.keys():
            raise ValueError(f"alignment {alignment!r} has no effect: the weights of mse and l1 are 0")
        if warm_up_iterations and "scale_invariant_log" not in self.weights:
            raise ValueError(f"{warm_up_iterations=} has no effect: the weight of scale_invariant_log is 0")
        if upstream_slicing and "gradient" not in self.weights:
            raise ValueError("upstream_slicing has no effect: the weight of gradient is 0")
        self.alignment = alignment
        self.max_depth = max_depth
        self.scale_invariant_log = SigLoss(
            loss_weight=scale_invariant_log,
            max_depth=max_depth,
            warm_up=warm_up_iterations > 0,
            warm_iter=warm_up_iterations,
        )
        self.gradient = GradientLoss(loss_weight=gradient, max_depth=max_depth, upstream_slicing=upstream_slicing)

    def forward(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Computes the weighted terms, whose sum is the objective.

        Args:
            outputs: predicted depth ``[B, 1, H, W]`` or ``[B, H, W]``.
            targets: true depth of the same size, NaN where unknown.

        Returns:
            Scalars by name of the argument that holds their weight, already multiplied by it.

        Raises:
            ValueError: the sizes differ.
        """
        terms = {}
        if "scale_invariant_log" in self.weights:
            terms["scale_invariant_log"] = self.scale_invariant_log(outputs, targets)
        if "gradient" in self.weights:
            terms["gradient"] = self.gradient(outputs, targets)
        for name, loss in (("mse", masked_mse_loss), ("l1", masked_l1_loss)):
            if name in self.weights:
                value = loss(outputs, targets, alignment=self.alignment, max_depth=self.max_depth)
                terms[name] = self.weights[name] * value
        return terms
