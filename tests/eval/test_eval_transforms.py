import numpy as np
import pytest
import torch
from PIL import Image

from dinov2.data.transforms import make_classification_eval_transform
from dinov2.eval.features import make_eval_transform


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def framed(width: int, height: int, border: int) -> Image.Image:
    """A grey image with a red border."""
    pixels = np.full((height, width, 3), 128, dtype=np.uint8)
    for edge in (np.s_[:border], np.s_[-border:], np.s_[:, :border], np.s_[:, -border:]):
        pixels[edge] = (255, 0, 0)
    return Image.fromarray(pixels)


def test_default_is_the_published_transform() -> None:
    image = noise(300, 260)
    assert torch.equal(make_eval_transform()(image), make_classification_eval_transform()(image))


@pytest.mark.parametrize("image_size", [28, 224, (42, 70), (70, 42)])
@pytest.mark.parametrize("whole_image", [False, True])
@pytest.mark.parametrize("shape", [(300, 200), (200, 300), (20, 20)])
def test_size_of_the_result(image_size: int | tuple[int, int], whole_image: bool, shape: tuple[int, int]) -> None:
    result = make_eval_transform(image_size, whole_image=whole_image)(noise(*shape))
    expected = (image_size, image_size) if isinstance(image_size, int) else image_size
    assert tuple(result.shape) == (3, *expected)
    assert result.dtype == torch.float32


@pytest.mark.parametrize("image_size", [56, (56, 84)])
def test_whole_image_shows_the_border_and_a_crop_does_not(image_size: int | tuple[int, int]) -> None:
    image = framed(448, 448, border=14)
    whole = make_eval_transform(image_size, whole_image=True)(image)
    cropped = make_eval_transform(image_size)(image)
    for edge in (whole[:, 0], whole[:, -1], whole[:, :, 0], whole[:, :, -1]):
        assert (edge[0] > 2).all()  # red, normalised
    assert cropped[0].max() < 0.5


def test_a_crop_that_is_not_square_keeps_the_shape_of_things() -> None:
    pixels = np.zeros((400, 400, 3), dtype=np.uint8)
    pixels[150:250, 150:250] = 255  # a square
    white = make_eval_transform((100, 200))(Image.fromarray(pixels))[0] > 0.5
    assert abs(int(white.any(dim=1).sum()) - int(white.any(dim=0).sum())) <= 1


@pytest.mark.parametrize("image_size", [0, (14, -1)])
def test_bad_size(image_size: int | tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="image_size must be at least 1"):
        make_eval_transform(image_size)
