"""The training loop: exact resume, checkpoints kept, full disks and failures that lose nothing, every switch."""

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from train_stand_ins import (
    ALL_BF16,
    EVERY_TWO,
    LAST,
    NETWORKS,
    Crash,
    Train,
    assert_identical,
    assert_same_run,
    before_step,
    checkpoint,
    crash,
    crashed_run,
    evaluation_pairs,
    files,
    iterations,
    losses,
    no_space,
    poison,
    records,
    steps,
)

from dinov2.config import ConfigError, load_config
from dinov2.data.datasets.base import ImageDataset
from dinov2.data.preprocessing import Chain
from dinov2.data.value_range import ValueRange
from dinov2.eval.command import trained_on
from dinov2.eval.results import EvaluationResults
from dinov2.logging import metrics_file
from dinov2.loop.optimization import NonFiniteLossError, Optimization
from dinov2.utils.errors import RunError
from tests.small_disk import mounted_disk

VARIANTS = {
    "sinkhorn, separate head, workers": (
        "train.centering=sinkhorn_knopp",
        "ibot.separate_head=true",
        "train.num_workers=2",
        "train.log_period=2",
    ),
    "bf16": ("train.log_period=4", *ALL_BF16),
}


def test_a_run_that_died_ends_like_an_undisturbed_one(train: Train, half: Path, whole: Path) -> None:
    assert iterations(half)[-1] <= 3
    assert not [name for name in files(half) if name.endswith(".tmp")]
    (half / ".model_0000005.rank_0.pth.abc.tmp").write_bytes(b"half")
    assert train(half) == 0
    assert_same_run(half, whole)
    assert iterations(half) == list(range(LAST + 1))
    assert not [name for name in files(half) if name.endswith(".tmp")], "no half-written file stays"


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_resumed_run_equals_an_undisturbed_one(train: Train, tmp_path: Path, parts: Path, variant: str) -> None:
    pairs = (*VARIANTS[variant], *evaluation_pairs(parts), EVERY_TWO)
    assert train(tmp_path / "whole", *pairs) == 0
    crashed_run(train, tmp_path / "resumed", *pairs, at=4)
    assert train(tmp_path / "resumed", *pairs) == 0
    assert_same_run(tmp_path / "resumed", tmp_path / "whole")


def test_the_number_of_workers_does_not_change_the_run(train: Train, tmp_path: Path, whole: Path) -> None:
    train(tmp_path, "train.num_workers=1", "train.cache_dataset=false")
    assert records(tmp_path) == records(whole)


def test_a_run_goes_on_from_a_named_step_elsewhere(train: Train, tmp_path: Path, whole: Path) -> None:
    pattern = str(whole / "model_0000002.rank_{rank}.pth")
    train(tmp_path / "weights", f"MODEL.WEIGHTS={pattern}")
    train(tmp_path / "path", "train.resume=true", f"train.resume_path={pattern.format(rank=0)}")
    for name in ("weights", "path"):
        assert iterations(tmp_path / name) == [3, 4, LAST]
        assert_identical(checkpoint(tmp_path / name)["model"], checkpoint(whole)["model"])


def test_the_same_command_goes_on_from_its_own_steps_although_it_names_another(
    train: Train, tmp_path: Path, whole: Path
) -> None:
    pairs = (f"MODEL.WEIGHTS={whole / 'model_0000002.rank_{rank}.pth'}", "train.keep_last=0", "optim.epochs=3")
    crashed_run(train, tmp_path, *pairs, at=4)  # after iteration 5 of the run is saved
    assert steps(tmp_path) == [5]
    train(tmp_path, *pairs)
    assert iterations(tmp_path) == list(range(3, 9))
    assert "goes on from its own newest checkpoint" in (tmp_path / "log" / "log.txt").read_text()


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
    train: Train, tmp_path: Path, parts: Path, evaluated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory")

    pairs = (*evaluation_pairs(parts), EVERY_TWO)
    with monkeypatch.context() as patched:
        patched.setattr("dinov2.train.train.evaluate_teacher", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            train(tmp_path, *pairs)
    assert steps(tmp_path) == [1]
    train(tmp_path, *pairs)
    assert [record["iteration"] for record in records(tmp_path)] == [-1, 0, 1, 1, 2, 3, 3, 4, 5, 5]
    assert records(tmp_path) == records(evaluated)


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
    with pytest.raises(NonFiniteLossError, match=rf"{term}.* at iteration 1;.*images.*part_\d+.*\.jpeg"):
        train(tmp_path, "train.max_bad_steps=0")
    assert len(taken) == 1
    assert iterations(tmp_path) == [0]


SWITCHES = {
    "no class-token loss, shared head": ("dino.loss_weight=0",),
    "no class-token loss, separate head": ("dino.loss_weight=0", "ibot.separate_head=true"),
    "no patch loss": ("ibot.loss_weight=0",),
    "no patch loss, separate head": ("ibot.loss_weight=0", "ibot.separate_head=true"),
    "no KoLeo": ("dino.koleo_loss_weight=0",),
    "no local crops": ("crops.local_crops_number=0",),
    "sinkhorn": ("train.centering=sinkhorn_knopp",),
    "no masks": ("ibot.mask_sample_probability=0",),
    "no masks, sinkhorn, separate head": (
        "ibot.mask_sample_probability=0",
        "train.centering=sinkhorn_knopp",
        "ibot.separate_head=true",
    ),
    "all masked": ("ibot.mask_sample_probability=1", "ibot.mask_ratio_min_max=[0.5,1.0]"),
    "not square": ("crops.global_crops_size=[32,48]", "crops.local_crops_size=[16,12]", "student.patch_size=[8,6]"),
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


def test_fp16_on_a_processor_warns_and_computes_in_fp32(train: Train, tmp_path: Path, whole: Path) -> None:
    from dinov2.fsdp import wrap

    wrap._warn_fp16_on_cpu.cache_clear()
    train(tmp_path, *(pair.replace("bf16", "fp16") for pair in ALL_BF16))
    assert losses(tmp_path) == losses(whole)
    assert "processors do not train in it" in (tmp_path / "log" / "log.txt").read_text()


def test_pretrained_weights_start_student_and_teacher(train: Train, tmp_path: Path, whole: Path) -> None:
    teacher = whole / "eval" / f"training_{LAST}" / "teacher_checkpoint.pth"
    frozen = ("optim.base_lr=0", "optim.min_lr=0", "optim.epochs=1")
    train(tmp_path, *frozen, f"student.pretrained_weights={teacher}")
    expected = torch.load(teacher, weights_only=True)["teacher"]
    model = checkpoint(tmp_path, 2)["model"]
    backbone = [name for name in expected if name.startswith("backbone.")]
    assert len(backbone) > 20
    for name in backbone:
        assert torch.equal(model[f"student.{name}"], expected[name]), name
        torch.testing.assert_close(model[f"teacher.{name}"], expected[name], rtol=1e-6, atol=1e-7)
    assert not torch.equal(model["student.dino_head.mlp.0.weight"], expected["dino_head.mlp.0.weight"])


def test_a_folder_with_braces_resumes(train: Train, tmp_path: Path) -> None:
    output = tmp_path / "{part}" / "{0}"
    train(output, "optim.epochs=1")
    train(output)
    assert iterations(output) == list(range(6))


def test_a_range_of_values_is_estimated_once_and_goes_wherever_images_are_read(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The resumed run reads its images as before, though they would tell another range by now."""
    ramp = np.linspace(0, 300, 48 * 48, dtype=np.float32).reshape(48, 48)
    for number in range(8):
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(np.roll(ramp, 100 * number)).save(tmp_path / "images" / f"{number}.tif")
    dataset = f"train.dataset_path=ImageFolder:root={tmp_path / 'images'}:labels=none:light=standardized"
    assert train(tmp_path / "whole", dataset) == 0
    config = load_config(tmp_path / "whole" / "config.yaml")
    assert f"train.dataset_path={config.train.dataset_path}" == f"{dataset}:range=0,300"
    teacher = torch.load(tmp_path / "whole" / "eval" / f"training_{LAST}" / "teacher_checkpoint.pth", weights_only=True)
    assert teacher["value_range"] == [0.0, 300.0]
    assert teacher["light"] == "standardized"
    assert checkpoint(tmp_path / "whole", LAST)["value_range"] == [0.0, 300.0]

    crashed_run(train, tmp_path / "half", dataset, at=4)
    with monkeypatch.context() as context:
        context.setattr(ImageDataset, "estimate_value_range", lambda *_: ValueRange(0, 9))
        assert train(tmp_path / "half", dataset) == 0
        assert load_config(tmp_path / "half" / "config.yaml").train.dataset_path.endswith(":range=0,300")
    assert_same_run(tmp_path / "half", tmp_path / "whole")


def test_preprocessing_goes_wherever_images_are_read_and_resumes_exactly(
    train: Train, tmp_path: Path, parts: Path, whole: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    steps = [{"window": {"low": 1.0, "high": 99.0}}, {"clahe": {"clip_limit": 3.0}}]
    pairs = (f"data.preprocessing={json.dumps(steps)}", *evaluation_pairs(parts), EVERY_TWO)
    assert train(tmp_path / "whole", *pairs, "train.num_workers=1") == 0
    chain = Chain.parse(steps)
    config = load_config(tmp_path / "whole" / "config.yaml")
    assert list(config.data.preprocessing) == steps
    path = tmp_path / "whole" / "eval" / f"training_{LAST}" / "teacher_checkpoint.pth"
    teacher = torch.load(path, weights_only=True)
    assert teacher["preprocessing"] == checkpoint(tmp_path / "whole", LAST)["preprocessing"] == chain.to_values()
    assert trained_on(path, load_config()).preprocessing == chain
    assert losses(tmp_path / "whole") != losses(whole)
    train(tmp_path / "after", f"student.pretrained_weights={path}", "optim.epochs=1")
    assert "data.preprocessing takes the place of the preprocessing that the backbone was tr" in capfd.readouterr().err
    crashed_run(train, tmp_path / "half", *pairs, at=4)
    assert train(tmp_path / "half", *pairs) == 0
    assert_same_run(tmp_path / "half", tmp_path / "whole")
    assert "THE PREPROCESSING CHANGES" not in capfd.readouterr().err

    crashed_run(train, tmp_path / "other", at=4)
    assert train(tmp_path / "other", pairs[0]) == 0
    assert "THE PREPROCESSING CHANGES from here on: it was none and is [{'window'" in capfd.readouterr().err
    with pytest.raises(ConfigError, match=r"data\.preprocessing, step 1: unknown step 'clahee'; did you mean clahe"):
        train(tmp_path / "wrong", "data.preprocessing=[clahee]")


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


EVERY_ITERATION = ("optim.epochs=6", "train.OFFICIAL_EPOCH_LENGTH=1", "train.keep_last=1")  # is saved


def fill(path: Path) -> None:
    """Takes the last byte of a disk."""
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1024))
        except OSError:
            pass


@pytest.mark.parametrize("instead", ["nothing", "an empty folder", "another run", "another link"])
def test_where_the_folder_of_a_run_is_lost_nothing_is_made_or_deleted_and_the_run_fails(
    train: Train, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, parts: Path, instead: str
) -> None:
    """A lost disk leaves an empty folder; a folder is moved, and that of another run comes to lie there."""
    run, moved, other = tmp_path / "run", tmp_path / "moved", tmp_path / "other"
    shutil.copytree(whole, other)
    if instead == "another link":
        moved.mkdir()
        run.symlink_to(moved)

    def lose() -> None:
        run.rename(tmp_path / "link" if run.is_symlink() else moved)
        if instead == "an empty folder":
            run.mkdir()
        elif instead == "another run":
            other.rename(run)
        elif instead == "another link":
            run.symlink_to(other)

    before_step(monkeypatch, {2: lose})
    monkeypatch.setattr("dinov2.checkpoint.checkpointer.time.sleep", lambda _: None)
    pairs = (*evaluation_pairs(parts), EVERY_TWO, "evaluation.nb_knn=[1]", "train.keep_last=1")
    with pytest.raises(RunError, match=r"3 saves in a row failed, .*/run was moved or replaced"):
        train(run, *pairs, "train.max_save_failures=3")
    here = set(files(run)) if run.exists() else set()
    assert here == (files(whole) if instead.startswith("another") else set())
    assert all((run / name).read_bytes() == (whole / name).read_bytes() for name in here if name != "run.lock")
    assert steps(moved) == [1]
    assert iterations(moved) == list(range(LAST + 1)), "open files go where they are"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with mounted_disk(tmp_path / "disk", 24) as folder:
        yield folder


def test_a_real_disk_without_a_byte_and_with_room_again(
    train: Train, tmp_path: Path, parts: Path, small_disk: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pairs = (*EVERY_ITERATION, *evaluation_pairs(parts), EVERY_TWO, "evaluation.nb_knn=[1]")
    assert train(tmp_path / "whole", *pairs) == 0
    other, run = small_disk / "other", small_disk / "run"
    with pytest.MonkeyPatch.context() as patch:
        before_step(patch, {2: lambda: fill(other), 5: other.unlink})
        assert train(run, *pairs) == 0
    assert_same_run(run, tmp_path / "whole")
    told = capfd.readouterr().err
    assert told.count("metrics.jsonl CANNOT BE WRITTEN") == 1
    assert "metrics.jsonl can be written again: " in told
    assert told.count("SAVING FAILED") == 3
    assert "SAVING FAILED (3 in a row" in told
    assert told.count("A TEACHER IS NOT SAVED, training goes on") == 1
    assert told.count("RESULTS OF AN EVALUATION ARE NOT SAVED, training goes on") == 1
    assert told.count("log.txt cannot be written") == 1
    assert "Traceback" not in told
    assert (run / "eval" / "training_5" / "results.json").is_file()
    assert not list(run.rglob("*.tmp"))


@pytest.mark.parametrize("at", [1, 4])
def test_a_kill_while_the_disk_is_full_loses_nothing(train: Train, tmp_path: Path, whole: Path, at: int) -> None:
    """Half a line is on the disk, as a full one leaves it. With 1, the step after iteration 2 has found room."""

    real, calls = metrics_file._write_all, iter(range(99))

    def write(file: Any, data: bytes) -> None:
        if next(calls) <= at:  # the first is a look at the features
            real(file, data)
            return
        file.write(data[:9])
        no_space()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics_file, "_write_all", write)
        before_step(patch, {5: crash})
        with pytest.raises(Crash):
            train(tmp_path)
    whole_lines = (tmp_path / "metrics.jsonl").read_bytes().split(b"\n")
    assert len(whole_lines[:-1]) == at + 1
    assert train(tmp_path) == 0
    assert_same_run(tmp_path, whole)


def test_records_that_are_lost_at_the_end_are_told(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics_file, "_write_all", no_space)
    with pytest.raises(OSError, match=r"metrics\.jsonl cannot be written: its last 5 line\(s\) are lost"):
        train(tmp_path, "optim.epochs=1")
    assert records(tmp_path) == []


def test_results_of_the_last_evaluation_must_be_written(
    train: Train, tmp_path: Path, parts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = (*evaluation_pairs(parts), "optim.epochs=1")
    with monkeypatch.context() as patch:
        patch.setattr(EvaluationResults, "write", no_space)
        with pytest.raises(OSError, match=r"the results in .*training_2 cannot be written: .*No space left"):
            train(tmp_path, *pairs)
    assert train(tmp_path, *pairs) == 0
    assert (tmp_path / "eval" / "training_2" / "results.json").is_file()
    assert len([record for record in records(tmp_path) if "evaluation" in record]) == 2
