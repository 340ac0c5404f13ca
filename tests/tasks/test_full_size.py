"""Resizing in bands is resizing at once."""

import pytest
import torch
import torch.nn.functional as F

from dinov2.tasks.task import full_size_bands


@pytest.mark.parametrize("size", [(16, 12), (40, 33), (17, 100), (16, 12000), (100, 12)])
@pytest.mark.parametrize("numbers_at_once", [1, 500, 2**26])
def test_enlarging_in_bands_is_bilinear(size: tuple[int, int], numbers_at_once: int) -> None:
    maps = torch.rand(3, 16, 12, generator=torch.Generator().manual_seed(0))
    bands = list(full_size_bands(maps, size, numbers_at_once=numbers_at_once))
    expected = F.interpolate(maps[None], size, mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(torch.cat(bands, dim=1), expected, atol=1e-5, rtol=1e-5)
    assert all(band.numel() <= max(numbers_at_once, 3 * size[1]) for band in bands)


def test_what_gets_smaller_is_averaged() -> None:
    maps = torch.rand(2, 64, 64, generator=torch.Generator().manual_seed(0))
    (one,) = full_size_bands(maps, (1, 1))
    assert one.shape == (2, 1, 1)
    expected = F.interpolate(maps[None], (1, 1), mode="bilinear", antialias=True)[0]
    torch.testing.assert_close(one, expected)
    assert (one - maps.mean(dim=(1, 2), keepdim=True)).abs().max() < 0.05  # a single pixel would be off by up to 0.5
    mixed = torch.cat(list(full_size_bands(maps, (8, 200))), dim=1)
    shrunk = F.interpolate(maps[None], (8, 64), mode="bilinear", antialias=True)
    torch.testing.assert_close(mixed, F.interpolate(shrunk, (8, 200), mode="bilinear")[0], atol=1e-5, rtol=1e-5)
