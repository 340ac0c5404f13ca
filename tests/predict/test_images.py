"""The command for images, and the files it writes."""

import csv
import logging
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dinov2.predict import images as infer_images
from dinov2.predict.images import find_inputs, main
from dinov2.predict.predictor import Predictor
from dinov2.tasks.package import TaskPackage, load_task_package
from dinov2.tasks.predictions import DepthPrediction, SaveOptions
from dinov2.utils.errors import RunError
from dinov2.utils.untrusted_text import from_table_cell, table_cell
from tests.predict.conftest import lines_of, read
from tests.tasks.predictor_stand_ins import (
    BLUE,
    COLOUR_CLASSES,
    GREEN,
    GREY,
    RED,
    ColourModel,
    halves,
    make_package,
    plain_image,
    write_package,
)


def save(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "predictions.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def run(folder: Path, weights: str, *inputs: Path | str, flags: tuple[str, ...] = ()) -> Path:
    out = folder / "out"
    words = ["--weights", weights, "--input", *map(str, inputs), "--output-dir", str(out), "--device", "cpu", *flags]
    assert main(words) == 0
    return out


def test_masks_overlays_and_tables_agree(tmp_path: Path, packages: dict[str, TaskPackage]) -> None:
    images = {"a": halves(40, 60), "sub/b": halves(30, 330, BLUE, GREEN), "c": plain_image(1, 1, RED)}
    for stem, image in images.items():
        save(tmp_path / "in" / f"{stem}.png", image)
    out = run(tmp_path, "masks.pth", tmp_path / "in", flags=("--defect-maps", "--batch-size", "2"))
    predictor = Predictor.of(packages["masks.pth"])
    lines = {line["image"]: line for line in lines_of(out / "predictions.jsonl")}
    rows = {row["image"]: row for row in rows_of(out)}
    assert len(lines) == len(rows) == 3
    for stem, image in images.items():
        (expected,) = predictor.predict([image])
        name = str(tmp_path / "in" / f"{stem}.png")
        line, row = lines[name], rows[name]
        mask = read(out / line["mask"])
        assert mask.dtype == np.uint8
        np.testing.assert_array_equal(mask, expected.labels)
        np.testing.assert_allclose(read(out / line["defect"]) / 65_535, expected.defect, atol=1e-5)
        for index, label in enumerate(COLOUR_CLASSES):
            assert line["pixels"].get(label, 0) == int(row[f"pixels {label}"]) == (mask == index).sum()
        assert read(out / line["overlay"]).ndim == 3
        assert line["overlay"] == f"overlays/{stem}.png"


def test_classes_are_written_as_probabilities(tmp_path: Path, packages: dict[str, TaskPackage]) -> None:
    for name, colour in (("r", RED), ("g", GREEN), ("x", GREY)):
        save(tmp_path / f"{name}.png", plain_image(20, 20, colour))
    out = run(tmp_path, "classes.pth", tmp_path / "*.png", flags=("--no-overlay", "--flips"))
    assert [(Path(line["image"]).stem, line["label"]) for line in lines_of(out / "predictions.jsonl")] == [
        ("g", "green"), ("r", "red"), ("x", "grey"),
    ]  # fmt: skip
    for line, row in zip(lines_of(out / "predictions.jsonl"), rows_of(out), strict=True):
        assert sum(line["probabilities"].values()) == pytest.approx(1, abs=1e-4)
        assert float(row["score"]) == line["score"] == max(line["probabilities"].values())
    assert {path.name for path in out.iterdir()} == {"predictions.jsonl", "predictions.csv", "log"}


def test_depth_is_written_exactly_and_as_sixteen_bits(tmp_path: Path, packages: dict[str, TaskPackage]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    save(tmp_path / "a.png", image)
    out = run(tmp_path, "depth.pth", tmp_path / "a.png", flags=("--depth-step", "0.001", "--depth-range", "1", "2"))
    (expected,) = Predictor.of(packages["depth.pth"]).predict([image])
    (line,) = lines_of(out / "predictions.jsonl")
    exact = np.load(out / line["depth"])
    np.testing.assert_array_equal(exact, expected.depth)
    np.testing.assert_allclose(read(out / line["depth_image"]) * line["depth_step"], exact, atol=0.00051)
    assert (line["unit"], line["max"]) == ("mm", pytest.approx(exact.max(), rel=1e-5))


def test_sixteen_bits_say_what_does_not_fit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    depth = np.array([[np.nan, 0.5, 300.0, -1.0, np.inf]], dtype=np.float32)
    options = SaveOptions()
    written = DepthPrediction(depth).save(tmp_path, "a", options)
    DepthPrediction(depth).save(tmp_path, "b", options)
    assert read(tmp_path / written["depth_image"]).tolist() == [[0, 128, 65_535, 0, 65_535]]
    np.testing.assert_array_equal(np.load(tmp_path / written["depth"]), depth)
    assert [record.getMessage().rpartition(", such as ")[2] for record in caplog.records] == ["0.015625"]
    with pytest.raises(ValueError, match="depth_step must be above 0"):
        SaveOptions(value_step=0)


def test_unreadable_images_are_skipped_counted_and_named(
    tmp_path: Path, packages: dict[str, TaskPackage], capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "in" / "b.png", halves(20, 20))
    whole = (tmp_path / "in" / "b.png").read_bytes()
    (tmp_path / "in" / "a.png").write_bytes(b"no image")
    (tmp_path / "in" / "c.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "in" / "d.png").write_bytes(b"")
    save(tmp_path / "in" / "e.png", halves(20, 20))
    out = run(tmp_path, "masks.pth", tmp_path / "in")
    lines = lines_of(out / "predictions.jsonl")
    assert [Path(line["image"]).name for line in lines] == ["a.png", "b.png", "c.png", "d.png", "e.png"]
    assert ["error" in line for line in lines] == [True, False, True, True, False]
    assert all(line["image"] in line["error"] for line in lines if "error" in line)
    assert len(rows_of(out)) == 2
    told = capsys.readouterr().err
    assert "skipped 3 of 5 images that could not be read" in told
    assert f"skipped: cannot read image {tmp_path / 'in' / 'a.png'}" in told
    assert "images: 5 of 5" in told


def test_an_image_too_thin_to_prepare_is_skipped(tmp_path: Path, packages: dict[str, TaskPackage]) -> None:
    packages["masks.pth"] = make_package(ColourModel(), image_size=512, resize="shorter_side")
    save(tmp_path / "thin.png", plain_image(1, 20_000, RED))
    save(tmp_path / "good.png", plain_image(600, 600, RED))
    out = run(tmp_path, "masks.pth", tmp_path / "*.png", flags=("--no-overlay",))
    good, thin = lines_of(out / "predictions.jsonl")
    assert "error" not in good
    assert f"{tmp_path / 'thin.png'}: an image of 1 x 20000 pixels" in thin["error"]


@pytest.mark.parametrize("name", ["=1+1.png", "-2+3.png", "a\nb.png", "a\x1b[2Jb.png", "a\udcffb.png"])
def test_no_name_of_a_file_is_computed_or_steers_a_terminal(
    tmp_path: Path, packages: dict[str, TaskPackage], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    save(tmp_path / "in" / "sound.png", plain_image(20, 20, RED))
    (tmp_path / "in" / "sound.png").rename(tmp_path / "in" / name)
    (tmp_path / "in" / f"broken{name}").write_bytes(b"no image")
    monkeypatch.chdir(tmp_path / "in")
    out = run(tmp_path, "classes.pth", "*.png", flags=("--no-overlay",))
    assert {line["image"] for line in lines_of(out / "predictions.jsonl")} == {name, f"broken{name}"}
    (row,) = rows_of(out)
    assert row["image"] == table_cell(name)
    assert from_table_cell(row["image"]) == name
    assert "\x1b" not in (out / "log" / "log.txt").read_text()


def test_when_nothing_can_be_read_the_job_was_not_done(tmp_path: Path, packages: dict[str, TaskPackage]) -> None:
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(RunError, match="none of the 1 images could be read"):
        run(tmp_path, "masks.pth", tmp_path / "a.png")
    assert (tmp_path / "out" / "predictions.csv").read_text() == "image\n", "a table of nothing is a table"
    with pytest.raises(FileNotFoundError, match="no image in"):
        run(tmp_path, "masks.pth", tmp_path / "out")


def test_images_that_fill_the_memory_are_taken_one_by_one(
    tmp_path: Path, packages: dict[str, TaskPackage], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = [(10, 10), (10, 10), (40, 40), (10, 10), (10, 10), (10, 10)]
    for number, size in enumerate(sizes):
        save(tmp_path / f"{number}.png", plain_image(*size, RED))
    monkeypatch.setattr(infer_images, "_MAX_PIXELS", 300)
    run(tmp_path, "masks.pth", tmp_path / "*.png", flags=("--batch-size", "8"))
    model = packages["masks.pth"].model
    assert [shape[0] for shape in model.batches] == [2, 1, 3]


@pytest.mark.parametrize(
    ("flags", "message"),
    [(("--depth-range", "1"), "--depth-range takes"), (("--depth-range", "2", "1"), "--depth-range takes"),
     (("--batch-size", "0"), "batch_size must be at least 1, found 0"), (("--depth-step", "0"), "depth_step"),
     (("--scales", "-1"), "scales must be")],
)  # fmt: skip
def test_wrong_options_are_said(
    flags: tuple[str, ...], message: str, tmp_path: Path, packages: dict[str, TaskPackage]
) -> None:
    save(tmp_path / "a.png", halves(20, 20))
    with pytest.raises(ValueError, match=message):
        run(tmp_path, "masks.pth", tmp_path / "a.png", flags=flags)


def test_a_part_model_is_pointed_out(
    tmp_path: Path, packages: dict[str, TaskPackage], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Parts(ColourModel):
        def forward(self, images: Any) -> Any:
            return super().forward(images[:, 0])

    packages["masks.pth"] = make_package(Parts(dense=False), "classification", "head.per_part=true")
    save(tmp_path / "a.png", plain_image(20, 20, RED))
    records: list[str] = []
    monkeypatch.setattr(logging.getLogger("dinov2"), "warning", lambda *words: records.append(words[0]))
    out = run(tmp_path, "masks.pth", tmp_path / "a.png")
    assert "every image is a part of its own" in records[0]
    assert lines_of(out / "predictions.jsonl")[0]["label"] == "red"


def test_a_trained_file_gives_what_the_predictor_gives(tmp_path: Path) -> None:
    weights = write_package(tmp_path / "best.pth", "segmentation")
    image = halves(50, 70, GREY, RED)
    save(tmp_path / "a.png", image)
    out = run(tmp_path, str(weights), tmp_path / "a.png", flags=("--scales", "1", "0.5"))
    (expected,) = Predictor.of(load_task_package(weights), scales=(1.0, 0.5)).predict([image])
    (line,) = lines_of(out / "predictions.jsonl")
    np.testing.assert_array_equal(read(out / line["mask"]), expected.labels)
    assert len(line["pixels"]) > 1  # a model that always says the same would prove little


def touch(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def found(root: Path, *inputs: str, output: str = "out") -> dict[str, str]:
    images = find_inputs([str(root / name) for name in inputs], root / output)
    return {image.path.relative_to(root).as_posix(): image.stem for image in images}


def test_folders_are_searched_keep_their_structure_and_results_of_an_earlier_run_are_no_input(tmp_path: Path) -> None:
    touch(tmp_path, "in/a.jpg", "in/b/a.PNG", "in/b/note.txt", "in/.hidden.png", "in/c.d.tif")
    expected = {"in/a.jpg": "a", "in/b/a.PNG": "b/a", "in/c.d.tif": "c.d"}
    assert found(tmp_path, "in") == expected
    touch(tmp_path, "in/out/overlays/a.png")
    assert found(tmp_path, "in", output="in/out") == expected


def test_a_named_file_counts_whatever_its_name_and_a_pattern_picks_images(tmp_path: Path) -> None:
    touch(tmp_path, "raw.dat", "p/1.png", "p/2.jpg", "p/3.txt", "p/q/4.png", "p/[x].png")
    assert found(tmp_path, "raw.dat") == {"raw.dat": "raw"}
    assert found(tmp_path, "p/*") == {"p/1.png": "1", "p/2.jpg": "2", "p/[x].png": "[x]"}
    assert found(tmp_path, "p/**/*.png") == {"p/1.png": "1", "p/[x].png": "[x]", "p/q/4.png": "4"}
    assert found(tmp_path, "p/[x].png") == {"p/[x].png": "[x]"}  # a file, not a pattern


def test_system_folders_hold_no_input_and_what_is_left_out_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / unicodedata.normalize("NFD", "Pr\u00fcfung")
    for name in ("a.JFIF", "@eaDir/a.jpg/THUMB.jpg", "sub/._b.png", "sub/b.png", "c.heic"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    typed = tmp_path / "Pr\u00fcfung"
    for wanted in (str(typed), f"{folder}/**/*"):
        found = find_inputs([wanted], tmp_path / "out")
        assert [file.path.name for file in found] == ["a.JFIF", "b.png"]
    assert caplog.text.count("left out, as no images that can be read: 1 .heic, 1 folders of the system (@eaDir)") == 2
    assert [file.path.name for file in find_inputs([f"{folder}/@eaDir/*/*.jpg"], tmp_path / "out")] == ["THUMB.jpg"]


def test_an_image_counts_once_and_stems_are_unique_in_any_case(tmp_path: Path) -> None:
    touch(tmp_path, "in/a.jpg", "in/a.png", "in/A.bmp", "in/a_2.gif", "other/a.jpg")
    images = found(tmp_path, "in/a.png", "in", "in/a.jpg", "in/*", "other/a.jpg")
    assert len(images) == 5
    assert len({stem.lower() for stem in images.values()}) == 5
    (tmp_path / "link.jpg").symlink_to(tmp_path / "in" / "a.jpg")
    assert len(found(tmp_path, "in/a.jpg", "link.jpg")) == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [("nothing.jpg", "no file, folder or pattern"), ("empty", "no image in"), ("texts", "no image in"),
     ("texts/*.jpg", "no image in"), ("out", "no image in")],
)  # fmt: skip
def test_an_input_without_images_is_an_error_that_names_it(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    touch(tmp_path, "texts/a.txt", "good.png", "out/overlays/a.png")
    with pytest.raises(FileNotFoundError, match=message) as raised:
        found(tmp_path, "good.png", name)
    assert name in str(raised.value)
