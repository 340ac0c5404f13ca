"""Attention over the photos of a part: invariances, masks, and finding the one photo that counts."""

import pytest
import torch
import torch.nn.functional as F
from random_features import random_features

from dinov2.models.heads.classification import LinearClassifier, PartAttentionPool, PartClassifier


@pytest.fixture
def trained_pool() -> PartAttentionPool:
    """A pool whose weights differ between photos."""
    torch.manual_seed(0)
    pool = PartAttentionPool(6, hidden_dim=4)
    torch.nn.init.normal_(pool.rating.weight, std=3.0)
    return pool


def test_fresh_weights_are_the_mean_of_the_valid_photos() -> None:
    photos = torch.randn(2, 4, 6)
    valid = torch.tensor([[True, True, False, True], [False, True, False, False]])
    pooled = PartAttentionPool(6)(photos, valid)
    torch.testing.assert_close(pooled, torch.stack([photos[0, [0, 1, 3]].mean(0), photos[1, 1]]))


def test_weights_match_the_formula(trained_pool: PartAttentionPool) -> None:
    photos = torch.randn(1, 3, 6)
    rated = []
    for photo in photos[0]:
        gate = 1 / (1 + torch.exp(-(trained_pool.gate.weight @ photo + trained_pool.gate.bias)))
        content = torch.tanh(trained_pool.content.weight @ photo + trained_pool.content.bias)
        rated.append(torch.exp(trained_pool.rating.weight[0] @ (content * gate)))
    expected = torch.stack(rated) / sum(rated)
    weights = trained_pool.weights(photos, torch.ones(1, 3, dtype=torch.bool))
    torch.testing.assert_close(weights[0], expected)
    assert weights.std() > 0.01
    pooled = trained_pool(photos, torch.ones(1, 3, dtype=torch.bool))
    torch.testing.assert_close(pooled[0], (expected[:, None] * photos[0]).sum(0))


def test_order_and_missing_photos_do_not_matter(trained_pool: PartAttentionPool) -> None:
    photos = torch.randn(1, 5, 6)
    valid = torch.tensor([[True, False, True, True, False]])
    pooled = trained_pool(photos, valid)
    order = torch.tensor([3, 1, 4, 0, 2])
    torch.testing.assert_close(trained_pool(photos[:, order], valid[:, order]), pooled)
    torch.testing.assert_close(trained_pool(photos[valid][None], valid[valid][None]), pooled)
    spoilt = photos.masked_fill(~valid.unsqueeze(-1), torch.nan).requires_grad_()
    result = trained_pool(spoilt, valid)
    torch.testing.assert_close(result, pooled)
    result.sum().backward()
    assert spoilt.grad is not None
    assert spoilt.grad.isfinite().all()
    assert all(
        parameter.grad is not None and parameter.grad.isfinite().all() for parameter in trained_pool.parameters()
    )


def test_one_bad_photo_makes_a_bad_part_and_is_found() -> None:
    """The label hangs on one photo in six; its weight must rise above all others."""
    torch.manual_seed(0)
    photos = torch.randn(64, 6, 8)
    bad = torch.arange(64) % 2 == 0
    place = torch.randint(6, (64,))
    photos[torch.arange(64), place, 0] += 6 * bad
    valid = torch.ones(64, 6, dtype=torch.bool)
    head = PartClassifier(LinearClassifier(8, 2, pooling="cls"), hidden_dim=16)
    features = [(photos.flatten(0, 1)[:, :, None, None], photos.flatten(0, 1))]
    optimizer = torch.optim.Adam(head.parameters(), lr=0.02)
    for _ in range(80):
        optimizer.zero_grad()
        loss = F.cross_entropy(head(features, valid), bad.long())
        loss.backward()
        optimizer.step()
    assert ((head(features, valid).argmax(1) == 1) == bad).float().mean() > 0.95
    weights = head.part_pool.weights(photos, valid)
    assert (weights.argmax(1) == place)[bad].float().mean() > 0.9


def test_a_part_of_one_photo_is_that_photo() -> None:
    features = random_features(2, batch=3)
    head = PartClassifier(LinearClassifier(16, 4, num_blocks=2))
    torch.nn.init.normal_(head.part_pool.rating.weight)
    alone = head(features)
    torch.testing.assert_close(alone, head.classifier(features))
    torch.testing.assert_close(head(features, torch.ones(3, 1, dtype=torch.bool)), alone)


def test_only_valid_photos_are_handed_in() -> None:
    features = random_features(1, batch=4)
    head = PartClassifier(LinearClassifier(16, 4, pooling="mean"))
    torch.nn.init.normal_(head.part_pool.rating.weight)
    valid = torch.tensor([[True, False, True, True], [False, False, True, False]])
    logits = head(features, valid)
    for part, members in enumerate(([0, 1, 2], [3])):
        own = [(patches[members], cls[members]) for patches, cls in features]
        alone = head(own, torch.ones(1, len(members), dtype=torch.bool))
        torch.testing.assert_close(logits[part : part + 1], alone)
    with pytest.raises(ValueError, match="marks 3 images as valid, and features came of 4"):
        head(features, valid & torch.tensor([[True], [False]]))


def test_parts_without_photos_and_wrong_masks_are_named(trained_pool: PartAttentionPool) -> None:
    photos = torch.randn(3, 2, 6)
    with pytest.raises(ValueError, match=r"positions \[0, 2\]"):
        trained_pool(photos, torch.tensor([[False, False], [True, False], [False, False]]))
    with pytest.raises(ValueError, match=r"bool mask \[3, 2\], got torch.float32 \[3, 2\]"):
        trained_pool(photos, torch.ones(3, 2))
    with pytest.raises(ValueError, match=r"got torch.bool \[3, 3\]"):
        trained_pool(photos, torch.ones(3, 3, dtype=torch.bool))
