"""One process, two sharded and two replicated processes train alike; rank files load on any number of processes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from dinov2.checkpoint.checkpointer import FSDPCheckpointer
from dinov2.checkpoint.sharding import full_state_dict
from dinov2.config import Config, load_config
from dinov2.data.collate import PretrainingBatch
from dinov2.distributed import get_rank, get_world_size
from dinov2.loop.optimization import Optimization, agree
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.train.setup import build_optimizer, parallelize
from dinov2.train.ssl_meta_arch import SSLMetaArch, update_teacher
from dinov2.utils.seeds import seed_everything
from tests.process_end import leave_group

STEPS = 10
CPU = torch.device("cpu")
IMAGES = 8


def make_config(centering: str, strategy: str) -> Config:
    values: dict[str, Any] = {
        "dino.head_n_prototypes": 64,
        "dino.head_hidden_dim": 48,
        "dino.head_bottleneck_dim": 16,
        "dino.koleo_all_ranks": True,
        "ibot.separate_head": True,
        "ibot.head_n_prototypes": 48,
        "ibot.head_hidden_dim": 48,
        "ibot.head_bottleneck_dim": 16,
        "crops.global_crops_size": 32,
        "crops.local_crops_size": 16,
        "crops.local_crops_number": 2,
        "student.patch_size": 8,
        "student.drop_path_rate": 0.0,
        "student.block_chunks": 2,
        "train.centering": centering,
    }
    for network in ("student", "teacher"):
        for part in ("backbone", "dino_head", "ibot_head"):
            values[f"compute_precision.{network}.{part}.sharding_strategy"] = strategy
    return load_config(values)


def make_batch(step: int) -> PretrainingBatch:
    """This process's part of a global batch of eight images that is the same however many processes there are."""
    generator = torch.Generator().manual_seed(step)
    crops = torch.randn(2, IMAGES, 3, 32, 32, generator=generator)
    local = torch.randn(2, IMAGES, 3, 16, 16, generator=generator)
    masks = torch.rand(2, IMAGES, 16, generator=generator) < 0.3
    masks[0, :3] = False
    mine = slice(get_rank(), None, get_world_size())
    masks = masks[:, mine].flatten(0, 1)
    weights = (1 / masks.sum(-1).clamp(min=1))[:, None].expand_as(masks)[masks]
    return PretrainingBatch(
        global_crops=crops[:, mine].flatten(0, 1),
        local_crops=local[:, mine].flatten(0, 1),
        masks=masks,
        mask_indices=masks.flatten().nonzero().flatten(),
        mask_weights=weights,
        num_masked=int(masks.sum()),
        upperbound=masks.numel(),
        names=(),
        unreadable=(),
    )


def build(config: Config) -> tuple[SSLMetaArch, Optimization]:
    seed_everything(0)
    backbones = [
        DinoVisionTransformer(img_size=32, patch_size=8, embed_dim=36, depth=3, num_heads=2, init_values=0.1)
        for _ in range(2)
    ]
    model = SSLMetaArch(config, (backbones[0], backbones[1])).train()
    parallelize(model, config, CPU)
    optimizer = build_optimizer(config, model.student, CPU)
    return model, Optimization(model.student, optimizer, torch.amp.GradScaler("cpu", enabled=False), clip_grad=0.3)


def train(model: SSLMetaArch, optimization: Optimization, steps: range) -> list[dict[str, float]]:
    history = []
    for step in steps:
        losses = model.forward_backward(make_batch(step), teacher_temp=0.05)
        norms = {f"norm_{name}": norm.item() for name, norm in optimization.clip().items()}
        optimization.step(lr=1e-3, weight_decay=0.04)
        update_teacher(model.student, model.teacher, 0.9)
        history.append(agree(losses, stop=False).losses | norms)
    return history


def run_all(rank: int, world_size: int, folder: Path) -> None:
    """Trains every variant; the main process writes the histories, and all write checkpoints of one variant."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / f"store_{world_size}"), world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    histories = {}
    strategies = ["SHARD_GRAD_OP"] if world_size == 1 else ["SHARD_GRAD_OP", "FULL_SHARD", "NO_SHARD"]
    for centering in ("centering", "sinkhorn_knopp"):
        for strategy in strategies:
            model, optimization = build(make_config(centering, strategy))
            histories[f"{centering} {strategy}"] = train(model, optimization, range(STEPS))
    # A checkpoint after half the steps, resumed by as many and by another number of processes.
    model, optimization = build(make_config("centering", "SHARD_GRAD_OP"))
    train(model, optimization, range(5))
    own = folder / f"written_by_{world_size}"
    own.mkdir(exist_ok=True)
    FSDPCheckpointer(model, own, optimizer=optimization.optimizer, asynchronous=False).save(
        "model_0000004", iteration=4, note="kept"
    )
    histories["resumed"] = resume(own)
    other = folder / f"written_by_{3 - world_size}"
    if other.exists():
        histories["resumed from the other"] = resume(other)
    state = full_state_dict(model)
    if rank == 0:
        (folder / f"histories_{world_size}.json").write_text(json.dumps(histories))
        torch.save(state, folder / f"state_{world_size}.pth")
    leave_group()


def resume(folder: Path) -> list[dict[str, float]]:
    model, optimization = build(make_config("centering", "SHARD_GRAD_OP"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    checkpointer = FSDPCheckpointer(model, folder, optimizer=optimization.optimizer)
    extras = checkpointer.resume_or_load("", resume=True)
    assert extras["iteration"] == 4
    assert extras["note"] == "kept"
    return train(model, optimization, range(5, STEPS))


@pytest.fixture(scope="module")
def histories(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    folder = tmp_path_factory.mktemp("equality")
    found = {}
    for world_size in (2, 1):
        mp.spawn(run_all, args=(world_size, folder), nprocs=world_size)
        found[world_size] = json.loads((folder / f"histories_{world_size}.json").read_text())
    found[0] = [torch.load(folder / f"state_{size}.pth", weights_only=True) for size in (1, 2)]
    return found


def assert_same(ours: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    assert len(ours) == len(expected)
    for step, (row, other) in enumerate(zip(ours, expected, strict=True)):
        assert row.keys() == other.keys()
        for name in row:
            assert row[name] == pytest.approx(other[name], rel=2e-5, abs=1e-7), (step, name)


@pytest.mark.slow
@pytest.mark.parametrize("centering", ["centering", "sinkhorn_knopp"])
@pytest.mark.parametrize("strategy", ["SHARD_GRAD_OP", "FULL_SHARD", "NO_SHARD"])
def test_two_processes_train_as_one(histories: dict[int, Any], centering: str, strategy: str) -> None:
    assert_same(histories[2][f"{centering} {strategy}"], histories[1][f"{centering} SHARD_GRAD_OP"])


@pytest.mark.slow
def test_a_resumed_run_goes_on_exactly(histories: dict[int, Any]) -> None:
    for world_size in (1, 2):
        undisturbed = histories[world_size]["centering SHARD_GRAD_OP"][5:]
        assert histories[world_size]["resumed"] == undisturbed


@pytest.mark.slow
def test_rank_files_of_two_load_on_one(histories: dict[int, Any]) -> None:
    assert_same(histories[1]["resumed from the other"], histories[1]["resumed"])


@pytest.mark.slow
def test_the_gathered_state_is_whole(histories: dict[int, Any]) -> None:
    one, two = histories[0]
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=2e-5, msg=name)
