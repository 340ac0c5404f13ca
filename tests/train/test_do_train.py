"""The training loop: exact resume, checkpoints kept, failures that lose nothing, and every switch of the method."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from train_stand_ins import (
    LAST,
    Train,
    assert_identical,
    assert_same_run,
    checkpoint,
    crashed_run,
    evaluation_pairs,
    files,
    iterations,
    losses,
    poison,
    records,
    steps,
)

from dinov2.data.pretraining import TooManyUnreadableImages
from dinov2.loop.optimization import NonFiniteLossError, Optimization

STUDENT = "compute_precision.student"
TEACHER = "compute_precision.teacher"
NETWORKS = [f"{network}.{part}" for network in (STUDENT, TEACHER) for part in ("backbone", "dino_head", "ibot_head")]
ALL_BF16 = [f"{network}.mixed_precision.param_dtype=bf16" for network in NETWORKS]
VARIANTS = {
    "centering": ("train.log_period=2",),
    "sinkhorn, separate head, workers": (
        "train.centering=sinkhorn_knopp",
        "ibot.separate_head=true",
        "train.num_workers=2",
    ),
    "bf16": ("train.log_period=4", *ALL_BF16),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_resumed_run_equals_an_undisturbed_one(train: Train, tmp_path: Path, parts: Path, variant: str) -> None:
    pairs = (*VARIANTS[variant], *evaluation_pairs(parts), "evaluation.eval_period_iterations=2")
    assert train(tmp_path / "whole", *pairs) == 0
    crashed_run(train, tmp_path / "resumed", *pairs, at=4)
    assert iterations(tmp_path / "resumed")[-1] <= 3
    assert train(tmp_path / "resumed", *pairs) == 0
    assert_same_run(tmp_path / "resumed", tmp_path / "whole")
    assert iterations(tmp_path / "whole")[-1] == LAST


def test_evaluation_does_not_change_the_run(train: Train, tmp_path: Path, parts: Path) -> None:
    train(tmp_path / "without")
    train(tmp_path / "with", *evaluation_pairs(parts), "evaluation.eval_period_iterations=1")
    states = [checkpoint(tmp_path / name) for name in ("with", "without")]
    for part in ("model", "optimizer", "random"):
        assert_identical(states[0][part], states[1][part])


def test_the_number_of_workers_does_not_change_the_run(train: Train, tmp_path: Path) -> None:
    train(tmp_path / "0", "optim.epochs=1")
    train(tmp_path / "1", "optim.epochs=1", "train.num_workers=1", "train.cache_dataset=false")
    assert records(tmp_path / "0") == records(tmp_path / "1")


def test_a_run_goes_on_from_a_named_step_elsewhere(train: Train, tmp_path: Path) -> None:
    train(tmp_path / "whole")
    pattern = str(tmp_path / "whole" / "model_0000002.rank_{rank}.pth")
    train(tmp_path / "weights", f"MODEL.WEIGHTS={pattern}")
    train(tmp_path / "path", "train.resume=true", f"train.resume_path={pattern.format(rank=0)}")
    whole = checkpoint(tmp_path / "whole")
    for name in ("weights", "path"):
        assert iterations(tmp_path / name) == [3, 4, LAST]
        assert_identical(checkpoint(tmp_path / name)["model"], whole["model"])


def test_the_same_command_goes_on_from_its_own_steps_although_it_names_another(train: Train, tmp_path: Path) -> None:
    train(tmp_path / "first", "optim.epochs=1")
    pairs = (f"MODEL.WEIGHTS={tmp_path / 'first' / 'model_0000002.rank_{rank}.pth'}", "train.keep_last=0")
    crashed_run(train, tmp_path / "second", *pairs, "optim.epochs=3", at=4)  # after iteration 5 of the run is saved
    assert steps(tmp_path / "second") == [5]
    train(tmp_path / "second", *pairs, "optim.epochs=3")
    assert iterations(tmp_path / "second") == list(range(3, 9))
    assert "goes on from its own newest checkpoint" in (tmp_path / "second" / "log" / "log.txt").read_text()


def test_a_run_without_resuming_starts_anew_and_keeps_its_own_checkpoints(train: Train, tmp_path: Path) -> None:
    train(tmp_path)
    train(tmp_path, "--no-resume", "optim.epochs=1", "train.keep_last=1", "train.seed=1")
    assert steps(tmp_path) == [2, 5], "the newer step of the earlier start must not push out the new one"
    assert (tmp_path / "last_checkpoint.rank_0").read_text() == "model_0000002.rank_0.pth\n"
    assert iterations(tmp_path) == [0, 1, 2]
    train(tmp_path, "train.keep_last=1", "train.seed=1")
    assert steps(tmp_path) == [5]
    assert iterations(tmp_path) == list(range(6))


def test_checkpoints_of_earlier_starts_count(train: Train, tmp_path: Path) -> None:
    pairs = ("train.keep_last=2", "train.OFFICIAL_EPOCH_LENGTH=1")
    train(tmp_path, *pairs, "optim.epochs=2")
    assert steps(tmp_path) == [0, 1]
    train(tmp_path, *pairs, "optim.epochs=4")
    assert steps(tmp_path) == [2, 3]


def test_all_checkpoints_are_kept_and_the_last_iteration_is_saved_off_period(train: Train, tmp_path: Path) -> None:
    train(tmp_path, "train.keep_last=0", "train.OFFICIAL_EPOCH_LENGTH=1", "optim.epochs=5", "train.saveckp_freq=2")
    assert steps(tmp_path) == [1, 3, 4]


def test_an_evaluation_that_ends_the_run_costs_no_iteration_and_is_made_up(
    train: Train, tmp_path: Path, parts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory")

    pairs = (*evaluation_pairs(parts), "evaluation.eval_period_iterations=2")
    with monkeypatch.context() as patched:
        patched.setattr("dinov2.train.train.evaluate_teacher", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            train(tmp_path / "run", *pairs)
    assert steps(tmp_path / "run") == [1]
    train(tmp_path / "run", *pairs)
    assert [record["iteration"] for record in records(tmp_path / "run")] == [-1, 0, 1, 1, 2, 3, 3, 4, 5, 5]
    train(tmp_path / "whole", *pairs)
    assert records(tmp_path / "run") == records(tmp_path / "whole")


@pytest.mark.parametrize("option", ["root=/nowhere", "split=EVERY", "image size"])
def test_wrong_evaluation_options_stop_the_run_before_it_starts(
    train: Train, tmp_path: Path, parts: Path, option: str
) -> None:
    pairs = list(evaluation_pairs(parts))
    if option == "image size":
        pairs.append("evaluation.image_size=30")
    else:
        name = option.partition("=")[0]
        pairs[1] = ":".join(option if part.startswith(f"{name}=") else part for part in pairs[1].split(":"))
    with pytest.raises((ValueError, FileNotFoundError)):
        train(tmp_path, *pairs)
    assert not steps(tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("what", "value", "term"),
    [
        ("koleo_loss", math.nan, "koleo_loss"),
        ("ibot_loss", math.inf, "ibot_loss"),
        ("gradient", math.nan, "the gradient of backbone"),
        ("pixel", math.nan, "dino_global_crops_loss"),
    ],
)
def test_a_value_that_is_not_finite_stops_before_the_step(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, value: float, term: str
) -> None:
    taken: list[int] = []
    real = Optimization.step
    monkeypatch.setattr(Optimization, "step", lambda self, **rates: (taken.append(1), real(self, **rates))[1])
    poison(monkeypatch, {1}, what, value)
    with pytest.raises(NonFiniteLossError, match=rf"{term}.* at iteration 1;.*rank 0.* images .*part_\d+.*\.jpeg"):
        train(tmp_path, "train.max_bad_steps=0")
    assert len(taken) == 1
    assert iterations(tmp_path) == [0]


def with_bad_images(parts: Path, folder: Path, count: int) -> list[Path]:
    shutil.copytree(parts, folder)
    images = sorted((folder / "train").rglob("*.jpeg"))[:count]
    images[0].unlink()
    for image in images[1:]:
        image.write_bytes(image.read_bytes()[:200])
    return images


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_replaced_counted_and_named(
    train: Train, tmp_path: Path, parts: Path, workers: int
) -> None:
    bad = with_bad_images(parts, tmp_path / "parts", 2)
    dataset = f"train.dataset_path=GroupedJSON:split=TRAIN:root={tmp_path / 'parts'}"
    assert train(tmp_path / "run", dataset, f"train.num_workers={workers}", "data.max_bad_fraction=0.2") == 0
    assert checkpoint(tmp_path / "run")["unreadable"] == {"names": [str(path) for path in bad]}
    log = (tmp_path / "run" / "log" / "log.txt").read_text()
    assert "2 of 14 images unreadable (14.29%)" in log
    if not workers:
        assert all(f"image {path} cannot be read" in log for path in bad)


def test_too_many_unreadable_images_stop_the_run(train: Train, tmp_path: Path, parts: Path) -> None:
    bad = with_bad_images(parts, tmp_path / "parts", 3)
    dataset = f"train.dataset_path=GroupedJSON:split=TRAIN:root={tmp_path / 'parts'}"
    with pytest.raises(TooManyUnreadableImages, match=r"of 14 images .* data.max_bad_fraction \(10\.00%\)") as failure:
        train(tmp_path / "run", dataset, "data.max_bad_fraction=0.1")
    assert sum(str(path) in str(failure.value) for path in bad) == 2, "two are more than a tenth of 14"
    assert (tmp_path / "run" / "last_checkpoint.rank_0").exists(), "what was done until then is saved"


SWITCHES = {
    "no class-token loss, shared head": ("dino.loss_weight=0",),
    "no class-token loss, separate head": ("dino.loss_weight=0", "ibot.separate_head=true"),
    "no patch loss": ("ibot.loss_weight=0",),
    "no patch loss, separate head": ("ibot.loss_weight=0", "ibot.separate_head=true"),
    "no KoLeo": ("dino.koleo_loss_weight=0",),
    "no local crops": ("crops.local_crops_number=0",),
    "sinkhorn": ("train.centering=sinkhorn_knopp",),
    "sinkhorn, separate head": ("train.centering=sinkhorn_knopp", "ibot.separate_head=true"),
    "no masks": ("ibot.mask_sample_probability=0",),
    "no masks, sinkhorn, separate head": (
        "ibot.mask_sample_probability=0",
        "train.centering=sinkhorn_knopp",
        "ibot.separate_head=true",
    ),
    "all masked": ("ibot.mask_sample_probability=1", "ibot.mask_ratio_min_max=[0.5,1.0]"),
    "not square": (
        "crops.global_crops_size=[32,48]",
        "crops.local_crops_size=[16,12]",
        "student.patch_size=[8,6]",
    ),
    "batch of one": ("train.batch_size_per_gpu=1",),
    "batch of one, sinkhorn": ("train.batch_size_per_gpu=1", "train.centering=sinkhorn_knopp"),
    "batch of one, much stochastic depth": ("train.batch_size_per_gpu=1", "student.drop_path_rate=0.5"),
    "registers, chunks, no layer scale": (
        "student.num_register_tokens=2",
        "student.block_chunks=2",
        "student.layerscale=0",
        "student.ffn_layer=swiglufused",
    ),
    "teacher stands still": ("teacher.momentum_teacher=1.0",),
    "bf16 backbone, fp32 heads": ALL_BF16[:1] + ALL_BF16[3:4],
    "fp32 backbone, bf16 heads": ALL_BF16[1:3] + ALL_BF16[4:],
    "bf16 full shard": [*ALL_BF16, *(f"{network}.sharding_strategy=FULL_SHARD" for network in NETWORKS)],
    "bf16 replicated": [*ALL_BF16, *(f"{network}.sharding_strategy=NO_SHARD" for network in NETWORKS)],
}
ABSENT = {
    "no class-token loss, shared head": {"dino_local_crops_loss", "dino_global_crops_loss"},
    "no class-token loss, separate head": {"dino_local_crops_loss", "dino_global_crops_loss", "grad_norm_dino_head"},
    "no patch loss": {"ibot_loss"},
    "no patch loss, separate head": {"ibot_loss"},
    "no KoLeo": {"koleo_loss"},
    "no local crops": {"dino_local_crops_loss"},
}
TERMS = {"dino_local_crops_loss", "dino_global_crops_loss", "koleo_loss", "ibot_loss", "grad_norm_dino_head"}


@pytest.mark.parametrize("name", SWITCHES)
def test_every_switch_trains_saves_and_resumes(train: Train, tmp_path: Path, name: str) -> None:
    assert train(tmp_path, "train.OFFICIAL_EPOCH_LENGTH=1", *SWITCHES[name]) == 0
    (*_, last) = [record for record in records(tmp_path) if "evaluation" not in record]
    assert TERMS - last.keys() == ABSENT.get(name, set())
    assert all(math.isfinite(value) for name, value in last.items() if name != "warnings")
    if name.startswith("no masks"):
        assert last["ibot_loss"] == 0
    model = checkpoint(tmp_path, 1)["model"]
    assert all(torch.isfinite(tensor).all() for tensor in model.values())
    assert all(tensor.dtype == torch.float32 for tensor in model.values())
    assert train(tmp_path, "train.OFFICIAL_EPOCH_LENGTH=1", *SWITCHES[name], "optim.epochs=3") == 0
    assert iterations(tmp_path) == [0, 1, 2]


def test_recomputing_blocks_changes_nothing(train: Train, tmp_path: Path) -> None:
    train(tmp_path / "plain", "student.drop_path_rate=0.4")
    train(tmp_path / "recomputed", "student.drop_path_rate=0.4", "train.activation_checkpointing=true")
    assert losses(tmp_path / "recomputed") == pytest.approx(losses(tmp_path / "plain"), rel=1e-6)
    assert_identical(*(checkpoint(tmp_path / name)["random"] for name in ("plain", "recomputed")))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler looks at everything, and torch warns of some of it
@pytest.mark.parametrize("more", [[], [*ALL_BF16, "train.activation_checkpointing=true"]], ids=["fp32", "bf16 and all"])
def test_compiled_blocks_compute_the_same(train: Train, tmp_path: Path, parts: Path, more: list[str]) -> None:
    pairs = ("optim.epochs=1", "student.drop_path_rate=0", *evaluation_pairs(parts), *more)
    train(tmp_path / "plain", *pairs)
    train(tmp_path / "compiled", *pairs, "train.compile=true")
    torch.compiler.reset()
    tolerance = 2e-2 if more else 1e-4
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=tolerance)
    assert checkpoint(tmp_path / "compiled", 2)["model"].keys() == checkpoint(tmp_path / "plain", 2)["model"].keys()


def test_fp16_on_a_processor_warns_and_computes_in_fp32(train: Train, tmp_path: Path) -> None:
    from dinov2.fsdp import wrap

    train(tmp_path / "fp32", "optim.epochs=1")
    wrap._warn_fp16_on_cpu.cache_clear()
    train(tmp_path / "fp16", "optim.epochs=1", *(pair.replace("bf16", "fp16") for pair in ALL_BF16))
    assert losses(tmp_path / "fp16") == losses(tmp_path / "fp32")
    assert "processors do not train in it" in (tmp_path / "fp16" / "log" / "log.txt").read_text()


def test_pretrained_weights_start_student_and_teacher(train: Train, tmp_path: Path) -> None:
    train(tmp_path / "first", "optim.epochs=1")
    teacher = tmp_path / "first" / "eval" / "training_2" / "teacher_checkpoint.pth"
    frozen = ("optim.base_lr=0", "optim.min_lr=0", "optim.epochs=1")
    train(tmp_path / "second", *frozen, f"student.pretrained_weights={teacher}")
    expected = torch.load(teacher, weights_only=True)["teacher"]
    model = checkpoint(tmp_path / "second", 2)["model"]
    backbone = [name for name in expected if name.startswith("backbone.")]
    assert len(backbone) > 20
    for name in backbone:
        assert torch.equal(model[f"student.{name}"], expected[name]), name
        torch.testing.assert_close(model[f"teacher.{name}"], expected[name], rtol=1e-6, atol=1e-7)
    assert not torch.equal(model["student.dino_head.mlp.0.weight"], expected["dino_head.mlp.0.weight"])


def test_no_half_written_file_stays(train: Train, tmp_path: Path) -> None:
    crashed_run(train, tmp_path, at=4)
    (tmp_path / ".model_0000005.rank_0.pth.abc.tmp").write_bytes(b"half")
    assert not [name for name in files(tmp_path) if name.endswith(".tmp") and "abc" not in name]
    train(tmp_path)
    assert not [name for name in files(tmp_path) if name.endswith(".tmp")]


def test_a_folder_with_braces_resumes(train: Train, tmp_path: Path) -> None:
    output = tmp_path / "{part}" / "{0}"
    train(output, "optim.epochs=1")
    train(output)
    assert iterations(output) == list(range(6))


def test_metrics_are_json_with_the_stated_keys(train: Train, tmp_path: Path) -> None:
    train(tmp_path, "train.log_period=2")
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [-1, 1, 3, 5, 5]
    lines = [line for line in lines if "evaluation" not in line]
    schedules = {"lr", "weight_decay", "momentum", "teacher_temp", "last_layer_lr"}
    for line in lines:
        assert line.keys() >= TERMS | schedules | {"iteration", "total_loss", "grad_norm_backbone", "batch_size"}
        assert line["timing"].keys() >= {"images_per_second", "data_wait_fraction", "iteration_seconds", "memory_gib"}
        total = line["dino_local_crops_loss"] + line["dino_global_crops_loss"]
        assert line["total_loss"] == pytest.approx(total + 2 * (line["koleo_loss"] + line["ibot_loss"]), rel=1e-5)
