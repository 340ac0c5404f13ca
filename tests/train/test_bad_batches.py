"""Batches that give NaN or infinity: nothing changes, they are written down, skipped, and counted across resumes."""

import math
import signal
from pathlib import Path

import pytest
import torch
from train_stand_ins import (
    LAST,
    Train,
    assert_identical,
    assert_same_run,
    checkpoint,
    crashed_run,
    damaged,
    iterations,
    losses,
    poison,
    records,
)

from dinov2.data.collate import PretrainingBatch
from dinov2.loop.optimization import NonFiniteLossError
from dinov2.train import setup as preparation
from dinov2.train.bad_batches import BadBatches, load_bad_batch
from dinov2.train.ssl_meta_arch import SSLMetaArch
from dinov2.utils.files import HeldFolder, sidecar

CPU = torch.device("cpu")


@pytest.mark.parametrize("what", ["pixel", "gradient"])
def test_a_bad_batch_leaves_everything_as_it_was(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    gradients = []

    def note_gradients(_: int, model: SSLMetaArch) -> None:
        gradients.append([parameter for parameter in model.parameters() if parameter.grad is not None])

    poison(monkeypatch, {1}, what, before=note_gradients)
    assert train(tmp_path, "train.OFFICIAL_EPOCH_LENGTH=1", "optim.epochs=3", "train.keep_last=0") == 0
    before, bad, after = (checkpoint(tmp_path, step) for step in range(3))
    for part in ("model", "optimizer", "scaler", "targets"):
        assert_identical(bad[part], before[part])
    assert gradients == [[], [], []]
    assert [found["bad_batches"] for found in (bad, after)] == [
        {"in_a_row": 1, "total": 1},
        {"in_a_row": 0, "total": 1},
    ]


def test_a_signal_during_a_bad_batch_stops_the_run(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, {1}, before=lambda number, _: number == 1 and signal.raise_signal(signal.SIGINT))
    assert train(tmp_path) == 130
    assert checkpoint(tmp_path, 1)["bad_batches"] == {"in_a_row": 1, "total": 1}


def test_a_run_goes_on_without_the_bad_batch_and_keeps_it(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = poison(monkeypatch, {2, 3})
    assert train(tmp_path, "train.log_period=2") == 0
    assert sorted(path.name for path in (tmp_path / "bad_batches").iterdir()) == [
        f"iteration_000000{number}.rank_0.pth{end}" for number in (2, 3) for end in ("", ".sha256")
    ]
    batch, about = load_bad_batch(tmp_path / "bad_batches" / "iteration_0000002.rank_0.pth")
    ours, expected = dict(vars(batch)), dict(vars(seen[2]))
    ours["global_crops"][0, 0, 0, 0] = expected["global_crops"][0, 0, 0, 0] = 0
    assert_identical(ours, expected)
    assert (about["iteration"], about["rank"], about["seed"]) == (2, 0, 0)
    assert math.isnan(about["losses"]["total_loss"])
    lines = {line["iteration"]: line for line in records(tmp_path) if "evaluation" not in line}
    assert "skipped_batches" not in lines[1]
    assert "total_loss" not in lines[3], "the period held no step"
    assert [lines[at]["skipped_batches"] for at in (3, LAST)] == [2, 2]
    assert math.isfinite(lines[LAST]["total_loss"])
    log = (tmp_path / "log" / "log.txt").read_text()
    assert "BATCH SKIPPED (2 in a row" in log
    assert checkpoint(tmp_path)["bad_batches"] == {"in_a_row": 0, "total": 2}


def test_the_count_in_a_row_is_resumed(train: Train, tmp_path: Path) -> None:
    """Iterations 1 to 4 are bad; the run dies in 3 after it has saved 2: the next start has one more to skip."""
    pairs = ("train.max_bad_steps=3", "optim.epochs=3")
    with pytest.MonkeyPatch.context() as monkeypatch:
        poison(monkeypatch, {1, 2, 3, 4})
        with pytest.raises(NonFiniteLossError, match="at iteration 4"):
            train(tmp_path, *pairs)
    assert checkpoint(tmp_path, 2)["bad_batches"] == {"in_a_row": 2, "total": 2}
    with pytest.MonkeyPatch.context() as monkeypatch:
        poison(monkeypatch, {0, 1})  # the same iterations, 3 and 4
        with pytest.raises(NonFiniteLossError, match="at iteration 4"):
            train(tmp_path, *pairs)
    assert train(tmp_path, *pairs) == 0
    assert iterations(tmp_path)[-1] == 8


def scale_loss(monkeypatch: pytest.MonkeyPatch, scale: float) -> None:
    """Lets a run on the processor scale its loss, as one in fp16 does on a GPU."""
    monkeypatch.setattr(
        preparation, "build_grad_scaler", lambda *_: torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=999)
    )


def test_the_loss_scale_shrinks_first_and_then_the_batch_is_bad(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Iterations 1 to 3 overflow: the scale goes from 4 to 2 to 1, and at 1 the gradient is the batch's own fault."""
    scale_loss(monkeypatch, 4.0)
    poison(monkeypatch, {1, 2, 3}, "gradient", math.inf)
    assert train(tmp_path, "train.saveckp_freq=1", "train.keep_last=0") == 0
    found = [checkpoint(tmp_path, step) for step in (2, 5)]
    assert [content["scaler"]["scale"] for content in found] == [1.0, 1.0]
    assert [content["bad_batches"] for content in found] == [{"in_a_row": 0, "total": 0}, {"in_a_row": 0, "total": 1}]
    assert [set(map(float, content["optimizer"]["step"].values())) for content in found] == [{1.0}, {3.0}]
    log = (tmp_path / "log" / "log.txt").read_text()
    assert log.count("BATCH SKIPPED") == 1
    assert [path.name for path in (tmp_path / "bad_batches").glob("*.pth")] == ["iteration_0000003.rank_0.pth"]
    assert "the gradient of backbone is not finite at iteration 3" in log


def test_a_loss_that_is_not_finite_is_bad_at_any_scale_and_leaves_it(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scale_loss(monkeypatch, 1024.0)
    poison(monkeypatch, {1})
    assert train(tmp_path) == 0
    assert checkpoint(tmp_path)["scaler"]["scale"] == 1024.0
    assert checkpoint(tmp_path)["bad_batches"] == {"in_a_row": 0, "total": 1}


def test_overflows_without_end_stop_the_run(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scale_loss(monkeypatch, 4.0)
    seen = poison(monkeypatch, range(1, 99), "gradient", math.inf)
    with pytest.raises(NonFiniteLossError, match="at iteration 5"):
        train(tmp_path, "train.max_bad_steps=2", "optim.epochs=4")
    assert len(seen) == 6, "one good, two for the scale, three bad ones"


@pytest.mark.parametrize(
    ("what", "bad", "bad_after"), [("pixel", {1}, set()), ("gradient", {1, 4}, {1})], ids=["NaN", "between overflows"]
)
def test_a_resumed_run_equals_an_undisturbed_one(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, bad: set[int], bad_after: set[int]
) -> None:
    """It is resumed at iteration 3; those that follow are bad again."""
    if what == "gradient":
        scale_loss(monkeypatch, 4.0)
    with monkeypatch.context() as patch:
        poison(patch, bad, what, math.inf)
        assert train(tmp_path / "whole", "train.log_period=4") == 0
    with monkeypatch.context() as patch:
        poison(patch, bad, what, math.inf)
        crashed_run(train, tmp_path / "resumed", "train.log_period=4", at=3)
    with monkeypatch.context() as patch:
        poison(patch, bad_after, what, math.inf)
        assert train(tmp_path / "resumed", "train.log_period=4") == 0
    assert checkpoint(tmp_path / "whole")["bad_batches"]["total"] == (what == "pixel")
    assert_same_run(tmp_path / "resumed", tmp_path / "whole")
    assert losses(tmp_path / "whole")


def test_a_folder_that_cannot_be_written_does_not_end_the_run(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, {1})
    (tmp_path / "bad_batches").write_text("a file where the folder should be")
    assert train(tmp_path) == 0
    assert "could not be written" in (tmp_path / "log" / "log.txt").read_text()


def test_only_so_many_files_are_written_and_damage_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dinov2.train.bad_batches.MAX_FILES", 2)
    batch = PretrainingBatch(
        global_crops=torch.zeros(2, 3, 8, 8), local_crops=None, masks=torch.zeros(2, 1, dtype=torch.bool),
        mask_indices=torch.zeros(0, dtype=torch.int64), mask_weights=torch.zeros(0), num_masked=0, upperbound=1,
        names=("a",), unreadable=(),
    )  # fmt: skip
    error = NonFiniteLossError("bad", {"total_loss": math.nan}, {})
    bad = BadBatches(HeldFolder(tmp_path), 100, 0)
    for iteration in range(4):
        bad.begin_step()
        bad.skip(error, batch, iteration, 0.04)
    paths = sorted((tmp_path / "bad_batches").glob("*.pth"))
    assert len(paths) == 2
    assert bad.total == 4
    for content in damaged(paths[0].read_bytes()):
        paths[0].write_bytes(content)
        with pytest.raises(ValueError, match=r"iteration_0000000\.rank_0\.pth is damaged"):
            load_bad_batch(paths[0])
    sidecar(paths[0]).unlink()
    paths[0].write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"iteration_0000000\.rank_0\.pth is damaged"):
        load_bad_batch(paths[0])
