"""Depth heads: recorded values, slow definitions, and the range of depth kept everywhere."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from random_features import random_features
from torch import Tensor, nn

from dinov2.models.heads.depth import (
    BIN_NORMS,
    BIN_SPACINGS,
    DepthBins,
    DepthFromScores,
    DepthOutput,
    DPTHead,
    LinearDepthHead,
    ReluDepth,
    SigmoidDepth,
    SoftplusDepth,
)
from dinov2.models.heads.segmentation import ConvDecoder
from dinov2.models.task_model import TensorTaskModel

OUTPUTS: list[DepthOutput] = [
    *(DepthBins(0.5, 20.0, num_bins=6, spacing=spacing, norm=norm) for spacing in BIN_SPACINGS for norm in BIN_NORMS),
    ReluDepth(0.5, 20.0),
    SigmoidDepth(0.5, 20.0),
    SoftplusDepth(0.5, 20.0),
]


class RecordedBackbone(nn.Module):
    """Gives recorded features whatever the image; stands in for a backbone of patches of 14 pixels."""

    patch_size = (14, 14)

    def __init__(self, features: list[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.recorded = features
        self.n_blocks = len(features)

    def get_intermediate_layers(self, images: Tensor, *, n: tuple[int, ...], **options: bool) -> Any:
        assert images.shape[-2:] == (84, 112)
        assert options == {"reshape": True, "return_class_token": True, "norm": False}
        return tuple(self.recorded[block] for block in n)


def recorded_linear_head(settings: dict[str, Any]) -> LinearDepthHead:
    arguments = settings["args"]
    depth_range = arguments["min_depth"], arguments["max_depth"]
    output: DepthOutput
    if arguments["classify"]:
        spacing = {"UD": "UD", "SID": "SID_upstream"}[arguments["bins_strategy"]]
        output = DepthBins(*depth_range, num_bins=arguments["n_bins"], spacing=spacing, norm=arguments["norm_strategy"])
    else:
        output = (SigmoidDepth if arguments["scale_up"] else ReluDepth)(*depth_range)
    head = LinearDepthHead(24, output, num_blocks=len(arguments["in_index"]), upsample=arguments["upsample"])
    head.load_state_dict(settings["state_dict"])
    return head


@pytest.mark.parametrize("index", range(7))
def test_recorded_linear_heads_are_reproduced(reference, index: int) -> None:
    recorded = reference("eval_fixture.pt")["depth"]
    settings = recorded["heads"][index]
    head = recorded_linear_head(settings)
    features = [recorded["features"][place] for place in settings["args"]["in_index"]]
    # Upstream cuts off at the range outside of the head; here evaluation mode does.
    torch.testing.assert_close(head.train()(features), settings["out"], atol=1e-4, rtol=0)

    model = TensorTaskModel(
        RecordedBackbone(recorded["features"]),
        head,
        blocks=settings["args"]["in_index"],
        norm=False,
    ).eval()
    depth = model(torch.zeros(3, 3, 84, 112))
    torch.testing.assert_close(depth[:1], settings["encode_decode_84x112"].float(), atol=1e-4, rtol=1e-3)
    assert depth.mean().item() == pytest.approx(settings["encode_decode_mean"], abs=1e-4)


def test_the_recorded_dpt_head_is_reproduced(reference) -> None:
    recorded = reference("eval_fixture.pt")["depth"]
    dpt = recorded["dpt"]
    head = DPTHead(24, ReluDepth(0.001, 10.0), channels=16, level_channels=dpt["args"]["post_process_channels"]).eval()
    head.load_state_dict(dpt["state_dict"])
    torch.testing.assert_close(head(recorded["features"]), dpt["out"], atol=1e-4, rtol=0)
    assert set(DPTHead(24, ReluDepth(0.001, 10.0), channels=16).state_dict()) == set(dpt["state_dict"])


def test_bins_run_from_the_smallest_to_the_largest_depth() -> None:
    like = torch.zeros(1, dtype=torch.float64)
    uniform = DepthBins(0.5, 80.0, num_bins=100).centres(like)
    assert torch.allclose(uniform.diff(), uniform.diff()[0], rtol=1e-9)
    ratios = DepthBins(0.5, 80.0, num_bins=100, spacing="SID").centres(like)
    assert torch.allclose(ratios[1:] / ratios[:-1], ratios[1] / ratios[0], rtol=1e-9)
    for centres in (uniform, ratios):
        assert centres[0].item() == pytest.approx(0.5)
        assert centres[-1].item() == pytest.approx(80.0)


@pytest.mark.parametrize("norm", BIN_NORMS)
def test_depth_is_the_expectation_over_bins(norm: str) -> None:
    torch.manual_seed(0)
    output = DepthBins(1.0, 4.0, num_bins=3, norm=norm)
    scores = torch.randn(2, 3, 1, 2)
    torch.testing.assert_close(output.probabilities(scores).sum(1), torch.ones(2, 1, 2))
    for image in range(2):
        for column in range(2):
            a, b, c = scores[image, :, 0, column].tolist()
            weights = {
                "linear": [max(a, 0) + 0.1, max(b, 0) + 0.1, max(c, 0) + 0.1],
                "softmax": [math.exp(a), math.exp(b), math.exp(c)],
                "sigmoid": [1 / (1 + math.exp(-a)), 1 / (1 + math.exp(-b)), 1 / (1 + math.exp(-c))],
            }[norm]
            expected = sum(w * d for w, d in zip(weights, (1.0, 2.5, 4.0), strict=True)) / sum(weights)
            assert output(scores)[image, 0, 0, column].item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    "output", OUTPUTS, ids=lambda o: f"{type(o).__name__}-{getattr(o, 'spacing', '')}-{o.extra_repr()}"
)
def test_evaluation_keeps_to_the_range_and_training_keeps_gradients(output: DepthOutput) -> None:
    scores = torch.linspace(-60, 60, output.num_scores * 20).view(1, output.num_scores, 4, 5)
    scores = torch.cat([scores, -scores]).requires_grad_()
    depth = output.eval()(scores)
    assert depth.shape == (2, 1, 4, 5)
    assert depth.min() >= 0.5
    assert depth.max() <= 20.0
    depth = output.train()(scores)
    assert (depth > 0).all()
    (gradient,) = torch.autograd.grad(depth.sum(), scores)
    beyond = (depth > 20.0).expand_as(gradient)
    assert gradient.isfinite().all()
    if isinstance(output, ReluDepth | SoftplusDepth):
        assert beyond.any()
        assert (gradient[beyond] > 0).all()


@pytest.mark.parametrize("kind", [SigmoidDepth, SoftplusDepth])
def test_scores_that_overshot_come_back_in_training(kind: type[DepthOutput]) -> None:
    output = kind(0.5, 20.0)
    scores = torch.tensor([-1e4, -1e3, 1e3, 1e4]).view(4, 1, 1, 1).requires_grad_()
    for training in (True, False):
        (gradient,) = torch.autograd.grad(output.train(training).read(scores).sum(), scores)
        assert (gradient >= 0.02 * 19.5).all() == training
    torch.testing.assert_close(output.train().read(scores), output.eval().read(scores), rtol=0, atol=0)


def test_activations_at_known_scores() -> None:
    scores = torch.tensor([-100.0, 0.0, 2.0]).view(3, 1, 1, 1)

    def read(output: DepthOutput) -> list[float]:
        values: list[float] = output.train()(scores).flatten().tolist()
        return values

    assert read(ReluDepth(0.5, 10.0)) == pytest.approx([0.5, 0.5, 2.5])
    assert read(SigmoidDepth(0.5, 10.0)) == pytest.approx([0.0, 5.0, 10 / (1 + math.exp(-2))], abs=1e-6)
    expected = [0.5, 0.5 + 9.5 * math.log(2), 0.5 + 9.5 * math.log(1 + math.exp(2))]
    assert read(SoftplusDepth(0.5, 10.0)) == pytest.approx(expected)
    millimetres = torch.tensor(read(SoftplusDepth(500.0, 10_000.0)))
    torch.testing.assert_close(millimetres, 1000 * torch.tensor(read(SoftplusDepth(0.5, 10.0))))


def test_half_precision_scores_are_read_in_float32() -> None:
    torch.manual_seed(0)
    scores = torch.randn(1, 256, 2, 2)
    output = DepthBins(0.001, 80.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        depth = output(scores.bfloat16())
    assert depth.dtype == torch.float32
    torch.testing.assert_close(depth, output(scores.bfloat16().double()).float(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("class_token", [True, False])
def test_the_linear_head_is_that_on_enlarged_tokens(class_token: bool) -> None:
    """As published: tokens are enlarged first; the order must not matter."""
    torch.manual_seed(0)
    features = random_features(2)
    output = DepthBins(0.001, 10.0, num_bins=8, norm="softmax")
    head = LinearDepthHead(16, output, num_blocks=2, class_token=class_token, upsample=3)
    columns = []
    for patches, cls in features:
        columns += [patches, cls[:, :, None, None].expand_as(patches)] if class_token else [patches]
    enlarged = F.interpolate(torch.cat(columns, dim=1), size=(9, 15), mode="bilinear", align_corners=False)
    scores = torch.einsum("bchw,kc->bkhw", enlarged, head.conv_depth.weight[:, :, 0, 0])
    expected = output(scores + head.conv_depth.bias.view(1, -1, 1, 1))
    torch.testing.assert_close(head(features), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("grid", "size"), [((4, 6), (64, 96)), ((5, 7), (96, 128)), ((1, 1), (32, 32))])
def test_dpt_on_even_and_odd_grids(grid: tuple[int, int], size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    features = random_features(4, embed_dim=16, grid=grid)
    head = DPTHead(16, SoftplusDepth(0.1, 5.0), channels=8)
    depth = head(features)
    assert depth.shape == (2, 1, *size)
    depth.sum().backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None, name
    for patches, cls in features:
        assert patches.grad.abs().sum() > 0
        assert cls.grad.abs().sum() > 0


def test_a_decoder_becomes_a_depth_head() -> None:
    features = random_features(1)
    head = DepthFromScores(ConvDecoder(16, 1, num_blocks=1, channels=8), SigmoidDepth(0.1, 5.0)).eval()
    torch.testing.assert_close(head(features), (5 * head.decoder(features).sigmoid()).clamp(0.1, 5.0))


def test_wrong_settings_are_named() -> None:
    for low, high in ((0.0, 1.0), (2.0, 1.0), (1.0, math.inf), (math.nan, 1.0)):
        with pytest.raises(ValueError, match="0 < min_depth < max_depth"):
            ReluDepth(low, high)
    with pytest.raises(ValueError, match=r"'log'.*UD, SID"):
        DepthBins(0.1, 1.0, spacing="log")
    with pytest.raises(ValueError, match=r"'tanh'.*linear, softmax, sigmoid"):
        DepthBins(0.1, 1.0, norm="tanh")
    with pytest.raises(ValueError, match="at least 2 bins, got 1"):
        DepthBins(0.1, 1.0, num_bins=1)
    with pytest.raises(ValueError, match="upsample"):
        LinearDepthHead(16, ReluDepth(0.1, 1.0), upsample=0)
    with pytest.raises(ValueError, match="DepthBins needs 256"):
        DPTHead(16, DepthBins(0.1, 1.0))
    with pytest.raises(ValueError, match="4 positive widths"):
        DPTHead(16, ReluDepth(0.1, 1.0), level_channels=(1, 2, 3))
    with pytest.raises(ValueError, match="4 blocks, got those of 1"):
        DPTHead(16, ReluDepth(0.1, 1.0))(random_features(1))
