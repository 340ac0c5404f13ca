"""Two processes learn what one learns from the same batches, and one goes on from what they saved."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fine_tune_stand_ins import finetune, make_small, metrics_of

from dinov2.tasks.networks import Learner
from dinov2.tasks.package import load_task_package
from dinov2.utils.errors import RESUME_EXIT_CODE, StartAgainError
from tests.processes import forking_context, leave_group, run_processes

SAME = (
    *("backbone.mode=full", "augmentation.hflip=0", "train.ema_momentum=0.9", "optim.warmup_epochs=0"),
    # Standardising looks at the images of one process, as batch norm does.
    *("augmentation.brightness=0", "augmentation.contrast=0", "head.standardize=false"),
)
LOSSES_AGREE = 2e-4


def run_two(
    rank: int,
    parts: Path,
    output: Path,
    pairs: tuple[str, ...],
    stop_after: int | None = None,
    killed: int | None = None,
) -> None:
    """A run that gets a signal before that step, if any; a rank that is killed gets SIGKILL there, and it alone."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{output}_store_{stop_after}", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    with pytest.MonkeyPatch.context() as monkeypatch:
        make_small(monkeypatch)
        if stop_after is not None:
            real, calls = Learner.step, iter(range(1000))

            def train_step(*arguments: Any, **keywords: Any) -> Any:
                if next(calls) == stop_after and killed in (None, rank):
                    os.kill(os.getpid(), signal.SIGUSR1 if killed is None else signal.SIGKILL)
                return real(*arguments, **keywords)

            monkeypatch.setattr(Learner, "step", train_step)
        if killed is not None:
            with pytest.raises(StartAgainError, match=f"a process is lost or hangs: rank {killed} does not answer"):
                finetune(parts, output, *SAME, *pairs)
            os._exit(0)  # the group cannot be left together
        assert finetune(parts, output, *SAME, *pairs) == (0 if stop_after is None else RESUME_EXIT_CODE)
    leave_group()


@pytest.fixture(scope="module")
def alone(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as monkeypatch:
        make_small(monkeypatch)
        assert finetune(parts, output, *SAME, "train.batch_size_per_gpu=8") == 0
    return output


@pytest.mark.parametrize("strategy", ["NO_SHARD", "SHARD_GRAD_OP"])
def test_two_processes_learn_what_one_learns(
    parts: Path, tmp_path: Path, alone: Path, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_small(monkeypatch)
    pairs = (f"train.sharding_strategy={strategy}",)
    run_processes(run_two, parts, tmp_path / "two", pairs)
    ours, theirs = metrics_of(tmp_path / "two"), metrics_of(alone)
    assert [record["iteration"] for record in ours] == [record["iteration"] for record in theirs]
    for record, other in zip(ours, theirs, strict=True):
        if "evaluation" in record:
            assert record["evaluation"] == pytest.approx(other["evaluation"], abs=0.02)
        else:
            assert record["total_loss"] == pytest.approx(other["total_loss"], rel=LOSSES_AGREE)
    for name, tensor in load_task_package(tmp_path / "two" / "best.pth").model.state_dict().items():
        other_tensor = load_task_package(alone / "best.pth").model.state_dict()[name]
        torch.testing.assert_close(tensor, other_tensor, rtol=2e-3, atol=2e-4)


# With running statistics, which every process gathers over its own images.
GATHERING = ("head.standardize=true", "train.ema_momentum=0.9", "optim.epochs=3")


@pytest.fixture(scope="module")
def undisturbed(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    run_processes(run_two, parts, output, GATHERING)
    return output


@pytest.mark.parametrize("stop_after", [1, 3])
def test_two_processes_go_on_exactly(
    parts: Path, tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch, stop_after: int
) -> None:
    make_small(monkeypatch)
    stopped = tmp_path / "stopped"
    for stop in (stop_after, None):
        run_processes(run_two, parts, stopped, GATHERING, stop)
    ours, theirs = (load_task_package(folder / "best.pth") for folder in (stopped, undisturbed))
    for name, tensor in ours.model.state_dict().items():
        assert torch.equal(tensor, theirs.model.state_dict()[name]), name
    for rank in (0, 1):
        name = (undisturbed / f"last_checkpoint.rank_{rank}").read_text().strip()
        states = [torch.load(folder / name, weights_only=True)["model"] for folder in (stopped, undisturbed)]
        assert any(key.endswith("running_mean") for key in states[0])
        for key, tensor in states[0].items():
            assert torch.equal(tensor, states[1][key]), key


def test_a_killed_process_is_named_by_the_other(parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_small(monkeypatch)
    context = forking_context()
    processes = [context.Process(target=run_two, args=(rank, parts, tmp_path / "run", (), 2, 1)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, -signal.SIGKILL]


def test_one_process_goes_on_from_what_two_saved(
    parts: Path, tmp_path: Path, alone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sharded = ("train.sharding_strategy=SHARD_GRAD_OP", "optim.epochs=1", "optim.schedule=constant")
    run_processes(run_two, parts, tmp_path, sharded)
    make_small(monkeypatch)
    pairs = ("train.batch_size_per_gpu=8", "optim.schedule=constant")
    assert finetune(parts, tmp_path, *SAME, *pairs) == 0
    assert finetune(parts, tmp_path / "alone", *SAME, *pairs) == 0
    resumed, whole = (
        [record["total_loss"] for record in metrics_of(folder) if "evaluation" not in record]
        for folder in (tmp_path, tmp_path / "alone")
    )
    assert resumed == pytest.approx(whole, rel=LOSSES_AGREE)
