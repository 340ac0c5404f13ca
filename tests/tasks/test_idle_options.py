"""Options without effect are named, and none other."""

from pathlib import Path

import pytest

from dinov2.tasks.options import load_task_config
from dinov2.tasks.preparation import warn_of_idle_options


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (["head.channels=7", "head.bins=SID"], "head.channels, head.bins: no effect on a linear head for classifi"),
        (["loss.dice=1", "loss.l1=1"], "loss.dice, loss.l1: no effect on task=classification"),
        (["task=depth", "loss.class_weights=inverse"], "loss.class_weights: no effect on task=depth"),
        (["task=segmentation", "loss.focal_gamma=1"], "loss.focal_gamma: no effect with loss.focal=0"),
        (["backbone.lora_rank=2"], "backbone.lora_rank: no effect with backbone.mode=frozen"),
        (["backbone.mode=full", "backbone.last_blocks=3"], "backbone.last_blocks: no effect with backbone.mode=full"),
        (["backbone.drop_path_rate=0.1"], "backbone.drop_path_rate: no effect with backbone.mode=frozen"),
        (["optim.backbone_lr_mult=1"], "optim.backbone_lr_mult: no effect on a frozen backbone"),
        (["optim.schedule=constant", "optim.min_lr=1e-5"], "optim.min_lr: no effect with optim.schedule=constant"),
        (["data.max_photos=3"], "data.max_photos: no effect without head.per_part"),
        (["evaluation.depth_crop=kitti_garg"], "evaluation.depth_crop: no effect on task=classification"),
        (["head.per_part=true", "evaluation.flips=true"], "evaluation.flips: no effect with head.per_part"),
        (
            ["data.multi_label=true", "evaluation.part_aggregate=mean"],
            "evaluation.part_aggregate: no effect with data.",
        ),
    ],
)
def test_what_nothing_looks_at_is_named(pairs: list[str], message: str, caplog: pytest.LogCaptureFixture) -> None:
    warn_of_idle_options(load_task_config(None, pairs))
    assert len(caplog.messages) == 1
    assert message in caplog.messages[0]


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
def test_what_acts_is_not(pairs: list[str], caplog: pytest.LogCaptureFixture) -> None:
    warn_of_idle_options(load_task_config(None, pairs))
    assert not caplog.messages


def test_shipped_configs_set_nothing_in_vain(repository: Path, caplog: pytest.LogCaptureFixture) -> None:
    for path in (repository / "configs" / "task").glob("*.yaml"):
        warn_of_idle_options(load_task_config(path))
        assert not caplog.messages, path
