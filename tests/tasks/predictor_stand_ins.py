"""Task models whose answers can be told from the colours of an image, and a file of a real tiny one."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dinov2.config import load_config
from dinov2.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from dinov2.data.value_range import ValueRange
from dinov2.models.heads.anomaly import MemoryHead
from dinov2.models.task_model import TaskModel
from dinov2.tasks import TASKS, load_task_config, package, parse_task_config
from dinov2.tasks.package import TaskPackage, build_task_model, save_task_package
from dinov2.tasks.task import TaskFacts

RED, GREEN, BLUE, GREY = (230, 20, 20), (20, 230, 20), (20, 20, 230), (128, 128, 128)
COLOUR_CLASSES = ("grey", "red", "green", "blue")


class ColourModel(nn.Module):
    """Says which of red, green and blue outweighs the others (classes 1 to 3), or none (class 0).

    Args:
        dense: answer for every pixel; otherwise for the mean colour.
        most: batch size from which on memory runs out.
    """

    def __init__(self, *, dense: bool = True, most: int = 1000) -> None:
        super().__init__()
        self.dense = dense
        self.most = most
        self.gain = nn.Parameter(torch.tensor(20.0), requires_grad=False)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN)[:, None, None])
        self.register_buffer("std", torch.tensor(IMAGENET_STD)[:, None, None])
        self.batches: list[tuple[int, ...]] = []

    def colours(self, images: Tensor) -> Tensor:
        self.batches.append(tuple(images.shape))
        if len(images) > self.most:
            raise RuntimeError("CUDA out of memory. Tried to allocate 1 GiB")
        colours = images * self.std + self.mean
        return colours if self.dense else colours.mean(dim=(-2, -1), keepdim=True)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        colours = self.colours(images)
        logits = torch.cat([torch.full_like(colours[:, :1], 0.2), colours - colours.mean(dim=1, keepdim=True)], dim=1)
        return {"logits": self.gain * (logits if self.dense else logits[:, :, 0, 0])}


class DepthModel(ColourModel):
    """Depth is red in [0, 1], plus 1."""

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"depth": self.colours(images)[:, :1] + 1}


class DifferenceModel(ColourModel):
    """What differs from the reference is new (class 1), all else is not (class 0)."""

    def forward(self, images: Tensor, reference: Tensor) -> dict[str, Tensor]:
        far = (self.colours(images) - self.colours(reference)).abs().sum(dim=1, keepdim=True)
        return {"logits": self.gain * torch.cat([torch.full_like(far, 0.3), far], dim=1)}


class LeftModel(ColourModel):
    """Classifies by the redness of the left half alone: a mirrored image gets another answer."""

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        left = self.colours(images)[..., : images.shape[-1] // 2]
        green, red = left[:, 1].mean(dim=(-2, -1)), left[:, 0].mean(dim=(-2, -1))
        return {"logits": torch.stack([green, red], dim=1) * self.gain}


def make_package(
    model: nn.Module,
    task: str = "segmentation",
    *pairs: str,
    classes: Sequence[str] = COLOUR_CLASSES,
    light: str = "original",
    image_size: int = 16,
    resize: str = "stretch",
    value_range: ValueRange | None = None,
) -> TaskPackage:
    """A package around a stand-in, with a network size of 16."""
    options = (f"task={task}", f"data.image_size={image_size}", f"data.resize={resize}", "loss.silog=1", *pairs)
    config = load_task_config(None, options)
    facts = TaskFacts(unit="mm") if task == "depth" else TaskFacts(classes=tuple(classes))
    return package.make_package(model, TASKS[task](config, facts), light=light, value_range=value_range)


def plain_image(height: int, width: int, colour: Sequence[int]) -> NDArray[np.uint8]:
    """One colour everywhere."""
    return np.broadcast_to(np.array(colour, dtype=np.uint8), (height, width, 3)).copy()


def halves(height: int, width: int, left: Sequence[int] = GREY, right: Sequence[int] = RED) -> NDArray[np.uint8]:
    """Two colours side by side."""
    image = plain_image(height, width, left)
    image[:, width // 2 :] = right
    return image


def write_package(path: Path, task: str, thresholds: Mapping[str, float] | None = None, **data: Any) -> Path:
    """A file of a ViT-Ti with random weights and a head, as training writes it; the network size is 32."""
    classes = () if task == "depth" else ("background", "crack", "dent")
    lines = [f"{name}: {str(value).lower()}" for name, value in {"image_size": 32, "resize": "stretch", **data}.items()]
    config = parse_task_config(f"task: {task}\ndata: {{{', '.join(lines)}}}\nhead: {{num_bins: 8}}\n", "test")
    pairs = ["student.arch=vit_tiny", "student.patch_size=8", "crops.global_crops_size=32"]
    backbone_config = load_config(None, pairs)
    torch.manual_seed(0)
    facts = TaskFacts(classes=classes, unit="mm" if task == "depth" else "")
    made = TASKS[task](config, facts)
    model = build_task_model(made, backbone_config, num_outputs=facts.num_outputs).eval()
    if task == "segmentation":
        _spread_answers(model)
    if isinstance(model.head, MemoryHead):
        centres = nn.functional.normalize(torch.randn(30, model.head.centres.shape[1]), dim=1)
        model.head.remember(centres, radius=0.1, num_patches=100)
    more: dict[str, Any] = {"light": "original", "figures": {}, "thresholds": thresholds}
    save_task_package(path, model.state_dict(), made, backbone_config, **more)
    return path


def _spread_answers(model: TaskModel) -> None:
    """Lets a fresh segmentation head give different classes to different patches."""
    image = torch.linspace(-2, 2, 32).expand(1, 3, 32, 32)
    weight, bias = list(model.head.parameters())[-2:]
    with torch.no_grad():
        weight.normal_(std=5)
        bias -= model(image)["logits"].mean(dim=(0, 2, 3))
