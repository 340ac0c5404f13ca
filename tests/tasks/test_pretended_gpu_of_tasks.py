"""Task heads and their losses on a pretended GPU; see `tests/train/test_pretended_gpu.py` for what that shows.

Heads over parts are left out: they ask the device how many photos there are, so as not to compute the padding.
"""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dinov2.data.task_dataset import TaskSample
from dinov2.tasks import TASKS, load_task_config
from dinov2.tasks.networks import build_task_optimizer
from dinov2.tasks.package import build_task_model, load_backbone_config
from dinov2.tasks.task import TaskFacts

DEVICE = torch.device("cuda", 0)
PHOTOS, SIDE = 3, 64
CLASSES = ("good", "scratch", "dent")


def make_sample(task: str, *, multi_label: bool) -> TaskSample:
    sample = TaskSample(image=torch.randn(PHOTOS, 3, SIDE, SIDE))
    if task == "classification":
        sample["label"] = torch.ones(PHOTOS, len(CLASSES)) if multi_label else torch.ones(PHOTOS, dtype=torch.int64)
    elif task == "segmentation":
        sample["mask"] = torch.zeros(PHOTOS, SIDE, SIDE, dtype=torch.int64)
    else:
        sample["depth"] = torch.ones(PHOTOS, SIDE, SIDE)
    return sample


@pytest.mark.parametrize(
    ("task", "pairs"),
    [
        ("classification", ("head.kind=linear",)),
        ("classification", ("head.kind=mlp", "head.dropout=0.1", "loss.label_smoothing=0.1")),
        ("classification", ("data.multi_label=true",)),
        ("segmentation", ("head.kind=bn_linear", "head.class_token=true")),
        ("segmentation", ("head.kind=multi_scale", "backbone.blocks=[1,3,5,7]", "loss.dice=1", "loss.focal=1")),
        ("segmentation", ("head.kind=conv_decoder", "loss.dice=1")),
        ("depth", ("head.kind=linear_bins", "loss.silog=1", "loss.gradient=0.5")),
        ("depth", ("head.kind=dpt", "backbone.blocks=[1,3,5,7]", "loss.silog=1", "loss.gradient=0.5")),
        ("depth", ("head.kind=conv_decoder", "loss.silog=0", "loss.gradient=0.5", "loss.l1=1", "loss.mse=1")),
        ("depth", ("head.kind=conv_decoder", "loss.silog=0", "loss.l1=1", "loss.depth_alignment=least_squares")),
    ],
)
def test_losses_stay_on_the_gpu_and_wait_for_nothing(
    task: str, pairs: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = tmp_path / "backbone.yaml"
    backbone.write_text("student: {arch: vit_tiny, patch_size: 16}\ncrops: {global_crops_size: 64}\n")
    config = load_task_config(None, [f"task={task}", f"backbone.config_file={backbone}", "backbone.mode=full", *pairs])
    facts = TaskFacts(unit="m") if task == "depth" else TaskFacts(classes=CLASSES)
    monkeypatch.setattr(nn.init, "trunc_normal_", lambda tensor, *_, **__: tensor)
    with FakeTensorMode(allow_non_fake_inputs=False), torch.device(DEVICE):
        made = TASKS[task](config, facts)
        model = build_task_model(made, load_backbone_config(config), num_outputs=facts.num_outputs).train()
        made.prepare_loss((), DEVICE)
        sample = make_sample(task, multi_label=config.data.multi_label)
        outputs = model(sample["image"])
        terms = made.loss(outputs, sample)
        assert {term.device for term in terms.values()} == {DEVICE}
        optimizer = build_task_optimizer(
            config, nn.ModuleDict({"backbone": model.backbone, "head": model.head}), DEVICE
        )
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
