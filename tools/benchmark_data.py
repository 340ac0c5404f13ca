"""Measures the speed of the data path: one image on one core, and the loader as a run uses it."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch

from dinov2.config import Config, load_config
from dinov2.config.command_line import option, parse
from dinov2.data.collate import PretrainingBatch
from dinov2.data.pretraining import SampleKey
from dinov2.run.launch import exit_with
from dinov2.train.data import build_augmentation, build_pretraining_dataset, build_pretraining_loader


@dataclass(frozen=True)
class DataSpeed:
    """Times of one image on one core, and images per second of the loader.

    Attributes:
        decode_ms: median time to read and decode an image.
        augment_ms: median time to cut all its crops.
        sample_ms: median time of both, with the random state kept apart.
        loader_images_per_second: of one process with ``num_workers``, after a first batch.
        num_workers: loading processes of the loader.
    """

    decode_ms: float
    augment_ms: float
    sample_ms: float
    loader_images_per_second: float
    num_workers: int

    def __str__(self) -> str:
        return (
            f"one core, median per image: decode {self.decode_ms:.2f} ms, crops {self.augment_ms:.2f} ms, together "
            f"{self.sample_ms:.2f} ms\nloader with {self.num_workers} worker(s): "
            f"{self.loader_images_per_second:.0f} images/s"
        )


def benchmark_data(config: Config, *, num_images: int = 200, seconds: float = 10.0) -> DataSpeed:
    """Measures the data path that a run's options describe.

    Args:
        config: options of the run; nothing is trained.
        num_images: images for the times of one image.
        seconds: how long the loader is run.
    """
    torch.set_num_threads(1)
    dataset = build_pretraining_dataset(config)
    augmentation = build_augmentation(config)
    images = [dataset.dataset.get_image(index % len(dataset)) for index in range(num_images)]
    return DataSpeed(
        decode_ms=_median_ms(lambda index: dataset.dataset.get_image(index % len(dataset)), num_images),
        augment_ms=_median_ms(lambda index: augmentation(images[index]), num_images),
        sample_ms=_median_ms(lambda index: dataset[SampleKey(index, index % len(dataset))], num_images),
        loader_images_per_second=_loader_rate(config, seconds),
        num_workers=config.train.num_workers,
    )


def _median_ms(work: Callable[[int], object], count: int) -> float:
    times = []
    for index in range(count):
        start = time.perf_counter()
        work(index)
        times.append(time.perf_counter() - start)
    return 1e3 * sorted(times)[count // 2]


def _loader_rate(config: Config, seconds: float) -> float:
    batches = iter(
        cast(Iterable[PretrainingBatch], build_pretraining_loader(config, build_pretraining_dataset(config)))
    )
    next(batches)
    images, elapsed = 0, 0.0
    start = time.perf_counter()
    while elapsed < seconds:
        images += len(next(batches).names)
        elapsed = time.perf_counter() - start
    return images / elapsed


@dataclass(frozen=True)
class BenchmarkOptions:
    """Options of the command."""

    overrides: tuple[str, ...] = option((), help="options of the config as key=value pairs", positional=True)
    config: Path | None = option(None, help="YAML file of a run", aliases=("--config-file",))
    num_images: int = option(200, help="images for the times of one image")
    seconds: float = option(10.0, help="how long the loader is run")


def main() -> int:
    """Measures and prints."""
    options = parse(
        BenchmarkOptions,
        description="Measures the data path of a run: decoding, crops, and the loader with its workers.",
        example="python tools/benchmark_data.py --config configs/train/demo_parts_cpu.yaml train.num_workers=2",
    )
    config = load_config(options.config, options.overrides)
    print(benchmark_data(config, num_images=options.num_images, seconds=options.seconds))
    return 0


if __name__ == "__main__":
    exit_with(main)
