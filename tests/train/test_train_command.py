"""The command ``train``: what a run writes, flags, and a clear message for everything that can be wrong."""

import hashlib
import json
import os
import re
import shlex
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from train_stand_ins import (
    ALL_BF16,
    DOOR,
    LAST,
    OPTIONS,
    TORCHRUN,
    Train,
    checkpoint,
    evaluation_pairs,
    files,
    iterations,
    no_space,
    run_python,
    shared_run,
    small_vit,
    steps,
)

from dinov2.config import Config, ConfigError, leaf_names, load_config
from dinov2.config.command_line import parse
from dinov2.eval.knn import KnnOptions
from dinov2.eval.report.page import ReportOptions
from dinov2.eval.visualize import PictureOptions
from dinov2.models.pretrained import load_pretrained_backbone
from dinov2.tasks import load_task_config
from dinov2.tasks.engine import FinetuneCommand
from dinov2.train import command
from dinov2.train.train import next_commands
from dinov2.utils.errors import RunError
from tests.option_recorder import recording


def evaluated_pairs(parts: Path) -> tuple[str, ...]:
    return (*evaluation_pairs(parts), "evaluation.eval_period_iterations=4", "evaluation.nb_knn=[1,5]")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, parts: Path) -> Path:
    """Folder of a whole run with plots and evaluation, not to be changed."""
    return shared_run(tmp_path_factory, parts, *evaluated_pairs(parts), plots=True)


def contents(folder: Path) -> dict[str, bytes]:
    """All files but the logs."""
    return {name: (folder / name).read_bytes() for name in files(folder) if not name.startswith("log/")}


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """The finished run, to be damaged."""
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def test_a_run_writes_exactly_the_files_that_are_documented(finished: Path) -> None:
    found = files(finished)
    events = {name for name in found if name.startswith("tensorboard/events.out.tfevents.")}
    assert len(events) == 1
    assert found - events == {
        "config.yaml",
        "metrics.jsonl",
        "log/log.txt",
        "last_checkpoint.rank_0",
        "run.lock",
        *(f"model_{step:07d}.rank_0.pth{end}" for step in (2, 3, 5) for end in ("", ".sha256")),
        *(f"plots/{name}.png" for name in ("losses", "schedules", "throughput", "knn", "monitors")),
        "eval/baselines.json",
        "eval/probe_start.pth",
        "eval/probe_start.pth.sha256",
        "eval/best/best.json",
        *(f"eval/best/teacher_checkpoint.pth{end}" for end in ("", ".sha256")),
        *(
            f"eval/training_{step}/{name}"
            for step in (3, 5)
            for name in ("teacher_checkpoint.pth", "teacher_checkpoint.pth.sha256", "results.json", "predictions.csv")
        ),
    }
    assert (finished / "last_checkpoint.rank_0").read_text().strip() == "model_0000005.rank_0.pth"


def test_the_written_config_reloads_to_the_same_options(finished: Path, parts: Path) -> None:
    config = load_config(finished / "config.yaml")
    places = [f"train.dataset_path=GroupedJSON:split=TRAIN:root={parts}", f"train.output_dir={finished}"]
    assert config == load_config(None, [*places, *OPTIONS, *evaluated_pairs(parts)])


def test_rank_files_hold_everything_as_plain_values(finished: Path) -> None:
    content = checkpoint(finished)
    assert content.keys() >= {"model", "optimizer", "scaler", "random", "unreadable", "rows"}
    assert (content["iteration"], content["samples_seen"], content["rank"], content["world_size"]) == (5, 24, 0, 1)
    assert content["optimizer"].keys() == {"step", "exp_avg", "exp_avg_sq"}
    assert {name.partition(".")[0] for name in content["optimizer"]["exp_avg"]} == {"student"}
    assert all(step == 6 for step in content["optimizer"]["step"].values())
    assert {name.partition(".")[0] for name in content["model"]} == {"student", "teacher", "dino_loss", "ibot_loss"}


def test_the_teacher_loads_into_a_backbone(finished: Path) -> None:
    path = finished / "eval" / f"training_{LAST}" / "teacher_checkpoint.pth"
    content = torch.load(path, weights_only=True)
    assert content.keys() == {"teacher", "config"}
    backbone = small_vit(img_size=32, patch_size=8, init_values=0.1)
    report = load_pretrained_backbone(backbone, path)
    assert not report.missing
    assert not report.unexpected
    saved = checkpoint(finished)["model"]
    for name, tensor in backbone.state_dict().items():
        assert torch.equal(tensor, saved[f"teacher.backbone.{name}"]), name
    assert {f"teacher.{name}" for name in content["teacher"]} == {name for name in saved if name.startswith("teacher.")}


def test_evaluation_is_recorded_as_json_and_among_the_metrics(finished: Path) -> None:
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    scores = {line["iteration"]: line["evaluation"] for line in lines if "evaluation" in line}
    assert scores.keys() == {-1, 3, 5}
    assert scores[5].keys() >= {"knn_image_accuracy_k1", "knn_part_auroc_k5"}
    assert all(0 <= value <= 1 for name, value in scores[5].items() if name.startswith("knn_"))
    results = json.loads((finished / "eval" / "training_5" / "results.json").read_text())
    assert results["weights"]["path"].endswith("eval/training_5/teacher_checkpoint.pth")


def test_a_second_start_of_a_finished_run_changes_nothing(
    train: Train, copy: Path, parts: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = contents(copy)
    assert train(copy, *evaluated_pairs(parts), "optim.base_lr=1") == 0
    assert "the run is complete: 6 of 6 iterations are done" in capfd.readouterr().err
    assert contents(copy) == before


def test_the_teacher_of_the_newest_checkpoint_is_written_and_scored_alone(
    train: Train, copy: Path, parts: Path
) -> None:
    expected = torch.load(copy / "eval" / "training_5" / "teacher_checkpoint.pth", weights_only=True)["teacher"]
    config = (copy / "config.yaml").read_bytes()
    shutil.rmtree(copy / "eval")
    assert train(copy, "--eval-only", *evaluation_pairs(parts), "evaluation.nb_knn=[3]") == 0
    assert files(copy / "eval") == {
        f"training_5/{name}"
        for name in ("teacher_checkpoint.pth", "teacher_checkpoint.pth.sha256", "results.json", "predictions.csv")
    }
    found = torch.load(copy / "eval" / "training_5" / "teacher_checkpoint.pth", weights_only=True)["teacher"]
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert (copy / "config.yaml").read_bytes() == config
    assert steps(copy) == [2, 3, 5]
    assert train(copy, "--eval-only", f"MODEL.WEIGHTS={copy}/model_0000002.rank_{{rank}}.pth") == 0
    assert (copy / "eval" / "training_2" / "teacher_checkpoint.pth").exists()


def test_there_is_nothing_to_evaluate_before_the_first_checkpoint(train: Train, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"{tmp_path} holds no checkpoint to evaluate"):
        train(tmp_path, "--eval-only")


def test_options_may_come_from_a_file_and_flags_have_two_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "my.yaml"
    file.write_text("optim: {epochs: 7, warmup_epochs: 1}\ntrain: {device: cpu, output_dir: from_file}\n")
    seen: list[Config] = []

    def stop_here(config: Config, *_: Any) -> None:
        seen.append(config)
        raise ConfigError("stop here")

    monkeypatch.setattr(command, "check_attention", stop_here)
    for flag in ("--config", "--config-file"):
        with pytest.raises(ConfigError, match="stop here"):
            command.main([flag, str(file), "train.seed=5", "--output-dir", str(tmp_path / "from_flag")])
    assert all((one.optim.epochs, one.train.seed) == (7, 5) for one in seen)
    assert all(one.train.output_dir == str(tmp_path / "from_flag") for one in seen)


def test_the_first_lines_of_the_log_tell_where_and_how_is_computed_and_what_is_idle(finished: Path) -> None:
    lines = (finished / "log" / "log.txt").read_text().splitlines()
    assert "1 process(es) on cpu; the run's folder is" in lines[0]
    assert lines[1].endswith("computing in fp32")
    assert any("WARNING" in line and "ibot.separate_head is false" in line for line in lines[2:4])


WRONG_OPTIONS: dict[str, tuple[str, str]] = {
    "unknown": (
        "train.bach_size_per_gpu=4",
        r"unknown option train\.bach_size_per_gpu.*did you mean train\.batch_size",
    ),
    "ill-typed": ("optim.epochs=many", r"optim\.epochs \(in 'optim\.epochs=many'\): expected a whole number.*'many'"),
    "out of range": ("train.batch_size_per_gpu=0", r"train\.batch_size_per_gpu.*must be at least 1, found 0"),
    "crop": ("crops.global_crops_size=30", r"crops\.global_crops_size=30 is not divisible.*=8; .* are 24 and 32"),
    "nothing to learn": ("dino.loss_weight=0 ibot.loss_weight=0", "nothing is left to learn from"),
    "no dataset": ("train.dataset_path=Grouped:root=/x", r"Grouped.*GroupedJSON"),
    "no root": ("train.dataset_path=GroupedJSON:split=TRAIN:root=/nowhere", r"'/nowhere' is not a folder"),
    "batch": ("train.batch_size_per_gpu=20", r"dataset has 14 images, fewer than one batch of 20"),
    "resume": ("train.resume=true", r"train\.resume=true, but .* holds no checkpoint"),
    "contradiction": ("train.resume=true --no-resume", r"--no-resume contradicts train\.resume"),
    "two": ("MODEL.WEIGHTS=a.rank_0.pth train.resume_path=b.rank_0.pth", "name different checkpoints: a.* and b"),
    "rank file": ("MODEL.WEIGHTS=/x/teacher_checkpoint.pth", r"not a rank file.*model_0011249.*pretrained_weights"),
    "no rank file": ("MODEL.WEIGHTS=/x/model_0000002.rank_{rank}.pth", r"/x/model_0000002\.rank_0\.pth does not exist"),
    "hue": ("crops.color_jitter=[0.4,0.4,0.2,0.6]", r"crops\.color_jitter=\[0\.4, .*0\.6\]: hue.*at most 0\.5"),
    "offset": ("student.interpolate_offset=1", r"student\.interpolate_offset.*must be at most 0\.99, found 1"),
    "tiny crop": ("crops.local_crops_size=8", r"crops\.local_crops_size.*must be at least 9, found 8"),
    "no GPU": ("student.attention_backend=xformers", r"student\.attention_backend=xformers .* CUDA GPUs only.* cpu"),
    "evaluation": (
        "evaluation.train_dataset_path=GroupedJSON:split=TRAIN:root=PARTS "
        "evaluation.val_dataset_path=GroupedJSON:split=VAL:root=/nowhere",
        r"'/nowhere' is not a folder",
    ),
    "evaluation's size": ("evaluation.image_size=30", r"image_size=30 is not divisible by student\.patch_size=8"),
    "probe": ("evaluation.probe_dataset_path=GroupedJSON:split=VAL:root=/nowhere", r"'/nowhere' is not a folder"),
    "metric": ("evaluation.best_metric=auroc", r"best_metric='auroc' must be image_ or part_ and one of accuracy, "),
    "both flags": ("--dry-run --eval-only", "exclude each other"),
    "no weights": ("student.pretrained_weights=/x/vit.pth", r"student\.pretrained_weights=/x/vit\.pth does not exist"),
}


@pytest.mark.parametrize("name", WRONG_OPTIONS)
def test_wrong_options_say_where_what_and_what_is_allowed(train: Train, tmp_path: Path, parts: Path, name: str) -> None:
    pairs, message = WRONG_OPTIONS[name]
    for flags in (["--dry-run"], []):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            train(tmp_path / "run", *pairs.replace("PARTS", str(parts)).split(), *flags)
    assert files(tmp_path) <= {"run/log/log.txt", "run/run.lock"}, "nothing but the reason is left behind"


def test_a_broken_annotation_file_is_named_with_its_row(train: Train, tmp_path: Path, parts: Path) -> None:
    shutil.copytree(parts, tmp_path / "parts")
    annotations = tmp_path / "parts" / "annotations" / "train.json"
    content = json.loads(annotations.read_text())
    del content["data_list"][3]["img_path"]
    dataset = f"train.dataset_path=GroupedJSON:split=TRAIN:root={tmp_path / 'parts'}"
    for text, message in (
        (json.dumps(content), r"train\.json.*3.*img_path"),
        (json.dumps(content)[:100], r"train\.json"),
        (json.dumps({"metainfo": {"classes": ["good"]}, "data_list": []}), r"no images|data_list"),
    ):
        annotations.write_text(text)
        with pytest.raises(ValueError, match=message):
            train(tmp_path / "run", dataset)


def test_a_checkpoint_of_another_architecture_names_the_keys(train: Train, copy: Path) -> None:
    before = contents(copy)
    with pytest.raises(ValueError, match=r"not in the checkpoint: student\.backbone\.register_tokens"):
        train(copy, "student.num_register_tokens=3", "optim.epochs=3")
    with pytest.raises(
        ValueError, match=r"last_layer\.weight_v: \(64, 16\) in the checkpoint, \(96, 16\) in the model"
    ):
        train(copy, "dino.head_n_prototypes=96", "optim.epochs=3")
    assert contents(copy) == before


class Evil:
    """Would run code when unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> Any:
        return (Path.touch, (self.proof,))


@pytest.mark.parametrize("damage", ["half", "text", "one bit", "code", "lacks a rank"])
def test_a_step_that_is_not_good_is_named_and_the_one_before_is_used(
    train: Train, copy: Path, tmp_path: Path, damage: str
) -> None:
    """Code in a file with the right checksum is not run."""
    newest, named = copy / "model_0000005.rank_0.pth", "model_0000005.rank_0.pth"
    whole = newest.read_bytes()
    if damage in ("code", "lacks a rank"):
        torch.save(
            {"model": Evil(tmp_path / "ran")} if damage == "code" else checkpoint(copy) | {"world_size": 2}, newest
        )
        digest = hashlib.sha256(newest.read_bytes()).hexdigest()
        newest.with_name(newest.name + ".sha256").write_text(f"{digest}  {newest.name}\n", encoding="utf-8")
        named = "model_0000005.rank_1.pth" if damage == "lacks a rank" else named
    else:
        flipped = bytearray(whole)
        flipped[len(whole) // 3] ^= 4
        text = b"this is no checkpoint, however long it may be\n" * 100
        newest.write_bytes({"half": whole[: len(whole) // 2], "text": text, "one bit": bytes(flipped)}[damage])
    assert train(copy, "optim.epochs=3") == 0
    assert iterations(copy) == list(range(9))
    log = (copy / "log" / "log.txt").read_text(encoding="utf-8")
    assert named in log
    assert re.search(r"resumed from .*model_0000003\.rank_", log)
    assert not (tmp_path / "ran").exists()


def test_a_missing_checkpoint_file_is_named_and_any_step_can_be_asked_for(train: Train, copy: Path) -> None:
    (copy / "model_0000005.rank_0.pth").unlink()
    assert train(copy, "optim.epochs=3", f"MODEL.WEIGHTS={copy}/model_0000003.rank_0.pth") == 0
    assert iterations(copy) == list(range(9))


def test_pretrained_weights_that_match_too_little(train: Train, tmp_path: Path) -> None:
    state = small_vit(img_size=32, patch_size=8).state_dict()
    few = {name: tensor for name, tensor in state.items() if name.startswith("blocks.0.")}
    torch.save(few, tmp_path / "few.pth")
    with pytest.raises(ValueError, match=r"few\.pth fills only 12 of the \d+ parameters of the backbone"):
        train(tmp_path / "run", f"student.pretrained_weights={tmp_path / 'few.pth'}")
    torch.save(state | {"cls_token": torch.zeros(1, 1, 99)}, tmp_path / "other.pth")
    with pytest.raises(
        ValueError, match=r"other\.pth holds another architecture; .*cls_token \[1, 1, 99\] in the file"
    ):
        train(tmp_path / "run", f"student.pretrained_weights={tmp_path / 'other.pth'}")


def test_a_folder_that_cannot_be_written_stops_the_run_at_once(train: Train, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for flags in ([], ["--dry-run"]):
        with pytest.raises(
            OSError, match=r"file/run \(train\.output_dir\) cannot be written: .*(not a folder|Not a dir)"
        ):
            train(tmp_path / "file" / "run", *flags)
    if os.geteuid() != 0:
        (tmp_path / "locked").mkdir(mode=0o500)
        with pytest.raises(OSError, match=r"locked \(train\.output_dir\) cannot be written"):
            train(tmp_path / "locked")


def test_a_full_disk_leaves_the_checkpoint_before(train: Train, half: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = files(half)

    def full(content: Any, file: Any) -> None:
        file.write(b"the first megabytes")
        no_space()

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        patch.setattr("dinov2.checkpoint.checkpointer.time.sleep", lambda seconds: None)
        with pytest.raises(RunError, match="No space left on device"):
            train(half, "train.max_save_failures=3")
    assert not {name for name in files(half) - before if name.endswith((".pth", ".sha256", ".tmp"))}
    assert train(half) == 0
    assert iterations(half) == list(range(6))


@pytest.mark.slow
def test_the_door_ends_with_the_message_alone(tmp_path: Path) -> None:
    wrong = run_python(DOOR, "train.epochs=3", f"train.output_dir={tmp_path}")
    assert wrong.returncode == 1
    assert wrong.stderr == "error: unknown option train.epochs (in 'train.epochs=3'); did you mean optim.epochs?\n"
    assert not files(tmp_path)


def test_an_unknown_flag_and_a_call_for_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        command.main(["--epochs", "3"])
    assert "--epochs" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="0"):
        command.main(["--help"])
    assert re.search(r"torchrun --nproc_per_node=2 run/train/train\.py --config \S+\.yaml", capsys.readouterr().out)


@pytest.mark.slow
def test_more_processes_than_images(tmp_path: Path, parts: Path) -> None:
    shutil.copytree(parts, tmp_path / "parts")
    annotations = tmp_path / "parts" / "annotations" / "train.json"
    content = json.loads(annotations.read_text())
    annotations.write_text(json.dumps(content | {"data_list": content["data_list"][:1]}))
    dataset = f"train.dataset_path=GroupedJSON:split=TRAIN:root={tmp_path / 'parts'}"
    began = time.monotonic()
    pairs = (*OPTIONS, dataset, f"train.output_dir={tmp_path / 'run'}", "train.batch_size_per_gpu=1")
    finished = run_python(*TORCHRUN, *pairs)
    assert finished.returncode == 1
    assert "error: dataset has 1 images, fewer than the 2 processes: use fewer processes" in finished.stderr
    assert time.monotonic() - began < 60, "no process waits for the other"


def test_the_recorder_notes_reads_and_nothing_else() -> None:
    seen: list[str] = []
    config = recording(Config(), seen.append)
    assert isinstance(config, Config)
    assert config.optim.epochs == 100
    assert config.compute_precision.student.backbone.mixed_precision.param_dtype == "auto"
    assert seen == ["optim.epochs", "compute_precision.student.backbone.mixed_precision.param_dtype"]


def test_every_option_is_read(train: Train, tmp_path: Path, parts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[str] = set()

    def load_recording(*arguments: Any) -> Config:
        config: Config = recording(load_config(*arguments), seen.add)
        return config

    monkeypatch.setattr(command, "load_config", load_recording)
    short = ("optim.epochs=1", "train.OFFICIAL_EPOCH_LENGTH=1")
    train(tmp_path / "shared", *short)
    teacher = tmp_path / "shared" / "eval" / "training_0" / "teacher_checkpoint.pth"
    everything = (
        "ibot.separate_head=true",
        *ALL_BF16,
        f"student.pretrained_weights={teacher}",
        "train.OFFICIAL_EPOCH_LENGTH=1",
        *evaluation_pairs(parts),
    )
    train(tmp_path / "all", *everything, "optim.epochs=1")
    begun = (f"student.pretrained_weights={teacher}", "student.pretrained_heads=true")
    train(tmp_path / "distilled", *short, *begun, f"distillation.teacher_weights={teacher}")
    train(tmp_path / "all", *everything, f"train.resume_path={tmp_path / 'all' / 'model_0000000.rank_0.pth'}")
    unread = set(leaf_names()) - seen
    assert not unread, f"options that nothing reads: {', '.join(sorted(unread))}"


NEXT: dict[str, type] = {
    "tools/report_run.py": ReportOptions,
    "tools/visualize_features.py": PictureOptions,
    "eval/knn.py": KnnOptions,
    "run/train/finetune.py": FinetuneCommand,
}


def test_the_last_lines_are_commands_that_go_on_with_what_the_run_wrote(
    whole: Path, evaluated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_labels, with_labels = list(NEXT)[:2], [*list(NEXT)[:1], *list(NEXT)[2:]]
    for run, doors in ((whole, without_labels), (evaluated, with_labels)):
        lines = (run / "log" / "log.txt").read_text().splitlines()[-len(doors) :]
        commands = [shlex.split(line.partition(" next: ")[2]) for line in lines]
        assert [words[:2] for words in commands] == [["python", door] for door in doors]
        for _, door, *words in commands:
            options = parse(NEXT[door], words, description="", example="")
            named = [word.partition("=")[2] or word for word in words if str(run) in word and "output" not in word]
            assert all(Path(name).exists() for name in named if Path(name).suffix in (".pth", ".yaml")), named
            if isinstance(options, FinetuneCommand):
                config = load_task_config(None, options.pairs())
                assert config.data.image_size == (32, 32)
                assert load_config(config.backbone.config_file) == load_config(run / "config.yaml")
    monkeypatch.chdir(tmp_path)  # no checkout
    for line in next_commands(load_config(evaluated / "config.yaml"), evaluated):
        assert line.startswith(("dinov2 ", "python -m dinov2 "))
