"""Several gloo processes must give what one gives."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from eval_stand_ins import Backbone, random_set

from dinov2.eval.log_regression import LogRegressionSettings, eval_log_regression


def evaluate(folder: Path) -> dict[str, object]:
    train, val = random_set(25, 2, seed=0, photos_per_part=3, name="a"), random_set(11, 2, seed=1, name="b")
    settings = LogRegressionSettings(cs=(1e-3, 1e-1, 10.0), n_per_class_list=(-1, 3), n_tries=2, num_resamples=10)
    results = eval_log_regression(Backbone(), train, val, settings, batch_size=4, num_workers=0, output_dir=folder)
    assert results.predictions is not None
    return {**results.as_dict(), "probabilities": results.predictions.probabilities.tolist()}


def run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(os.path.join(folder, "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    torch.save(evaluate(Path(folder) / f"rank_{rank}"), os.path.join(folder, f"{rank}.pt"))
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path: Path) -> None:
    mp.spawn(run_rank, args=(str(tmp_path),), nprocs=2)
    alone = evaluate(tmp_path / "alone")
    probabilities = alone.pop("probabilities")
    for rank in range(2):
        outcome = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert outcome.pop("probabilities") == [pytest.approx(row, abs=1e-4) for row in probabilities]
        assert outcome["chosen"] == alone["chosen"]
        assert outcome["datasets"] == alone["datasets"]
        assert outcome["revision"] == alone["revision"]
        assert outcome["scores"].keys() == alone["scores"].keys()
    names = ("results.json", "predictions.csv", "log_regression.npz")
    assert all((tmp_path / "rank_0" / name).exists() for name in names)
    assert not (tmp_path / "rank_1").exists()
