"""Photo, mask, depth and boxes stay together: every pixel says where it came from."""

import math

import pytest
import torch
from task_stand_ins import MOVES, Options, coded_sample, decode_depth
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as TF

from dinov2.data.datasets.dense_targets import IGNORED
from dinov2.data.task_dataset import Depth
from dinov2.data.task_transforms import Geometry, RandomCropping, apply_geometry, canvas_of, inside_photo, place_window

SIZE = (90, 120)
RANDOM = [
    (MOVES, "stretch"),
    (MOVES, "shorter_side"),
    (MOVES, "original"),
    (Options(random_resized_crop=(0.1, 1.0), rotation=180, hflip=0.5, rotate90=0.5), "shorter_side"),
    (Options(scale_jitter=(0.5, 2.0), vflip=0.5, rotate90=0.5), "stretch"),
]


def draws(count=40):
    for options, resize in RANDOM:
        cropping = RandomCropping(options, (56, 84), resize)
        for seed in range(count):
            torch.manual_seed(seed)
            sample = coded_sample()
            yield sample, cropping.draw(sample)


def erode(inside, radius=4):
    padded = torch.nn.functional.pad(inside[None, None].float(), [radius] * 4)
    return (-torch.nn.functional.max_pool2d(-padded, 2 * radius + 1, stride=1))[0, 0].bool()


def test_image_and_depth_tell_the_same_place():
    bias = []
    for sample, geometry in draws():
        moved = apply_geometry(sample, geometry)
        assert moved["image"].shape[-2:] == moved["depth"].shape == geometry.output == (56, 84)
        middle = erode(inside_photo(SIZE, geometry))
        rows, columns = decode_depth(moved["depth"])
        red, green = moved["image"][0] / 2, moved["image"][1] / 2
        # Half a pixel of the nearest neighbour twice (resizing and turning), and the rounding of colours.
        difference = torch.stack([red - columns, green - rows])[:, middle]
        if difference.numel():
            coarsest = max(1, *(geometry.box[2 + axis] / geometry.canvas[axis] for axis in range(2)))
            assert difference.abs().max() <= 0.5 + 0.75 * coarsest + 0.3, geometry
            bias.append(difference.mean())
    assert len(bias) > 100
    assert abs(torch.stack(bias).mean()) < 0.05, "targets are shifted against the image"


def test_points_go_where_pixels_go():
    for sample, geometry in draws(10):
        depth = apply_geometry(sample, geometry)["depth"]
        known = ~depth.isnan()
        rows, columns = decode_depth(depth[known])
        places = geometry.map_points(torch.stack([columns, rows], dim=-1) + 0.5)
        found_rows, found_columns = known.nonzero(as_tuple=True)
        expected = torch.stack([found_columns, found_rows], dim=-1) + 0.5
        finest = max(1, *(geometry.canvas[axis] / geometry.box[2 + axis] for axis in range(2)))
        assert (places - expected).norm(dim=-1).max() <= math.sqrt(0.5) * (finest + 1), geometry


def test_mask_follows_depth_and_is_ignored_where_depth_is_unknown():
    for sample, geometry in draws(20):
        moved = apply_geometry(sample, geometry)
        unknown = moved["depth"].isnan()
        assert torch.equal(unknown, moved["mask"] == IGNORED)
        assert torch.equal(unknown, ~inside_photo(SIZE, geometry))
        rows, columns = decode_depth(moved["depth"][~unknown])
        expected = 3 * ((rows >= 20) & (rows < 45) & (columns >= 70) & (columns < 100))
        assert torch.equal(moved["mask"][~unknown].float(), expected.float())


def test_boxes_hold_their_shape_and_little_more():
    seen = 0
    for sample, geometry in draws():
        moved = apply_geometry(sample, geometry)
        assert moved["boxes"].canvas_size == geometry.output
        left, top, right, bottom = moved["boxes"][0].tolist()
        assert 0 <= left <= right <= 84
        assert 0 <= top <= bottom <= 56
        rows, columns = (moved["mask"] == 3).nonzero(as_tuple=True)
        if len(rows) == 0:
            continue
        slack = 1 + max(geometry.canvas[axis] / geometry.box[2 + axis] for axis in range(2))
        assert columns.min() >= left - slack
        assert columns.max() + 1 <= right + slack
        assert rows.min() >= top - slack
        assert rows.max() + 1 <= bottom + slack
        if geometry.angle == 0:
            seen += 1
            assert columns.min() <= left + slack
            assert columns.max() + 1 >= right - slack
            assert rows.min() <= top + slack
            assert rows.max() + 1 >= bottom - slack
    assert seen > 20


@pytest.mark.parametrize("turns", range(4))
@pytest.mark.parametrize("horizontal", [False, True])
@pytest.mark.parametrize("vertical", [False, True])
def test_right_angles_and_flips_equal_those_of_torchvision(turns, horizontal, vertical):
    sample = coded_sample()
    geometry = Geometry(
        box=(10, 20, 30, 50),
        canvas=(30, 50),
        window=(30, 50),
        quarter_turns=turns,
        horizontal_flip=horizontal,
        vertical_flip=vertical,
    )
    moved = apply_geometry(sample, geometry)
    for key in ("image", "mask", "depth", "boxes"):
        expected = TF.rotate(TF.crop(sample[key], 10, 20, 30, 50), 90.0 * turns, expand=True)
        expected = TF.horizontal_flip(expected) if horizontal else expected
        expected = TF.vertical_flip(expected) if vertical else expected
        assert type(moved[key]) is type(sample[key])
        torch.testing.assert_close(
            moved[key].as_subclass(torch.Tensor).float(),
            expected.as_subclass(torch.Tensor).float(),
            atol=1e-3 if key == "boxes" else 0,
            rtol=0,
        )


def test_turning_equals_that_of_torchvision_far_from_the_edges():
    sample = coded_sample(91, 91)
    moved = apply_geometry(sample, place_window((31, 31), (31, 31), (45.5, 45.5), angle=20))
    turned = TF.center_crop(TF.rotate(sample["depth"], 20.0), [31, 31])
    assert torch.equal(moved["depth"], turned)
    smooth = TF.rotate(sample["image"], 20.0, interpolation=TF.InterpolationMode.BILINEAR)
    assert torch.equal(moved["image"], TF.center_crop(smooth, [31, 31]))


def test_fill_values():
    geometry = Geometry(box=(-10, 100, 30, 40), canvas=(30, 40), window=(30, 40))
    moved = apply_geometry(coded_sample(), geometry)
    outside = torch.ones(30, 40, dtype=torch.bool)
    outside[10:, :20] = False
    assert torch.equal(inside_photo(SIZE, geometry), ~outside)
    assert torch.equal(moved["image"][:, outside].unique(dim=1), torch.tensor([[124], [116], [104]], dtype=torch.uint8))
    assert torch.equal(moved["mask"] == IGNORED, outside)
    assert torch.equal(moved["depth"].isnan(), outside)
    assert geometry.leaves(SIZE)
    assert not Geometry(box=(0, 0, 90, 120), canvas=(9, 9), window=(9, 9)).leaves(SIZE)


def test_a_box_beside_the_photo_shows_nothing_of_it():
    geometry = Geometry(box=(200, -300, 5, 6), canvas=(10, 12), window=(10, 12))
    moved = apply_geometry(coded_sample(), geometry)
    assert (moved["mask"] == IGNORED).all()
    assert moved["depth"].isnan().all()


def test_unknown_depth_stays_unknown_and_spreads_to_nothing_else():
    sample = coded_sample()
    sample["depth"][30:50, 40:60] = math.nan
    for angle in (0.0, 17.0):
        geometry = place_window((60, 60), (80, 80), (45, 60), angle=angle)
        before, after = (apply_geometry(entry, geometry)["depth"] for entry in (coded_sample(), sample))
        rows, columns = decode_depth(before)
        hole = (rows >= 30) & (rows < 50) & (columns >= 40) & (columns < 60)
        assert hole.sum() > 100
        assert torch.equal(after.isnan(), hole | before.isnan())
        assert torch.equal(after[~after.isnan()], before[~after.isnan()])


@pytest.mark.parametrize("window", [(30, 50), (50, 30), (14, 200), (1, 1)])
def test_the_corners_of_a_turned_window_stay_on_its_canvas(window):
    for angle in range(-180, 181, 7):
        canvas = canvas_of(window, angle)
        assert all((whole - part) % 2 == 0 for whole, part in zip(canvas, window, strict=True))
        turned = Geometry(box=(0, 0, *canvas), canvas=canvas, window=canvas, angle=-angle)
        height, width = window
        top, left = (canvas[0] - height) / 2, (canvas[1] - width) / 2
        corners = torch.tensor([[left, top], [left + width, top], [left, top + height], [left + width, top + height]])
        places = turned.map_points(corners.double())
        assert places.min() >= 0
        assert (places <= torch.tensor([canvas[1], canvas[0]])).all()
    assert canvas_of(window, 0) == window


def test_boxes_that_leave_go_with_their_labels():
    sample = coded_sample()
    boxes = [[0, 0, 10, 10], [95, 0, 105, 10], [99, 0, 119, 10], [10, 10, 10.5, 40], [110, 80, 119, 89]]
    sample["boxes"] = tv_tensors.BoundingBoxes(torch.tensor(boxes), format="XYXY", canvas_size=SIZE)
    sample["box_labels"] = torch.arange(5)
    geometry = Geometry(box=(0, 0, 90, 100), canvas=(90, 100), window=(90, 100))
    assert apply_geometry(sample, geometry, min_box_visibility=0.04)["box_labels"].tolist() == [0, 1, 2]
    assert apply_geometry(sample, geometry, min_box_visibility=0.4)["box_labels"].tolist() == [0, 1]
    assert apply_geometry(sample, geometry, min_box_visibility=0.6)["box_labels"].tolist() == [0]
    kept = apply_geometry(sample, geometry, min_box_visibility=0.5)["boxes"]
    assert kept.tolist() == [[0, 0, 10, 10], [95, 0, 100, 10]]
    assert len(apply_geometry(sample, geometry)["boxes"]) == 5


def test_boxes_of_other_formats_and_no_boxes():
    sample = coded_sample()
    geometry = place_window((30, 40), (60, 80), (50, 60), quarter_turns=1)
    expected = apply_geometry(sample, geometry)["boxes"]
    converted = TF.convert_bounding_box_format(sample["boxes"], new_format=tv_tensors.BoundingBoxFormat.XYWH)
    assert torch.equal(apply_geometry({**sample, "boxes": converted}, geometry)["boxes"], expected)
    none = tv_tensors.BoundingBoxes(torch.zeros(0, 4), format="XYXY", canvas_size=SIZE)
    empty = apply_geometry({**sample, "boxes": none, "box_labels": torch.zeros(0, dtype=torch.int64)}, geometry)
    assert empty["boxes"].shape == (0, 4)
    assert empty["boxes"].canvas_size == (40, 30)
    assert empty["box_labels"].shape == (0,)


def test_the_sample_given_is_left_alone():
    sample, kept = coded_sample(), coded_sample()
    geometry = Geometry(box=(-5, -5, 100, 130), canvas=(40, 50), window=(40, 50), angle=0.0)
    moved = apply_geometry(sample, geometry)
    moved["image"].fill_(0)
    for key in ("image", "mask", "depth", "boxes", "box_labels"):
        assert torch.equal(sample[key], kept[key])
    assert moved["index"] == 5


def test_torchvision_treats_depth_as_a_mask():
    depth = coded_sample()["depth"]
    assert isinstance(TF.resize(depth, [30, 40]), Depth)
    assert set(TF.resize(depth, [30, 40]).flatten().tolist()) <= set(depth.flatten().tolist())
