"""Linear depth head: one linear layer per position on patch and class tokens.

Reference: Oquab et al., DINOv2 (2023), section 7.4 ("lin. 1" and "lin. 4").
"""

import torch
from torch import Tensor, nn

from dinov2.models.heads.depth_output import DepthOutput
from dinov2.models.heads.features import Features, block_maps, check_num_blocks, map_width, resize_maps


class LinearDepthHead(nn.Module):
    """Scores per position by one linear layer, enlarged, and read as depth.

    Named BNHead upstream, after a batch norm that it no longer has; the parameter names (``conv_depth.…``) are those of
    the released heads. There the tokens are enlarged and then multiplied: the same, since both are linear and the
    weights of bilinear interpolation sum to 1, but at ``upsample``² times the memory and arithmetic.

    Args:
        embed_dim: width ``D`` of the backbone.
        output: reads the scores; released heads use `DepthBins` with 256 bins.
        num_blocks: blocks whose maps are concatenated; released heads use 1 or 4.
        class_token: whether the class token of a block stands beside each of its patches, as in the released heads.
        upsample: what the grid of patches is enlarged by, bilinearly; 4 in the released heads.

    Raises:
        ValueError: when ``upsample`` is below 1.
    """

    def __init__(
        self,
        embed_dim: int,
        output: DepthOutput,
        *,
        num_blocks: int = 1,
        class_token: bool = True,
        upsample: int = 4,
    ) -> None:
        super().__init__()
        if upsample < 1:
            raise ValueError(f"upsample must be at least 1, got {upsample}")
        self.num_blocks = num_blocks
        self.class_token = class_token
        self.upsample = upsample
        width = map_width(embed_dim, class_token=class_token)
        self.conv_depth = nn.Conv2d(num_blocks * width, output.num_scores, kernel_size=1)
        self.output = output

    def forward(self, features: Features) -> Tensor:
        """Maps features to depth ``[B, 1, upsample * h, upsample * w]``."""
        check_num_blocks(features, self.num_blocks, type(self).__name__)
        maps = block_maps(features, class_token=self.class_token)
        size = (maps[0].shape[-2], maps[0].shape[-1])
        scores = self.conv_depth(torch.cat([resize_maps(entry, size) for entry in maps], dim=1))
        depth: Tensor = self.output(resize_maps(scores, (self.upsample * size[0], self.upsample * size[1])))
        return depth
