"""Segmentation heads: recorded values, slow definitions, sizes."""

import pytest
import torch
import torch.nn.functional as F
from random_features import random_features

from dinov2.models.heads.features import ConvNormAct, num_groups
from dinov2.models.heads.segmentation import BNHead, ConvDecoder, MultiScaleHead, num_doublings


@pytest.mark.parametrize("index", range(3))
def test_recorded_heads_are_reproduced(reference, index: int) -> None:
    recorded = reference("eval_fixture.pt")["segmentation"]
    settings = recorded["heads"][index]
    arguments = settings["args"]
    head = BNHead(16, 9, num_blocks=len(arguments["in_index"]), resize_factors=arguments.get("resize_factors")).eval()
    head.load_state_dict(settings["state_dict"])
    features = [(recorded["features"][place], torch.zeros(2, 16)) for place in arguments["in_index"]]
    torch.testing.assert_close(head(features), settings["out_eval"], atol=1e-5, rtol=0)


def test_training_normalises_every_channel_over_the_batch() -> None:
    torch.manual_seed(0)
    features = random_features(2, batch=3)
    head = BNHead(16, 4, num_blocks=2, class_token=True).train()
    torch.nn.init.normal_(head.conv_seg.bias)
    logits = head(features)
    expected = torch.zeros(3, 4, 3, 5)
    columns = [tensor for patches, cls in features for tensor in (patches, cls[:, :, None, None].expand_as(patches))]
    values = torch.cat(columns, dim=1).detach()
    for channel in range(64):
        column = values[:, channel]
        normed = (column - column.mean()) / (column.var(unbiased=False) + 1e-5).sqrt()
        expected += head.conv_seg.weight[:, channel].view(1, 4, 1, 1) * normed[:, None]
    expected += head.conv_seg.bias.view(1, 4, 1, 1)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(head.bn.running_mean, 0.1 * values.mean(dim=(0, 2, 3)))


def test_maps_below_one_are_averaged() -> None:
    features = random_features(1, grid=(4, 8))
    head, plain = BNHead(16, 2, resize_factors=[0.25]).eval(), BNHead(16, 2).eval()
    plain.load_state_dict(head.state_dict())
    torch.testing.assert_close(head(features), plain([(F.avg_pool2d(features[0][0], 4), features[0][1])]))


@pytest.mark.parametrize("grid", [(1, 1), (3, 5), (8, 4)])
def test_multi_scale_sizes(grid: tuple[int, int]) -> None:
    head = MultiScaleHead(16, 3, num_blocks=2, channels=16, class_token=True)
    assert head(random_features(2, grid=grid)).shape == (2, 3, 2 * grid[0], 2 * grid[1])
    coarse = MultiScaleHead(16, 3, num_blocks=2, channels=16, scales=(0.5,))
    assert coarse(random_features(2, grid=grid)).shape[-2:] == tuple(max(round(side / 2), 1) for side in grid)


def test_every_branch_sees_its_own_scale() -> None:
    torch.manual_seed(0)
    features = random_features(2, grid=(4, 8))
    head = MultiScaleHead(16, 3, num_blocks=2, channels=8, scales=(0.25, 1.0, 2.0)).eval()
    mixed = head.mix_blocks(torch.cat([patches for patches, _ in features], dim=1))
    coarse, middle, fine = head.branches
    seen = [
        F.interpolate(coarse(F.avg_pool2d(mixed, 4)), size=(8, 16), mode="bilinear"),
        F.interpolate(middle(mixed), size=(8, 16), mode="bilinear"),
        fine(F.interpolate(mixed, size=(8, 16), mode="bilinear")),
    ]
    torch.testing.assert_close(head(features), head.classify(head.mix_scales(torch.cat(seen, dim=1))))


@pytest.mark.parametrize(
    ("patch_size", "stride", "doublings"),
    [(14, 14, 0), (14, 100, 0), (14, 7, 1), (14, 4, 2), (14, 1, 4), (16, 4, 2), (16, 5, 2), ((8, 16), 4, 2)],
)
def test_doublings_reach_the_stride_and_no_further(
    patch_size: int | tuple[int, int], stride: int, doublings: int
) -> None:
    assert num_doublings(patch_size, stride) == doublings
    largest = max(patch_size) if isinstance(patch_size, tuple) else patch_size
    assert largest / 2**doublings <= stride
    assert doublings == 0 or largest / 2 ** (doublings - 1) > stride


@pytest.mark.parametrize("stride", [14, 7, 4, 1])
def test_the_decoder_enlarges_by_powers_of_two(stride: int) -> None:
    head = ConvDecoder(16, 5, num_blocks=2, patch_size=14, output_stride=stride, channels=128, class_token=True)
    factor = 2 ** num_doublings(14, stride)
    assert head(random_features(2)).shape == (2, 5, 3 * factor, 5 * factor)
    assert [step[0].out_channels for step in head.steps] == [64, 32, 32, 32][: len(head.steps)]


def test_the_decoder_is_bilinear_doubling_and_convolution() -> None:
    torch.manual_seed(0)
    features = random_features(1)
    head = ConvDecoder(16, 2, num_blocks=1, patch_size=8, output_stride=2, channels=16).eval()
    maps = head.mix_blocks(features[0][0])
    for step in head.steps:
        maps = step(F.interpolate(maps, scale_factor=2, mode="bilinear"))
    assert len(head.steps) == 2
    torch.testing.assert_close(head(features), head.predict(maps))


def test_group_norm_treats_each_image_alone_in_groups_that_divide_and_are_not_too_small() -> None:
    for channels in (3, 8, 20, 32, 48, 256, 1024):
        groups = num_groups(channels)
        assert channels % groups == 0
        assert 1 <= groups <= 32
        assert groups == 1 or channels // groups >= 8
    torch.manual_seed(0)
    layer = ConvNormAct(4, 16).train()
    images = torch.randn(3, 4, 5, 5)
    torch.testing.assert_close(layer(images)[1:2], layer(images[1:2]))


def test_dropout_acts_in_training_only() -> None:
    torch.manual_seed(0)
    features = random_features(2)
    for head in (
        BNHead(16, 3, num_blocks=2, dropout=0.5),
        MultiScaleHead(16, 3, num_blocks=2, channels=16, dropout=0.5),
        ConvDecoder(16, 3, num_blocks=2, channels=16, dropout=0.5),
    ):
        assert torch.equal(head.eval()(features), head(features))
        assert not torch.equal(head.train()(features), head(features))


def test_wrong_settings_are_named() -> None:
    with pytest.raises(ValueError, match="2 positive numbers, one per block"):
        BNHead(16, 2, num_blocks=2, resize_factors=[1.0])
    with pytest.raises(ValueError, match="positive"):
        BNHead(16, 2, resize_factors=[0.0])
    with pytest.raises(ValueError, match=r"scales must be .* got \(\)"):
        MultiScaleHead(16, 2, scales=())
    with pytest.raises(ValueError, match="output_stride"):
        ConvDecoder(16, 2, output_stride=0)
    for head in (BNHead(16, 2, num_blocks=2), MultiScaleHead(16, 2, num_blocks=2), ConvDecoder(16, 2, num_blocks=2)):
        with pytest.raises(ValueError, match="2 blocks, got those of 3"):
            head(random_features(3))
