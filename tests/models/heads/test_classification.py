"""Classification heads: pooling against recorded features and loops, and the two classifiers."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from random_features import random_features
from torch import Tensor

from dinov2.models.heads.classification import (
    POOLINGS,
    LinearClassifier,
    MLPClassifier,
    PartAttentionPool,
    PartClassifier,
    pool_tokens,
    pooled_width,
)


def recorded_features(linear: dict[str, Any], num_blocks: int) -> list[tuple[Tensor, Tensor]]:
    """The last blocks, with patches [6, 20, 32] as maps of 4 x 5."""
    return [
        (patches.transpose(1, 2).reshape(6, 32, 4, 5), cls) for patches, cls in linear["x_tokens_list"][-num_blocks:]
    ]


@pytest.mark.parametrize("num_blocks", [1, 2, 4])
@pytest.mark.parametrize("pooling", ["cls", "cls_mean"])
def test_pooling_and_classifiers_are_those_of_the_linear_evaluation(reference, num_blocks: int, pooling: str) -> None:
    linear = reference("eval_fixture.pt")["linear"]
    name = f"n{num_blocks}_avgpool{pooling == 'cls_mean'}"
    features = recorded_features(linear, num_blocks)
    torch.testing.assert_close(pool_tokens(features, pooling), linear["features"][name], atol=1e-6, rtol=0)
    recorded = linear["classifier"][name]
    head = LinearClassifier(32, 7, num_blocks=num_blocks, pooling=pooling)
    head.load_state_dict({"weight": recorded["weight"], "bias": recorded["bias"]})
    torch.testing.assert_close(head(features), recorded["out"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("num_blocks", [1, 3])
def test_pooled_rows_match_a_loop_over_images(pooling: str, num_blocks: int) -> None:
    features = random_features(num_blocks, batch=3)
    rows = []
    for image in range(3):
        tokens = [cls[image] for _, cls in features]
        means = [torch.stack([m[image, :, i, j] for i in range(3) for j in range(5)]).mean(0) for m, _ in features]
        rows.append(torch.cat({"cls": tokens, "cls_mean": [*tokens, means[-1]], "mean": means}[pooling]))
    torch.testing.assert_close(pool_tokens(features, pooling), torch.stack(rows))
    assert pooled_width(16, num_blocks, pooling) == len(rows[0])


def test_a_fresh_linear_head_is_nearly_indifferent() -> None:
    torch.manual_seed(0)
    head = LinearClassifier(512, 400, num_blocks=2)
    assert head.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert not head.bias.any()
    assert list(head.state_dict()) == ["weight", "bias"]


def test_both_classifiers_equal_their_formulas_and_drop_only_in_training() -> None:
    torch.manual_seed(0)
    features = random_features(2)
    head = LinearClassifier(16, 3, num_blocks=2, dropout=0.5)
    evaluated = head.eval()(features)
    torch.testing.assert_close(evaluated, F.linear(pool_tokens(features, "cls_mean"), head.weight, head.bias))
    assert not torch.allclose(head.train()(features), evaluated)
    features = random_features(1)
    head = MLPClassifier(16, 3, hidden_dim=8, dropout=0.5).eval()
    hidden = F.gelu(head.fc1(F.layer_norm(pool_tokens(features, "cls_mean"), (32,))))
    torch.testing.assert_close(head(features), head.fc2(hidden))
    assert not torch.allclose(head.train()(features), head.eval()(features))


def test_wrong_settings_are_named() -> None:
    with pytest.raises(ValueError, match=r"'max'.*cls, cls_mean, mean"):
        LinearClassifier(16, 2, pooling="max")
    with pytest.raises(ValueError, match="LinearClassifier was built for the features of 4 blocks, got those of 1"):
        LinearClassifier(16, 2, num_blocks=4)(random_features(1))


def test_standardised_rows_have_mean_0_and_variance_1_in_training_and_use_running_statistics_afterwards() -> None:
    torch.manual_seed(0)
    head = LinearClassifier(8, 2, pooling="cls", standardize=True)
    tokens = 100 + 3 * torch.randn(64, 8)
    features = [(torch.zeros(64, 8, 1, 1), tokens)]
    for _ in range(200):
        rows = head.train().pool(features)
    torch.testing.assert_close(rows.mean(dim=0), torch.zeros(8), atol=1e-4, rtol=0)
    torch.testing.assert_close(rows.var(dim=0, correction=0), torch.ones(8), atol=1e-3, rtol=0)
    expected = (tokens - tokens.mean(dim=0)) / tokens.std(dim=0)
    torch.testing.assert_close(head.eval().pool(features), expected, atol=1e-2, rtol=1e-3)
    # One image has no variance of its own: the running statistics are used, also in training, and stay.
    one = [(maps[:1], cls[:1]) for maps, cls in features]
    before = head.standardize.running_mean.clone()
    torch.testing.assert_close(head.train().pool(one), head.eval().pool(one))
    torch.testing.assert_close(head.standardize.running_mean, before)


@pytest.fixture
def trained_pool() -> PartAttentionPool:
    """A pool whose weights differ between images."""
    torch.manual_seed(0)
    pool = PartAttentionPool(6, hidden_dim=4)
    torch.nn.init.normal_(pool.rating.weight, std=3.0)
    return pool


def test_fresh_weights_are_the_mean_of_the_valid_images() -> None:
    images = torch.randn(2, 4, 6)
    valid = torch.tensor([[True, True, False, True], [False, True, False, False]])
    pooled = PartAttentionPool(6)(images, valid)
    torch.testing.assert_close(pooled, torch.stack([images[0, [0, 1, 3]].mean(0), images[1, 1]]))


def test_weights_match_the_formula(trained_pool: PartAttentionPool) -> None:
    images = torch.randn(1, 3, 6)
    rated = []
    for image in images[0]:
        gate = 1 / (1 + torch.exp(-(trained_pool.gate.weight @ image + trained_pool.gate.bias)))
        content = torch.tanh(trained_pool.content.weight @ image + trained_pool.content.bias)
        rated.append(torch.exp(trained_pool.rating.weight[0] @ (content * gate)))
    expected = torch.stack(rated) / sum(rated)
    weights = trained_pool.weights(images, torch.ones(1, 3, dtype=torch.bool))
    torch.testing.assert_close(weights[0], expected)
    assert weights.std() > 0.01
    pooled = trained_pool(images, torch.ones(1, 3, dtype=torch.bool))
    torch.testing.assert_close(pooled[0], (expected[:, None] * images[0]).sum(0))


def test_order_and_missing_images_do_not_matter(trained_pool: PartAttentionPool) -> None:
    images = torch.randn(1, 5, 6)
    valid = torch.tensor([[True, False, True, True, False]])
    pooled = trained_pool(images, valid)
    order = torch.tensor([3, 1, 4, 0, 2])
    torch.testing.assert_close(trained_pool(images[:, order], valid[:, order]), pooled)
    torch.testing.assert_close(trained_pool(images[valid][None], valid[valid][None]), pooled)
    spoilt = images.masked_fill(~valid.unsqueeze(-1), torch.nan).requires_grad_()
    result = trained_pool(spoilt, valid)
    torch.testing.assert_close(result, pooled)
    result.sum().backward()
    assert spoilt.grad.isfinite().all()
    assert all(
        parameter.grad is not None and parameter.grad.isfinite().all() for parameter in trained_pool.parameters()
    )


def test_a_part_of_one_image_is_that_image_and_a_mask_for_other_images_is_refused() -> None:
    features = random_features(2, batch=3)
    head = PartClassifier(LinearClassifier(16, 4, num_blocks=2))
    torch.nn.init.normal_(head.part_pool.rating.weight)
    alone = head(features)
    torch.testing.assert_close(alone, head.classifier(features))
    torch.testing.assert_close(head(features, torch.ones(3, 1, dtype=torch.bool)), alone)
    with pytest.raises(ValueError, match="marks 4 images as valid, and features came of 3"):
        head(features, torch.ones(2, 2, dtype=torch.bool))


def test_parts_without_images_and_wrong_masks_are_named(trained_pool: PartAttentionPool) -> None:
    images = torch.randn(3, 2, 6)
    with pytest.raises(ValueError, match=r"positions \[0, 2\]"):
        trained_pool(images, torch.tensor([[False, False], [True, False], [False, False]]))
    with pytest.raises(ValueError, match=r"bool mask \[3, 2\], got torch.float32 \[3, 2\]"):
        trained_pool(images, torch.ones(3, 2))
    with pytest.raises(ValueError, match=r"got torch.bool \[3, 3\]"):
        trained_pool(images, torch.ones(3, 3, dtype=torch.bool))
