"""Linear evaluation by several gloo processes must give what one process gives with the same images per step."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from linear_stand_ins import TokenBackbone, noisy, two_sets

from dinov2.eval.linear import LinearProtocol, eval_linear

PROTOCOL = LinearProtocol(
    learning_rates=(0.1, 0.01), epochs=2, epoch_length=5, batch_size=12, num_resamples=20, class_weighting="balanced"
)


def evaluate(folder: Path, batch_size: int, augment: bool) -> dict[str, Any]:
    results = eval_linear(
        TokenBackbone(),
        *two_sets(3, num_train=31),
        replace(PROTOCOL, batch_size=batch_size),
        train_transform=noisy if augment else None,
        num_workers=0,
        output_dir=folder,
    )
    assert results.predictions is not None
    return {"chosen": results.chosen, "probabilities": torch.from_numpy(results.predictions.probabilities)}


def run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(os.path.join(folder, "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    outcomes = [evaluate(Path(folder) / f"{augment} on {rank}", 6, augment) for augment in (False, True)]
    torch.save(outcomes, os.path.join(folder, f"{rank}.pt"))
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path: Path) -> None:
    mp.spawn(run_rank, args=(str(tmp_path),), nprocs=2)
    shares = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for place, augment in enumerate((False, True)):
        alone = evaluate(tmp_path / "alone" / str(augment), 12, augment)
        saved = torch.load(tmp_path / "alone" / str(augment) / "linear_checkpoint.pth", weights_only=True)
        for share in shares:
            assert share[place]["chosen"] == alone["chosen"]
            torch.testing.assert_close(share[place]["probabilities"], alone["probabilities"], rtol=0, atol=1e-5)
        together = torch.load(tmp_path / f"{augment} on 0" / "linear_checkpoint.pth", weights_only=True)
        assert together["settings"] == saved["settings"], "one may go on from the other"
        torch.testing.assert_close(together["classifiers"], saved["classifiers"], rtol=0, atol=1e-5)
        assert not (tmp_path / f"{augment} on 1" / "linear_checkpoint.pth").exists()
