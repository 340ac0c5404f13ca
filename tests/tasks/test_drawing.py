"""What is drawn on images: where, in which colours, at which size."""

import re
from collections.abc import Sequence

import numpy as np
import pytest
from PIL import Image

from dinov2.tasks import drawing
from dinov2.tasks.drawing import (
    Box,
    LegendEntry,
    class_colour,
    contrasting,
    depth_table,
    display_size,
    draw_boxes,
    fit_text,
    font_for,
    known_range,
    legible,
    load_font,
    paint_depth,
    paint_labels,
    resize_depth,
    resize_labels,
)
from dinov2.tasks.predictions import ClassPrediction, DepthPrediction, Prediction, SegmentationPrediction

NAMES = ("background", "crack", "dent", "scratch")


def image(height: int, width: int) -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(90, 160, (height, width, 3), dtype=np.uint8))


def segmentation(labels: np.ndarray, classes: Sequence[str] = NAMES) -> SegmentationPrediction:
    ones = np.ones(labels.shape, dtype=np.float32)
    return SegmentationPrediction(labels.astype(np.uint8), ones, ones, tuple(classes))


def disc(height: int, width: int, value: int = 1) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width]
    inside = ((rows - height / 2) / (height / 3)) ** 2 + ((columns - width / 2) / (width / 3)) ** 2 < 1
    return (inside * value).astype(np.uint8)


def class_prediction(*probabilities: float, multi_label: bool = False) -> ClassPrediction:
    return ClassPrediction(np.array(probabilities, dtype=np.float32), multi_label, NAMES)


def kinds(height: int, width: int) -> list[Prediction]:
    depth = np.linspace(1, 2, height * width, dtype=np.float32).reshape(height, width)
    return [
        segmentation(disc(height, width)),
        DepthPrediction(depth, "mm"),
        DepthPrediction(np.full((height, width), np.nan, dtype=np.float32)),
        class_prediction(0.1, 0.7, 0.2),
        class_prediction(0.1, 0.2, 0.2, multi_label=True),
    ]


@pytest.mark.parametrize("size", [(1, 1), (1, 900), (900, 1), (30, 40), (400, 300), (360, 2300)])
def test_every_kind_is_drawn_on_every_size(size: tuple[int, int]) -> None:
    width, height = display_size(size[1], size[0])
    for prediction in kinds(*size):
        drawn = prediction.draw(image(*size))
        assert drawn.mode == "RGB"
        assert drawn.height > height  # the legend lies below
        assert drawn.width == max(width, 320)
        assert prediction.draw(image(*size), keep_size=True, caption="x").size == (size[1], size[0])


@pytest.mark.parametrize(
    ("size", "expected"),
    [((20_000, 20_000), (2048, 2048)), ((20_000, 10), (2048, 1)), ((1, 1), (320, 320)), ((640, 480), (640, 480)),
     ((100, 33), (400, 132)), ((2048, 1), (2048, 1))],
)  # fmt: skip
def test_display_sizes(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert display_size(*size) == expected


def test_areas_are_covered_by_their_colour_and_all_else_is_left_alone() -> None:
    """The slow definition, pixel by pixel; edges are solid, and lie inside the area."""
    picture, labels = image(24, 30), disc(24, 30)
    labels[2:6, 1:4] = 2
    painted = np.array(paint_labels(picture, labels))
    original = np.array(picture)
    for row in range(24):
        for column in range(30):
            value = labels[row, column]
            if value == 0:
                expected = original[row, column]
            else:
                around = labels[max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2]
                share = 1.0 if (around != value).any() else 0.45
                expected = original[row, column] * (1 - share) + np.array(class_colour(int(value))) * share
            np.testing.assert_allclose(painted[row, column], expected, atol=1)


def test_depth_colours_follow_the_scale_and_unknown_pixels_stay_grey() -> None:
    picture = Image.new("RGB", (3, 1), (100, 100, 100))
    painted = np.array(paint_depth(picture, np.array([[1.0, 3.0, np.nan]], dtype=np.float32), (1.0, 3.0)))[0]
    table = depth_table().astype(float)
    np.testing.assert_allclose(painted[0], table[0] * 0.75 + 25, atol=1)
    np.testing.assert_allclose(painted[1], table[255] * 0.75 + 25, atol=1)
    np.testing.assert_array_equal(painted[2], [100, 100, 100])
    beyond = np.array(paint_depth(picture, np.array([[-9.0, 9.0, np.inf]], dtype=np.float32), (1.0, 3.0)))[0]
    np.testing.assert_array_equal(beyond, painted)


def test_a_colour_means_the_same_depth_with_a_given_range() -> None:
    near = DepthPrediction(np.full((400, 400), 1.0, dtype=np.float32), "m")
    far = DepthPrediction(np.full((400, 400), 2.0, dtype=np.float32), "m")
    grey = Image.new("RGB", (400, 400), (100, 100, 100))

    def colour(prediction: DepthPrediction, depth_range: tuple[float, float] | None) -> tuple[int, ...]:
        pixel = prediction.draw(grey, value_range=depth_range).getpixel((200, 200))
        assert isinstance(pixel, tuple)
        return pixel

    assert colour(near, None) == colour(far, None)
    assert colour(near, (1.0, 2.0)) != colour(far, (1.0, 2.0))


def legend(picture: Image.Image, prediction: Prediction, caption: str = "") -> np.ndarray:
    """What lies below the image."""
    return np.array(prediction.draw(picture, caption=caption))[400:]


def test_the_legend_names_what_is_there_and_nothing_else() -> None:
    picture, labels = image(400, 400), disc(400, 400, 2)
    reference = legend(picture, segmentation(labels))
    same = legend(picture, segmentation(labels, ("background", "other", "dent", "thing")))
    np.testing.assert_array_equal(same, reference)
    for names in (("background", "crack", "hole", "scratch"), ("ground", "crack", "dent", "scratch")):
        assert not np.array_equal(legend(picture, segmentation(labels, names)), reference)
    assert not np.array_equal(legend(picture, segmentation(labels), caption="12 frames/s"), reference)
    colours = {tuple(colour) for colour in reference.reshape(-1, 3)}
    assert class_colour(2) in colours
    assert class_colour(1) not in colours


def test_class_score_and_unit_are_written() -> None:
    picture = image(400, 400)
    reference = legend(picture, class_prediction(0.05, 0.9, 0.05))
    assert (legend(picture, class_prediction(0.05, 0.85, 0.1)) != reference).any()
    assert (legend(picture, class_prediction(0.9, 0.05, 0.05)) != reference).any()
    several = legend(picture, class_prediction(0.9, 0.8, 0.1, multi_label=True))
    assert (legend(picture, class_prediction(0.9, 0.8, 0.2, multi_label=True)) == several).all()
    nothing = legend(picture, class_prediction(0.2, 0.1, 0.1, multi_label=True))
    assert (legend(picture, class_prediction(0.3, 0.1, 0.1, multi_label=True)) != nothing).any()
    depth = np.linspace(1, 2, 160_000, dtype=np.float32).reshape(400, 400)
    millimetres = legend(picture, DepthPrediction(depth, "mm"))
    assert (legend(picture, DepthPrediction(depth, "um")) != millimetres).any()
    assert (legend(picture, DepthPrediction(depth + 1, "mm")) != millimetres).any()


def test_many_and_long_names_fit_into_the_picture() -> None:
    labels = np.arange(160_000).reshape(400, 400) % 200
    drawn = segmentation(labels, ["a name without end " * 20] * 200).draw(image(400, 400))
    assert drawn.width == 400
    inside = np.array(segmentation(labels, [str(i) for i in range(200)]).draw(image(400, 400), keep_size=True))
    bare = np.array(paint_labels(image(400, 400), labels.astype(np.uint8)))
    np.testing.assert_array_equal(inside[100:], bare[100:])
    assert 0.1 < covered(inside, bare) <= 0.2


def covered(drawn: np.ndarray, bare: np.ndarray) -> float:
    """Share of the smallest rectangle that holds all differences."""
    rows, columns = (np.flatnonzero((drawn != bare).any(axis=(2, axis))) for axis in (1, 0))
    return 0.0 if not len(rows) else float((np.ptp(rows) + 1) * (np.ptp(columns) + 1) / bare[..., 0].size)


@pytest.mark.parametrize(
    "size", [(1, 1), (7, 900), (900, 7), (48, 64), (90, 160), (240, 320), (480, 640), (1080, 1920)]
)
def test_a_legend_inside_a_frame_never_covers_more_than_a_fifth(size: tuple[int, int]) -> None:
    picture = image(*size)
    many = np.arange(size[0] * size[1]).reshape(size) % 150
    for prediction in (
        *kinds(*size),
        segmentation(many, [f"a long name of class number {index}" for index in range(150)]),
        class_prediction(0.1, 0.9, 0.8, 0.7, multi_label=True),
    ):
        drawn = np.array(prediction.draw(picture, keep_size=True, caption="12.3 frames/s"))
        assert drawn.shape == (*size, 3)
        bare = np.array(prediction.paint(picture, prediction.value_range()))
        assert covered(drawn, bare) <= 0.2
        if min(size) >= 240:
            assert covered(drawn, bare) > 0.01


def test_classes_of_a_legend_keep_their_order_and_the_score_of_the_image_comes_first() -> None:
    labels = np.zeros((100, 100), dtype=np.uint8)
    labels[:5], labels[5:50] = 1, 3
    for mask in (labels, np.where(labels == 1, 3, np.where(labels == 3, 1, 0))):
        defect = np.linspace(0, 0.93, mask.size, dtype=np.float32).reshape(mask.shape)
        prediction = SegmentationPrediction(mask.astype(np.uint8), defect, defect, NAMES)
        score, *names = prediction.legend()
        assert score.words == "defect score  0.93"
        assert [entry.text for entry in names] == ["crack", "scratch", "background"]


def test_a_long_name_is_cut_and_its_value_is_not() -> None:
    font = load_font(12)
    words = LegendEntry("a long name " * 9, "0.70").fitted(font, 90)
    assert re.fullmatch(r"a long…  0\.70|a lon…  0\.70|a…  0\.70|a l…  0\.70|a lo…  0\.70", words)
    assert LegendEntry("a long name", "0.70").fitted(font, 30) == "0.70"
    assert font.getlength(words) <= 90


def test_names_of_any_script_are_drawn_or_numbered(monkeypatch: pytest.MonkeyPatch) -> None:
    assert legible("Straße Ω Царапина e\u0301", 3) == "Straße Ω Царапина é"
    monkeypatch.setattr(drawing, "_system_font", lambda letters: None)
    assert legible("划痕 A", 3) == "class 3 (?? A)"
    prediction = segmentation(disc(300, 300, 3), ("background", "a", "b", "划痕"))
    assert [entry.text for entry in prediction.legend()][1:] == ["class 3 (??)", "background"]
    assert prediction.describe() == "划痕"
    own = load_font(12).path
    monkeypatch.setattr(drawing, "_system_font", lambda letters: own)
    assert legible("划痕", 3) == "划痕"
    assert font_for("划痕", 12).path == own


def test_a_thin_crack_survives_the_reduction_and_of_two_classes_in_a_pixel_the_larger_wins() -> None:
    labels = np.zeros((4000, 3000), dtype=np.uint8)
    labels[2000, :] = 3
    reduced = resize_labels(labels, (300, 400))
    assert reduced.shape == (400, 300)
    assert (reduced[200] == 3).all()
    assert (np.delete(reduced, 200, axis=0) == 0).all()
    labels = np.zeros((8, 8), dtype=np.uint8)
    labels[:4, :4], labels[4:7, :4] = 1, 2
    assert resize_labels(labels, (1, 1)).tolist() == [[1]]
    labels[4:8, :6] = 2
    assert resize_labels(labels, (1, 1)).tolist() == [[2]]


def test_enlarged_pixels_are_squares() -> None:
    labels = np.array([[0, 3], [1, 2]], dtype=np.uint8)
    np.testing.assert_array_equal(resize_labels(labels, (6, 6)), labels.repeat(3, 0).repeat(3, 1))
    depth = labels.astype(np.float32)
    np.testing.assert_array_equal(resize_depth(depth, (6, 6)), depth.repeat(3, 0).repeat(3, 1))


def test_known_range() -> None:
    maps = [np.array([[np.nan, 3.0]], dtype=np.float32), np.array([[np.inf, -1.0]], dtype=np.float32)]
    assert known_range(*maps) == (-1.0, 3.0)
    assert np.isnan(known_range(np.full((1, 1), np.nan, dtype=np.float32))).all()


# Of colours as seen without one kind of cones. Reference: Machado et al., A Physiologically-based Model for Simulation
# of Color Vision Deficiency, 2009, severity 1.0; for linear RGB.
MISSING_CONES = {
    "none": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
}


def as_seen(colours: np.ndarray, kind: str) -> np.ndarray:
    """CIELAB of colours ``[n, 3]`` as a person sees them."""
    import cv2

    share = colours / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4) @ np.transpose(
        MISSING_CONES[kind]
    )
    linear = linear.clip(0, 1)
    rgb = np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.asarray(cv2.cvtColor(rgb[None].astype(np.float32), cv2.COLOR_RGB2Lab)[0])


@pytest.mark.parametrize("kind", MISSING_CONES)
def test_colours_are_told_apart_with_any_colour_vision(kind: str) -> None:
    lab = as_seen(np.array([class_colour(index) for index in range(1, 8)], dtype=float), kind)
    distances = np.linalg.norm(lab[:, None] - lab[None], axis=-1)
    assert distances[~np.eye(7, dtype=bool)].min() > 10  # 2 is the least that is noticed side by side
    lightness = as_seen(depth_table().astype(float), kind)[:, 0]
    assert (np.diff(lightness) > -0.3).all()  # depth reads as lightness, up to rounding


def test_colours_repeat_after_twenty_one_differ_before_and_letters_stand_out_from_them() -> None:
    assert len({class_colour(index) for index in range(22)}) == 22
    assert class_colour(22) == class_colour(1)
    for index in range(22):
        colour = class_colour(index)
        light = np.dot(colour, (0.299, 0.587, 0.114))
        assert abs(light - np.dot(contrasting(colour), (0.299, 0.587, 0.114))) > 90


def test_text_is_cut_where_it_does_not_fit() -> None:
    font = load_font(20)
    assert fit_text("a\nb  c", font, 1000) == "a b c"
    cut = fit_text("crack" * 50, font, 100)
    assert cut.endswith("…")
    assert 60 < font.getlength(cut) <= 100
    assert fit_text("crack", font, 1) == ""


GREY = (128, 128, 128)


def drawn(size: tuple[int, int], *boxes: Box, keep_size: bool = True) -> np.ndarray:
    return np.array(draw_boxes(Image.new("RGB", size, GREY), boxes, ("nut", "bolt"), keep_size=keep_size))


def test_a_line_runs_along_the_edge_of_the_box_and_the_inside_stays_visible() -> None:
    pixels = drawn((400, 400), Box(100, 150, 201, 251, 1, 0.5))
    colour = np.array(class_colour(2))
    for x, y in [(100, 200), (200, 200), (150, 150), (150, 250)]:  # first and last column and row
        np.testing.assert_array_equal(pixels[y, x], colour)
    for x, y in [(99, 200), (201, 200), (195, 149), (195, 251)]:  # a thin line around it
        np.testing.assert_array_equal(pixels[y, x], contrasting(class_colour(2)))
    np.testing.assert_array_equal(pixels[160:240, 110:190], np.broadcast_to(GREY, (80, 80, 3)))
    assert (pixels[132:148, 100:150] != GREY).any()  # the label above
    assert (pixels[260:, :] == GREY).all()


def test_boxes_are_scaled_with_the_image_and_the_most_certain_lies_on_top() -> None:
    small = drawn((100, 100), Box(20, 30, 60, 70, 0, 0.5), keep_size=False)
    assert small.shape == (400, 400, 3)
    np.testing.assert_array_equal(small[200, 80], class_colour(1))
    np.testing.assert_array_equal(small[200, 239], class_colour(1))
    boxes = Box(50, 50, 150, 150, 0, 0.9), Box(50, 50, 150, 150, 1, 0.3)
    for order in (boxes, boxes[::-1]):
        np.testing.assert_array_equal(drawn((300, 300), *order)[100, 50], class_colour(1))


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (200, 3), (400, 300)])
def test_boxes_at_and_beyond_the_border_are_clipped(size: tuple[int, int]) -> None:
    width, height = size
    boxes = [
        Box(-50, -50, width + 50, height + 50, 0, 1.0),
        Box(width - 1, height - 1, width, height, 1, 0.1),
        Box(width, height, width, height, 5, 0.0),
    ]
    pixels = drawn(size, *boxes)
    assert pixels.shape == (height, width, 3)
    np.testing.assert_array_equal(pixels[0, -1], class_colour(1))


def test_score_and_name_are_written() -> None:
    reference = drawn((300, 300), Box(50, 50, 150, 150, 0, 0.9))
    assert (drawn((300, 300), Box(50, 50, 150, 150, 0, 0.8)) != reference).any()
    other = np.array(draw_boxes(Image.new("RGB", (300, 300), GREY), [Box(50, 50, 150, 150, 0, 0.9)], keep_size=True))
    assert (other != reference).any()
    assert (drawn((300, 300)) == GREY).all()
