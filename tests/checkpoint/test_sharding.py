"""Rows of tensors in the files of any number of processes, and files that are none."""

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from dinov2.checkpoint.sharding import RankFiles, Rows, held_rows, load_file, local_part, rank_file, rank_pattern


def write(folder: Path, tensors: dict[str, Tensor], world_size: int, **changes: Any) -> str:
    """Writes the files of ``world_size`` processes, split as FSDP2 splits, and returns their pattern."""
    for rank in range(world_size):
        model, rows = {}, {}
        for name, tensor in tensors.items():
            total = tensor.shape[0] if tensor.ndim else 1
            piece = -(-total // world_size) if tensor.ndim else 1
            start = min(rank * piece, total) if tensor.ndim else 0
            count = min(piece, total - start)
            model[name] = tensor[start : start + count].clone() if tensor.ndim else tensor
            rows[name] = [start, count, total]
        content = {
            "model": model,
            "optimizer": {},
            "rows": rows,
            "rank": rank,
            "world_size": world_size,
            "iteration": 3,
        }
        torch.save(content | changes.get(f"rank_{rank}", {}), folder / f"model_0000003.rank_{rank}.pth")
    return str(folder / "model_0000003.rank_{rank}.pth")


TENSORS = {
    "wide": torch.arange(14.0).reshape(7, 2),
    "short": torch.arange(3.0),
    "one": torch.ones(1, 5),
    "none": torch.ones(0, 5),
    "scalar": torch.tensor(4.0),
}


@pytest.mark.parametrize("writers", [1, 2, 3, 5])
@pytest.mark.parametrize("readers", [1, 2, 4])
def test_what_some_processes_wrote_any_number_reads(tmp_path: Path, writers: int, readers: int) -> None:
    files = RankFiles(write(tmp_path, TENSORS, writers))
    assert files.world_size == writers
    assert files.names("model") == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert files.shape("model", name) == tensor.shape
        if tensor.ndim == 0:
            assert torch.equal(files.pieces("model", name, Rows(0, 1, 1))[0], tensor)
            continue
        total = tensor.shape[0]
        piece = -(-total // readers)
        starts = [min(rank * piece, total) for rank in range(readers)]
        pieces = [
            torch.cat(files.pieces("model", name, Rows(start, min(piece, total - start), total))) for start in starts
        ]
        assert torch.equal(torch.cat(pieces), tensor), name
        assert all(part.shape[1:] == tensor.shape[1:] for part in pieces)


def test_replicas_are_read_once(tmp_path: Path) -> None:
    tensor = torch.arange(4.0)
    for rank in range(2):
        content = {"model": {"a": tensor}, "optimizer": {}, "rows": {"a": [0, 4, 4]}, "iteration": 3}
        torch.save(content | {"rank": rank, "world_size": 2}, tmp_path / f"m_0000003.rank_{rank}.pth")
    files = RankFiles(str(tmp_path / "m_0000003.rank_{rank}.pth"))
    (whole,), (middle,) = files.pieces("model", "a", Rows(0, 4, 4)), files.pieces("model", "a", Rows(1, 2, 4))
    assert torch.equal(whole, tensor)
    assert torch.equal(middle, tensor[1:3])


@pytest.fixture
def one_process() -> Iterator[None]:
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_a_sharded_tensor_is_held_in_part() -> None:
    line = init_device_mesh("cpu", (1,))
    sharded = distribute_tensor(torch.zeros(3, 2), line, [Shard(0)])
    assert held_rows(sharded) == Rows(0, 3, 3)
    local_part(sharded).fill_(2)
    assert torch.equal(sharded.full_tensor(), torch.full((3, 2), 2.0)), "memory is shared"
    plane = init_device_mesh("cpu", (1, 1))
    assert held_rows(distribute_tensor(torch.zeros(5, 2), plane, [Replicate(), Shard(0)])) == Rows(0, 5, 5)


def test_the_rank_in_a_path_is_the_only_thing_filled_in_and_a_path_without_it_is_refused() -> None:
    assert rank_file("/a/{b}/{0}/m.rank_{rank}.pth", 12) == "/a/{b}/{0}/m.rank_12.pth"
    assert rank_file(rank_pattern("/a_{rank}/m_1.rank_0.pth"), 12) == "/a_{rank}/m_1.rank_12.pth", "a folder's own name"
    for path in ("x/model_0000001.rank_12.pth", "x/model_0000001.rank_{rank}.pth"):
        assert rank_pattern(path) == "x/model_0000001.rank_{rank}.pth"
    message = r"is not a rank file: expected a name such as model_0011249\.rank_\{rank\}\.pth"
    for path in ("model.pth", "model.rank_.pth", "model.rank_0.pth.bak", ""):
        with pytest.raises(ValueError, match=message):
            rank_pattern(path)


def test_a_missing_file_is_named_with_what_lies_beside_it(tmp_path: Path) -> None:
    pattern = write(tmp_path, TENSORS, 3)
    (tmp_path / "model_0000003.rank_1.pth").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"rank_1\.pth does not exist; beside it lie .*rank_0\.pth, .*rank_2\.pth"
    ):
        RankFiles(pattern)
    with pytest.raises(FileNotFoundError, match=r"/no/model_1\.rank_0\.pth does not exist$"):
        RankFiles("/no/model_1.rank_{rank}.pth")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 0}, "is of rank 0 of 2, iteration 3; rank 0 is of 2, iteration 3"),
        ({"world_size": 3}, "is of rank 1 of 3, iteration 3"),
        ({"iteration": 2}, "is of rank 1 of 2, iteration 2"),
    ],
)
def test_files_of_different_runs_are_not_mixed(tmp_path: Path, change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=rf"rank_1\.pth {message}"):
        RankFiles(write(tmp_path, TENSORS, 2, rank_1=change))


GARBAGE = {
    "empty": b"",
    "text": b"hello\nworld\n",
    "zeros": bytes(4096),
    "zip head": b"PK\x03\x04" + bytes(100),
    "pickle": pickle.dumps({"model": 1}),
    "png": b"\x89PNG\r\n\x1a\n" + bytes(100),
}


@pytest.mark.parametrize("kind", [*GARBAGE, 0.1, 0.5, 0.9, 0.999])
def test_garbage_and_part_of_a_file_are_no_checkpoint(tmp_path: Path, kind: str | float) -> None:
    if isinstance(kind, str):
        content = GARBAGE[kind]
    else:
        content = Path(write(tmp_path, {"big": torch.zeros(1000, 10)}, 1).format(rank=0)).read_bytes()
        content = content[: int(len(content) * kind)]
    (tmp_path / "m.rank_0.pth").write_bytes(content)
    with pytest.raises(ValueError, match=rf"m\.rank_0\.pth \({len(content)} bytes\) is truncated or not a ") as failure:
        load_file(tmp_path / "m.rank_0.pth")
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize("content", [{"teacher": {}}, [1, 2], torch.zeros(3), {"model": {}, "rank": 0}])
def test_other_files_of_torch_are_told_apart(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "m.rank_0.pth")
    with pytest.raises(ValueError, match=r"is not a checkpoint of a training run: it lacks .*optimizer"):
        load_file(tmp_path / "m.rank_0.pth")
    with pytest.raises(FileNotFoundError):
        load_file(tmp_path)
