"""A chain of steps: reading, giving back, what it refuses, and what it checks after each step."""

import dataclasses
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import yaml

from dinov2.data.preprocessing import STEPS, Chain, Frame, PreprocessingError, Step
from dinov2.data.preprocessing.step import Pixels

REQUIRED: dict[str, dict[str, Any]] = {
    "flat_field": {"flat": "flat.png"},
    "crop": {"height": 2, "width": 2},
    "region_of_interest": {"polygon": [[0, 0], [2, 0], [2, 2.5]]},
}


@pytest.mark.parametrize("name", STEPS)
def test_each_step_goes_to_plain_values_and_back(name: str) -> None:
    chain = Chain.parse([{name: REQUIRED.get(name)}])
    values = chain.to_values()
    assert set(values[0][name]) == {field.name for field in dataclasses.fields(STEPS[name])}
    assert Chain.parse(yaml.safe_load(yaml.safe_dump(values))) == chain


@pytest.mark.parametrize("name", STEPS)
def test_each_step_says_what_it_does_and_what_its_parameters_mean(name: str) -> None:
    assert inspect.getdoc(STEPS[name])
    for field in dataclasses.fields(STEPS[name]):
        assert field.metadata["help"], f"{name}.{field.name}"


def test_a_chain_is_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "chain.yaml"
    text = "- window: {low: 1, high: 99}\n- clahe:\n- median\n"
    path.write_text(text)
    chain = Chain.read(path)
    assert [step.name for step in chain.steps] == ["window", "clahe", "median"]
    assert chain.to_values()[0] == {"window": {"low": 1.0, "high": 99.0, "by": "percent", "bits": 0}}
    path.write_text("preprocessing:\n" + text)
    assert Chain.read(path) == chain
    assert Chain.parse([]) == Chain()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"window": {}}, "expected a list of steps"),
        ("window", "expected a list of steps"),
        (None, "expected a list of steps"),
        ([{"windw": {}}], "x, step 1: unknown step 'windw'; did you mean window"),
        ([{"zzzzzz": {}}], "unknown step 'zzzzzz'; there are .*clahe, "),
        (["clahe", {"clahe": {"cliplimit": 2}}], "x, step 2 .clahe.: unknown .* 'cliplimit'; did you mean clip_limit"),
        ([{"clahe": {"clip_limit": 0}}], "x, step 1: clahe.clip_limit: must be greater than 0, found 0"),
        ([{"clahe": {"clip_limit": "much"}}], "clahe.clip_limit: expected a number, found 'much'"),
        ([{"clahe": {"clip_limit": float("nan")}}], "clahe.clip_limit: must be finite"),
        ([{"clahe": 2}], r"step 1 \(clahe\): expected parameters such as"),
        ([{"clahe": {}, "median": {}}], "expected one name with its parameters"),
        ([7], "expected one name with its parameters"),
        ([{"window": {"low": 5, "high": 5}}], "window.low must lie below window.high"),
        ([{"window": {"high": 4000}}], "at most 100 per cent, found 4000.0; for values: by: value"),
        ([{"window": {"by": "percentile"}}], "'percentile' is not one of percent, value"),
        ([{"window": {"bits": 12}}], "expected 0 or 8 or 16, found 12"),
        ([{"median": {"size": 4}}], "median.size must be odd, found 4"),
        (["flat_field"], "flat_field.flat must name the calibration image"),
    ],
)  # fmt: skip
def test_what_is_no_chain(values: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Chain.parse(values, "x")


def test_a_file_that_is_missing_or_no_yaml(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"chain\.yaml does not exist"):
        Chain.read(tmp_path / "chain.yaml")
    (tmp_path / "chain.yaml").write_text("- [")
    with pytest.raises(ValueError, match=r"chain\.yaml, line .*not valid YAML"):
        Chain.read(tmp_path / "chain.yaml")


@dataclass(frozen=True)
class Faulty(Step):
    """Gives what it is told to."""

    name: ClassVar[str] = "faulty"


IMAGE = np.arange(20, dtype=np.uint8).reshape(4, 5)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (np.full((4, 5), np.nan), "20 of 20 values are not-a-number or infinite"),
        (np.full((4, 5), np.inf, np.float32), "not-a-number or infinite"),
        (IMAGE / 20, "values must be uint8 or uint16, found float64"),
        (IMAGE[:3], r"changed the size of the image from \(4, 5\) to \(3, 5\)"),
        (IMAGE[..., None], r"changed the shape of the image from \[4, 5\] to \[4, 5, 1\]"),
        (IMAGE.astype(np.uint16), "changed the dtype of the image from uint8 to uint16"),
        (IMAGE[:0], "not empty"),
        (RuntimeError("no luck"), "no luck"),
    ],
)
def test_a_bad_result_names_the_step_and_the_image(monkeypatch: pytest.MonkeyPatch, result: Any, message: str) -> None:
    def apply(step: Step, image: Pixels) -> Pixels:
        if isinstance(result, Exception):
            raise result
        found: Pixels = result
        return found

    monkeypatch.setattr(Faulty, "apply", apply)
    with pytest.raises(PreprocessingError, match=rf"^a\.png: preprocessing step 2 \(faulty\): .*{message}"):
        Chain((*Chain.parse(["gamma"]).steps, Faulty()))(IMAGE, "a.png")


@pytest.mark.parametrize(
    "maps", [{"labels": np.zeros((4, 4), np.int32)}, {"channels": (IMAGE[:3],)}, {"channels": (IMAGE / 2,)}]
)
def test_maps_must_fit_the_image(monkeypatch: pytest.MonkeyPatch, maps: dict[str, Any]) -> None:
    monkeypatch.setattr(Faulty, "run", lambda step, frame: dataclasses.replace(frame, **maps))
    with pytest.raises(PreprocessingError, match=r"step 1 \(faulty\): (the mask|channel 0) "):
        Chain((Faulty(),))(IMAGE)


@pytest.mark.parametrize("image", [IMAGE / 20, IMAGE.astype(np.int16), IMAGE[None, None], IMAGE[:0]])
def test_what_is_no_image(image: Any) -> None:
    with pytest.raises(PreprocessingError, match=r"^b\.tif: "):
        Chain()(image, "b.tif")


def test_the_way_back_to_the_image() -> None:
    frame = Frame(IMAGE[1:3, 2:5], origin=(1, 2), full_size=(4, 5))
    assert frame.to_image_points([[0, 0], [2, 1]]).tolist() == [[2, 1], [4, 2]]
    whole = frame.to_image_map(frame.image, fill=99)
    assert (whole[1:3, 2:5] == IMAGE[1:3, 2:5]).all()
    assert (whole == 99).sum() == 20 - 6
    with pytest.raises(ValueError, match="does not fit"):
        frame.to_image_map(IMAGE)


@pytest.mark.parametrize("level", [0, 77, 255])
@pytest.mark.parametrize("name", [name for name in STEPS if name != "flat_field"])
def test_constant_images_are_no_trouble(name: str, level: int) -> None:
    """A step gives an image, or says that it needs a region; nothing warns, and nothing is not-a-number."""
    needs_regions = {"morphology", "clean_mask", "watershed", "use_mask", "crop_to_regions", "geodesic_contour"}
    chain = Chain.parse([*(["otsu"] if name in needs_regions else []), {name: REQUIRED.get(name)}])
    for image in (np.full((24, 24), level, np.uint8), np.full((24, 24, 3), level * 257, np.uint16)):
        assert chain(image, "a.png").image.size
