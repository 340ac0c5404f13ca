"""Which photos are meant by files, folders and patterns."""

from pathlib import Path

import pytest

from dinov2.predict.images import find_photos


def touch(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def found(root: Path, *inputs: str, output: str = "out") -> dict[str, str]:
    photos = find_photos([str(root / name) for name in inputs], root / output)
    return {photo.path.relative_to(root).as_posix(): photo.stem for photo in photos}


def test_folders_are_searched_and_keep_their_structure(tmp_path: Path) -> None:
    touch(tmp_path, "in/a.jpg", "in/b/a.PNG", "in/b/note.txt", "in/.hidden.png", "in/c.d.tif")
    assert found(tmp_path, "in") == {"in/a.jpg": "a", "in/b/a.PNG": "b/a", "in/c.d.tif": "c.d"}


def test_a_named_file_counts_whatever_its_name_and_a_pattern_picks_images(tmp_path: Path) -> None:
    touch(tmp_path, "raw.dat", "p/1.png", "p/2.jpg", "p/3.txt", "p/q/4.png", "p/[x].png")
    assert found(tmp_path, "raw.dat") == {"raw.dat": "raw"}
    assert found(tmp_path, "p/*") == {"p/1.png": "1", "p/2.jpg": "2", "p/[x].png": "[x]"}
    assert found(tmp_path, "p/**/*.png") == {"p/1.png": "1", "p/[x].png": "[x]", "p/q/4.png": "4"}
    assert found(tmp_path, "p/[x].png") == {"p/[x].png": "[x]"}  # a file, not a pattern


def test_a_photo_counts_once_and_stems_are_unique_in_any_case(tmp_path: Path) -> None:
    touch(tmp_path, "in/a.jpg", "in/a.png", "in/A.bmp", "in/a_2.gif", "other/a.jpg")
    photos = found(tmp_path, "in/a.png", "in", "in/a.jpg", "in/*", "other/a.jpg")
    assert len(photos) == 5
    assert len({stem.lower() for stem in photos.values()}) == 5
    (tmp_path / "link.jpg").symlink_to(tmp_path / "in" / "a.jpg")
    assert len(found(tmp_path, "in/a.jpg", "link.jpg")) == 1


def test_results_of_an_earlier_run_are_no_input(tmp_path: Path) -> None:
    touch(tmp_path, "in/a.jpg", "in/out/overlays/a.png")
    assert found(tmp_path, "in", output="in/out") == {"in/a.jpg": "a"}


@pytest.mark.parametrize(
    ("name", "message"),
    [("nothing.jpg", "no file, folder or pattern"), ("empty", "no photo in"), ("texts", "no photo in"),
     ("texts/*.jpg", "no photo in"), ("out", "no photo in")],
)  # fmt: skip
def test_an_input_without_photos_is_an_error_that_names_it(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    touch(tmp_path, "texts/a.txt", "good.png", "out/overlays/a.png")
    with pytest.raises(FileNotFoundError, match=message) as raised:
        found(tmp_path, "good.png", name)
    assert name in str(raised.value)
