"""Every evaluator and streamed metric on two gloo processes gives what it gives on one."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from eval_stand_ins import Backbone, TokenBackbone, noisy, random_set, two_sets
from test_streaming import KINDS, filled, pieces

from dinov2.eval import features as sharding
from dinov2.eval.features import extract_features, share_of_this_process
from dinov2.eval.knn import eval_knn
from dinov2.eval.linear import LinearProtocol, eval_linear
from dinov2.eval.log_regression import LogRegressionSettings, eval_log_regression
from dinov2.eval.results import EvaluationResults
from dinov2.eval.retrieval import RetrievalSettings, eval_retrieval
from tests.processes import run_processes


def evaluate_all(folder: Path, linear_batch: int) -> dict[str, EvaluationResults]:
    """Results by the name of their folder."""
    train, val = random_set(25, 2, seed=0, photos_per_part=3, name="a"), random_set(11, 2, seed=1, name="b")
    one, other = random_set(1, 2, seed=1, name="b"), random_set(20, 2, seed=5, photos_per_part=4, name="other")
    common: dict[str, Any] = {"batch_size": 4, "num_workers": 0}
    protocol = LinearProtocol(
        learning_rates=(0.1, 0.01),
        epochs=2,
        epoch_length=5,
        batch_size=linear_batch,
        num_resamples=20,
        class_weighting="balanced",
    )
    regression = LogRegressionSettings(cs=(1e-3, 1e-1, 10.0), n_per_class_list=(-1, 3), n_tries=2, num_resamples=10)
    retrieval = RetrievalSettings(num_resamples=20, whitening=other, **common)
    results = {
        "knn": eval_knn(Backbone(), train, val, output_dir=folder / "knn", **common),
        "knn of one image": eval_knn(Backbone(), train, one, output_dir=folder / "knn of one image", **common),
        "log_regression": eval_log_regression(
            Backbone(), train, val, regression, output_dir=folder / "log_regression", **common
        ),
        "retrieval": eval_retrieval(
            Backbone(), val, train, gallery="train+val", settings=retrieval, output_dir=folder / "retrieval"
        ),
    }
    for name, transform in (("linear", None), ("augmented linear", noisy)):
        results[name] = eval_linear(
            TokenBackbone(),
            *two_sets(3, num_train=31),
            protocol,
            train_transform=transform,
            num_workers=0,
            output_dir=folder / name,
        )
    return results


def run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(os.path.join(folder, "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    sharding.ROWS_AT_A_TIME = 5  # so that a gather takes several pieces
    calls: list[int] = []
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, inputs, _: calls.append(len(inputs[0])) if isinstance(module, Backbone) else None
    )
    train = random_set(25, 2, seed=0, photos_per_part=3, name="a")
    embeddings = extract_features(Backbone(), train, batch_size=4, num_workers=0).embeddings
    results = evaluate_all(Path(folder) / f"rank {rank}", 6)
    handle.remove()
    for kind in KINDS:
        updates = pieces(kind)
        metric = filled(kind, updates[:2] if rank == 0 else updates[2:])
        metric.merge_processes()
        assert metric.compute() == pytest.approx(filled(kind, updates).compute(), rel=1e-12), kind
    plain = {name: json.dumps(found.as_dict()) for name, found in results.items()}
    torch.save({"results": plain, "embeddings": embeddings, "calls": calls}, os.path.join(folder, f"{rank}.pt"))
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path: Path) -> None:
    run_processes(run_rank, str(tmp_path))
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert first["calls"] == second["calls"]  # as many passes of the same sizes, or a sharded model would hang
    alone = evaluate_all(tmp_path / "alone", 12)
    train = random_set(25, 2, seed=0, photos_per_part=3, name="a")
    expected = extract_features(Backbone(), train, batch_size=4, num_workers=0).embeddings
    for share in (first, second):
        torch.testing.assert_close(share["embeddings"], expected, rtol=0, atol=1e-6)
        for name, results in alone.items():
            found = json.loads(share["results"][name])
            if name.startswith("knn") or name == "retrieval":
                assert found == results.as_dict()
            assert (found["chosen"], found["datasets"]) == (results.chosen, results.as_dict()["datasets"])
            assert found["revision"] == results.revision
            assert list(found["scores"]) == list(results.scores)
    for name in alone:
        files = sorted(path.name for path in (tmp_path / "alone" / name).iterdir())
        assert sorted(path.name for path in (tmp_path / "rank 0" / name).iterdir()) == files
        assert {"predictions.csv", "results.json"} < {*files, ""}
        together, single = (read_scores(tmp_path / run / name / "predictions.csv") for run in ("rank 0", "alone"))
        assert together == pytest.approx(single, abs=1e-4)
    for name in ("linear", "augmented linear"):
        paths = (tmp_path / run / name / "linear_checkpoint.pth" for run in ("rank 0", "alone"))
        together, single = (torch.load(path, weights_only=True) for path in paths)
        assert together["settings"] == single["settings"], "one may go on from the other"
        torch.testing.assert_close(together["classifiers"], single["classifiers"], rtol=0, atol=1e-5)
    assert not [path for path in (tmp_path / "rank 1").rglob("*") if path.is_file()]


def read_scores(path: Path) -> list[float]:
    """The column of scores."""
    header, *lines = path.read_text().splitlines()
    place = header.split(",").index("score")
    return [float(line.split(",")[place]) for line in lines]


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
