"""One brightness and contrast for all photos, where the light they were taken in says nothing."""

import numpy as np
from PIL import Image

LIGHTS = ("original", "standardized")

_MEAN, _DEVIATION = 120.0, 48.0  # levels of 8 bits; close to the statistics that the networks' normalisation assumes
_SMALLEST_DEVIATION = 4.0  # levels: below it there is nothing but noise, which should not be blown up further


def standardize_light(image: Image.Image) -> Image.Image:
    """Shifts and stretches an RGB photo so that its grey values have mean 120 and standard deviation 48.

    All channels go through the same line, so colours keep their differences; what leaves 0..255 is clipped. Photos of a
    part at several exposures become nearly equal, and a random or trained network then describes the part instead of
    the exposure. Do not use it where brightness itself tells good from bad.
    """
    counts = np.asarray(image.convert("L").histogram(), dtype=np.float64)
    levels = np.arange(256)
    mean = float(counts @ levels / counts.sum())
    deviation = float(np.sqrt(counts @ (levels - mean) ** 2 / counts.sum()))
    line = (levels - mean) * (_DEVIATION / max(deviation, _SMALLEST_DEVIATION)) + _MEAN
    table = line.clip(0, 255).round().astype(int).tolist()
    return image.point(table * len(image.getbands()))
