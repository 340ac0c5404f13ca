"""Transforms of supervised data: image, mask, depth and boxes stay together, as every pixel says where it came from."""

import math
import pickle
from collections import Counter
from dataclasses import replace

import pytest
import torch
from data_stand_ins import EVERYTHING, MOVES, Options, coded_sample, decode_depth
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as TF

from dinov2.data import photometric
from dinov2.data.datasets.dense_targets import IGNORED
from dinov2.data.decoding import MAX_PIXELS
from dinov2.data.task_transforms import (
    PhotometricJitter,
    RandomWindow,
    canvas_of,
    draw_foreground,
    make_eval_transform,
    make_train_transform,
)
from dinov2.data.transforms import IMAGENET_MEAN, IMAGENET_STD

MEAN, STD = torch.tensor(IMAGENET_MEAN)[:, None, None], torch.tensor(IMAGENET_STD)[:, None, None]
ROWS, COLUMNS = 90, 120  # of the image
TENSORS = ("image", "mask", "depth", "boxes", "box_labels")
UPRIGHT, TURNED = "[[1, 0], [0, 1]]", ("[[0, 1], [-1, 0]]", "[[-1, 0], [0, -1]]", "[[0, -1], [1, 0]]")
RANDOM = [
    (MOVES, "stretch"),
    (MOVES, "shorter_side"),
    (MOVES, "original"),
    (Options(random_resized_crop=(0.1, 1.0), rotation=180, hflip=0.5, rotate90=0.5), "shorter_side"),
    (Options(scale_jitter=(0.5, 2.0), vflip=0.5, rotate90=0.5), "stretch"),
]


def draw_many(options, resize="shorter_side", image_size=(56, 84), sample=None, count=100, **keywords):
    transform = make_train_transform(options, image_size, resize, min_box_visibility=0.0, **keywords)
    torch.manual_seed(0)
    return [transform(coded_sample() if sample is None else sample) for _ in range(count)]


def denormalize(image):
    return 255 * (image * STD + MEAN)


def erode(inside, radius=4):
    padded = torch.nn.functional.pad(inside[None, None].float(), [radius] * 4)
    return (-torch.nn.functional.max_pool2d(-padded, 2 * radius + 1, stride=1))[0, 0].bool()


def steps(sample):
    """How many rows and columns of the image lie between neighbouring pixels: ``[[dr/dy, dr/dx], [dc/dy, dc/dx]]``."""
    places = torch.stack(decode_depth(sample["depth"]))
    y, x = (~sample["depth"].isnan()).nonzero().double().T
    design = torch.stack([y, x, torch.ones_like(y)], dim=1)
    found = places[:, ~sample["depth"].isnan()].double().T
    return torch.linalg.lstsq(design, found).solution[:2].T


@pytest.mark.parametrize(("options", "resize"), RANDOM)
def test_image_mask_depth_and_boxes_tell_the_same_place(options, resize):
    bias, upright = [], 0
    for sample in draw_many(options, resize, count=40):
        inside = ~sample["depth"].isnan()
        rows, columns = decode_depth(sample["depth"])
        in_box = (rows >= 20) & (rows < 45) & (columns >= 70) & (columns < 100)
        assert torch.equal(sample["mask"], torch.where(inside, 3 * in_box, IGNORED))
        assert (sample["image"][:, ~inside] == 0).all()
        image, step = denormalize(sample["image"]) / 2, steps(sample)
        difference = torch.stack([image[0] - columns, image[1] - rows])[:, erode(inside)]
        if difference.numel():
            # Half a pixel of the nearest neighbour twice (resizing and turning), and the rounding of colours.
            assert difference.abs().max() <= 0.8 + 0.75 * max(1, *step.norm(dim=1).tolist())
            bias.append(difference.mean())
        left, top, right, bottom = sample["boxes"][0].tolist()
        assert 0 <= left <= right <= 84
        assert 0 <= top <= bottom <= 56
        if in_box.any():  # the box holds its shape and little more
            y, x = in_box.nonzero(as_tuple=True)
            found = torch.stack([x.min(), y.min(), x.max() + 1, y.max() + 1])
            slack = 1 + 1.5 / step.norm(dim=0).min()
            outwards = torch.tensor([-1, -1, 1, 1]) * (found - torch.tensor([left, top, right, bottom]))
            assert outwards.max() <= slack
            if step.abs().min() < 0.01:  # not turned, or by a right angle
                upright += 1
                assert outwards.min() >= -slack
    assert len(bias) > 20
    assert abs(torch.stack(bias).mean()) < 0.06, "targets are shifted against the image"
    assert upright > 5 or options.rotation


def test_boxes_that_leave_go_with_their_labels():
    sample = coded_sample()
    boxes = torch.tensor([[0, 0, 10, 10], [10, 0, 20, 10], [99, 0, 119, 10], [50, 10, 50.5, 40], [110, 80, 119, 89]])
    sample |= {"boxes": boxes_of(boxes), "box_labels": torch.arange(5)}
    for visibility in (0.0, 0.04, 0.26, 0.61, 1.0):
        transform = make_train_transform(Options(), (90, 100), "original", min_box_visibility=visibility)
        for seed in range(10):
            torch.manual_seed(seed)
            moved = transform(sample)
            start = int(moved["depth"][0, 0])
            clipped = (boxes - torch.tensor([start, 0, start, 0])).clamp(min=0)
            clipped[:, [0, 2]] = clipped[:, [0, 2]].clamp(max=100)
            sides, whole = clipped[:, 2:] - clipped[:, :2], boxes[:, 2:] - boxes[:, :2]
            kept = (sides.prod(1) / whole.prod(1) >= visibility) & (sides.min(1).values >= 1) | (visibility == 0)
            assert moved["box_labels"].tolist() == torch.arange(5)[kept].tolist()
            torch.testing.assert_close(moved["boxes"].as_subclass(torch.Tensor), clipped[kept])


def boxes_of(boxes, format_="XYXY"):
    return tv_tensors.BoundingBoxes(boxes, format=format_, canvas_size=(ROWS, COLUMNS))


def test_boxes_of_other_formats_and_no_boxes():
    sample = coded_sample()
    converted = TF.convert_bounding_box_format(sample["boxes"], new_format="XYWH")
    given, other = (draw_many(MOVES, sample={**sample, "boxes": b}, count=5) for b in (sample["boxes"], converted))
    assert all(torch.equal(one["boxes"], two["boxes"]) for one, two in zip(given, other, strict=True))
    none = {"boxes": boxes_of(torch.zeros(0, 4)), "box_labels": torch.zeros(0, dtype=torch.int64)}
    for empty in draw_many(EVERYTHING, sample={**sample, **none}, count=5):
        assert (empty["boxes"].shape, empty["boxes"].canvas_size) == ((0, 4), (56, 84))
        assert empty["box_labels"].shape == (0,)


def test_a_second_image_moves_with_the_first():
    sample = coded_sample()
    for moved in draw_many(EVERYTHING, sample={**sample, "reference": sample["image"].clone()}, count=5):
        outside = moved["depth"].isnan()
        assert (moved["reference"][:, outside] == 0).all()
        assert (moved["reference"] - moved["image"]).abs().mean() < 1, "but for the noise"


def test_unknown_depth_stays_unknown_and_spreads_to_nothing_else():
    sample = coded_sample()
    sample["depth"][30:50, 40:60] = math.nan
    for known, holed in zip(draw_many(MOVES, count=30), draw_many(MOVES, sample=sample, count=30), strict=True):
        before, after = known["depth"], holed["depth"]
        rows, columns = decode_depth(before)
        hole = (rows >= 30) & (rows < 50) & (columns >= 40) & (columns < 60)
        assert torch.equal(after.isnan(), hole | before.isnan())
        assert torch.equal(after[~after.isnan()], before[~after.isnan()])


@pytest.mark.parametrize("window", [(30, 50), (50, 30), (14, 80), (1, 1)])
def test_a_turned_window_equals_that_of_the_whole_image_turned(window):
    sample = coded_sample(201, 201)
    cropping = RandomWindow(Options(), window, "original")
    for angle in range(-180, 181, 40):
        canvas = canvas_of(window, angle)
        assert all((whole - part) % 2 == 0 for whole, part in zip(canvas, window, strict=True))
        # An image of even size for windows of even size: both turn about the same point.
        whole = {
            key: TF.crop(sample[key], 0, 0, 200 + window[0] % 2, 200 + window[1] % 2) for key in ("image", "depth")
        }
        middle = [side + part % 2 for side, part in zip((200, 200), window, strict=True)]
        box = [(middle[axis] - canvas[axis]) // 2 for axis in (0, 1)]
        params = {"box": (*box, *canvas), "canvas": list(canvas), "window": list(window), "angle": angle, "turns": 0}
        for key, mode in (("image", TF.InterpolationMode.BILINEAR), ("depth", TF.InterpolationMode.NEAREST)):
            expected = TF.center_crop(TF.rotate(whole[key], angle, interpolation=mode), list(window))
            moved = cropping.transform(whole[key], params)
            assert (moved != expected).float().mean() < 0.02, "but for ties"
    assert canvas_of(window, 0) == window


@pytest.mark.parametrize(("resize", "zoom"), [("stretch", (56 / 90, 84 / 120)), ("shorter_side", (56 / 90, 56 / 90))])
def test_zoom_is_that_of_evaluation_times_the_jitter(resize, zoom):
    found = torch.stack([steps(sample).diag() for sample in draw_many(Options(scale_jitter=(0.5, 2.0)), resize)])
    factors = -(found * torch.tensor(zoom)).log2()
    torch.testing.assert_close(factors[:, 0], factors[:, 1], atol=0.05, rtol=0)
    assert factors.abs().max() < 1.05
    assert abs(factors.mean()) < 0.15, "as likely larger as smaller"
    assert factors.min() < -0.85
    assert factors.max() > 0.85
    for sample in draw_many(Options(), "original", count=20):
        assert not sample["depth"].isnan().any()
        torch.testing.assert_close(steps(sample), torch.eye(2).double())


def test_windows_lie_in_the_image_or_around_it():
    tops = []
    for sample in draw_many(Options(scale_jitter=(0.5, 2.0)), "stretch"):
        inside = ~sample["depth"].isnan()
        for places, axis, whole in zip(decode_depth(sample["depth"]), (1, 0), (ROWS, COLUMNS), strict=True):
            if not inside.any(dim=axis).all():
                known = places[inside]
                assert known.min() <= 3, "half of the pixels that the smallest zoom makes one"
                assert known.max() >= whole - 4
            elif axis == 1:
                tops.append(places[inside].min().item())
    assert 25 < len(tops) < 75
    assert min(tops) < 5
    assert max(tops) > 25


@pytest.mark.parametrize(
    ("options", "shares"),
    [
        ({"hflip": 0.2}, {UPRIGHT: 0.8, "[[1, 0], [0, -1]]": 0.2}),
        ({"vflip": 0.7}, {UPRIGHT: 0.3, "[[-1, 0], [0, 1]]": 0.7}),
        ({"rotate90": 0.6}, {UPRIGHT: 0.4, **dict.fromkeys(TURNED, 0.2)}),
    ],
)
def test_flips_and_right_angles_come_as_often_as_asked(options, shares):
    drawn = [steps(sample) for sample in draw_many(Options(**options), "stretch", (9, 12), count=500)]
    found = Counter(str(torch.where(step.abs() < 1, 0, step.sign()).int().tolist()) for step in drawn)
    assert {key: count / 500 for key, count in found.items()} == pytest.approx(shares, abs=0.06)


def test_angles_are_uniform_either_way():
    drawn = [steps(sample) for sample in draw_many(Options(rotation=20), "original", (28, 42), count=300)]
    angles = torch.tensor([math.degrees(math.atan2(step[0, 1], step[1, 1])) for step in drawn])
    assert 19 < angles.abs().max() < 20.5
    assert angles.mean().abs() < 2
    assert angles.abs().mean() == pytest.approx(10, abs=1)


def test_random_resized_crops_cover_their_share_and_lie_in_the_image():
    options = Options(random_resized_crop=(0.2, 0.5))
    for resize, aspect in (("shorter_side", 1), ("stretch", 4 / 3)):
        drawn = draw_many(options, resize, (56, 56), count=200)
        assert not any(sample["depth"].isnan().any() for sample in drawn)
        extents = torch.stack([56 * steps(sample).diag() for sample in drawn])
        shares, aspects = extents.prod(dim=1) / (ROWS * COLUMNS), extents[:, 1] / extents[:, 0] / aspect
        assert 0.19 < shares.min() < 0.25 < 0.45 < shares.max() < 0.51
        assert 0.7 < aspects.min() < 0.8 < 1.25 < aspects.max() < 1.4, "up to 4/3 flatter or wider than the image"
    whole = draw_many(Options(random_resized_crop=(1.0, 1.0)), "stretch", (56, 56))
    assert not any(sample["depth"].isnan().any() for sample in whole)


@pytest.mark.parametrize("options", [Options(), Options(rotation=45, rotate90=0.5, hflip=0.5), MOVES])
@pytest.mark.parametrize("row", [0, 50, 89])
@pytest.mark.parametrize("column", [0, 60, 119])
def test_foreground_crops_show_the_foreground(options, row, column):
    sample = coded_sample(box=(column, row, column + 1, row + 1))
    sample["mask"].zero_()
    sample["mask"][row, column] = 9
    sample["mask"][5:20, 5:20] = IGNORED
    for moved in draw_many(replace(options, foreground_crop_prob=1.0), "original", (28, 42), sample, count=25):
        left, top, right, bottom = moved["boxes"][0].tolist()
        assert right > left
        assert bottom > top
        if not options.rotation:
            assert (moved["mask"] == 9).any()


def test_foreground_crops_are_no_more_than_asked_and_vary():
    sample = coded_sample(900, 1200, box=(600, 400, 603, 403))
    drawn = draw_many(Options(foreground_crop_prob=0.3), "original", (28, 42), sample, count=400)
    starts = [tuple(moved["depth"][0, 0].reshape(1).tolist()) for moved in drawn if (moved["mask"] == 3).any()]
    assert len(starts) / 400 == pytest.approx(0.3, abs=0.07)
    assert len(set(starts)) > 50


def test_rare_classes_are_shown_as_often_as_common_ones():
    mask = torch.ones(ROWS, COLUMNS, dtype=torch.uint8)
    mask[4, 7] = 2
    torch.manual_seed(0)
    places = [draw_foreground([tv_tensors.Mask(mask)]) for _ in range(400)]
    assert sum(place == (4, 7) for place in places) / 400 == pytest.approx(0.5, abs=0.08)
    assert len(set(places)) > 100


def test_foreground_without_any():
    sample = coded_sample()
    assert draw_foreground([tv_tensors.Mask(torch.zeros(ROWS, COLUMNS, dtype=torch.uint8)), sample["boxes"]]) is None
    torch.manual_seed(0)
    for _ in range(50):
        row, column = draw_foreground([sample["image"], sample["depth"], sample["boxes"]])
        assert 20 <= row < 45
        assert 70 <= column < 100
    assert draw_foreground([boxes_of(torch.zeros(0, 4))]) is None
    with pytest.raises(ValueError, match="needs masks or boxes, and this dataset has neither"):
        make_train_transform(Options(foreground_crop_prob=1.0), (28, 28))({"image": sample["image"]})


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (3, 2000)])
@pytest.mark.parametrize("resize", ["stretch", "shorter_side", "original"])
def test_images_of_any_shape(size, resize):
    sample = coded_sample(*size, box=(0, 0, 1, 1))
    for options in (MOVES, Options(random_resized_crop=(0.05, 1.0), rotation=10)):
        for moved in draw_many(options, resize, (28, 42), sample, count=10):
            assert moved["image"].shape == (3, 28, 42)
            assert moved["mask"].shape == moved["depth"].shape == (28, 42)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_eval_transform((28, 28), "squash"), "unknown resize 'squash'; allowed: stretch, shorter_side"),
        (lambda: make_eval_transform((28, 28), "original", center_crop=True), "shorter_side only, got original"),
        (lambda: make_train_transform(Options(), (28, 28), "squash"), "unknown resize 'squash'"),
        (lambda: refuse(scale_jitter=(2.0, 0.5)), r"scale_jitter must satisfy 0 < smallest <= largest, got \(2.0, 0.5"),
        (lambda: refuse(scale_jitter=(0.0, 1.0)), "scale_jitter must satisfy"),
        (lambda: refuse(random_resized_crop=(0.0, 0.5)), "random_resized_crop must satisfy"),
        (lambda: refuse(random_resized_crop=(0.5, 1.0), scale_jitter=(0.5, 1.0)), "draws the zoom by itself"),
        (lambda: make_train_transform(Options(), (0, 28)), r"image_size must be at least 1, got \(0, 28\)"),
        (lambda: make_train_transform(Options(), (28, 28), min_box_visibility=2), r"must lie in 0\.\.1, got 2"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def refuse(**options):
    make_train_transform(Options(**options), (28, 28), "stretch")


@pytest.mark.parametrize("resize", ["stretch", "shorter_side", "original"])
@pytest.mark.parametrize("image_size", [(56, 56), (28, 84), (140, 42)])
def test_kinds_and_sizes(resize, image_size):
    for sample in draw_many(EVERYTHING, resize, image_size, count=10):
        for key, dtype in (("image", torch.float32), ("mask", torch.int64), ("depth", torch.float32)):
            assert type(sample[key]) is torch.Tensor
            assert sample[key].dtype == dtype
            assert sample[key].shape[-2:] == image_size
            assert sample[key].is_contiguous()
        assert sample["image"].isfinite().all()
        outside = sample["mask"] == IGNORED
        assert torch.equal(outside, sample["depth"].isnan())
        assert (sample["image"][:, outside] == 0).all()
        assert (sample["image"][:, ~outside] != 0).float().mean() > 0.95
        assert sample["boxes"].dtype == torch.float32
        assert len(sample["boxes"]) == len(sample["box_labels"])
        assert sample["index"] == 5


def test_training_without_options_equals_evaluation():
    (trained,) = draw_many(Options(), "stretch", count=1)
    evaluated = make_eval_transform((56, 84), "stretch")(coded_sample())
    assert all(torch.equal(trained[key], evaluated[key]) for key in TENSORS)


@pytest.mark.parametrize(
    "transform",
    [make_train_transform(EVERYTHING, (56, 84), "stretch"), make_eval_transform((ROWS, COLUMNS), "original")],
)
def test_the_sample_given_is_left_alone(transform):
    sample = coded_sample()
    transform(sample)["image"].zero_()
    for key, value in coded_sample().items():
        assert torch.equal(sample[key], value) if isinstance(value, torch.Tensor) else sample[key] == value
        assert type(sample[key]) is type(value)


def test_seeds_repeat_everything_and_transforms_travel():
    transform = make_train_transform(EVERYTHING, (56, 84), "stretch")
    results = []
    for seed, made in ((1, transform), (1, pickle.loads(pickle.dumps(transform))), (2, transform)):
        torch.manual_seed(seed)
        results.append(made(coded_sample()))
    assert all(torch.equal(results[0][key], results[1][key]) for key in ("image", "mask", "boxes"))
    assert not torch.equal(results[0]["image"], results[2]["image"])


@pytest.mark.parametrize(
    ("size", "resize", "expected"),
    [
        ((90, 120), "stretch", (56, 84)),
        ((90, 120), "shorter_side", (56, 75)),
        ((120, 90), "shorter_side", (75, 56)),
        ((90, 120), "original", (90, 120)),
        ((1, 1), "shorter_side", (56, 56)),
        ((1, 1), "stretch", (56, 84)),
    ],
)
def test_sizes_of_evaluation(size, resize, expected):
    image = coded_sample(*size, box=(0, 0, 1, 1))
    sample = make_eval_transform((56, 84), resize)(image)
    assert sample["image"].shape == (3, *expected)
    assert sample["mask"].shape == sample["depth"].shape == expected
    resized = TF.resize(image["image"], list(expected), interpolation=TF.InterpolationMode.BICUBIC, antialias=True)
    torch.testing.assert_close(denormalize(sample["image"]), resized.float(), atol=1e-3, rtol=0)


def test_center_crop_of_evaluation():
    whole = make_eval_transform((56, 56), "shorter_side")(coded_sample())
    crop = make_eval_transform((56, 56), "shorter_side", center_crop=True)(coded_sample())
    assert torch.equal(crop["image"], whole["image"][:, :, 9:65])
    assert torch.equal(crop["mask"], whole["mask"][:, 9:65])
    padded = make_eval_transform((56, 84), "shorter_side", center_crop=True)(coded_sample())
    outside = torch.ones(56, 84, dtype=torch.bool)
    outside[:, 5:80] = False  # 75 of 84 columns, one pixel more on the left
    assert torch.equal(padded["mask"] == IGNORED, outside)
    assert torch.equal(padded["depth"].isnan(), outside)
    assert (padded["image"][:, outside] == 0).all()


def test_evaluation_keeps_every_box_and_refuses_images_that_would_burst():
    sample = make_eval_transform((14, 14), "stretch")(coded_sample(box=(70, 20, 71, 21)))
    torch.testing.assert_close(sample["boxes"].tolist(), [[70 * 14 / 120, 20 * 14 / 90, 71 * 14 / 120, 21 * 14 / 90]])
    image = {"image": torch.zeros(3, 1, 1, dtype=torch.uint8).expand(3, 1, 20_000)}
    with pytest.raises(ValueError, match=f"would be resized to 518 x 10360000 .*more than {MAX_PIXELS} pixels"):
        make_eval_transform((518, 518), "shorter_side")(image)


def picture(value=None):
    if value is not None:
        return tv_tensors.Image(torch.full((3, 20, 24), value, dtype=torch.uint8))
    pixels = torch.randint(0, 256, (3, 20, 24), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    return tv_tensors.Image(pixels)


def jitter_many(options, image, count=300):
    jitter = PhotometricJitter(options)
    torch.manual_seed(0)
    return torch.stack([jitter(image).as_subclass(torch.Tensor) for _ in range(count)])


class TestPhotometricJitter:
    def test_no_strength_changes_nothing_and_targets_stay(self):
        assert torch.equal(PhotometricJitter(Options())(picture()), picture())
        sample = coded_sample()
        changed = PhotometricJitter(EVERYTHING)(sample)
        assert all(torch.equal(changed[key], sample[key]) for key in ("mask", "boxes", "box_labels", "depth"))

    def test_brightness_and_gamma_span_their_ranges(self):
        brightness = jitter_many(Options(brightness=0.5), picture(100))[:, 0, 0, 0].float()
        assert brightness.min().item() == pytest.approx(50, abs=2)
        assert brightness.max().item() == pytest.approx(150, abs=2)
        gamma = jitter_many(Options(gamma=1.0), picture(64))[:, 0, 0, 0].float() / 255
        assert gamma.min().item() == pytest.approx((64 / 255) ** 2, abs=0.01)
        assert gamma.max().item() == pytest.approx((64 / 255) ** 0.5, abs=0.01)
        assert (gamma < 64 / 255).float().mean().item() == pytest.approx(0.5, abs=0.1)
        for value in (0, 255):
            assert (jitter_many(Options(gamma=1.0), picture(value), 20) == value).all()

    def test_contrast_keeps_grey_and_saturation_and_hue_keep_greys(self):
        assert (jitter_many(Options(contrast=0.9), picture(90), 20).int() - 90).abs().max() <= 1
        grey = tv_tensors.Image(picture()[:1].expand(3, -1, -1))
        for options in (Options(saturation=0.9), Options(hue=0.5)):
            assert (jitter_many(options, grey, 20).int() - grey.int()).abs().max() <= 1
            assert not torch.equal(jitter_many(options, picture(), 2)[1], picture())

    def test_strong_options_never_invert(self):
        dark = jitter_many(Options(brightness=3.0), picture(100), 300)[:, 0, 0, 0]
        assert dark.min() < 10
        assert (dark == 0).float().mean() < 0.05, "the smallest factor is 0, not negative"
        contrast = jitter_many(Options(contrast=3.0), picture(), 100).float()
        centred = picture().float() - picture().float().mean()
        assert ((contrast - contrast.mean(dim=(1, 2, 3), keepdim=True)) * centred).mean(dim=(1, 2, 3)).min() >= -1

    def test_blur_happens_as_often_as_asked(self):
        results = jitter_many(Options(blur=0.3), picture(), 400)
        changed = (results != picture()).flatten(1).any(dim=1).float().mean().item()
        assert changed == pytest.approx(0.3, abs=0.08)  # the smallest blurs change nothing
        strongest = photometric.gaussian_blur(picture().permute(1, 2, 0).numpy(), 2.0)
        assert results.float().std(dim=(1, 2, 3)).min().item() == pytest.approx(strongest.std(), rel=0.05)

    def test_noise_has_the_announced_deviation(self):
        results = jitter_many(Options(noise=0.1), picture(128)).float()
        deviations = results.std(dim=(1, 2, 3)) / 255
        assert deviations.max().item() == pytest.approx(0.1, abs=0.01)
        assert deviations.mean().item() == pytest.approx(0.05, abs=0.01)
        assert abs(results.mean().item() - 128) < 0.1

    def test_every_order_of_changes_comes(self):
        jitter = PhotometricJitter(Options(brightness=0.1, contrast=0.1, saturation=0.1))
        torch.manual_seed(0)
        orders = Counter(tuple(change.__name__ for change, _ in jitter.make_params([])["changes"]) for _ in range(100))
        assert len(orders) == 6
        assert all(len(set(order)) == 3 for order in orders)
