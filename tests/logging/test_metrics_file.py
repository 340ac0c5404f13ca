import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from dinov2.logging import MetricsFile, read_metrics


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "metrics.jsonl"


def write(path: Path, iterations: range) -> None:
    with MetricsFile(path) as file:
        for iteration in iterations:
            file.append({"iteration": iteration, "total_loss": iteration / 3})


def iterations_of(path: Path) -> list[int]:
    return [record["iteration"] for record in read_metrics(path)]


def test_a_record_is_readable_at_once_and_floats_come_back_exactly(path: Path) -> None:
    file = MetricsFile(path)
    file.append({"iteration": 0, "loss": 0.1 + 0.2, "tiny": 5e-324, "timing": {"seconds": 1 / 3}})
    assert read_metrics(path) == [{"iteration": 0, "loss": 0.1 + 0.2, "tiny": 5e-324, "timing": {"seconds": 1 / 3}}]
    file.close()


def test_tensors_and_numpy_values_become_numbers(path: Path) -> None:
    with MetricsFile(path) as file:
        file.append({"a": torch.tensor(1.5), "b": np.float32(2.5), "c": (np.int64(3), [torch.tensor(4)]), "d": path})
    assert read_metrics(path) == [{"a": 1.5, "b": 2.5, "c": [3, [4]], "d": str(path)}]


def test_values_json_cannot_hold_become_null(path: Path) -> None:
    with MetricsFile(path) as file:
        file.append({"a": math.nan, "b": math.inf, "c": {"d": torch.tensor(-math.inf)}, "e": [np.float64("nan")]})

    def refuse(name: str) -> float:
        raise AssertionError(f"{name} is no JSON")

    line = json.loads(path.read_text(), parse_constant=refuse)
    assert line == {"a": None, "b": None, "c": {"d": None}, "e": [None]}


def test_a_value_of_another_kind_is_refused_and_leaves_no_trace(path: Path) -> None:
    with MetricsFile(path) as file:
        with pytest.raises(TypeError, match="not JSON serializable"):
            file.append({"iteration": 0, "loss": object()})
        assert file.position == 0


def test_truncation_equals_never_having_gone_on(path: Path, tmp_path: Path) -> None:
    write(path, range(10))
    with MetricsFile(path) as file:
        assert file.truncate_after(5) == 4
        for iteration in range(6, 10):
            file.append({"iteration": iteration, "total_loss": iteration / 3})
    write(tmp_path / "undisturbed.jsonl", range(10))
    assert path.read_bytes() == (tmp_path / "undisturbed.jsonl").read_bytes()


def test_truncation_keeps_records_without_an_iteration_and_all_when_none_is_later(path: Path) -> None:
    with MetricsFile(path) as file:
        file.append({"note": "start"})
        file.append({"iteration": 7})
        assert file.truncate_after(7) == 0
        assert file.truncate_after(-1) == 1
        assert file.position == path.stat().st_size
    assert read_metrics(path) == [{"note": "start"}]


@pytest.mark.parametrize("torn", [b'{"iteration": 3, "total', b"\0\0\0\0", b'{"iteration": 3}'])
def test_a_torn_last_line_is_dropped(path: Path, torn: bytes) -> None:
    write(path, range(3))
    with path.open("ab") as raw:
        raw.write(torn)
    assert iterations_of(path) == [0, 1, 2]
    write(path, range(3, 5))
    assert iterations_of(path) == [0, 1, 2, 3, 4]


def test_position_leads_back(path: Path) -> None:
    write(path, range(3))
    with MetricsFile(path) as file:
        position = file.position
        assert position == path.stat().st_size
        file.append({"iteration": 3})
        file.truncate_to(position)
        file.append({"iteration": 4})
        with pytest.raises(ValueError, match="cannot be cut to 100000"):
            file.truncate_to(100_000)
    assert iterations_of(path) == [0, 1, 2, 4]


def test_a_spoilt_line_is_named(path: Path) -> None:
    write(path, range(1))
    with path.open("a") as raw:
        raw.write("[1]\n")
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2: expected a JSON object, found list"):
        read_metrics(path)
    path.write_text("{\n")
    with MetricsFile(path) as file, pytest.raises(ValueError, match=r"line 1: not valid JSON"):
        file.truncate_after(0)
    with pytest.raises(FileNotFoundError, match="no metrics file"):
        read_metrics(path.with_name("other.jsonl"))
