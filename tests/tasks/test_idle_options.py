"""Options without effect are named, and none other."""

from pathlib import Path

import pytest

from dinov2.config import options_without_effect
from dinov2.tasks import load_task_config


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
        (["head.per_part=true", "evaluation.flips=true"], "evaluation.flips has no effect with head.per_part"),
        (
            ["data.multi_label=true", "evaluation.part_aggregate=mean"],
            "evaluation.part_aggregate has no effect with data.",
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
    ],
)
def test_what_acts_is_not(pairs: list[str]) -> None:
    assert options_without_effect(load_task_config(None, pairs)) == []


def test_shipped_configs_set_nothing_in_vain(repository: Path) -> None:
    for path in (repository / "configs" / "task").glob("*.yaml"):
        assert options_without_effect(load_task_config(path)) == [], path
