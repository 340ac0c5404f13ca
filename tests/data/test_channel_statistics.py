"""Normalisation that is estimated from a set, against NumPy over all pixels at once."""

import runpy
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml
from PIL import Image

from dinov2.data.channel_statistics import estimate_normalization
from dinov2.data.loaders import make_dataset
from dinov2.data.preprocessing import Chain

APPEND = Chain.parse([{"gamma": {"gamma": 0.7}}, {"sobel": {"output": "append"}}])


@pytest.mark.parametrize("chain", [Chain(), APPEND], ids=["as they are", "two channels"])
def test_mean_and_deviation_are_those_of_all_pixels(tmp_path: Path, chain: Chain) -> None:
    rng, images = np.random.default_rng(0), []
    for number in range(5):
        images.append(rng.integers(0, 40_000, (8 + number, 9)).astype(np.uint16))
        cv2.imwrite(str(tmp_path / f"{number}.png"), images[-1])
    dataset = make_dataset(dataset_str=f"ImageFolder:root={tmp_path}:labels=none", preprocessing=chain)
    found = estimate_normalization(dataset)
    stacked = [np.atleast_3d(chain(image).stacked) for image in images]
    pixels = np.concatenate([image.reshape(-1, image.shape[2]) for image in stacked]) / 65535
    np.testing.assert_allclose(found.mean, pixels.mean(axis=0), rtol=1e-9)
    np.testing.assert_allclose(found.std, pixels.std(axis=0), rtol=1e-9)
    assert found.num_images == 5
    assert estimate_normalization(dataset, 2).num_images == 2


def test_the_tool_prints_yaml_and_mixed_channels_are_refused(
    tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("L", (4, 4), 51).save(tmp_path / "a.png")
    dataset = f"ImageFolder:root={tmp_path}:labels=none"
    (tmp_path / "grey.yaml").write_text("[{channels: {count: 1}}]")
    words = ["--dataset", dataset, "--preprocessing", str(tmp_path / "grey.yaml")]
    monkeypatch.setattr(sys, "argv", ["estimate_normalization.py", *words])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(repository / "tools" / "estimate_normalization.py"), run_name="__main__")
    assert not ended.value.code
    printed = yaml.safe_load(capsys.readouterr().out)
    assert (printed["mean"], printed["std"], printed["num_images"]) == ([0.2], [0.0], 1)
    assert printed["expected_mean"] == [0.449]
    Image.new("RGB", (4, 4)).save(tmp_path / "b.png")
    with pytest.raises(ValueError, match=r"b\.png has 3 channels, those before 1"):
        estimate_normalization(make_dataset(dataset_str=dataset))
