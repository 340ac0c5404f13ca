"""What processes agree on after a step; checked in one process and in two, of which one has the bad batch."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from train_stand_ins import OPTIONS, files, make_small

from dinov2.config import load_config
from dinov2.loop.optimization import Agreement, NonFiniteLossError, Optimization, agree, check_finite
from dinov2.train import train as loop
from dinov2.train.command import build_model
from dinov2.train.ssl_meta_arch import SSLMetaArch
from tests.process_end import leave_group

CPU = torch.device("cpu")


def test_one_process_agrees_with_itself() -> None:
    losses = {"total_loss": torch.tensor(3.0, dtype=torch.bfloat16), "koleo_loss": torch.tensor(0.5)}
    assert agree(losses, stop=False) == Agreement({"total_loss": 3.0, "koleo_loss": 0.5}, stop=False, unreadable=())
    assert agree(losses, stop=True, unreadable=["a", "b"]) == Agreement(
        {"total_loss": 3.0, "koleo_loss": 0.5}, stop=True, unreadable=("a", "b")
    )


def test_finite_values_pass() -> None:
    losses = {"total_loss": torch.tensor(1.0)}
    check_finite(agree(losses, stop=False), losses, {"backbone": torch.tensor(1e30)}, 0, ["a"])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_message_names_term_iteration_and_images(value: float) -> None:
    losses = {"total_loss": torch.tensor(value), "ibot_loss": torch.tensor(value), "koleo_loss": torch.tensor(0.0)}
    images = [f"image_{number}.png" for number in range(11)]
    with pytest.raises(NonFiniteLossError) as failure:
        check_finite(agree(losses, stop=False), losses, {}, 41, images)
    text = str(failure.value)
    assert text.startswith("total_loss, ibot_loss is not finite at iteration 41; no step was taken. rank 0: ")
    assert "image_7.png and 3 more" in text
    assert "image_8.png" not in text
    assert "koleo_loss" not in text


def test_a_gradient_that_is_not_finite_names_the_network() -> None:
    losses = {"total_loss": torch.tensor(1.0)}
    norms = {"backbone": torch.tensor(math.nan), "dino_head": torch.tensor(1.0)}
    with pytest.raises(
        NonFiniteLossError, match=r"the gradient of backbone is not finite at iteration 2;.*images.*a\.png"
    ):
        check_finite(agree(losses, stop=False), losses, norms, 2, ["a.png"])


def run_two(rank: int, folder: Path, parts: Path) -> None:
    """Writes down what this process saw."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 2), rank=rank, world_size=2)
    losses = {"total_loss": torch.tensor(1.0 + rank)}
    seen = []
    for stop, unreadable in ((False, []), (rank == 1, ["bad"] if rank else []), (False, [f"bad of {rank}"])):
        agreement = agree(losses, stop=stop, unreadable=unreadable)
        seen.append([agreement.losses["total_loss"], agreement.stop, list(agreement.unreadable)])
    notes = {"agreed": seen, "stopped": "", "steps": 0}
    with pytest.MonkeyPatch.context() as monkeypatch:
        make_small(monkeypatch)
        poison_rank_one(monkeypatch, rank)
        real = Optimization.step

        def step(self: Optimization, hyperparameters: object) -> None:
            notes["steps"] += 1
            real(self, hyperparameters)

        monkeypatch.setattr(Optimization, "step", step)
        dataset = f"train.dataset_path=GroupedJSON:split=TRAIN:root={parts}"
        config = load_config(None, [*OPTIONS, dataset, "train.batch_size_per_gpu=2", "train.max_bad_steps=0"])
        output = folder / "run"
        output.mkdir(exist_ok=True)
        try:
            loop.do_train(config, build_model(config, CPU), output_dir=output, device=CPU)
        except NonFiniteLossError as error:
            notes["stopped"] = str(error)
    (folder / f"rank_{rank}.json").write_text(json.dumps(notes))
    dist.barrier()
    leave_group()


def poison_rank_one(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    """The third batch of process 1 holds a pixel that is not a number."""
    real = SSLMetaArch.forward_backward
    calls = iter(range(1000))

    def forward_backward(self: SSLMetaArch, batch: object, **keywords: object) -> dict[str, torch.Tensor]:
        if next(calls) == 2 and rank == 1:
            batch.global_crops[0, 0, 0, 0] = math.nan
        return real(self, batch, **keywords)

    monkeypatch.setattr(SSLMetaArch, "forward_backward", forward_backward)


@pytest.mark.slow
def test_two_processes_agree_and_stop_together(tmp_path: Path, parts: Path) -> None:
    mp.spawn(run_two, args=(tmp_path, parts), nprocs=2)
    notes = [json.loads((tmp_path / f"rank_{rank}.json").read_text()) for rank in (0, 1)]
    assert notes[0] == notes[1]
    assert notes[0]["agreed"] == [
        [1.5, False, []],
        [1.5, True, ["bad"]],
        [1.5, False, ["bad of 0", "bad of 1"]],
    ]
    assert notes[0]["steps"] == 2
    assert "is not finite at iteration 2; no step was taken. rank 1: " in notes[0]["stopped"]
    assert "rank 0: " not in notes[0]["stopped"]
    assert not [name for name in files(tmp_path / "run") if name.startswith("model_")]
