"""Options of supervised runs: none is dead, the default file shows them all, contradictions are errors."""

import pickle
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from fine_tune_stand_ins import KINDS, finetune, make_small

from dinov2.config import ConfigError, leaf_names, options_without_effect, render_config
from dinov2.config.command_line import parse
from dinov2.config.schema import leaf
from dinov2.tasks import TASKS, load_task_config, parse_task_config
from dinov2.tasks import engine as command
from dinov2.tasks.classification import ClassificationTask
from dinov2.tasks.options import HeadOptions, TaskConfig
from tests.option_recorder import recording


def test_every_option_is_read(parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_small(monkeypatch)
    seen: set[str] = set()

    def load_recording(*arguments: Any) -> TaskConfig:
        config: TaskConfig = recording(load_task_config(*arguments), seen.add)
        return config

    monkeypatch.setattr(command, "load_task_config", load_recording)
    for task in KINDS:
        assert finetune(parts, tmp_path / task, "optim.epochs=1", "backbone.mode=lora", task=task) == 0
    unread = {name for name in set(leaf_names(TaskConfig)) - seen if not name.startswith("head.")}
    assert not unread, f"options that nothing reads: {', '.join(sorted(unread))}"
    # The head's options are copied as a whole, which counts as reading; what its builders look at is tested with them.
    read = {name for task in TASKS.values() for head in task.heads.values() for name in head.options}
    assert {field.name for field in fields(HeadOptions)} - read == {"kind"}


def test_the_default_file_shows_every_option_with_its_default_and_meaning(repository: Path) -> None:
    text = (repository / "configs" / "task_default_config.yaml").read_text(encoding="utf-8")
    assert text.endswith(render_config(load_task_config(), comments=True))
    assert load_task_config(repository / "configs" / "task_default_config.yaml") == load_task_config()


def test_every_shipped_task_config_loads_carries_a_header_and_sets_nothing_in_vain(repository: Path) -> None:
    paths = sorted((repository / "configs" / "task").glob("*.yaml"))
    assert len(paths) >= 4
    for path in paths:
        config = load_task_config(path)
        assert options_without_effect(config) == [], path
        assert (repository / config.backbone.config_file).exists()
        header = path.read_text(encoding="utf-8").split("\n\n")[0]
        assert header.startswith("#")
        assert "ommand" in header
        assert yaml.safe_load(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (["task=depth", "head.kind=mlp"], "head.kind=mlp does not go with task=depth: linear_bins, dpt, conv_decoder"),
        (["task=depth", "head.kind=dpt"], "fuses 4 blocks"),
        (["backbone.blocks=[1,1]"], "names a block twice"),
        (["task=depth", "head.min_depth=5", "head.max_depth=5"], "must be less than head.max_depth"),
        (["task=segmentation", "head.per_part=true"], "head.per_part"),
        (["data.resize=original"], "dense tasks"),
        (["data.reference=true", "head.per_part=true"], "head.per_part looks at all images of a part at once"),
        (["task=depth", "data.reference=true"], "data.reference compares .* does not help task=depth"),
        (["task=segmentation", "loss.cross_entropy=0"], "nothing is left to learn from"),
        (["augmentation.foreground_crop_prob=0.5"], "needs masks"),
        (["task=depth", "augmentation.mosaic=0.5"], "augmentation.mosaic needs masks or boxes"),
        (["augmentation.copy_paste=0.5"], "augmentation.copy_paste needs masks or boxes"),
        (["augmentation.multi_scale=[1.5,1]"], "multi_scale=.*must not exceed the second"),
        (["augmentation.scale_jitter=[0.5,2]", "augmentation.random_resized_crop=[0.5,1]"], "exclude each other"),
        (["augmentation.scale_jitter=[2,0.5]"], "must not exceed"),
        (["augmentation.scale_jitter=[0,1]"], "augmentation.scale_jitter .*must be greater than 0, found 0"),
        (["augmentation.random_resized_crop=[0.5,1.5]"], "augmentation.random_resized_crop .*at most 1, found 1.5"),
        (["augmentation.hflip=1.5"], "augmentation.hflip .*must be at most 1, found 1.5"),
        (["augmentation.rotate90=-0.1"], "augmentation.rotate90 .*must be at least 0"),
        (["augmentation.foreground_crop_prob=2"], "augmentation.foreground_crop_prob .*at most 1"),
        (["augmentation.rotation=200"], "augmentation.rotation .*must be at most 180, found 200"),
        (["augmentation.brightness=-0.1"], "augmentation.brightness .*must be at least 0"),
        (["augmentation.hue=0.6"], "augmentation.hue .*must be at most 0.5"),
        (["augmentation.blur=1.1"], "augmentation.blur .*must be at most 1"),
        (["augmentation.noise=-1"], "augmentation.noise .*must be at least 0"),
        (["evaluation.scales=[1,2]"], "evaluation.scales=.* are for dense tasks"),
        (["data.multi_label=true", "loss.label_smoothing=0.1"], "label_smoothing"),
        (["data.multi_label=true", "head.per_part=true"], "head.per_part"),
        (["optim.warmup_epochs=30"], "exceeds optim.epochs"),
        (["optim.min_lr=1"], "exceeds optim.lr"),
        (["optim.optimiser=sgd"], "unknown option optim.optimiser .* did you mean optim.optimizer"),
        (["optim.nonsense_word=1"], "task_default_config.yaml lists all"),
        (["task=captions"], "not one of classification, segmentation, depth, detection"),
    ],
)
def test_contradictions_are_errors(pairs: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_task_config(None, pairs)


def test_a_further_task_has_a_section_of_its_own(tmp_path: Path) -> None:
    @dataclass(frozen=True, kw_only=True)
    class ToyOptions:
        width: int = leaf(8, "Width of the head.", minimum=1)

    class Toy(ClassificationTask):
        name = "toy"
        options = ToyOptions

    class Plain(ClassificationTask):
        name = "plain"

    tasks = {**TASKS, "toy": Toy, "plain": Plain}
    (tmp_path / "toy.yaml").write_text("task: toy\ntoy: {width: 3}\noptim: {epochs: 7}\n")
    config: Any = load_task_config(tmp_path / "toy.yaml", ["optim.warmup_epochs=2"], tasks)
    assert isinstance(config, TaskConfig)
    assert (config.toy.width, config.optim.epochs, config.optim.warmup_epochs) == (3, 7, 2)
    assert parse_task_config(render_config(config), "text", tasks) == config
    assert pickle.loads(pickle.dumps(load_task_config())) == load_task_config()
    assert load_task_config(None, ["task=plain"], tasks).task == "plain"
    for pair, message in {
        "toy.width=0": "at least 1",
        "toy.witdh=2": "did you mean toy.width",
        "task=tory": "tory' is not one of classification, segmentation, depth, detection, anomaly, toy, plain",
    }.items():
        with pytest.raises(ConfigError, match=message):
            load_task_config(None, [pair], tasks)
    with pytest.raises(ConfigError, match=r"unknown option toy\.width"):
        load_task_config(None, ["toy.width=2"])


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (["head.channels=7", "head.bins=SID"], "head.channels, head.bins have no effect on a linear head for classifi"),
        (["loss.dice=1", "loss.l1=1"], "loss.dice, loss.l1 have no effect on task=classification"),
        (["task=depth", "loss.class_weights=inverse"], "loss.class_weights has no effect on task=depth"),
        (["task=segmentation", "loss.focal_gamma=1"], "loss.focal_gamma has no effect with loss.focal=0"),
        (["backbone.lora_rank=2"], "backbone.lora_rank has no effect with backbone.mode=frozen"),
        (
            ["backbone.mode=full", "backbone.last_blocks=3"],
            "last_blocks has no effect with backbone.mode=full",
        ),
        (["backbone.drop_path_rate=0.1"], "backbone.drop_path_rate has no effect with backbone.mode=frozen"),
        (["optim.backbone_lr_mult=1"], "optim.backbone_lr_mult has no effect on a frozen backbone"),
        (["optim.schedule=constant", "optim.min_lr=1e-5"], "optim.min_lr has no effect with optim.schedule=constant"),
        (["data.max_photos=3"], "data.max_photos has no effect without head.per_part"),
        (["evaluation.depth_crop=kitti_garg"], "evaluation.depth_crop has no effect on task=classification"),
        (["detection.nms_iou=0.5"], "detection.nms_iou has no effect on task=classification"),
        (
            ["evaluation.threshold=recall", "evaluation.threshold_false_alarms=0.1"],
            "evaluation.threshold_false_alarms has no effect with evaluation.threshold=recall",
        ),
        (
            ["evaluation.threshold_level=part"],
            "evaluation.threshold_level has no effect with evaluation.threshold=auto",
        ),
        (["task=detection", "head.kind=detr", "detection.nms_iou=0.5"], "has no effect on a detr head that sees the"),
        (["head.per_part=true", "evaluation.flips=true"], "evaluation.flips has no effect with head.per_part"),
        (
            ["data.multi_label=true", "evaluation.part_aggregate=mean"],
            "evaluation.part_aggregate has no effect with data.",
        ),
        (
            ["task=anomaly", "optim.lr=1e-4", "augmentation.vflip=0.5", "train.ema_momentum=0.9"],
            "augmentation.vflip, optim.lr, train.ema_momentum have no effect on a memory",
        ),
    ],
)
def test_what_nothing_reads_is_named(pairs: list[str], message: str) -> None:
    (sentence,) = options_without_effect(load_task_config(None, pairs))
    assert message in sentence


@pytest.mark.parametrize(
    "pairs",
    [
        [],
        ["task=segmentation", "loss.focal=1", "loss.focal_gamma=1", "evaluation.boundary_tolerance=0.1"],
        ["backbone.mode=lora", "backbone.lora_rank=2", "optim.layerwise_decay=0.5", "backbone.drop_path_rate=0.1"],
        ["backbone.mode=last_blocks", "backbone.last_blocks=1"],
        ["head.per_part=true", "data.max_photos=3"],
        ["evaluation.threshold=recall", "evaluation.threshold_recall=0.9", "evaluation.threshold_level=part"],
        ["task=detection", "head.detail=false", "detection.nms_iou=0.5", "evaluation.threshold_level=image"],
        ["task=detection", "head.kind=detr", "head.num_queries=10", "head.two_stage=false"],
        ["task=anomaly", "head.kind=reconstruction", "optim.lr=1e-4", "train.ema_momentum=0.9"],
    ],
)
def test_what_acts_is_not(pairs: list[str]) -> None:
    assert options_without_effect(load_task_config(None, pairs)) == []


@pytest.mark.parametrize(
    ("words", "pairs"),
    [
        (["--imgsz", "64"], ["data.image_size=64"]),
        (["--imgsz", "64", "128", "optim.epochs=2"], ["optim.epochs=2", "data.image_size=[64,128]"]),
        (
            ["optim.epochs=2", "--image-size=32", "--output-dir", "o"],
            ["optim.epochs=2", "data.image_size=32", "train.output_dir=o"],
        ),
    ],
)
def test_flags_stand_for_options(words: list[str], pairs: list[str]) -> None:
    assert parse(command.FinetuneCommand, words, description="d", example="e").pairs() == pairs
    load_task_config(None, pairs)


def test_an_option_that_is_written_as_a_flag_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(command.FinetuneCommand, ["--epochs", "5"], description="d", example="e")
    assert "without dashes: optim.epochs=5" in capsys.readouterr().err
