"""A chain applied to a folder: what is written, resuming, what is refused, and the preview."""

import csv
import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image

from dinov2.data.decoding import decode_levels
from dinov2.data.preprocessing import Chain
from dinov2.data.preprocessing.folder import draw_preview, preprocess_folder
from dinov2.utils.errors import RunError
from tools.draw_preprocessing_examples import draw_examples

CHAIN = Chain.parse([{"gamma": {"gamma": 0.5}}, "otsu", {"crop": {"top": 2, "left": 4, "height": 16, "width": 20}}])


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """An image of 8 bits in colours, and one of 16 bits in a subfolder."""
    root = tmp_path / "raw"
    (root / "b").mkdir(parents=True)
    grey = np.full((20, 30), 5000, np.uint16)
    grey[8:12, 10:20] = 40_000
    Image.fromarray(grey).save(root / "b" / "deep.tif")
    colours = np.dstack([grey // 257, grey // 300, grey // 400]).astype(np.uint8)
    Image.fromarray(colours).save(root / "flat.png")
    (root / "notes.txt").write_text("no image")
    return root


def load(path: Path) -> Any:
    return decode_levels(path.read_bytes(), str(path))


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_what_is_written(images: Path, tmp_path: Path, num_workers: int) -> None:
    output = tmp_path / "out"
    assert preprocess_folder(images, output, CHAIN, num_workers=num_workers) == 2
    for name, target in (("flat.png", "flat.png"), ("b/deep.tif", "b/deep.png")):
        frame = CHAIN(load(images / name))
        assert load(output / "images" / target).dtype == frame.image.dtype
        assert (load(output / "images" / target) == frame.image).all()
        assert (load(output / "masks" / target) == np.where(frame.labels, 255, 0)).all()
    with (output / "regions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["image"], row["area"], row["top"], row["left"]) for row in rows] == [
        ("b/deep.tif", "40", "8", "10"),
        ("flat.png", "40", "8", "10"),
    ]
    provenance = json.loads((output / "provenance.json").read_text())
    assert Chain.parse(provenance["preprocessing"]) == CHAIN
    assert "scikit-image" in provenance["versions"]
    record = json.loads((output / "images.jsonl").read_text().splitlines()[0])
    assert (record["origin"], record["full_size"]) == ([2, 4], [20, 30])


def test_it_goes_on_where_it_ended(images: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    preprocess_folder(images, output, CHAIN)
    assert preprocess_folder(images, output, CHAIN) == 0
    rows = (output / "images.jsonl").read_text()
    (output / "images.jsonl").write_text(rows[:-30])  # killed while it wrote
    assert preprocess_folder(images, output, CHAIN) == 1
    (output / "images" / "flat.png").unlink()
    assert preprocess_folder(images, output, CHAIN) == 1
    os.utime(images / "flat.png", ns=(1, 1))
    assert preprocess_folder(images, output, CHAIN) == 1
    assert len((output / "regions.csv").read_text().splitlines()) == 3
    with pytest.raises(ValueError, match="results of another preprocessing "):
        preprocess_folder(images, output, Chain.parse(["median"]))


def test_an_image_that_fails_stops_no_other(images: Path, tmp_path: Path) -> None:
    (images / "a.png").write_bytes(b"no image")
    Image.new("L", (5, 5)).save(images / "small.png")
    with pytest.raises(
        RunError, match=r"2 of 4 images failed[^$]*a\.png[^$]*small\.png: preprocessing step 3 \(crop\)"
    ):
        preprocess_folder(images, tmp_path / "out", CHAIN)
    assert (tmp_path / "out" / "images" / "flat.png").is_file()


def test_folders_that_do_not_do(images: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lies in the input"):
        preprocess_folder(images, images / "out", CHAIN)
    with pytest.raises(ValueError, match="was not written by this command"):
        preprocess_folder(images / "b", images, CHAIN)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty holds no image"):
        preprocess_folder(tmp_path / "empty", tmp_path / "out", CHAIN)


def test_many_channels_become_tiff_and_names_do_not_collide(images: Path, tmp_path: Path) -> None:
    Image.new("L", (30, 20)).save(images / "flat.bmp")
    output = tmp_path / "out"
    preprocess_folder(images, output, Chain.parse([{"lbp": {"output": "append"}}]))
    assert tifffile.imread(output / "images" / "flat.png.tif").shape == (20, 30, 4)
    assert tifffile.imread(output / "images" / "flat.bmp.tif").shape == (20, 30, 2)
    assert not (output / "masks").exists()
    assert not (output / "regions.csv").exists()


def test_the_preview_and_the_command(
    images: Path, tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "chain.yaml").write_text("- window: {low: 1, high: 99}\n- otsu\n")
    words = ["--input", images, "--output", tmp_path / "out", "--preprocessing", tmp_path / "chain.yaml"]
    for extra in (["--preview", "2"], ["--range", "0,40000"]):
        monkeypatch.setattr(sys, "argv", ["preprocess_images.py", *map(str, words), *extra])
        assert runpy.run_path(str(repository / "tools" / "preprocess_images.py"))["main"]() == 0
    sheet = cv2.imread(str(tmp_path / "out" / "preview.png"))
    assert sheet is not None
    assert sheet.shape[:2] == (2 * (256 + 16 + 4), 3 * (256 + 4))
    assert load(tmp_path / "out" / "images" / "b" / "deep.png").max() == 65535
    draw_preview(images, tmp_path / "one.png", Chain(), count=1)
    assert (tmp_path / "one.png").is_file()


def test_the_examples_of_the_documentation_are_drawn(tmp_path: Path, repository: Path) -> None:
    for path in draw_examples(tmp_path):
        shown = repository / "docs" / "images" / path.name
        with Image.open(path) as drawn, Image.open(shown) as known:
            assert drawn.size == known.size, "draw docs/images anew: tools/draw_preprocessing_examples.py"
