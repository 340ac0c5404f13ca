"""Colour and blur operations agree with Pillow and torchvision, and leave grey images grey."""

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import functional as F

from dinov2.data import photometric
from dinov2.data.loaders import make_dataset
from dinov2.data.photometric import standardize_light


@pytest.fixture
def pixels():
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (12, 10, 3), dtype=np.uint8))
    return np.array(small.resize((61, 47), Image.Resampling.BICUBIC))


def largest_difference(left, right):
    return int(np.abs(np.asarray(left).astype(int) - np.asarray(right).astype(int)).max())


def to_gray(pixels, _):
    return photometric.to_grayscale(pixels)


def blur(image, sigma):
    return F.gaussian_blur(image, [9, 9], [sigma, sigma])


@pytest.mark.parametrize(
    ("ours", "theirs", "amounts", "most", "share"),
    [
        (photometric.adjust_brightness, F.adjust_brightness, (0.0, 0.6, 0.93, 1.0, 1.4), 0, 0),
        (photometric.adjust_contrast, F.adjust_contrast, (0.0, 0.6, 0.93, 1.0, 1.4), 0, 0),
        (photometric.adjust_saturation, F.adjust_saturation, (0.0, 0.8, 0.93, 1.0, 1.2), 1, 0.02),
        # Where a colour lies on the border between two codes of hue, rounding decides which it gets.
        (photometric.adjust_hue, F.adjust_hue, (-0.5, -0.1, 0.0, 0.05, 0.1), 6, 0.003),
        (to_gray, lambda image, _: image.convert("L"), (None,), 1, 0.001),
        (photometric.gaussian_blur, blur, (0.1, 0.7, 2.0), 1, 0.001),
    ],
)
def test_operations_equal_pillow_and_torchvision(pixels, ours, theirs, amounts, most, share):
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    for image in (pixels, noise):
        for amount in amounts:
            expected, result = np.asarray(theirs(Image.fromarray(image), amount)), ours(image, amount)
            assert largest_difference(result, expected) <= most, amount
            assert np.mean(result != expected) <= share, amount


@pytest.mark.parametrize("threshold", [0, 128, 256])
def test_solarize_equals_its_definition(pixels, threshold):
    expected = np.where(pixels < threshold, pixels, 255 - pixels)
    assert np.array_equal(photometric.solarize(pixels, threshold), expected)


def test_one_channel_gives_what_three_equal_channels_give(pixels):
    gray = np.ascontiguousarray(pixels[..., 0])
    triple = np.repeat(gray[..., None], 3, axis=2)
    for operation, amount in (
        (photometric.adjust_brightness, 1.3),
        (photometric.adjust_contrast, 0.7),
        (photometric.adjust_saturation, 1.2),
        (photometric.adjust_hue, 0.08),
        (photometric.gaussian_blur, 1.1),
        (photometric.solarize, 128),
    ):
        assert np.array_equal(operation(triple, amount), np.repeat(operation(gray, amount)[..., None], 3, axis=2))
    assert np.array_equal(photometric.to_grayscale(triple), photometric.to_grayscale(gray))


def test_fixed_operations_equal_the_reference(reference):
    expected = reference("aug_deterministic.npz")
    image = expected["bicubic_224_to_98"]
    assert largest_difference(photometric.adjust_brightness(image, 1.3), expected["brightness_1.3"]) == 0
    assert largest_difference(photometric.adjust_contrast(image, 0.7), expected["contrast_0.7"]) == 0
    assert largest_difference(photometric.adjust_saturation(image, 1.2), expected["saturation_1.2"]) <= 1
    assert largest_difference(photometric.to_grayscale(image), expected["grayscale_3"][..., 0]) <= 1
    assert largest_difference(photometric.solarize(image), expected["solarize_128"]) == 0
    for sigma in (0.1, 0.5, 1.0, 2.0):
        blurred = photometric.gaussian_blur(image, sigma)
        assert largest_difference(blurred, expected[f"gaussian_blur_k9_sigma{sigma}"]) <= 1
    hue = photometric.adjust_hue(image, 0.08).astype(int)
    assert np.mean(np.abs(hue - expected["hue_0.08"]) > 1) < 0.003, "but for colours on the border of two codes"


def make_texture(seed=0):
    return np.random.default_rng(seed).normal(size=(40, 60, 1)).clip(-2, 2)


def photograph(texture, brightness, contrast, tint=(0.0, 0.0, 0.0)):
    return Image.fromarray((brightness + contrast * texture + np.array(tint)).clip(0, 255).round().astype(np.uint8))


def test_mean_and_deviation_are_the_same_for_every_exposure():
    photos = [np.asarray(standardize_light(photograph(make_texture(), *light))) for light in ((70, 12), (160, 30))]
    for photo in photos:
        assert abs(photo.mean() - 120) < 1
        assert abs(photo.std() - 48) < 1.5
    assert np.abs(photos[0].astype(int) - photos[1]).mean() < 2


def test_channels_keep_their_differences():
    tinted = np.asarray(standardize_light(photograph(make_texture(), 100, 12, tint=(6, 0, -6)))).astype(float)
    differences = (tinted[..., 0] - tinted[..., 2]).ravel()
    assert np.allclose(differences, np.median(differences), atol=9)  # rounding before the stretch, clipping after it
    assert 40 < np.median(differences) < 56  # 12 levels, stretched by 48 / 12


def test_an_even_photo_stays_even():
    photo = np.asarray(standardize_light(Image.new("RGB", (9, 7), (33, 33, 33))))
    assert (photo == 120).all()
    faint = np.asarray(standardize_light(photograph(make_texture(), 100, 0.5)))
    assert faint.std() < 12  # noise of half a level is not stretched to full contrast


def test_the_dataset_string_prepares_every_image(tmp_path):
    photograph(make_texture(), 70, 12).save(tmp_path / "a.png")
    plain = make_dataset(dataset_str=f"ImageFolder:root={tmp_path}:labels=none")
    standardized = make_dataset(dataset_str=f"ImageFolder:root={tmp_path}:labels=none:light=standardized")
    assert abs(np.asarray(plain.get_image(0)).mean() - 70) < 1
    assert abs(np.asarray(standardized.get_image(0)).mean() - 120) < 1
    assert abs(np.asarray(standardized[0][0]).mean() - 120) < 1
