"""Two processes that share a batch compute what one process computes on the whole of it."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dinov2.loss.dino_clstoken_loss import DINOLoss
from dinov2.loss.ibot_patch_loss import iBOTPatchLoss
from dinov2.loss.koleo_loss import KoLeoLoss
from tests.processes import run_processes

K, D = 7, 5
SPLITS = {
    "equal": (slice(0, 4), slice(4, 8)),
    "unequal": (slice(0, 2), slice(2, 8)),
    "one empty": (slice(0, 0), slice(0, 8)),
}


def batch(columns: int, seed: int) -> Tensor:
    return torch.randn(8, columns, generator=torch.Generator().manual_seed(seed))


def features_and_weight(rank: int | None) -> tuple[Tensor, Tensor]:
    """Features of this process (of all for ``None``) as a function of one shared weight, as in data parallelism."""
    inputs = batch(D, seed=3).double()
    inputs = inputs if rank is None else inputs[SPLITS["equal"][rank]]
    weight = torch.eye(D, dtype=torch.float64).add(0.1).requires_grad_()
    return inputs @ weight, weight


def work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=2)
    results: dict[str, Any] = {}
    for name, split in SPLITS.items():
        rows = batch(K, seed=0)[split[rank]]
        dino, ibot = DINOLoss(K), iBOTPatchLoss(K)
        for loss in (dino, ibot):
            loss.softmax_center_teacher(rows, 0.05)
            loss.update_center(rows)
        results[f"center {name}"] = dino.next_center
        results[f"ibot center {name}"] = ibot.next_center[0]
        results[f"sinkhorn {name}"] = dino.sinkhorn_knopp_teacher(3 * rows, 0.05)
        count = torch.tensor([len(rows)])
        padded = torch.cat([3 * rows, torch.zeros(2, K)])
        results[f"ibot sinkhorn {name}"] = ibot.sinkhorn_knopp_teacher(padded, 0.05, count)[: len(rows)]
        results[f"count {name}"] = count
    features, weight = features_and_weight(rank)
    loss = KoLeoLoss(all_ranks=True)(features)
    loss.backward()
    single = KoLeoLoss(all_ranks=True)(features[:1].detach())
    results |= {"koleo": loss.detach(), "koleo gradient": weight.grad, "koleo one row": single}
    torch.save(results, folder / f"rank_{rank}.pth")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("two_processes")
    run_processes(work, folder)
    return [torch.load(folder / f"rank_{rank}.pth", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("split", SPLITS)
def test_centre_is_the_mean_of_all_rows(ranks: list[dict[str, Tensor]], split: str) -> None:
    expected = 0.1 * batch(K, seed=0).mean(dim=0, keepdim=True)
    for rank in ranks:
        torch.testing.assert_close(rank[f"center {split}"], expected)
        torch.testing.assert_close(rank[f"ibot center {split}"], expected)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("prefix", ["", "ibot "])
def test_sinkhorn_balances_over_all_processes(ranks: list[dict[str, Tensor]], split: str, prefix: str) -> None:
    expected = DINOLoss(K).sinkhorn_knopp_teacher(3 * batch(K, seed=0), 0.05)
    together = torch.cat([rank[f"{prefix}sinkhorn {split}"] for rank in ranks])
    torch.testing.assert_close(together, expected)
    assert [int(rank[f"count {split}"]) for rank in ranks] == [part.stop - part.start for part in SPLITS[split]]


def test_koleo_over_all_ranks_is_that_of_one_process(
    ranks: list[dict[str, Tensor]],
) -> None:
    features, weight = features_and_weight(None)
    expected = KoLeoLoss()(features)
    expected.backward()
    mean_loss, mean_gradient = ((ranks[0][key] + ranks[1][key]) / 2 for key in ("koleo", "koleo gradient"))
    torch.testing.assert_close(mean_loss, expected.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(mean_gradient, weight.grad, rtol=1e-10, atol=1e-12)
    expected = KoLeoLoss()(features[[0, 4]]).detach()
    for rank in ranks:
        torch.testing.assert_close(rank["koleo one row"], expected)
