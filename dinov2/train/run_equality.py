"""Whether two runs ended alike, bit for bit."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinov2.checkpoint.integrity import find_steps

CLOCK = ("progress/seconds",)
"""Entries of a checkpoint that the machine's speed decides."""
LENGTHS = ("metrics_bytes",)
"""Lengths of files that hold times, written with as many digits as they need."""


def run_differences(ours: Path, expected: Path) -> list[str]:
    """Where the last checkpoint, the teacher files and ``metrics.jsonl`` of two run folders differ.

    What depends on the machine's speed (``timing`` in the metrics, `CLOCK` and `LENGTHS` in a checkpoint) is left out.

    Returns:
        One line for each difference; empty when the runs ended alike.
    """
    steps = [find_steps(folder)[:1] for folder in (ours, expected)]
    found = [(step.name, step.ranks) for newest in steps for step in newest]
    if len(found) != 2 or found[0] != found[1]:
        return [f"the newest checkpoints are {found}"]
    files = [path.relative_to(expected) for path in sorted(expected.rglob("teacher_checkpoint.pth"))]
    files += [steps[1][0].path(rank).relative_to(expected) for rank in steps[1][0].ranks]
    lines = []
    for file in files:
        if not (ours / file).is_file():
            lines.append(f"{file} is missing")
            continue
        contents = [torch.load(folder / file, map_location="cpu", weights_only=True) for folder in (ours, expected)]
        lines += [f"{file}: {where}" for where in content_differences(*contents)]
    return lines + record_differences(ours / "metrics.jsonl", expected / "metrics.jsonl")


def content_differences(ours: Any, expected: Any, where: str = "") -> Iterator[str]:
    """Places, such as ``model/student.backbone.norm.weight``, where two nested values are not the same bit for bit."""
    if where in CLOCK + LENGTHS:
        return
    if type(ours) is not type(expected):
        yield f"{where} is a {type(ours).__name__}, expected a {type(expected).__name__}"
    elif isinstance(expected, Mapping):
        if ours.keys() != expected.keys():
            yield f"{where or 'top level'} holds {sorted(map(str, ours.keys() ^ expected.keys()))} on one side only"
        for key in expected.keys() & ours.keys():
            yield from content_differences(ours[key], expected[key], f"{where}/{key}" if where else str(key))
    elif isinstance(expected, Tensor):
        if (ours.dtype, ours.shape) != (expected.dtype, expected.shape) or _bytes(ours) != _bytes(expected):
            yield f"{where} differs"
    elif isinstance(expected, list | tuple):
        if len(ours) != len(expected):
            yield f"{where} has {len(ours)} entries, expected {len(expected)}"
        else:
            for number, pair in enumerate(zip(ours, expected, strict=True)):
                yield from content_differences(*pair, f"{where}/{number}")
    elif ours != expected:
        yield f"{where} is {ours!r}, expected {expected!r}"


def record_differences(ours: Path, expected: Path) -> list[str]:
    """Lines in which two metrics files differ outside ``timing``, at most the first; missing lines count."""
    lines = [path.read_text(encoding="utf-8").splitlines() if path.is_file() else [] for path in (ours, expected)]
    for number, pair in enumerate(zip(*lines, strict=False), start=1):
        if _without_timing(pair[0]) != _without_timing(pair[1]):
            return [f"{ours.name} line {number}: {pair[0]}, expected {pair[1]}"]
    if len(lines[0]) != len(lines[1]):
        return [f"{ours.name} has {len(lines[0])} lines, expected {len(lines[1])}"]
    return []


def _without_timing(line: str) -> str:
    record = json.loads(line)
    record.pop("timing", None)
    return json.dumps(record)


def _bytes(tensor: Tensor) -> bytes:
    """All bits: unlike numbers, zeros of both signs differ and NaNs may be equal."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
