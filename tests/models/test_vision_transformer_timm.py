"""The same weights give the same features in timm, which carries the released models."""

import pytest
import torch
from torch import nn

from dinov2.models.vision_transformer import vit_small

timm = pytest.importorskip("timm")


@pytest.mark.parametrize(
    ("name", "num_registers"), [("vit_small_patch14_dinov2", 0), ("vit_small_patch14_reg4_dinov2", 4)]
)
def test_features_equal_those_of_timm(name: str, num_registers: int) -> None:
    from timm.models.vision_transformer import checkpoint_filter_fn

    torch.manual_seed(0)
    ours = vit_small(14, num_registers, img_size=70, init_values=1.0).eval()
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=0.05)
    theirs = timm.create_model(name, pretrained=False, img_size=70).eval()
    theirs.load_state_dict(checkpoint_filter_fn(dict(ours.state_dict()), theirs), strict=True)

    images = torch.randn(2, 3, 70, 70)
    with torch.inference_mode():
        output = ours(images, is_training=True)
        expected = theirs.forward_features(images)
    tokens = torch.cat(
        [output["x_norm_clstoken"].unsqueeze(1), output["x_norm_regtokens"], output["x_norm_patchtokens"]], 1
    )
    torch.testing.assert_close(tokens, expected, atol=2e-5, rtol=1e-4)
