"""Collectives: the identity in one process, and what their names say in two."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from dinov2.distributed import all_gather_objects, all_gather_rows, all_reduce_max, all_reduce_sum
from tests.processes import run_processes


def test_one_process_gets_back_what_it_gave() -> None:
    tensor = torch.tensor([1.0, 2.0])
    for reduce in (all_reduce_sum, all_reduce_max, all_gather_rows):
        assert reduce(tensor) is tensor
    value = {"a": 1}
    assert all_gather_objects(value) == [value]


def run_all(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 2), rank=rank, world_size=2)
    tensor = torch.tensor([[1.0 + rank, -rank]], requires_grad=True)
    columns = torch.arange(6.0).reshape(2, 3).t() + 10 * rank  # not contiguous
    results = {
        "sum": all_reduce_sum(tensor).tolist(),
        "max": all_reduce_max(tensor).tolist(),
        "own": tensor.tolist(),
        "rows": all_gather_rows(tensor.detach()).tolist(),
        "columns": all_gather_rows(columns).tolist(),
        "none": list(all_gather_rows(torch.empty(0, 3)).shape),
        "integers": all_reduce_sum(torch.tensor([2**40 + rank])).tolist(),
        "objects": all_gather_objects({"rank": rank, "names": ["x"] * rank}),
    }
    (folder / f"rank_{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    run_processes(run_all, tmp_path)
    results = [json.loads((tmp_path / f"rank_{rank}.json").read_text()) for rank in (0, 1)]
    assert [result.pop("own") for result in results] == [[[1.0, 0.0]], [[2.0, -1.0]]], "inputs are not changed"
    assert results[0] == results[1]
    assert results[0] == {
        "sum": [[3.0, -1.0]],
        "max": [[2.0, 0.0]],
        "rows": [[1.0, 0.0], [2.0, -1.0]],
        "columns": [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0], [10.0, 13.0], [11.0, 14.0], [12.0, 15.0]],
        "none": [0, 3],
        "integers": [2**41 + 1],
        "objects": [{"rank": 0, "names": []}, {"rank": 1, "names": ["x"]}],
    }
