"""The command that draws pictures of features, on a set on disk."""

from pathlib import Path

import pytest
from eval_command_sets import TINY, dataset_strings, make_parts
from PIL import Image

from dinov2.eval.visualize import FILES, main, picture_paths


def test_all_pictures_of_a_set_are_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, val = dataset_strings(make_parts(tmp_path / "parts"))
    words = ["--dataset", val, "--num-images", "2", "--num-workers", "0", "--num-neighbours", "3"]
    assert main([*TINY, *words, "--output", str(tmp_path / "all")]) == 0
    printed = capsys.readouterr().out.split("\n")
    assert printed == [*(str(tmp_path / "all" / name) for name in FILES.values()), ""]
    for name in FILES.values():
        with Image.open(tmp_path / "all" / name) as picture:
            assert min(picture.size) > 200
    more = ["--kinds", "neighbours", "map", "--bank-dataset", train, "--map-level", "part", "--map-method", "tsne"]
    assert main([*TINY, *words, *more, "--no-other-parts", "--output", str(tmp_path / "some")]) == 0
    assert sorted(path.name for path in (tmp_path / "some").iterdir()) == ["neighbours.png", "part_map.png"]
    bank = (tmp_path / "some" / "neighbours.png").read_bytes()
    assert bank != (tmp_path / "all" / "neighbours.png").read_bytes()


def test_one_file_holds_the_components_or_what_is_asked_for(tmp_path: Path) -> None:
    _, val = dataset_strings(make_parts(tmp_path / "parts"))
    words = [*TINY, "--dataset", val, "--num-images", "2", "--image-size", "42"]
    assert main([*words, "--output", str(tmp_path / "plots" / "patch_pca.png")]) == 0
    assert [path.name for path in (tmp_path / "plots").iterdir()] == ["patch_pca.png"]
    assert main([*words, "--kinds", "attention", "--output", str(tmp_path / "attention.png")]) == 0
    assert (tmp_path / "attention.png").read_bytes() != (tmp_path / "plots" / "patch_pca.png").read_bytes()
    with pytest.raises(ValueError, match=r"a\.png can hold one picture, not pca and map: give a folder"):
        main([*words, "--kinds", "pca", "map", "--output", "a.png"])


def test_files_follow_the_kinds() -> None:
    assert picture_paths(Path("x.PNG"), ()) == {"pca": Path("x.PNG")}
    assert picture_paths(Path("x.png"), ("map", "map")) == {"map": Path("x.png")}
    assert list(picture_paths(Path("x"), ("map", "pca"))) == ["pca", "map"]
    assert picture_paths(Path("x"), ()) == {kind: Path("x") / name for kind, name in FILES.items()}


def test_wrong_options_are_named(tmp_path: Path) -> None:
    _, val = dataset_strings(make_parts(tmp_path / "parts"))
    with pytest.raises(ValueError, match=r"evaluation\.image_size=30 is not divisible by student\.patch_size=14"):
        main([*TINY, "--dataset", val, "--image-size", "30", "--output", str(tmp_path / "x.png")])
    with pytest.raises(SystemExit):
        main(["--dataset", val, "--kinds", "umap"])
