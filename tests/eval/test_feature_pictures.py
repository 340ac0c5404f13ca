from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from dinov2.data.datasets.base import ImageDataset
from dinov2.eval.visualize import draw_patch_pca, patch_pca_colours, sample_photos


class BrightnessModel(nn.Module):
    """A stand-in backbone: a patch's features are one of two random directions, by whether the patch is bright."""

    def __init__(self, patch_size: tuple[int, int] = (8, 4), width: int = 16) -> None:
        super().__init__()
        self.patch_size = patch_size
        generator = torch.Generator().manual_seed(0)
        self.directions = nn.Parameter(torch.randn(2, width, generator=generator), requires_grad=False)
        self.noise = 0.05
        self.modes: list[bool] = []
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, x: Tensor, is_training: bool = False) -> dict[str, Any]:
        assert is_training
        self.modes.append(self.training)
        self.shapes.append(tuple(x.shape))
        bright = nn.functional.avg_pool2d(x.mean(dim=1, keepdim=True), self.patch_size).flatten(1) > 0  # [B, N]
        tokens = self.directions[bright.long()]
        generator = torch.Generator().manual_seed(1)
        return {"x_norm_patchtokens": tokens + self.noise * torch.randn(tokens.shape, generator=generator)}


def half_bright_photo(height: int = 48, width: int = 60) -> Image.Image:
    pixels = np.zeros((height, width), dtype=np.uint8)
    pixels[:, : width // 2] = 255
    return Image.fromarray(pixels)


def test_two_regions_get_two_colours(tmp_path: Path) -> None:
    model = BrightnessModel().train()
    draw_patch_pca(model, [half_bright_photo()], image_size=(32, 48), path=tmp_path / "new" / "p.png", titles=["plate"])
    assert model.shapes == [(1, 3, 32, 48)]
    assert model.modes == [False]
    assert model.training  # the model gets its mode back
    with Image.open(tmp_path / "new" / "p.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(float)
    height, width, _ = pixels.shape
    panel = pixels[height // 2 - 20 : height // 2 + 20, width // 2 :]  # the right half holds the features
    inked = panel[:, (panel < 250).any(axis=(0, 2))]
    left, right = inked[:, : inked.shape[1] // 3], inked[:, -inked.shape[1] // 3 :]
    between = np.abs(left.mean(axis=(0, 1)) - right.mean(axis=(0, 1))).max()
    assert between > 200  # the first component saturates at both ends


def test_colours_separate_regions_and_follow_the_grid() -> None:
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(2, 32, generator=generator)
    region = torch.zeros(3, 5, 7, dtype=torch.long)
    region[1, 2:, 3:] = 1
    tokens = directions[region] + 0.01 * torch.randn(3, 5, 7, 32, generator=generator)
    colours, explained = patch_pca_colours(tokens)
    assert colours.shape == (3, 5, 7, 3)
    assert colours.dtype == torch.float32
    first = colours[..., 0]
    assert (first[region == 1] - first[region == 0].mean()).abs().min() > 0.9
    assert first[region == 0].std() < 0.05
    assert 0.99 < explained <= 1.0


def test_components_are_those_of_an_exact_decomposition() -> None:
    tokens = torch.randn(2, 6, 6, 12, generator=torch.Generator().manual_seed(3)) * torch.arange(1, 13)
    rows = tokens.flatten(0, 2).double()
    rows = rows - rows.mean(dim=0)
    left, values, right = torch.linalg.svd(rows, full_matrices=False)
    colours, explained = patch_pca_colours(tokens)
    assert explained == pytest.approx(float((values[:3] ** 2).sum() / (values**2).sum()))
    inside = colours.flatten(0, 2)
    for component in range(3):
        sign = right[component, right[component].abs().argmax()].sign()
        projection = left[:, component] * values[component] * sign
        kept = (inside[:, component] > 0) & (inside[:, component] < 1)
        drawn, expected = inside[kept, component].double(), projection[kept]
        slope = (drawn.max() - drawn.min()) / (expected.max() - expected.min())
        torch.testing.assert_close(drawn - drawn.mean(), slope * (expected - expected.mean()), atol=1e-5, rtol=0)


def test_colours_do_not_depend_on_the_scale_or_an_offset_of_features() -> None:
    tokens = torch.randn(1, 8, 8, 6, generator=torch.Generator().manual_seed(5))
    expected, _ = patch_pca_colours(tokens)
    torch.testing.assert_close(patch_pca_colours(40 * tokens + 3)[0], expected, atol=1e-4, rtol=0)


def test_a_few_outliers_do_not_take_the_colours_away() -> None:
    tokens = torch.randn(1, 20, 20, 6, generator=torch.Generator().manual_seed(6))
    tokens[0, 0, 0] = 1e3
    colours, _ = patch_pca_colours(tokens)
    assert colours[0, 1:, 1:, 0].std() > 0.15  # less than 0.01 if the outlier had the whole range for itself


def test_features_without_variation_are_grey() -> None:
    colours, explained = patch_pca_colours(torch.ones(1, 4, 4, 8))
    assert (colours == 0.5).all()
    assert explained == 0.0


def test_models_are_drawn_side_by_side_and_pictures_repeat_exactly(tmp_path: Path) -> None:
    photos = [half_bright_photo(), half_bright_photo(20, 20).convert("RGBA")]
    models = {"random": BrightnessModel(width=8), "pretrained": BrightnessModel((16, 16)).to(torch.bfloat16)}
    for name in ("a", "b"):
        draw_patch_pca(models, photos, image_size=32, path=tmp_path / f"{name}.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    draw_patch_pca(models["random"], photos, image_size=32, path=tmp_path / "single.png")
    with Image.open(tmp_path / "a.png") as both, Image.open(tmp_path / "single.png") as single:
        assert both.height == single.height
        assert both.width == pytest.approx(single.width * 3 / 2, abs=2)


class StubDataset(ImageDataset):
    """Grey photos whose brightness is their index; targets as given, None where negative."""

    def __init__(self, targets: list[int], classes: tuple[str, ...] = ("ok", "defect")) -> None:
        super().__init__()
        self.targets = targets
        self.classes = classes

    def __len__(self) -> int:
        return len(self.targets)

    def get_image_path(self, index: int) -> Path:
        return Path(f"{index}.png")

    def get_target(self, index: int) -> int | None:
        return None if self.targets[index] < 0 else self.targets[index]

    def get_image(self, index: int) -> Image.Image:
        return Image.new("RGB", (4, 4), (index, index, index))


def test_photos_are_taken_evenly_from_every_class() -> None:
    photos, titles = sample_photos(StubDataset([0] * 10 + [1] * 3), 5)
    assert titles == ["ok\n0.png", "ok\n4.png", "ok\n9.png", "defect\n10.png", "defect\n12.png"]
    assert [photo.getpixel((0, 0))[0] for photo in photos] == [0, 4, 9, 10, 12]


def test_small_or_unlabelled_sets_give_what_they_have() -> None:
    assert sample_photos(StubDataset([-1, -1], classes=()), 8)[1] == ["0.png", "1.png"]
    assert sample_photos(StubDataset([1, 0]), 1)[1] == ["ok\n1.png"]
    with pytest.raises(ValueError, match="cannot choose 3 photos from a dataset of 0"):
        sample_photos(StubDataset([]), 3)


def test_bad_input_is_named(tmp_path: Path) -> None:
    model, photo, path = BrightnessModel(), half_bright_photo(), tmp_path / "p.png"
    with pytest.raises(ValueError, match="got 0 and 1"):
        draw_patch_pca(model, [], image_size=32, path=path)
    with pytest.raises(ValueError, match="2 titles were given for 1 photos"):
        draw_patch_pca(model, [photo], image_size=32, path=path, titles=["a", "b"])
    with pytest.raises(ValueError, match="image_size 30x32 must be a multiple of the patch size 8x4"):
        draw_patch_pca(model, [photo], image_size=(30, 32), path=path)
    with pytest.raises(ValueError, match="width 3 or more, got 2"):
        patch_pca_colours(torch.zeros(1, 2, 2, 2))
    with pytest.raises(ValueError, match="NaN or infinite"):
        patch_pca_colours(torch.full((1, 2, 2, 4), float("nan")))
    assert list(tmp_path.iterdir()) == []
