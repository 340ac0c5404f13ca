"""Multi-crop augmentation: geometry, rates, statistics, and the shortcut for grey images."""

import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from dinov2.data import augmentations
from dinov2.data.augmentations import (
    RELEASED_BLUR_PROBABILITIES,
    CropRecipe,
    DataAugmentationDINO,
    apply_recipe,
    draw_box,
    is_gray,
    normalize,
)
from dinov2.data.transforms import IMAGENET_MEAN, IMAGENET_STD, cut_tilted

GLOBAL, LOCAL = (0.32, 1.0), (0.05, 0.32)
PLAIN = CropRecipe(
    box=(0, 0, 10, 10),
    horizontal_flip=False,
    vertical_flip=False,
    jitter=(),
    grayscale=False,
    blur_sigma=None,
    solarize=False,
)
ORIENTATION = ("horizontal_flip", "vertical_flip", "transpose")


def make_image(height=60, width=80, seed=0):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def make_augmentation(local_crops_number=2, global_size=32, local_size=16, scale=GLOBAL, **options):
    return DataAugmentationDINO(scale, LOCAL, local_crops_number, global_size, local_size, **options)


def test_keys_shapes_and_types():
    crops = make_augmentation(3, (32, 48), (16, 24))(make_image())
    assert set(crops) == {"global_crops", "global_crops_teacher", "local_crops", "offsets"}
    assert [tuple(crop.shape) for crop in crops["global_crops"]] == [(3, 32, 48)] * 2
    assert [tuple(crop.shape) for crop in crops["local_crops"]] == [(3, 16, 24)] * 3
    assert all(crop.dtype == torch.float32 for crop in crops["global_crops"] + crops["local_crops"])
    assert all(a is b for a, b in zip(crops["global_crops"], crops["global_crops_teacher"], strict=True))
    assert crops["offsets"] == ()
    assert make_augmentation(0)(make_image())["local_crops"] == []


def test_randomness_comes_from_torch_alone():
    augmentation, image = make_augmentation(), make_image()
    torch.manual_seed(5)
    first = augmentation(image)
    random.seed(1)
    torch.manual_seed(5)
    again = augmentation(image)
    other = augmentation(image)
    assert all(torch.equal(a, b) for a, b in zip(first["local_crops"], again["local_crops"], strict=True))
    assert not torch.equal(again["local_crops"][0], other["local_crops"][0])


def test_gray_images_take_a_shortcut_with_the_same_result(monkeypatch):
    image = make_image().convert("L").convert("RGB")
    augmentation = make_augmentation(6)
    assert is_gray(image)
    torch.manual_seed(0)
    short = augmentation(image)
    torch.manual_seed(0)
    single_channel = augmentation(image.getchannel(0))
    monkeypatch.setattr(augmentations, "is_gray", lambda _: False)
    torch.manual_seed(0)
    full = augmentation(image)
    for name in ("global_crops", "local_crops"):
        for a, b, c in zip(short[name], full[name], single_channel[name], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
            assert torch.equal(a, c)
    monkeypatch.undo()
    image.putpixel((71, 53), (10, 10, 11))
    assert not augmentations.is_gray(image), "one coloured pixel"


@pytest.mark.parametrize("blur", [(1.0, 0.1, 0.5), RELEASED_BLUR_PROBABILITIES])
def test_application_rates(blur):
    augmentation = make_augmentation(blur_probabilities=blur)
    rng = random.Random(0)
    for kind, blur_rate, solarize_rate in (
        (augmentation.global_kinds[0], blur[0], 0.0),
        (augmentation.global_kinds[1], blur[1], 0.2),
        (augmentation.local_kind, blur[2], 0.0),
    ):
        recipes = [augmentation.draw_recipe(kind, (320, 256), rng) for _ in range(2000)]
        rates = {
            "blur": ([r.blur_sigma is not None for r in recipes], blur_rate),
            "solarize": ([r.solarize for r in recipes], solarize_rate),
            "jitter": ([r.jitter != () for r in recipes], 0.8),
            "gray": ([r.grayscale for r in recipes], 0.2),
            "flip": ([r.horizontal_flip for r in recipes], 0.5),
            "vertical": ([r.vertical_flip for r in recipes], 0.0),
            "transpose": ([r.transpose for r in recipes], 0.0),
        }
        for name, (applied, expected) in rates.items():
            assert np.mean(applied) == pytest.approx(expected, abs=0.03 if 0 < expected < 1 else 0), name
        sigmas = [r.blur_sigma for r in recipes if r.blur_sigma is not None]
        if sigmas:
            assert 0.1 <= min(sigmas) < 0.12
            assert 1.98 < max(sigmas) <= 2.0


def test_jitter_ranges_and_orders():
    augmentation = make_augmentation(color_jitter_probability=1.0)
    rng = random.Random(0)
    recipes = [augmentation.draw_recipe(augmentation.local_kind, (64, 64), rng) for _ in range(3000)]
    amounts = [dict(recipe.jitter) for recipe in recipes]
    for operation, (low, high) in enumerate([(0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1)]):
        values = [amount[operation] for amount in amounts]
        assert min(values) == pytest.approx(low, abs=0.005)
        assert max(values) == pytest.approx(high, abs=0.005)
    assert len({tuple(operation for operation, _ in recipe.jitter) for recipe in recipes}) == 24


@pytest.mark.parametrize(("kind", "scale"), [("global", GLOBAL), ("local", LOCAL)])
def test_crop_geometry_matches_the_reference(reference, kind, scale):
    expected = reference("aug_stats.json")["crop_geometry"][kind]
    rng = random.Random(0)
    boxes = np.array([draw_box((320, 256), scale, rng) for _ in range(8000)])
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    area = width * height / (320 * 256)
    assert area.mean() == pytest.approx(expected["area_fraction_mean"], rel=0.02)
    assert np.quantile(area, [0.05, 0.5, 0.95]) == pytest.approx(expected["area_quantiles_5_50_95"], rel=0.05)
    assert np.log(width / height).std() == pytest.approx(expected["log_aspect_std"], rel=0.03)
    assert boxes.min() >= 0
    assert boxes[:, 2].max() <= 320
    assert boxes[:, 3].max() <= 256


@pytest.mark.parametrize("scale", [GLOBAL, LOCAL])
def test_boxes_that_fit_are_drawn_as_published(scale):
    def draw_as_published(width, height, rng):
        for _ in range(10):
            area = width * height * rng.uniform(*scale)
            aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                top, left = rng.randint(0, height - h), rng.randint(0, width - w)
                return left, top, left + w, top + h
        raise AssertionError("none fits")

    ours, published = random.Random(3), random.Random(3)
    for size in [(320, 256), (64, 64), (200, 240)] * 300:
        assert draw_box(size, scale, ours, (224, 224)) == draw_as_published(*size, published)
    assert ours.getstate() == published.getstate()


@pytest.mark.parametrize("size", [(200, 50), (50, 200), (2000, 100), (1, 50), (400, 1), (1, 1), (3, 2)])
@pytest.mark.parametrize("scale", [GLOBAL, LOCAL, (0.9, 1.0)])
def test_boxes_that_fit_nowhere_keep_their_share_and_see_all_of_the_image(size, scale):
    rng = random.Random(0)
    boxes = np.array([draw_box(size, scale, rng) for _ in range(300)])
    assert boxes.min() >= 0
    assert (boxes[:, 2:] > boxes[:, :2]).all()
    assert (boxes[:, 2:] <= size).all()
    if min(size) >= 50:
        shares = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1) / math.prod(size)
        assert scale[0] - 0.03 < shares.min() < shares.max() < scale[1] + 0.03
    if max(size) >= 50:
        along = int(size[1] > size[0])
        seen = np.zeros(max(size), dtype=bool)
        for low, high in boxes[:, [along, along + 2]]:
            seen[low:high] = True
        assert seen.mean() > 0.98
        assert len(np.unique(boxes, axis=0)) > 5


def test_boxes_have_the_shape_of_the_crop():
    rng = random.Random(0)
    boxes = np.array([draw_box((4000, 1000), GLOBAL, rng, (64, 256)) for _ in range(400)])
    aspects = (boxes[:, 2] - boxes[:, 0]) / (boxes[:, 3] - boxes[:, 1])
    assert 4 * 0.74 < aspects.min() < aspects.max() < 4 * 1.34


def ramp(length, width, axis):
    """A grey image that brightens along an axis, from 0 to 255."""
    values = np.linspace(0, 255, length).astype(np.uint8)
    return Image.fromarray(
        np.broadcast_to(values[None] if axis == 1 else values[:, None], (width, length)[:: 1 if axis else -1]).copy()
    )


@pytest.mark.parametrize("axis", [0, 1])
def test_crops_of_a_long_image_come_from_one_piece_and_pieces_from_everywhere(axis):
    """Of 6400 x 64, a piece is 256 long, 4 % of the image: crops of a sample lie so near to each other."""
    image = ramp(6400, 64, axis)
    no_colours = {"color_jitter_probability": 0, "solarize_probability": 0, "blur_probabilities": (0, 0, 0)}
    augmentation = make_augmentation(**no_colours)
    torch.manual_seed(0)
    middles = []
    for _ in range(150):
        crops = augmentation(image)
        values = [crop[0].mean().item() for crop in crops["global_crops"] + crops["local_crops"]]
        levels = (np.array(values) * IMAGENET_STD[0] + IMAGENET_MEAN[0]) * 255
        assert levels.max() - levels.min() < 0.04 * 255 + 1
        middles.append(levels.mean())
    assert min(middles) < 0.05 * 255 < 0.95 * 255 < max(middles)
    assert np.histogram(middles, bins=10, range=(0, 255))[0].min() > 3

    partner = ramp(3200, 32, axis)  # another image of the part, taken at half the size
    levels = [[crop[0].mean().item() for crop in augmentation(image, partner)["global_crops"]] for _ in range(50)]
    assert np.abs(np.diff(levels)).max() * IMAGENET_STD[0] < 0.05, "both show the same place of the part"


@pytest.mark.parametrize(
    ("image_size", "crop_size", "piece"),
    [
        ((400, 100), (32, 32), (400, 100)),
        ((500, 100), (32, 32), (400, 100)),
        ((100, 500), (32, 32), (100, 400)),
        ((500, 100), (32, 160), (500, 100)),
        ((5000, 1), (32, 48), (48, 1)),  # no fewer pixels than the crop has
        ((20, 2), (32, 32), (20, 2)),
    ],
)
def test_piece_size(image_size, crop_size, piece):
    assert augmentations.piece_size(image_size, crop_size) == piece


def test_crop_fit_tells_how_often_no_box_fits():
    augmentation = make_augmentation()
    square = augmentations.crop_fit(augmentation, [(300, 300), (320, 256)])
    assert (square.pieces, square.global_fallback, square.local_fallback) == (0, 0, 0)
    mixed = augmentations.crop_fit(augmentation, [(300, 300), (3000, 300)])
    assert mixed.pieces == 0.5
    assert 0.4 < mixed.global_fallback <= 0.5
    assert mixed.local_fallback < 0.05


def test_recipe_applies_every_step():
    image = make_image(40, 40)
    plain = apply_recipe(image, PLAIN, (16, 16))
    steps = {"horizontal_flip": True, "vertical_flip": True, "jitter": ((0, 0.7),)}
    for field, value in (steps | {"grayscale": True, "blur_sigma": 1.0, "solarize": True}).items():
        crop = apply_recipe(image, replace(PLAIN, **{field: value}), (16, 16))
        assert not torch.equal(crop, plain), field
        if field.endswith("flip"):
            assert torch.equal(crop.flip(2 if field.startswith("h") else 1), plain)


def test_both_flips_and_the_exchange_of_rows_and_columns_give_all_eight_orientations():
    image = make_image(16, 16)
    pixels = normalize(np.array(image))
    expected = {
        tuple(torch.rot90(side, turns, (1, 2)).flatten().tolist())
        for side in (pixels, pixels.flip(2))
        for turns in range(4)
    }
    augmentation = make_augmentation(
        scale=(1.0, 1.0), global_size=16, vertical_flip_probability=0.5, transpose_probability=0.5
    )
    rng, found = random.Random(0), set()
    for _ in range(60):
        recipe = augmentation.draw_recipe(augmentation.global_kinds[0], image.size, rng)
        plain = replace(PLAIN, box=(0, 0, 16, 16), **{name: getattr(recipe, name) for name in ORIENTATION})
        found.add(tuple(apply_recipe(image, plain, (16, 16)).flatten().tolist()))
    assert found == expected
    assert len(found) == 8


def test_a_crop_with_rows_and_columns_exchanged_keeps_its_size_and_its_pixels_shape():
    augmentation = make_augmentation(transpose_probability=1.0, global_size=(32, 64), scale=(0.1, 0.2))
    kind, rng = augmentation.global_kinds[0], random.Random(0)
    boxes = [augmentation.draw_recipe(kind, (400, 400), rng).box for _ in range(100)]
    shapes = [(bottom - top) / (right - left) for left, top, right, bottom in boxes]
    assert 2 * 0.74 < min(shapes) < max(shapes) < 2 * 1.35, "an upright part of the image, which is laid down"
    image = make_image(64, 32)
    crop = apply_recipe(image, replace(PLAIN, box=(0, 0, 32, 64), transpose=True), (32, 64))
    assert torch.equal(crop, normalize(np.array(image)).transpose(1, 2))
    assert [tuple(crop.shape) for crop in augmentation(image)["global_crops"]] == [(3, 32, 64)] * 2


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_tilted_crop_shows_what_lies_there_and_its_mirror_image_past_the_border(mode):
    image = make_image(40, 40).convert(mode)
    turned = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_270}
    for angle, how in turned.items():
        crop = apply_recipe(image, replace(PLAIN, box=(0, 0, 40, 40), tilt=angle), (40, 40))
        assert torch.allclose(crop, normalize(np.array(image.transpose(how))), atol=0.02), angle
    columns, rows = np.meshgrid(np.arange(40.0), np.arange(40.0))
    ramp = Image.fromarray((2 * columns + 3 * rows).astype(np.uint8))
    crop = np.asarray(cut_tilted(ramp, (20, 20), (10, 10), 30), dtype=float)
    steps = np.array([np.diff(crop, axis=axis).mean() for axis in (1, 0)])  # along x and y of the crop
    cos, sin = np.cos(np.pi / 6), np.sin(np.pi / 6)
    np.testing.assert_allclose(steps, [2 * cos + 3 * sin, 3 * cos - 2 * sin], atol=0.1)
    corner = np.asarray(cut_tilted(ramp, (5, 5), (10, 10), 45), dtype=float)
    assert corner.min() >= 0
    assert corner[0, 5] <= 50, "left of the image lies its mirror image, not black or the other side"
    tilts = [
        recipe.tilt
        for augmentation in [make_augmentation(max_tilt=10)]
        for rng in [random.Random(0)]
        for recipe in (augmentation.draw_recipe(augmentation.local_kind, (64, 64), rng) for _ in range(500))
    ]
    assert -10 <= min(tilts) < -9 < 9 < max(tilts) <= 10
    with pytest.raises(ValueError, match="max_tilt must lie in"):
        make_augmentation(max_tilt=-1)


def test_the_stream_of_crops_is_the_old_one_where_rows_and_columns_are_never_exchanged():
    without, never = make_augmentation(), make_augmentation(transpose_probability=1e-300)
    rng = random.Random(7)
    recipes = [without.draw_recipe(without.global_kinds[1], (320, 256), rng) for _ in range(3)]
    assert [recipe.box for recipe in recipes] == [(12, 20, 202, 253), (37, 17, 237, 210), (20, 15, 203, 234)]
    assert rng.random() == 0.573025940277384, "as many numbers were drawn"
    one_later = random.Random(7)
    one_later.random()
    assert never.draw_recipe(never.local_kind, (320, 256), random.Random(7)) == without.draw_recipe(
        without.local_kind, (320, 256), one_later
    )


def test_crop_resize_and_normalisation_equal_the_reference(reference):
    expected = reference("aug_deterministic.npz")
    image = Image.fromarray(reference("aug_images.npz")["waves_320x256"])
    crop = image.crop((33, 20, 33 + 181, 20 + 150)).resize((224, 224), Image.Resampling.BICUBIC)
    assert np.array_equal(np.asarray(crop), expected["resized_crop_20_33_150_181_to_224"])
    recipe = replace(PLAIN, box=(33, 20, 33 + 181, 20 + 150))
    assert torch.equal(apply_recipe(image, recipe, (224, 224)), normalize(np.array(crop)))
    small = expected["bicubic_224_to_98"]
    torch.testing.assert_close(
        normalize(small), torch.from_numpy(expected["normalized_bicubic_98_f32"]), rtol=0, atol=2e-6
    )
    flipped = replace(PLAIN, box=(0, 0, 98, 98), horizontal_flip=True)
    assert torch.equal(apply_recipe(Image.fromarray(small), flipped, (98, 98)), normalize(expected["hflip"]))


def laplacian(crops):
    """Mean absolute discrete Laplacian of crops ``[n, 3, H, W]`` put back to 0..1."""
    raw = crops * torch.tensor(IMAGENET_STD).view(3, 1, 1) + torch.tensor(IMAGENET_MEAN).view(3, 1, 1)
    centre = raw[..., 1:-1, 1:-1]
    neighbours = raw[..., :-2, 1:-1] + raw[..., 2:, 1:-1] + raw[..., 1:-1, :-2] + raw[..., 1:-1, 2:]
    return (neighbours - 4 * centre).abs().mean(dim=(1, 2, 3))


@pytest.mark.parametrize("name", ["waves_320x256", "blocks_300x420", "noise_512x384"])
def test_output_statistics_match_the_reference(reference, name):
    expected = reference("aug_stats.json")["output_statistics"][name]
    image = Image.fromarray(reference("aug_images.npz")[name])
    augmentation = DataAugmentationDINO(GLOBAL, LOCAL, 2, 224, 98, blur_probabilities=RELEASED_BLUR_PROBABILITIES)
    torch.manual_seed(0)
    drawn = [augmentation(image) for _ in range(400)]
    kinds = {
        "global_1": torch.stack([crops["global_crops"][0] for crops in drawn]),
        "global_2": torch.stack([crops["global_crops"][1] for crops in drawn]),
        "local": torch.stack([crop for crops in drawn for crop in crops["local_crops"]]),
    }
    for kind, crops in kinds.items():
        reference_statistics = expected[kind]
        assert list(crops.shape[1:]) == reference_statistics["shape"]
        mean, std = crops.mean(dim=(0, 2, 3)).tolist(), crops.std(dim=(0, 2, 3)).tolist()
        assert mean == pytest.approx(reference_statistics["mean_per_channel"], abs=0.1), kind
        assert std == pytest.approx(reference_statistics["std_per_channel"], rel=0.08), kind
        low, *_, high = reference_statistics["laplacian_quantiles_5_25_50_75_95"]
        values = laplacian(crops)
        assert values.mean().item() == pytest.approx(reference_statistics["mean_abs_laplacian"], rel=0.1), kind
        assert low < values.median().item() < high, kind
        assert crops.min().item() == pytest.approx(reference_statistics["min"], abs=1e-4)
        assert crops.max().item() == pytest.approx(reference_statistics["max"], abs=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"local_crops_number": -1}, "local_crops_number must be at least 0"),
        ({"global_size": 4}, "at least 9 pixels"),
        ({"blur_probabilities": (1.0, 0.5)}, "needs three values"),
        ({"blur_probabilities": (1.0, 0.5, 2.0)}, "blur_probabilities must lie in 0..1"),
        ({"color_jitter": (0.4, 0.4, 0.2, 0.6)}, "hue at most 0.5"),
        ({"solarize_probability": -0.1}, "solarize_probability must lie in 0..1"),
        *(({"scale": scale}, "0 < smallest <= largest <= 1") for scale in ((0.0, 1.0), (0.5, 0.4), (0.5, 1.1))),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        make_augmentation(**options)


def test_bad_image_mode():
    with pytest.raises(ValueError, match="got mode 'RGBA'"):
        make_augmentation()(Image.new("RGBA", (20, 20)))
