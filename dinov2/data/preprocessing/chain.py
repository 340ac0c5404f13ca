"""A chain of preprocessing steps: read from YAML, checked, applied, and given back as plain values."""

import dataclasses
import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dinov2.config import ConfigError, read_yaml
from dinov2.data.preprocessing.intensity import INTENSITY_STEPS
from dinov2.data.preprocessing.region_of_interest import RegionOfInterest
from dinov2.data.preprocessing.regions import REGION_STEPS
from dinov2.data.preprocessing.step import Frame, Pixels, Step, image_fault
from dinov2.data.preprocessing.texture import TEXTURE_STEPS, Channels

STEPS: dict[str, type[Step]] = {
    step.name: step for step in (*INTENSITY_STEPS, *TEXTURE_STEPS, *REGION_STEPS, RegionOfInterest)
}

_KEY = "preprocessing"
_RGB = 3  # channels of images that no step says anything of


class PreprocessingError(ValueError):
    """A step failed on an image, or made of it what is none; the message names both."""


@dataclass(frozen=True)
class Chain:
    """Steps that are applied to an image one after the other. The same image gives the same result, wherever it runs.

    Attributes:
        steps: in their order; without any, images stay as they are.
    """

    steps: tuple[Step, ...] = ()

    @classmethod
    def parse(cls, values: Any, source: str = _KEY) -> "Chain":
        """Reads ``[{window: {low: 0.5}}, {clahe: {}}, median]``: a step by its name, with the parameters that differ.

        Args:
            values: as YAML gives them.
            source: names them in errors.

        Raises:
            ConfigError: an unknown step or parameter (with near names), a wrong type, a value out of range.
        """
        if isinstance(values, str) or not isinstance(values, Sequence):
            raise ConfigError(
                f"{source}: expected a list of steps such as [{{gamma: {{gamma: 0.8}}}}], found {values!r:.200}"
            )
        steps = tuple(_parse_step(entry, f"{source}, step {number}") for number, entry in enumerate(values, 1))
        if any(isinstance(step, Channels) for step in steps[:-1]):
            raise ConfigError(f"{source}: channels is the last step: others go before it")
        return cls(steps)

    @classmethod
    def read(cls, path: str | Path) -> "Chain":
        """Reads a YAML file that holds the list, by itself or under the key ``preprocessing``.

        Paths of calibration images are relative to the working folder.

        Raises:
            FileNotFoundError: there is no such file.
            ConfigError: as for `parse`; the message names the file.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist: expected a YAML file with a list of preprocessing steps")
        content = read_yaml(path.read_text(encoding="utf-8"), str(path))
        if isinstance(content, Mapping) and list(content) == [_KEY]:
            content = content[_KEY]
        return cls.parse(content, str(path))

    def to_values(self) -> list[dict[str, Any]]:
        """Lists, mappings and numbers with every parameter, which `parse` reads back to an equal chain."""
        return [dict(step.to_values()) for step in self.steps]

    def check_files(self) -> None:
        """Checks that all files that steps read are there.

        Raises:
            FileNotFoundError: naming the step and the file.
        """
        for number, step in enumerate(self.steps, 1):
            for path in step.files:
                if not Path(path).is_file():
                    raise FileNotFoundError(
                        f"preprocessing step {number} ({step.name}): {path} does not exist (in {Path.cwd()})"
                    )

    @property
    def num_channels(self) -> int:
        """Of the images that networks see: 3 (RGB, or grey three times) where the last step does not say another."""
        last = self.steps[-1] if self.steps else None
        return last.count if isinstance(last, Channels) else _RGB

    def check_channels(self, in_channels: int, where: str = _KEY) -> None:
        """Checks that images have as many channels as a network takes.

        Raises:
            ConfigError: naming both, and what to change.
        """
        if self.num_channels != in_channels:
            raise ConfigError(
                f"{where} gives images of {self.num_channels} channels, the network takes {in_channels} "
                f"(student.in_channels): let it end with channels: {{count: {in_channels}}}"
                + (", or leave that step out" if in_channels == _RGB else "")
            )

    @property
    def has_region(self) -> bool:
        """Whether a step says which pixels count."""
        return any(isinstance(step, RegionOfInterest) for step in self.steps)

    def region(self, name: str, size: tuple[int, int]) -> npt.NDArray[np.bool_] | None:
        """Which pixels of an image count, whatever it shows; see `RegionOfInterest`.

        Args:
            name: path of the image.
            size: height and width of the image that the chain is given.

        Returns:
            bool ``[H, W]``; None where all do.

        Raises:
            PreprocessingError: a region is of another size, or empty.
        """
        valid: npt.NDArray[np.bool_] | None = None
        for number, step in enumerate(self.steps, 1):
            if isinstance(step, RegionOfInterest):
                try:
                    kept = step.region(name, size)
                except (ValueError, OSError) as error:
                    raise PreprocessingError(f"{name}: preprocessing step {number} ({step.name}): {error}") from error
                if kept is not None:
                    valid = kept if valid is None else valid & kept
        return valid

    def __call__(self, image: Pixels, name: str = "") -> Frame:
        """Applies all steps.

        Args:
            image: uint8 or uint16, ``[H, W]`` or ``[H, W, C]``.
            name: path of the image, for errors and for steps that are for some images only; empty where there is none.

        Raises:
            PreprocessingError: a step failed, or its result has not-a-number or a shape or dtype that it must not have.
        """
        *_, (_, last) = self.trace(image, name)
        return last

    def trace(self, image: Pixels, name: str = "") -> Iterator[tuple[str, Frame]]:
        """The image before the first step (under the name ``input``), and after each, with the step's name.

        Raises:
            PreprocessingError: as for calling the chain.
        """
        shown = name or "an image"
        try:
            frame = Frame.of(image, name)
        except ValueError as error:
            raise PreprocessingError(f"{shown}: {error}") from None
        yield "input", frame
        for number, step in enumerate(self.steps, 1):
            where = f"{shown}: preprocessing step {number} ({step.name})"
            try:
                result = step.run(frame)
            # Libraries raise whatever an unusual image makes them stumble over; the cause stays in the traceback.
            except Exception as error:
                raise PreprocessingError(f"{where}: {str(error) or type(error).__name__}") from error
            fault = _result_fault(step, frame, result)
            if fault:
                raise PreprocessingError(f"{where}: {fault}")
            frame = result
            yield step.name, frame


def _parse_step(entry: Any, where: str) -> Step:
    if isinstance(entry, str):
        entry = {entry: None}
    if not isinstance(entry, Mapping) or len(entry) != 1:
        raise ConfigError(
            f"{where}: expected one name with its parameters, such as {{gamma: {{gamma: 0.8}}}}, found {entry!r:.200}"
        )
    ((name, parameters),) = entry.items()
    if name not in STEPS:
        raise ConfigError(f"{where}: unknown step {name!r:.200}{_near(name, STEPS)}")
    kind = STEPS[name]
    parameters = {} if parameters is None else parameters
    if not isinstance(parameters, Mapping):
        raise ConfigError(f"{where} ({name}): expected parameters such as {{name: value}}, found {parameters!r:.200}")
    known = [field.name for field in dataclasses.fields(kind)]
    for key in parameters:
        if key not in known:
            raise ConfigError(f"{where} ({name}): unknown parameter {key!r:.200}{_near(key, known)}")
    try:
        return kind(**parameters)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _near(name: object, known: Mapping[str, Any] | Sequence[str]) -> str:
    close = difflib.get_close_matches(str(name), list(known), n=3, cutoff=0.6)
    if close:
        return f"; did you mean {' or '.join(close)}?"
    return f"; there are {', '.join(sorted(known))}" if known else "; it has none"


def _result_fault(step: Step, before: Frame, after: Frame) -> str:
    """What is wrong with the result of a step, in a sentence; empty when it is good."""
    old, new = before.image, after.image
    fault = image_fault(new)
    if fault:
        return fault
    if new.shape[:2] != old.shape[:2] and not step.crops:
        return f"changed the size of the image from {old.shape[:2]} to {new.shape[:2]}, which it must not"
    if new.shape[2:] != old.shape[2:] and not step.changes_channels:
        return f"changed the shape of the image from {list(old.shape)} to {list(new.shape)}, which it must not"
    if new.dtype != old.dtype and not step.changes_dtype:
        return f"changed the dtype of the image from {old.dtype} to {new.dtype}, which it must not"
    maps: list[tuple[str, Pixels]] = [(f"channel {index}", found) for index, found in enumerate(after.channels)]
    if after.valid is not None:
        maps.append(("the region of interest", after.valid))
    if after.labels is not None:
        maps.append(("the mask", after.labels))
    for name, found in maps:
        if found.shape != new.shape[:2]:
            return f"{name} has the shape {list(found.shape)}, the image {list(new.shape[:2])}"
        if name.startswith("channel") and found.dtype != new.dtype:
            return f"{name} is {found.dtype}, the image {new.dtype}"
    if after.labels is not None and not np.issubdtype(after.labels.dtype, np.integer):
        return f"the mask is {after.labels.dtype}, expected whole numbers"
    return ""
