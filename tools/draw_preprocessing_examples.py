"""Draws the pictures of docs/preprocessing.md: synthetic images of three kinds, before and after the steps for them."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from dinov2.config.command_line import option, parse
from dinov2.data.preprocessing import Chain
from dinov2.data.preprocessing.folder import draw_preview
from dinov2.run.launch import exit_with

CHAINS = Path(__file__).parents[1] / "configs" / "preprocessing"
SIDE = 256

Grey = npt.NDArray[np.float64]
Levels = npt.NDArray[Any]


@dataclass(frozen=True)
class ExampleOptions:
    """Options of the command."""

    output: Path = option(Path("docs/images"), help="folder for preprocessing_xray.png and the others")


def draw_xray(rng: np.random.Generator) -> Levels:
    """A stepped plate with pores, 12 bits in 16: counts of photons, as thickness lets them through."""
    y, x = np.indices((SIDE, SIDE)) / SIDE
    thickness = 1.0 + 0.8 * (x > 0.4) + 0.5 * y + 0.6 * np.exp(-((x - 0.75) ** 2) / 0.01)
    for _ in range(14):
        row, column, radius = rng.uniform(0.1, 0.9), rng.uniform(0.05, 0.95), rng.uniform(0.008, 0.02)
        thickness -= 0.16 * np.exp(-((x - column) ** 2 + (y - row) ** 2) / radius**2)
    counts = rng.poisson(3000 * np.exp(-thickness)).astype(np.float64)
    counts[tuple(rng.integers(0, SIDE, (2, 60)))] = 4095  # dead pixels
    return counts.clip(0, 4095).astype(np.uint16)


def draw_line_scan(rng: np.random.Generator) -> Levels:
    """Brushed strip under a line camera: light falls off to the sides, pixels differ in gain, some scratches."""
    light = 1 - 0.75 * (np.linspace(-1, 1, SIDE) ** 2)
    gain = 1 + 0.05 * rng.standard_normal(SIDE)
    brushed = cv2.GaussianBlur(rng.standard_normal((SIDE, SIDE)), (0, 0), sigmaX=0.5, sigmaY=6)
    image: Grey = (150 + 60 * brushed) * light * gain
    for _ in range(4):
        (left, top), angle = rng.uniform(20, SIDE - 60, 2), rng.uniform(-0.6, 0.6)
        right, bottom = left + 45 * np.cos(angle), top + 45 * np.sin(angle)
        ends = [(int(left), int(top)), (int(right), int(bottom))]
        scratch = cv2.line(np.zeros((SIDE, SIDE)), *ends, color=1.0, thickness=1, lineType=cv2.LINE_8)
        image += 45 * scratch * light
    return image.clip(0, 255).astype(np.uint8)


def draw_grey_casting(rng: np.random.Generator) -> Levels:
    """A cast ring on a dark ground, dimly lit, with blowholes."""
    y, x = np.indices((SIDE, SIDE))
    radius = np.hypot(x - 140, y - 118)
    part = (radius < 88) & (radius > 26)
    grain = cv2.GaussianBlur(rng.standard_normal((SIDE, SIDE)), (0, 0), 1.2)
    image: Grey = np.where(part, 95 + 0.12 * (x - 140) + 14 * grain, 18 + 3 * rng.standard_normal((SIDE, SIDE)))
    for _ in range(7):
        angle, place = rng.uniform(0, 2 * np.pi), rng.uniform(36, 78)
        row, column = 118 + place * np.sin(angle), 140 + place * np.cos(angle)
        image -= 22 * part * np.exp(-((x - column) ** 2 + (y - row) ** 2) / rng.uniform(2, 5) ** 2)
    return image.clip(0, 255).astype(np.uint8)


EXAMPLES: dict[str, Callable[[np.random.Generator], Levels]] = {
    "xray": draw_xray,
    "line_scan": draw_line_scan,
    "grey_casting": draw_grey_casting,
}


def draw_examples(output: Path) -> list[Path]:
    """Draws an image of each kind, and its preview by the chain of the same name; returns the files."""
    written = []
    for name, draw in EXAMPLES.items():
        with tempfile.TemporaryDirectory() as folder:
            cv2.imwrite(str(Path(folder) / f"{name}.png"), draw(np.random.default_rng(0)))
            written.append(output / f"preprocessing_{name}.png")
            draw_preview(folder, written[-1], Chain.read(CHAINS / f"{name}.yaml"), count=1)
    return written


def main() -> int:
    """Draws, and says what was written."""
    options = parse(
        ExampleOptions,
        description="Draws the pictures of docs/preprocessing.md from synthetic images.",
        example="python tools/draw_preprocessing_examples.py --output docs/images",
    )
    for path in draw_examples(options.output):
        print(path)
    return 0


if __name__ == "__main__":
    exit_with(main)
