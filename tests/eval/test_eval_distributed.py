"""Several gloo processes must give what one gives."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from eval_stand_ins import Backbone, random_set

from dinov2.eval import features as sharding
from dinov2.eval.features import extract_features, share_of_this_process
from dinov2.eval.knn import eval_knn
from dinov2.eval.results import RESULTS_FILE


def evaluate(folder: Path, num_val: int) -> dict[str, object]:
    train, val = random_set(25, 2, seed=0, photos_per_part=3, name="a"), random_set(num_val, 2, seed=1, name="b")
    model = Backbone()
    results = eval_knn(model, train, val, batch_size=4, num_workers=0, output_dir=folder)
    return {"embeddings": extract_features(model, train, batch_size=4, num_workers=0).embeddings, **results.as_dict()}


def run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(os.path.join(folder, "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    sharding.ROWS_AT_A_TIME = 5  # so that a gather takes several pieces
    calls: list[int] = []
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, inputs, _: calls.append(len(inputs[0])) if isinstance(module, Backbone) else None
    )
    outcomes = [evaluate(Path(folder) / f"rank_{rank}", num_val) for num_val in (11, 1)]
    handle.remove()
    torch.save({"outcomes": outcomes, "calls": calls}, os.path.join(folder, f"{rank}.pt"))
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path: Path) -> None:
    mp.spawn(run_rank, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert first["calls"] == second["calls"]  # as many passes of the same sizes, or a sharded model would hang
    for position, num_val in enumerate((11, 1)):
        alone = evaluate(tmp_path / "alone", num_val)
        for outcome in (first["outcomes"][position], second["outcomes"][position]):
            torch.testing.assert_close(outcome.pop("embeddings"), alone["embeddings"], rtol=0, atol=1e-6)
            assert outcome == {name: value for name, value in alone.items() if name != "embeddings"}
    assert (tmp_path / "rank_0" / RESULTS_FILE).exists()
    assert not (tmp_path / "rank_1").exists()


@pytest.mark.parametrize(("num_rows", "world_size"), [(1, 1), (1, 4), (5, 2), (8, 4), (9, 4), (100, 7)])
def test_shares_are_equal_and_cover_everything(num_rows: int, world_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharding, "get_world_size", lambda: world_size)
    shares = []
    for rank in range(world_size):
        monkeypatch.setattr(sharding, "get_rank", lambda rank=rank: rank)
        shares.append(share_of_this_process(num_rows))
    assert len({len(share) for share in shares}) == 1
    assert [position for share in shares for position in share][:num_rows] == list(range(num_rows))
    assert sum(len(share) for share in shares) - num_rows < world_size
