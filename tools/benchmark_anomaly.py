"""Measures how fast a coreset is chosen, and in how much memory."""

import resource
import sys
import time
from dataclasses import dataclass

import torch

from dinov2.config.command_line import option, parse
from dinov2.eval.anomaly.coreset import greedy_coreset
from dinov2.run.launch import exit_with

ROWS_PER_DRAW = 4096
GIB = 2**30


@dataclass(frozen=True)
class BenchmarkOptions:
    """Options of the command."""

    num_rows: int = option(1_000_000, help="patches of good parts")
    width: int = option(384, help="numbers per patch")
    num_centres: int = option(10_000, help="patches that are chosen")
    num_clusters: int = option(2_000, help="clusters that patches lie in; 0: directions are uniform on the sphere")
    projection: int = option(0, help="dimensions in which they are chosen; 0: all")
    num_threads: int | None = option(None, help="by default those torch would use")
    device: str = option("cpu", help="where to compute")
    seed: int = option(0, help="of the random patches")


def draw_patches(options: BenchmarkOptions) -> torch.Tensor:
    """Rows ``[N, D]`` of unit length; nothing larger is in memory meanwhile."""
    generator = torch.Generator().manual_seed(options.seed)
    middles = torch.randn(max(options.num_clusters, 1), options.width, generator=generator)
    patches = torch.empty(options.num_rows, options.width)
    for rows in patches.split(ROWS_PER_DRAW):
        rows.normal_(generator=generator)
        if options.num_clusters:
            rows *= 0.5
            rows += middles[torch.randint(len(middles), (len(rows),), generator=generator)]
        rows /= rows.norm(dim=1, keepdim=True)
    return patches


def main() -> int:
    """Measures and prints."""
    options = parse(
        BenchmarkOptions,
        description="Measures seconds and peak memory of the greedy coreset of an anomaly memory.",
        example="python tools/benchmark_anomaly.py --num-rows 100000 --num-centres 1000",
    )
    if options.num_threads is not None:
        torch.set_num_threads(options.num_threads)
    patches = draw_patches(options).to(options.device)
    before = _peak_gib()
    start, cpu_start = time.perf_counter(), time.process_time()
    rows, radius = greedy_coreset(
        patches, options.num_centres, projection=options.projection or None, seed=options.seed
    )
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    print(
        f"{options.num_rows:,} patches x {options.width}, {len(rows):,} centres, {torch.get_num_threads()} thread(s): "
        f"{seconds:.1f} s, {cpu_seconds:.1f} CPU s, peak {_peak_gib():.2f} GiB ({before:.2f} before), "
        f"radius {radius:.4f}"
    )
    return 0


def _peak_gib() -> float:
    """Largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / GIB


if __name__ == "__main__":
    exit_with(main)
