"""The tools that measure the service and joined heads."""

import os
from pathlib import Path

import psutil
import pytest

from dinov2.deploy.service import Answering, Limits
from tests.deploy.service_stand_ins import patient_predictor, served, stand_in_model
from tests.tasks.predictor_stand_ins import write_package
from tools import benchmark_heads
from tools.benchmark_service import draw_images, put_under_load


def test_a_closed_loop_drops_nothing_and_counts_what_is_refused() -> None:
    images = draw_images(4, 32)
    with served(stand_in_model()) as service:
        load = put_under_load(service.url, images, clients=6, seconds=0.6, process=psutil.Process(os.getpid()))
    assert set(load.statuses) == {200}
    assert (load.dropped, len(load.memory_mib)) == (0, 10)
    assert load.images_per_s > 1
    assert load.median_ms <= load.p90_ms <= load.p99_ms
    predictor = patient_predictor()
    with served(stand_in_model(predictor), Answering(limits=Limits(max_requests=1, timeout_s=0.1))) as service:
        predictor.released.clear()
        load = put_under_load(service.url, images, clients=2, seconds=0.3)
        predictor.released.set()
    assert set(load.statuses) == {429, 504}
    assert load.dropped == load.statuses[504] > 0
    assert f"dropped {load.dropped}" in str(load)


def test_joined_heads_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [str(write_package(tmp_path / f"{task}.pth", task)) for task in ("classification", "segmentation")]
    words = [*paths, "--num-images", "1", "--side", "32", "--rounds", "1"]
    assert benchmark_heads.main(words) == 0
    assert "2 heads, 1 images of 32 pixels on cpu: together " in capsys.readouterr().out
