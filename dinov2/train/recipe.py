"""Options that are ``auto``: numbers in proportion to a run's length, and the precision of its machine.

They are settled once, when a run begins, before anything is built; the run's ``config.yaml`` holds what they became. A
resumed run takes them from there, wherever it goes on and however long it is made.

Between lengths that were measured or published, numbers are linear in the logarithm of the iterations (images over the
global batch), and beyond them constant:

    ==================================  ==============  =============  ===============
    iterations                          up to 3,600     125,000        625,000 and more
    ==================================  ==============  =============  ===============
    lag of the teacher at the start     10              125            1 / 0.006
    learning rate for a batch of 1024   0.002           0.004          0.0002
    final temperature of the teacher    0.04            0.07           0.07
    warm-up, share of the run           1 / 12          1 / 10         0.16
    iterations with a frozen last layer 0               1,250          1,250
    ==================================  ==============  =============  ===============

The lag is 1 / (1 - momentum), in iterations. At the end of the run it is 8 times the root of the iterations, which is
0.99, 0.995 and 0.998 for 165, 600 and 3,600 of them, and 1, in three decimals, for all published lengths. The
temperature rises for 0.3 of the run, for 37,500 iterations at most.

Reference:
    Oquab et al., DINOv2 (2023), appendix B, for the published lengths: ``configs/train/vitl16_short.yaml`` and
    ``vitl14.yaml``. The others were measured from scratch with batches of 64.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from dinov2.config import Config, as_number, leaf_values
from dinov2.config.schema import Auto
from dinov2.distributed import get_world_size
from dinov2.fsdp import resolve_dtype
from dinov2.utils.processor import multiplies_bf16

_LENGTHS = (3_600, 125_000, 625_000)  # iterations
_PRECISION = "mixed_precision.param_dtype"


def proportions(num_images: int, batch_size: int) -> dict[str, float]:
    """What numbers that are ``auto`` become, by the name of the option; those in epochs are given in iterations.

    Args:
        num_images: length of the run, every image counted as often as it is seen.
        batch_size: images of an iteration, over all processes.
    """
    iterations = num_images / batch_size

    def between(*values: float) -> float:
        return float(np.interp(math.log(iterations), [math.log(length) for length in _LENGTHS], values))

    return {
        "teacher.momentum_teacher": _momentum(between(10, 125, 1 / 0.006)),
        "teacher.final_momentum_teacher": _momentum(max(8 * math.sqrt(iterations), 10)),
        "teacher.teacher_temp": round(between(0.04, 0.07, 0.07), 3),
        "teacher.warmup_teacher_temp_epochs": round(min(0.3 * iterations, 37_500)),
        "optim.base_lr": float(f"{between(0.002, 0.004, 0.0002):.2g}"),
        "optim.warmup_epochs": round(between(1 / 12, 1 / 10, 0.16) * iterations),
        "optim.freeze_last_layer_epochs": round(between(0, 1_250, 1_250)),
    }


def _momentum(lag: float) -> float:
    return round(1 - 1 / lag, 3)


def num_iterations(epochs: float | Auto, config: Config) -> int:
    """Iterations of so many official epochs, of which the last may be a part.

    Raises:
        ConfigError: they are ``auto``.
    """
    return round(as_number(epochs) * config.train.OFFICIAL_EPOCH_LENGTH)


def choose_precision(device: torch.device) -> str:
    """bf16 where a GPU has it or the processor multiplies it in hardware, else fp32."""
    is_fast = resolve_dtype("auto", device) == torch.bfloat16 or (device.type == "cpu" and multiplies_bf16())
    return "bf16" if is_fast else "fp32"


def auto_values(config: Config, device: torch.device, stored: Mapping[str, Any]) -> dict[str, Any]:
    """Values of all options that are ``auto``, by name.

    Args:
        config: options of the run.
        device: where it computes.
        stored: all options by name, as they were stored by the run that is gone on with; empty for a new one.
    """
    batch_size, epoch_length = config.train.batch_size_per_gpu * get_world_size(), config.train.OFFICIAL_EPOCH_LENGTH
    numbers = proportions(config.optim.epochs * epoch_length * batch_size, batch_size)
    # What a run did that stored no decision: float32 on any processor.
    precision = "fp32" if stored and device.type == "cpu" else choose_precision(device)
    values: dict[str, Any] = {name: precision for name, _ in leaf_values(config) if name.endswith(_PRECISION)}
    values |= {name: value / epoch_length if name.endswith("_epochs") else value for name, value in numbers.items()}
    values |= {name: value for name, value in stored.items() if name in values and value != "auto"}
    return {name: values[name] for name, value in leaf_values(config) if value == "auto" and name in values}


def describe_auto(values: Mapping[str, Any]) -> str:
    """What each ``auto`` became, as pairs; but for precision, which the run's log and the dry run tell anyway."""
    return " ".join(f"{name}={value:.6g}" for name, value in values.items() if not name.endswith(_PRECISION))
