"""A small drawn set for trying every task without any data: plates with labels, masks, boxes and height maps."""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from dinov2.data.datasets.base import DEFAULT_FRACTIONS, Split, split_groups
from dinov2.data.prepare.grouped_json_writer import GroupedItem, write_grouped_set
from dinov2.utils.seeds import derive_seed

Array = npt.NDArray[np.floating[Any]]

DEFECT_TYPES = ("scratch", "dent", "stain")

_WIDTH_UM = 25_600.0  # what an image shows, whatever its size in pixels
_PLATE_UM = 2_000.0
_HOLE_UM = 200.0


@dataclass(frozen=True)
class Part:
    """A plate as it lies under the camera, on a canvas somewhat larger than an image.

    Attributes:
        height: micrometres above the table ``[S, S]``.
        albedo: share of light sent back, 0-1 ``[S, S]``.
        defects: one mask per defect ``[S, S]``.
    """

    height: Array
    albedo: Array
    defects: tuple[npt.NDArray[np.bool_], ...]


@dataclass(frozen=True)
class View:
    """One image of a part, and what it shows.

    Attributes:
        image: RGB, uint8 ``[H, W, 3]``.
        height: micrometres above the table, uint16 ``[H, W]``.
        mask: 255 on defects, else 0, uint8 ``[H, W]``.
        boxes: ``(x0, y0, x1, y1)`` in pixels around each defect, the end excluded.
    """

    image: npt.NDArray[np.uint8]
    height: npt.NDArray[np.uint16]
    mask: npt.NDArray[np.uint8]
    boxes: tuple[tuple[int, int, int, int], ...]


def draw_part(image_size: int, defect_type: str, product: np.random.Generator, part: np.random.Generator) -> Part:
    """Makes a plate: the layout of holes belongs to the product, the surface to the part.

    Args:
        image_size: side of the later images, pixels.
        defect_type: one of `DEFECT_TYPES`, or ``free``.
        product: draws what all plates share; to be seeded alike for all of them.
        part: draws the rest.
    """
    side = image_size + 2 * _margin(image_size)
    steps = (np.arange(side, dtype=np.float32) + 0.5 - side / 2) / image_size  # in image widths from the centre
    y, x = np.meshgrid(steps, steps, indexing="ij")
    # Signed distances to the plate's edge and to the nearest hole's edge, in image widths, negative inside.
    turn, dx, dy = part.normal(0, 0.015), *part.normal(0, 0.006, size=2)
    u = np.cos(turn) * (x - dx) + np.sin(turn) * (y - dy)
    v = -np.sin(turn) * (x - dx) + np.cos(turn) * (y - dy)
    half_width, half_height, corner = product.uniform(0.38, 0.43), product.uniform(0.36, 0.42), 0.06
    side_x, side_y = np.abs(u) - half_width + corner, np.abs(v) - half_height + corner
    outside = (
        np.hypot(np.maximum(side_x, 0), np.maximum(side_y, 0)) + np.minimum(np.maximum(side_x, side_y), 0) - corner
    )

    corners = [(sx * (half_width - 0.08), sy * (half_height - 0.08), 0.03) for sx in (-1, 1) for sy in (-1, 1)]
    bore = (product.uniform(-0.12, 0.12), product.uniform(-0.1, 0.1), product.uniform(0.07, 0.1))
    distances = [np.hypot(u - cx, v - cy) - radius for cx, cy, radius in (*corners, bore)]
    outside, in_hole = outside.astype(np.float32), np.min(distances, axis=0).astype(np.float32)

    plate = _step(-outside, 0.006)  # 1 on the plate, soft at the rim
    holes = _step(-in_hole, 0.004)
    angle = part.uniform(-0.3, 0.3)
    brushed = _noise(side, part, image_size * 0.25, image_size * 0.003, angle)
    blotches = _noise(side, part, image_size * 0.12, image_size * 0.12)
    height = plate * (_PLATE_UM + 2.5 * brushed) * (1 - holes) + holes * _HOLE_UM
    albedo = 0.18 + plate * (0.40 + part.uniform(-0.04, 0.04) + 0.025 * brushed + 0.02 * blotches)
    albedo = albedo * (1 - 0.75 * holes)

    masks = []
    for _ in range(0 if defect_type == "free" else int(part.integers(1, 3))):
        free = (np.maximum(outside, -in_hole) < -0.05) & (np.hypot(x, y) < 0.36)
        relief, stain, mask = _defect(defect_type, x, y, free, part)
        mask &= (outside < -0.01) & (in_hole > 0.008)
        height += np.where(mask, relief, 0)
        albedo *= np.where(mask, 1 + stain, 1)
        if mask.any():
            masks.append(mask)
    return Part(height.astype(np.float32), albedo.clip(0, 1).astype(np.float32), tuple(masks))


def _view_part(part: Part, image_size: int, rng: np.random.Generator) -> View:
    """An image of a part under a light of its own, slightly shifted, with sensor noise; ``image_size`` in pixels."""
    margin = _margin(image_size)
    top, left = rng.integers(0, 2 * margin + 1, size=2)
    window = np.s_[top : top + image_size, left : left + image_size]

    slopes = np.gradient(part.height.astype(np.float64), _WIDTH_UM / image_size)  # down, right
    tilt_x, tilt_y = np.tanh(slopes[1][window]), np.tanh(slopes[0][window])  # steep rims reflect like slanted ones
    length = np.sqrt(tilt_x**2 + tilt_y**2 + 1)
    azimuth, elevation = rng.uniform(0, 2 * np.pi), np.deg2rad(rng.uniform(40, 65))
    light = np.cos(azimuth) * np.cos(elevation), np.sin(azimuth) * np.cos(elevation), np.sin(elevation)
    diffuse = np.maximum((light[2] - light[0] * tilt_x - light[1] * tilt_y) / length, 0)
    half = np.array([light[0], light[1], light[2] + 1])
    half /= np.linalg.norm(half)
    highlight = np.maximum((half[2] - half[0] * tilt_x - half[1] * tilt_y) / length, 0) ** 40

    y, x = np.mgrid[:image_size, :image_size] / image_size - 0.5
    falloff = 1 + rng.uniform(0.15, 0.45) * (np.cos(azimuth) * x + np.sin(azimuth) * y)
    radiance = part.albedo[window] * (0.35 + 0.75 * diffuse) * falloff + 0.18 * part.albedo[window] * highlight
    tint = np.array([1, 1, 1]) + rng.uniform(-0.03, 0.03, size=3)
    grey = radiance * rng.uniform(0.85, 1.3)
    image = np.clip(grey, 0, 1)[..., None] ** (1 / 1.6) * tint  # [H, W, 3]
    image += rng.normal(0, 0.012, size=(image_size, image_size, 1))
    masks = [mask[window] for mask in part.defects]
    seen = [mask for mask in masks if mask.any()]
    boxes = []
    for mask in seen:
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        boxes.append((int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1))
    together = np.any(seen, axis=0) if seen else np.zeros((image_size, image_size), dtype=bool)
    return View(
        image=(image.clip(0, 1) * 255).round().astype(np.uint8),
        height=part.height[window].round().clip(0, 65535).astype(np.uint16),
        mask=together.astype(np.uint8) * 255,
        boxes=tuple(boxes),
    )


def _margin(image_size: int) -> int:
    return max(1, image_size // 24)


def _defect(
    kind: str, x: Array, y: Array, free: npt.NDArray[np.bool_], rng: np.random.Generator
) -> tuple[Array, Array, npt.NDArray[np.bool_]]:
    """Relief in micrometres, relative change of albedo, and mask of one defect inside the free surface."""
    places = np.flatnonzero(free)
    centre = rng.choice(places) if len(places) else x.size // 2
    u, v = x - x.flat[centre], y - y.flat[centre]
    angle = rng.uniform(0, np.pi)
    along, across = np.cos(angle) * u + np.sin(angle) * v, -np.sin(angle) * u + np.cos(angle) * v
    if kind == "scratch":
        half, bend, width = rng.uniform(0.08, 0.18), rng.normal(0, 1.2), rng.uniform(0.003, 0.006)
        distance = np.hypot(across - bend * along**2, np.maximum(np.abs(along) - half, 0))
        profile = np.exp(-0.5 * (distance / width) ** 2)
        return -45 * profile, 0.5 * profile, distance < 1.6 * width
    if kind == "dent":
        radius, squeeze = rng.uniform(0.025, 0.05), rng.uniform(0.7, 1.0)
        distance = np.hypot(along, across / squeeze) / radius
        profile = np.exp(-0.5 * (1.6 * distance) ** 2)
        return -rng.uniform(350, 600) * profile, -0.15 * profile, distance < 1.4
    assert kind == "stain", kind
    radius = rng.uniform(0.05, 0.09)
    waves = sum(np.sin(k * np.arctan2(v, u) + rng.uniform(0, 6.3)) * rng.uniform(0.03, 0.12) for k in range(2, 7))
    distance = np.hypot(along, across * rng.uniform(1, 1.6)) / radius - waves
    profile = _step(1 - distance, 0.25)
    return np.zeros_like(profile), -rng.uniform(0.3, 0.5) * profile * (0.75 + 0.25 * distance.clip(0, 1)), profile > 0.3


def _noise(side: int, rng: np.random.Generator, along: float, across: float, angle: float = 0.0) -> Array:
    """Gaussian noise of unit variance, smooth over ``along`` pixels in one direction and ``across`` in the other."""
    fy, fx = np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None]
    u, v = np.cos(angle) * fx + np.sin(angle) * fy, -np.sin(angle) * fx + np.cos(angle) * fy
    spectrum = np.fft.rfft2(rng.standard_normal((side, side))) * np.exp(-2 * ((along * u) ** 2 + (across * v) ** 2))
    noise = np.fft.irfft2(spectrum, s=(side, side))
    noise -= noise.mean()
    return (noise / max(float(noise.std()), 1e-12)).astype(np.float32)


def _step(distance: Array, softness: float) -> Array:
    """0 to 1 over a band of ``softness`` on either side of distance 0."""
    t: Array = (distance / softness * 0.5 + 0.5).clip(0, 1)
    return t * t * (3 - 2 * t)


_CLASSES = ("good", "defective")


def make_demo_parts(output: str | Path, parts: int = 60, photos: int = 4, seed: int = 0, image_size: int = 256) -> None:
    """Draws a grouped set of metal plates, each photographed several times under changing light.

    Every third part is defective. Each row holds ``gt_label``, ``group_id``, ``defect_type``, ``boxes``
    (``[x0, y0, x1, y1]`` in pixels, the end excluded) with ``box_labels`` (positions in ``metainfo.box_classes``),
    ``height_path`` (16-bit PNG, micrometres above the table) and, where there is a defect, ``mask_path`` (PNG, 0 and
    255). The same arguments draw the same set.

    Args:
        output: new or empty folder.
        parts: number of plates, at least 6.
        photos: images of each plate, at least 1.
        seed: draws everything.
        image_size: side of an image in pixels, at least 32.

    Raises:
        ValueError: for numbers out of range, or an ``output`` that holds anything else.
    """
    for name, value, least in (("parts", parts, 6), ("photos", photos, 1), ("image_size", image_size, 32)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    write_grouped_set(
        output,
        _items(parts, photos, seed, image_size),
        metainfo={
            "classes": list(_CLASSES),
            "defect_types": ["free", *DEFECT_TYPES],
            "box_classes": list(DEFECT_TYPES),
        },
        tool="make_demo_parts",
        settings={"parts": parts, "photos": photos, "seed": seed, "image_size": image_size},
    )


def _items(parts: int, photos: int, seed: int, image_size: int) -> Iterator[tuple[Split, GroupedItem]]:
    names = [f"part_{number:04d}" for number in range(parts)]
    kinds = [DEFECT_TYPES[number // 3 % len(DEFECT_TYPES)] if number % 3 == 2 else "free" for number in range(parts)]
    strata = ["free" if kind == "free" else "defective" for kind in kinds]
    splits = [list(Split)[number] for number in split_groups(names, strata, DEFAULT_FRACTIONS, seed).tolist()]
    for name, kind, split in sorted(zip(names, kinds, splits, strict=True)):
        part = draw_part(image_size, kind, _generator(seed, "product"), _generator(seed, name))
        for number in range(photos):
            view = _view_part(part, image_size, _generator(seed, name, number))
            stem = f"{split}/{name}/{name}-{number}"
            visible = kind if view.boxes else "free"
            row = {
                "img_path": f"{stem}.jpeg",
                "gt_label": int(bool(view.boxes)),
                "group_id": name,
                "defect_type": visible,
                "boxes": [list(box) for box in view.boxes],
                "box_labels": [DEFECT_TYPES.index(visible) for _ in view.boxes],
                "height_path": f"heights/{stem}.png",
            }
            files: dict[str, Path | bytes] = {
                f"{stem}.jpeg": _encode(view.image, "JPEG"),
                f"heights/{stem}.png": _encode(view.height, "PNG"),
            }
            if view.boxes:
                row["mask_path"] = f"masks/{stem}.png"
                files[f"masks/{stem}.png"] = _encode(view.mask, "PNG")
            yield split, GroupedItem(row, files)


def _encode(pixels: npt.NDArray[np.uint8] | npt.NDArray[np.uint16], kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, quality=92)
    return buffer.getvalue()


def _generator(seed: int, *parts: int | str) -> np.random.Generator:
    return np.random.default_rng(derive_seed(seed, "demo parts", *parts))
