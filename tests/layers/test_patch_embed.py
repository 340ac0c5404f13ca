"""Resampling of the position embedding: the two definitions of the sampling grid, dtypes and shapes."""

import pytest
import torch
import torch.nn.functional as F

from dinov2.layers.patch_embed import interpolate_position_embedding


def test_own_grid_returns_the_parameter_itself() -> None:
    pos_embed = torch.nn.Parameter(torch.randn(1, 7, 4))
    assert interpolate_position_embedding(pos_embed, (2, 3), (2, 3)) is pos_embed
    assert interpolate_position_embedding(pos_embed, (2, 3), (3, 2)) is not pos_embed


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("offset", [0.0, 0.1])
@pytest.mark.parametrize("new_grid", [(2, 3), (9, 4), (1, 1), (37, 16)])
def test_every_channel_is_resampled_as_an_image(antialias: bool, offset: float, new_grid: tuple[int, int]) -> None:
    pos_embed = torch.randn(1, 1 + 4 * 6, 3)
    result = interpolate_position_embedding(pos_embed, (4, 6), new_grid, antialias=antialias, offset=offset)
    assert torch.equal(result[:, :1], pos_embed[:, :1])
    image = pos_embed[0, 1:, 1].view(1, 1, 4, 6)
    if offset:
        factors = [(new_grid[0] + offset) / 4, (new_grid[1] + offset) / 6]
        expected = F.interpolate(image, scale_factor=factors, mode="bicubic", antialias=antialias)
    else:
        expected = F.interpolate(image, size=new_grid, mode="bicubic", antialias=antialias)
    torch.testing.assert_close(result[0, 1:, 1].view(new_grid), expected[0, 0])


@pytest.mark.parametrize("offset", [0.0, 0.1])
def test_a_constant_embedding_stays_constant(offset: float) -> None:
    result = interpolate_position_embedding(torch.full((1, 17, 2), 0.7), (4, 4), (7, 5), offset=offset)
    torch.testing.assert_close(result, torch.full((1, 36, 2), 0.7))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_computes_in_float32_and_keeps_the_dtype(dtype: torch.dtype) -> None:
    pos_embed = torch.randn(1, 17, 2).to(dtype)
    result = interpolate_position_embedding(pos_embed, (4, 4), (7, 5))
    assert result.dtype == dtype
    assert torch.equal(result, interpolate_position_embedding(pos_embed.float(), (4, 4), (7, 5)).to(dtype))


@pytest.mark.parametrize("old", [1, 3, 7, 14, 16, 37])
def test_the_offset_always_gives_the_size_asked_for(old: int) -> None:
    pos_embed = torch.zeros(1, 1 + old * old, 1)
    for new in range(1, 64, 3):
        for offset in (0.0, 0.1):
            result = interpolate_position_embedding(pos_embed, (old, old), (new, 1), offset=offset)
            assert result.shape == (1, 1 + new, 1)
