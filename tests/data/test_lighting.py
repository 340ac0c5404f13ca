"""Photos of one thing in different light become alike."""

import numpy as np
from PIL import Image

from dinov2.data.loaders import make_dataset
from dinov2.data.photometric import standardize_light


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
