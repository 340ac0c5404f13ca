"""Puts a service under load by a closed loop of clients; counts accepted requests that were dropped, and its memory.

Every client posts an image, waits for the answer and posts the next. A request is dropped when it got an answer of 500
or above, or none; an answer of 429 refuses it, and the client tries again a moment later.
"""

import http.client
import json
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import psutil
from PIL import Image

from dinov2.config.command_line import option, parse
from dinov2.data.datasets.scan import find_images
from dinov2.run.launch import exit_with
from dinov2.utils.errors import RunError

_MIB = 2**20
_PAUSE_S = 0.05  # after a 429


@dataclass(frozen=True)
class Load:
    """What a service did under load.

    Attributes:
        statuses: answers by HTTP status; 0 for requests without an answer.
        images_per_s: predictions per second.
        median_ms: of the time to an answer 200, as for the following.
        p90_ms: of which a tenth took longer.
        p99_ms: of which a hundredth took longer.
        dropped: accepted requests without a prediction.
        memory_mib: of the service, ten values over the time, evenly; empty where its process is not known.
    """

    statuses: dict[int, int]
    images_per_s: float
    median_ms: float
    p90_ms: float
    p99_ms: float
    dropped: int
    memory_mib: list[float]

    def __str__(self) -> str:
        memory = f"\nmemory {' '.join(f'{value:.0f}' for value in self.memory_mib)} MiB" if self.memory_mib else ""
        return (
            f"{self.images_per_s:.1f} images/s, median {self.median_ms:.0f} ms, p90 {self.p90_ms:.0f} ms, p99 "
            f"{self.p99_ms:.0f} ms; answers {self.statuses}; dropped {self.dropped}{memory}"
        )


def put_under_load(
    url: str, images: Sequence[bytes], *, clients: int, seconds: float, process: psutil.Process | None = None
) -> Load:
    """Runs clients against a service for a while.

    Args:
        url: of the service.
        images: content of files, which clients post in turns.
        clients: that each wait for one answer at a time.
        seconds: for which new requests are sent.
        process: of the service, whose memory is looked at.
    """
    address = urlsplit(url).netloc
    statuses: Counter[int] = Counter()
    times: list[float] = []
    lock = threading.Lock()
    end = time.monotonic() + seconds

    def run(number: int) -> None:
        connection = http.client.HTTPConnection(address, timeout=120)
        while time.monotonic() < end:
            number += clients
            start = time.perf_counter()
            try:
                connection.request("POST", "/predict", images[number % len(images)], {"Content-Type": "image/png"})
                answer = connection.getresponse()
                answer.read()
                status = answer.status
            except (OSError, http.client.HTTPException):
                status = 0
                connection.close()
            took = time.perf_counter() - start
            with lock:
                statuses[status] += 1
                if status == 200:
                    times.append(took)
            if status == 429:
                time.sleep(_PAUSE_S)
        connection.close()

    threads = [threading.Thread(target=run, args=(number,)) for number in range(clients)]
    start = time.monotonic()
    for thread in threads:
        thread.start()
    memory = []
    for _ in range(10 if process is not None else 0):
        time.sleep(seconds / 10)
        memory.append(process.memory_info().rss / _MIB)
    for thread in threads:
        thread.join()
    took = time.monotonic() - start
    median, p90, p99 = (1000 * np.quantile(times, [0.5, 0.9, 0.99])).tolist() if times else [float("nan")] * 3
    dropped = sum(count for status, count in statuses.items() if status == 0 or status >= 500)
    return Load(dict(statuses), len(times) / took, median, p90, p99, dropped, memory)


def draw_images(count: int, side: int) -> list[bytes]:
    """Files of random images."""
    generator = np.random.default_rng(0)
    files = []
    for _ in range(count):
        file = BytesIO()
        Image.fromarray(generator.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(file, "PNG")
        files.append(file.getvalue())
    return files


@dataclass(frozen=True, kw_only=True)
class BenchmarkOptions:
    """Options of the command."""

    models: tuple[str, ...] = option(help="what dinov2 serve opens", positional=True)
    images: Path | None = option(None, help="folder of images to post (by default random ones)")
    side: int = option(224, help="pixels of a side of random images")
    clients: int = option(64, help="clients that each wait for one answer at a time")
    seconds: float = option(60.0, help="how long they go on")
    device: str = option("auto", help="where the service computes")
    output: Path | None = option(None, help="file for the numbers, JSON")


def main(argv: Sequence[str] | None = None) -> int:
    """Starts a service, measures, prints; the exit code is 1 where an accepted request was dropped."""
    options = parse(
        BenchmarkOptions,
        argv,
        description="Starts a service of a model and puts it under load by a closed loop of clients.",
        example="python tools/benchmark_service.py outputs/cracks/best.pth --clients 64 --seconds 60",
    )
    if options.images is None:
        images = draw_images(16, options.side)
    else:
        images = [(options.images / name).read_bytes() for name in find_images(options.images)[:256]]
    words = [sys.executable, "-m", "dinov2", "serve", *options.models, "--device", options.device, "--port", "0"]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            said = []
            url = ""
            for line in process.stderr:
                said.append(line)
                if found := re.search(r"http://\S+:\d+", line):
                    url = found[0]
                    break
            if not url:
                raise RunError(f"the service did not start:\n{''.join(said)}")
            threading.Thread(target=process.stderr.read, daemon=True).start()
            load = put_under_load(
                url, images, clients=options.clients, seconds=options.seconds, process=psutil.Process(process.pid)
            )
        finally:
            process.terminate()
        code = process.wait(60)
    print(f"{options.clients} clients for {options.seconds:g} s: {load}\nSIGTERM ended the service with code {code}")
    if options.output is not None:
        options.output.write_text(json.dumps(asdict(load), indent=1) + "\n")
    return 1 if load.dropped or code else 0


if __name__ == "__main__":
    exit_with(main)
