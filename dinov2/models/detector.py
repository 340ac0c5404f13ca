"""A detector that is built by name: a released architecture, and a set of boxes from queries."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from dinov2.models.heads.set_detection import SetDetectionHead
from dinov2.models.task_model import TaskModel
from dinov2.models.vision_transformer import DinoVisionTransformer, vit_small

BLOCKS = (3, 7, 11)
POSITIONS = 518  # pixels that the released position embeddings are for


class DINOv2ObjectDetector(TaskModel):
    """A backbone with a `SetDetectionHead`, whose outputs have the names of DETR's. Nothing is downloaded.

    Args:
        num_classes: classes ``C``; there is none for background.
        num_queries: most boxes of an image, ``Q``.
        backbone: of 12 blocks at least, with weights of its own. Default: ViT-S/14 as released, with random weights.
        **head: further options of `SetDetectionHead`.

    Raises:
        ValueError: for options that the head does not allow, or too few blocks.
    """

    def __init__(
        self, num_classes: int, *, num_queries: int = 100, backbone: DinoVisionTransformer | None = None, **head: Any
    ) -> None:
        backbone = backbone or vit_small(patch_size=14, img_size=POSITIONS, init_values=1.0)
        options = {"num_blocks": len(BLOCKS), "num_queries": num_queries, **head}
        super().__init__(backbone, SetDetectionHead(backbone.embed_dim, num_classes, **options), blocks=BLOCKS)

    def forward(  # type: ignore[override]
        self, images: Tensor, targets: Mapping[str, Sequence[Tensor]] | None = None
    ) -> dict[str, Tensor]:
        """Predicts a set of boxes for every image.

        Args:
            images: normalised ``[B, 3, H, W]``, sides multiples of the patch.
            targets: in training, see `SetDetectionHead.forward`.

        Returns:
            ``pred_logits`` ``[B, Q, C]``, whose sigmoid are probabilities, and ``pred_boxes`` ``[B, Q, 4]``,
            (cx, cy, w, h) in [0, 1]; in training also what `dinov2.loss.set_detection_loss.SetDetectionLoss` needs.

        Raises:
            ValueError: for images of another shape, or whose sides are no multiples of the patch.
        """
        if any(side % patch for side, patch in zip(images.shape[-2:], self.patch_size, strict=True)):
            raise ValueError(f"sides must be multiples of the patch {self.patch_size}, got {list(images.shape)}")
        outputs: dict[str, Tensor] = self.head(self.features(images), images, targets)
        named = {"pred_logits": outputs.pop("scores"), "pred_boxes": outputs.pop("normalized_boxes")}
        del outputs["boxes"]
        return named | outputs
