"""In which number formats a run computes, and whether others would be faster on this machine."""

import torch

from dinov2.config import Config
from dinov2.fsdp import resolve_dtype
from dinov2.utils.processor import multiplies_bf16

_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_FASTER_PAIRS = " ".join(
    f"compute_precision.{network}.backbone.mixed_precision.param_dtype=bf16" for network in ("student", "teacher")
)


def describe_precision(config: Config, device: torch.device) -> str:
    """The format of parameters and activations of each part of the student, and the teacher's where it differs."""
    precision = config.compute_precision
    parts = ["backbone", "dino_head", *(["ibot_head"] if config.ibot.separate_head else [])]
    student, teacher = (
        {part: _NAMES[resolve_dtype(getattr(network, part).mixed_precision.param_dtype, device)] for part in parts}
        for network in (precision.student, precision.teacher)
    )
    shown = _show(student)
    return shown if teacher == student else f"{shown}; teacher: {_show(teacher)}"


def advise_bf16(config: Config, device: torch.device) -> str:
    """What to add to the command where a run in float32 would be faster in bf16; empty elsewhere.

    ``auto`` means float32 on processors, so that a run gives the same numbers on any of them. Those that multiply bf16
    matrices in hardware can be told to.
    """
    networks = (config.compute_precision.student, config.compute_precision.teacher)
    is_auto = all(network.backbone.mixed_precision.param_dtype == "auto" for network in networks)
    if device.type != "cpu" or not is_auto or not multiplies_bf16():
        return ""
    return f"this processor multiplies bf16 in hardware and would be faster with {_FASTER_PAIRS}"


def _show(formats: dict[str, str]) -> str:
    if len(set(formats.values())) == 1:
        return next(iter(formats.values()))
    return ", ".join(f"{part} {name}" for part, name in formats.items())
