"""Light, colour, blur and noise: strengths mean what they say, and torch's generator decides."""

from collections import Counter

import pytest
import torch
from task_stand_ins import EVERYTHING, Options

from dinov2.data import photometric
from dinov2.data.task_transforms import PhotometricJitter


def image(value=None):
    if value is not None:
        return torch.full((3, 20, 24), value, dtype=torch.uint8)
    return torch.randint(0, 256, (3, 20, 24), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def apply_many(options, picture, count=300):
    jitter = PhotometricJitter(options)
    torch.manual_seed(0)
    return torch.stack([jitter(picture) for _ in range(count)])


def test_no_strength_changes_nothing_and_draws_no_noise():
    assert torch.equal(PhotometricJitter(Options())(image()), image())


def test_results_follow_the_generator():
    jitter = PhotometricJitter(EVERYTHING)
    results = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        results.append(jitter(image()))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    assert results[0].shape == image().shape
    assert results[0].dtype == torch.uint8


def test_brightness_and_gamma_span_their_ranges():
    brightness = apply_many(Options(brightness=0.5), image(100))[:, 0, 0, 0].float()
    assert brightness.min().item() == pytest.approx(50, abs=2)
    assert brightness.max().item() == pytest.approx(150, abs=2)
    gamma = apply_many(Options(gamma=1.0), image(64))[:, 0, 0, 0].float() / 255
    assert gamma.min().item() == pytest.approx((64 / 255) ** 2, abs=0.01)
    assert gamma.max().item() == pytest.approx((64 / 255) ** 0.5, abs=0.01)
    assert (gamma < 64 / 255).float().mean().item() == pytest.approx(0.5, abs=0.1)


def test_black_and_white_survive_gamma():
    for value in (0, 255):
        assert (apply_many(Options(gamma=1.0), image(value), 20) == value).all()


def test_contrast_keeps_grey_and_saturation_and_hue_keep_greys():
    assert (apply_many(Options(contrast=0.9), image(90), 20).int() - 90).abs().max() <= 1
    grey = image()[:1].expand(3, -1, -1)
    for options in (Options(saturation=0.9), Options(hue=0.5)):
        assert (apply_many(options, grey, 20).int() - grey.int()).abs().max() <= 1
        assert not torch.equal(apply_many(options, image(), 2)[1], image())


def test_strong_options_never_invert():
    assert (apply_many(Options(brightness=3.0), image(100), 50) >= 0).all()
    dark = apply_many(Options(brightness=3.0), image(100), 300)[:, 0, 0, 0]
    assert dark.min() < 10
    assert (dark == 0).float().mean() < 0.05, "the smallest factor is 0, not negative"
    contrast = apply_many(Options(contrast=3.0), image(), 100).float()
    centred = image().float() - image().float().mean()
    assert ((contrast - contrast.mean(dim=(1, 2, 3), keepdim=True)) * centred).mean(dim=(1, 2, 3)).min() >= -1


def test_blur_happens_as_often_as_asked():
    results = apply_many(Options(blur=0.3), image(), 400)
    changed = (results != image()).flatten(1).any(dim=1).float().mean().item()
    assert changed == pytest.approx(0.3, abs=0.08)  # the smallest blurs change nothing
    strongest = photometric.gaussian_blur(image().permute(1, 2, 0).numpy(), 2.0)
    assert results.float().std(dim=(1, 2, 3)).min().item() == pytest.approx(strongest.std(), rel=0.05)


def test_noise_has_the_announced_deviation():
    results = apply_many(Options(noise=0.1), image(128)).float()
    deviations = results.std(dim=(1, 2, 3)) / 255
    assert deviations.max().item() == pytest.approx(0.1, abs=0.01)
    assert deviations.mean().item() == pytest.approx(0.05, abs=0.01)
    assert abs(results.mean().item() - 128) < 0.1


def test_every_order_of_changes_comes(monkeypatch):
    called = []
    for name in ("adjust_brightness", "adjust_contrast", "adjust_saturation"):
        monkeypatch.setattr(photometric, name, lambda pixels, _, name=name: called.append(name) or pixels)
    jitter = PhotometricJitter(Options(brightness=0.1, contrast=0.1, saturation=0.1))
    torch.manual_seed(0)
    for _ in range(100):
        jitter(image())
    orders = Counter(tuple(called[start : start + 3]) for start in range(0, 300, 3))
    assert len(orders) == 6
    assert all(len(set(order)) == 3 for order in orders)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"brightness": -0.1}, "brightness must not be negative, got -0.1"),
        ({"noise": -1}, "noise must not be negative"),
        ({"hue": 0.6}, r"hue must lie in 0..0.5, got 0.6"),
        ({"blur": 1.1}, "blur is a probability"),
    ],
)
def test_bad_strengths(change, message):
    with pytest.raises(ValueError, match=message):
        PhotometricJitter(Options(**change))
