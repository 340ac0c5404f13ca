"""Strings in two arrays behave like the list they came from."""

import json
import pickle
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinov2.data.datasets.dense_targets import DepthReader
from dinov2.data.datasets.grouped_json import GroupedJSON
from dinov2.data.datasets.scan import CompactStrings, is_image_name
from dinov2.data.decoding import load_image
from dinov2.data.reading import UnreadableImageError

STRINGS = ["a", "", "ü/ß.png", "file\udc80", "x" * 1000, ""]


def test_equals_the_list() -> None:
    strings = CompactStrings(STRINGS)
    assert list(strings) == STRINGS
    assert len(strings) == len(STRINGS)
    assert [strings[i] for i in range(-6, 6)] == STRINGS * 2
    assert strings[1:5:2] == STRINGS[1:5:2]
    assert list(pickle.loads(pickle.dumps(strings))) == STRINGS
    assert list(CompactStrings([])) == []
    for index in (6, -7):
        with pytest.raises(IndexError, match=f"index {index} is out of range for 6 strings"):
            strings[index]


def test_arrays_round_trip_and_are_checked() -> None:
    strings = CompactStrings(STRINGS)
    assert list(CompactStrings.from_arrays(strings.bytes, strings.ends)) == STRINGS
    with pytest.raises(ValueError, match="do not fit"):
        CompactStrings.from_arrays(strings.bytes[1:], strings.ends)
    with pytest.raises(ValueError, match="not the arrays of strings"):
        CompactStrings.from_arrays(strings.bytes, strings.ends.astype(np.float64))


@pytest.mark.parametrize(
    "name", ["a.jfif", "a.JPE", "a.TIF", "a.b.webp", "a.avif", "a.jpx", "a.apng", "a.mpo", "a.pfm", "a.dib", "a.sgi"]
)
def test_every_ending_that_the_decoder_reads_is_an_image(name: str) -> None:
    assert is_image_name(name)
    assert not is_image_name(f".{name}")
    assert not any(map(is_image_name, ("a.heic", "a.eps", "a.pdf", "a.psd", "jpg", "a.jpg.txt")))


@pytest.mark.parametrize(("listed", "stored"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_with_accents_are_found_in_either_form_of_unicode(tmp_path: Path, listed: str, stored: str) -> None:
    name = "L\u00fccke/gr\u00f6\u00dfe.png"
    path = tmp_path / unicodedata.normalize(stored, name)
    path.parent.mkdir()
    Image.new("RGB", (2, 2)).save(path)
    assert load_image(tmp_path / unicodedata.normalize(listed, name)).size == (2, 2)
    np.save(path.with_suffix(".npy"), np.ones((1, 1)))
    array = (tmp_path / unicodedata.normalize(listed, name)).with_suffix(".npy")
    assert DepthReader().read(array, (1, 1)).tolist() == [[1.0]]
    row = {"img_path": unicodedata.normalize(listed, name), "group_id": 1}
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "train.json").write_text(json.dumps({"metainfo": {}, "data_list": [row]}))
    assert GroupedJSON(tmp_path, "train").missing_files() == []


def test_a_missing_file_names_one_that_differs_in_capitals_form_or_ending(tmp_path: Path) -> None:
    mixed = unicodedata.normalize("NFD", "\u00f6") + "\u00f6.png"  # neither form
    for name in ("IMG_1.JPG", mixed):
        (tmp_path / name).touch()
    with pytest.raises(UnreadableImageError, match=r"no such file; the folder has 'IMG_1.JPG', .* in capitals only"):
        load_image(tmp_path / "img_1.jpg")
    with pytest.raises(UnreadableImageError, match="differs in Unicode normalisation"):
        load_image(tmp_path / "\u00f6\u00f6.png")
    with pytest.raises(UnreadableImageError, match=r"no such file; the folder has 'IMG_1.JPG': is the ending wrong\?"):
        load_image(tmp_path / "img_1.png")
    with pytest.raises(UnreadableImageError, match=r"no such file$"):
        load_image(tmp_path / "a.png")
