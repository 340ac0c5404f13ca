"""Measures what joining heads on one frozen backbone saves: seconds per image, together against one after the other."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dinov2.config.command_line import option, parse
from dinov2.predict.images import DEVICES
from dinov2.predict.model import load_model
from dinov2.run.launch import exit_with


@dataclass(frozen=True, kw_only=True)
class BenchmarkOptions:
    """Options of the command."""

    models: tuple[str, ...] = option(help="best.pth of heads on the same frozen backbone", positional=True)
    num_images: int = option(16, help="random images per round")
    side: int = option(224, help="pixels of their sides")
    rounds: int = option(5, help="in each of which both are measured")
    num_threads: int | None = option(None, help="by default those torch would use")
    device: str = option("cpu", help="where to compute", choices=DEVICES)


def measure(ways: Sequence[Callable[[], object]], rounds: int) -> list[float]:
    """Median seconds of each way; they take turns, and the first round warms up."""
    times: list[list[float]] = [[] for _ in ways]
    for number in range(rounds + 1):
        for way, taken in zip(ways, times, strict=True):
            start = time.perf_counter()
            way()
            if number:
                taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in times]


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and prints."""
    options = parse(
        BenchmarkOptions,
        argv,
        description="Compares heads that are joined on their backbone with the same heads one after the other.",
        example="python tools/benchmark_heads.py classes.pth masks.pth depth.pth",
    )
    if options.num_threads is not None:
        torch.set_num_threads(options.num_threads)
    generator = np.random.default_rng(0)
    shape = (options.num_images, options.side, options.side, 3)
    images = list(generator.integers(0, 256, shape, dtype=np.uint8))
    joined = load_model(options.models, device=options.device)
    single = [load_model(path, device=options.device) for path in options.models]

    def one_after_the_other() -> None:
        for model in single:
            model.predict(images)

    ways = [lambda: joined.predict(images), one_after_the_other, lambda: single[0].predict(images)]
    together, apart, one = (seconds / options.num_images for seconds in measure(ways, options.rounds))
    print(
        f"{len(single)} heads, {options.num_images} images of {options.side} pixels on {joined.device}: together "
        f"{1000 * together:.1f} ms per image, one after the other {1000 * apart:.1f} ms "
        f"({apart / together:.2f} times as long), the first alone {1000 * one:.1f} ms"
    )
    return 0


if __name__ == "__main__":
    exit_with(main)
