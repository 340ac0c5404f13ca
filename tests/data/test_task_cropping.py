"""Random crops: inside the photo, at the announced zoom and turn, and on the foreground when asked."""

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from task_stand_ins import MOVES, Options, coded_sample
from torchvision import tv_tensors

from dinov2.data.datasets.dense_targets import IGNORED
from dinov2.data.task_transforms import RandomCropping, apply_geometry, draw_foreground, place_window, zoom_of

SIZE = (90, 120)


def draw_many(options, resize="shorter_side", image_size=(56, 84), sample=None, count=200):
    cropping = RandomCropping(options, image_size, resize)
    torch.manual_seed(0)
    sample = coded_sample() if sample is None else sample
    return [cropping.draw(sample) for _ in range(count)]


def test_without_options_a_stretched_crop_is_the_whole_photo():
    for geometry in draw_many(Options(), "stretch", count=5):
        assert geometry == place_window((56, 84), SIZE, (45, 60))
        assert geometry.box == (0, 0, 90, 120)


@pytest.mark.parametrize(("resize", "zoom"), [("stretch", (56 / 90, 84 / 120)), ("shorter_side", (56 / 90, 56 / 90))])
def test_zoom_is_that_of_evaluation_times_the_jitter(resize, zoom):
    assert zoom_of(SIZE, (56, 84), resize) == zoom
    factors = []
    for geometry in draw_many(Options(scale_jitter=(0.5, 2.0)), resize):
        found = [geometry.canvas[axis] / geometry.box[2 + axis] / zoom[axis] for axis in range(2)]
        assert found[0] == pytest.approx(found[1], rel=0.03)  # boxes are whole pixels
        factors.append(math.log2(found[0]))
    assert min(factors) > -1.05
    assert max(factors) < 1.05
    assert abs(sum(factors) / len(factors)) < 0.1, "as likely larger as smaller"
    assert min(factors) < -0.9
    assert max(factors) > 0.9


def test_a_zoom_above_one_enlarges():
    for geometry in draw_many(Options(scale_jitter=(2.0, 2.0)), "original", (40, 60), count=5):
        assert geometry.canvas == (40, 60)
        assert geometry.box[2:] == (20, 30)


def test_original_size_is_a_plain_cut():
    for geometry in draw_many(Options(), "original", count=20):
        assert geometry.canvas == geometry.window == geometry.box[2:] == (56, 84)
        assert not geometry.leaves(SIZE)


def test_windows_lie_in_the_photo_or_around_it():
    boxes = [geometry.box for geometry in draw_many(Options(scale_jitter=(0.5, 2.0)), "stretch")]
    larger = [box for box in boxes if box[2] > 90]
    assert 50 < len(larger) < 150
    for top, left, height, width in boxes:
        if height > 90:
            assert top <= 0
            assert top + height >= 90
        else:
            assert top >= 0
            assert top + height <= 90
        if width <= 120:
            assert left >= 0
            assert left + width <= 120
    starts = {box[0] for box in boxes if box[2] < 60}
    assert min(starts) < 5
    assert max(starts) > 25


def test_turns_and_flips_happen_as_often_as_asked():
    drawn = draw_many(Options(hflip=0.2, vflip=0.7, rotate90=0.75, rotation=20), count=2000)
    share = {
        "hflip": sum(geometry.horizontal_flip for geometry in drawn) / 2000,
        "vflip": sum(geometry.vertical_flip for geometry in drawn) / 2000,
    }
    assert share["hflip"] == pytest.approx(0.2, abs=0.04)
    assert share["vflip"] == pytest.approx(0.7, abs=0.04)
    turns = Counter(geometry.quarter_turns for geometry in drawn)
    assert all(turns[turn] / 2000 == pytest.approx(0.25, abs=0.04) for turn in range(4))
    angles = torch.tensor([geometry.angle for geometry in drawn])
    assert angles.abs().max() <= 20
    assert angles.abs().max() > 19
    assert angles.mean().abs() < 1
    assert all(geometry.output == (56, 84) for geometry in drawn)


def test_random_resized_crops_cover_their_share_and_lie_in_the_photo():
    shares, aspects = [], []
    for geometry in draw_many(Options(random_resized_crop=(0.2, 0.5)), image_size=(56, 56)):
        assert not geometry.leaves(SIZE)
        _, _, height, width = geometry.box
        shares.append(height * width / (90 * 120))
        aspects.append(width / height)
    assert min(shares) > 0.19
    assert max(shares) < 0.51
    assert max(shares) - min(shares) > 0.25
    assert 0.7 < min(aspects) < 0.8
    assert 1.25 < max(aspects) < 1.4
    stretched = draw_many(Options(random_resized_crop=(0.2, 0.5)), "stretch", image_size=(56, 56))
    squeezed = [geometry.box[3] / geometry.box[2] for geometry in stretched]
    assert 0.95 < min(squeezed) < 1.1, "as the photo, 4/3, and up to 4/3 flatter or wider"
    assert 1.65 < max(squeezed) < 1.85
    whole = draw_many(Options(random_resized_crop=(1.0, 1.0)), "stretch", image_size=(56, 56))
    assert all(not geometry.leaves(SIZE) for geometry in whole)


@pytest.mark.parametrize("options", [Options(), Options(rotation=45, rotate90=0.5, hflip=0.5), MOVES])
@pytest.mark.parametrize("row", [0, 50, 89])
@pytest.mark.parametrize("column", [0, 60, 119])
def test_foreground_crops_show_the_foreground(options, row, column):
    sample = coded_sample()
    sample["mask"].zero_()
    sample["mask"][row, column] = 9
    sample["mask"][5:20, 5:20] = IGNORED
    options = replace(options, foreground_crop_prob=1.0)
    for geometry in draw_many(options, "original", (28, 42), sample, count=25):
        assert geometry.shows(row, column)
        if geometry.angle == 0:
            assert (apply_geometry(sample, geometry)["mask"] == 9).sum() >= (geometry.canvas[0] >= geometry.box[2])


def test_foreground_crops_are_no_more_than_asked_and_vary():
    sample = coded_sample(900, 1200, box=(600, 400, 603, 403))
    drawn = draw_many(Options(foreground_crop_prob=0.3), "original", (28, 42), sample, count=1000)
    showing = [geometry for geometry in drawn if geometry.shows(401, 601)]
    assert len(showing) / 1000 == pytest.approx(0.3, abs=0.05)
    assert len({geometry.box for geometry in showing}) > 100


def test_rare_classes_are_drawn_as_often_as_common_ones():
    sample = coded_sample()
    sample["mask"].fill_(1)
    sample["mask"][4, 7] = 2
    torch.manual_seed(0)
    places = [draw_foreground(sample) for _ in range(400)]
    assert sum(place == (4, 7) for place in places) / 400 == pytest.approx(0.5, abs=0.08)
    assert len(set(places)) > 100


def test_foreground_without_any():
    sample = coded_sample()
    sample["mask"].zero_()
    assert draw_foreground(sample) is None
    del sample["mask"]
    torch.manual_seed(0)
    for _ in range(50):
        row, column = draw_foreground(sample)
        assert 20 <= row < 45
        assert 70 <= column < 100
    sample["boxes"] = tv_tensors.BoundingBoxes(torch.zeros(0, 4), format="XYXY", canvas_size=SIZE)
    assert draw_foreground(sample) is None
    del sample["boxes"]
    with pytest.raises(ValueError, match="needs masks or boxes, and this dataset has neither"):
        draw_foreground(sample)


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (3, 2000)])
@pytest.mark.parametrize("resize", ["stretch", "shorter_side", "original"])
def test_photos_of_any_shape(size, resize):
    sample = coded_sample(*size, box=(0, 0, 1, 1))
    for options in (MOVES, Options(random_resized_crop=(0.05, 1.0), rotation=10)):
        for geometry in draw_many(options, resize, (28, 42), sample, count=10):
            moved = apply_geometry(sample, geometry)
            assert moved["image"].shape == (3, 28, 42)
            assert moved["mask"].shape == moved["depth"].shape == (28, 42)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hflip": 1.5}, "hflip is a probability and must lie in 0..1, got 1.5"),
        ({"rotate90": -0.1}, "rotate90 is a probability"),
        ({"foreground_crop_prob": 2}, "foreground_crop_prob is a probability"),
        ({"rotation": 200}, "rotation must lie in 0..180 degrees, got 200"),
        ({"scale_jitter": (2.0, 0.5)}, r"scale_jitter must satisfy 0 < smallest <= largest, got \(2.0, 0.5\)"),
        ({"scale_jitter": (0.0, 1.0)}, "scale_jitter must satisfy"),
        ({"random_resized_crop": (0.0, 0.5)}, "random_resized_crop must satisfy"),
        ({"random_resized_crop": (0.5, 1.5)}, "random_resized_crop must satisfy"),
        ({"random_resized_crop": (0.5, 1.0), "scale_jitter": (0.5, 1.0)}, "draws the zoom by itself"),
    ],
)
def test_bad_options(change, message):
    with pytest.raises(ValueError, match=message):
        RandomCropping(Options(**change), (28, 28), "stretch")


def test_bad_sizes():
    with pytest.raises(ValueError, match="unknown resize 'squash'; allowed: stretch, shorter_side, original"):
        RandomCropping(Options(), (28, 28), "squash")
    with pytest.raises(ValueError, match=r"image_size must be at least 1, got \(0, 28\)"):
        RandomCropping(Options(), (0, 28), "stretch")
