"""Transforms of evaluation and supervised training."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from dinov2.data.transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    make_classification_eval_transform,
    make_classification_train_transform,
    make_normalize_transform,
)


def make_image(height=40, width=60):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_normalisation_is_by_imagenet_statistics():
    normalized = make_normalize_transform()(torch.tensor(IMAGENET_MEAN).view(3, 1, 1).expand(3, 4, 4).clone())
    torch.testing.assert_close(normalized, torch.zeros(3, 4, 4))
    above = torch.tensor(IMAGENET_MEAN).view(3, 1, 1) + torch.tensor(IMAGENET_STD).view(3, 1, 1)
    torch.testing.assert_close(make_normalize_transform()(above), torch.ones(3, 1, 1))


def test_eval_transform_equals_the_reference(reference):
    expected = reference("aug_deterministic.npz")
    image = Image.fromarray(reference("aug_images.npz")["noise_512x384"])
    result = make_classification_eval_transform()(image)
    difference = result - torch.from_numpy(expected["eval_transform_noise_256_224"]).float()
    assert difference.abs().max().item() < 2e-3  # stored in half precision
    mean, std, total = expected["eval_transform_noise_256_224_stats_f32"].tolist()
    assert result.mean().item() == pytest.approx(mean, abs=1e-5)
    assert result.std().item() == pytest.approx(std, rel=1e-5)
    assert result.abs().sum().item() == pytest.approx(total, rel=1e-5)


def test_train_transform_draws_crops_of_the_asked_size():
    transform = make_classification_train_transform(crop_size=32)
    torch.manual_seed(0)
    first, second = transform(make_image()), transform(make_image())
    assert first.shape == (3, 32, 32)
    assert first.dtype == torch.float32
    assert not torch.equal(first, second)
    assert "Flip" not in repr(make_classification_train_transform(hflip_prob=0))
    assert "Flip" in repr(transform)


def test_tensors_pass_through_and_crops_larger_than_the_image_are_refused():
    assert make_classification_eval_transform(32, 24)(torch.rand(3, 40, 60)).shape == (3, 24, 24)
    with pytest.raises(ValueError, match="crop_size 256 exceeds resize_size 224"):
        make_classification_eval_transform(224, 256)


def test_random_resized_crops_of_long_images_see_their_ends():
    """Torchvision's takes the middle for ever where no box fits, and the same box for others."""
    crop = make_classification_train_transform(crop_size=32, scale=(0.5, 1.0)).transforms[0]
    long, tall = Image.new("L", (1000, 20)), Image.new("L", (20, 1000))
    lefts = [crop.get_params(long, crop.scale, crop.ratio)[1] for _ in range(300)]
    tops = [crop.get_params(tall, crop.scale, crop.ratio)[0] for _ in range(300)]
    for places in (lefts, tops):
        assert min(places) < 50
        assert max(places) > 900
    for size in ((300, 300), (320, 256)):
        torch.manual_seed(1)
        ours = [crop.get_params(Image.new("L", size), crop.scale, crop.ratio) for _ in range(300)]
        torch.manual_seed(1)
        assert ours == [
            transforms.RandomResizedCrop.get_params(Image.new("L", size), crop.scale, crop.ratio) for _ in range(300)
        ]
