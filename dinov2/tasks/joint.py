"""Several heads that were trained on one frozen backbone, joined: an image passes the backbone once for all of them."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from dinov2.models.description import fingerprint
from dinov2.models.task_model import JointTaskModel, TaskModel
from dinov2.tasks.package import TaskPackage
from dinov2.tasks.predictions import NamedPredictions
from dinov2.tasks.task import ExportOutput, Outputs, PreparedImage, TaskOutputs
from dinov2.utils.files import is_plain_name

_SAME_WEIGHTS = ("num_heads", "grid_size", "interpolate_antialias", "interpolate_offset")  # with another meaning


class JointTask(TaskOutputs):
    """What the outputs ``HEAD/OUTPUT`` of a `JointTaskModel`, or of its export, mean: what each head's own task says.

    Predictions are `NamedPredictions`. Thresholds are called ``HEAD/CLASS``.

    Args:
        tasks: by the names of the heads.
    """

    name = "joint"

    def __init__(self, tasks: Mapping[str, TaskOutputs]) -> None:
        self.tasks = dict(tasks)
        # Of all heads alike, see `join_heads`: it decides how images are cut.
        self.windowed = any(task.windowed for task in tasks.values())

    def activate(self, outputs: Outputs) -> Outputs:
        return self._named({name: task.activate(_of(name, outputs)) for name, task in self.tasks.items()})

    def unmirror(self, outputs: Outputs) -> Outputs:
        return self._named({name: task.unmirror(_of(name, outputs)) for name, task in self.tasks.items()})

    def postprocess(self, outputs: Outputs, prepared: Sequence[PreparedImage]) -> list[Any]:
        columns = [
            task.postprocess(
                _of(name, outputs), [replace(image, thresholds=_of(name, image.thresholds)) for image in prepared]
            )
            for name, task in self.tasks.items()
        ]
        return [NamedPredictions(zip(self.tasks, row, strict=True)) for row in zip(*columns, strict=True)]

    def export_outputs(self) -> tuple[ExportOutput, ...]:
        return tuple(
            replace(output, name=f"{name}/{output.name}")
            for name, task in self.tasks.items()
            for output in task.export_outputs()
        )

    @staticmethod
    def _named(outputs: Mapping[str, Outputs]) -> Outputs:
        return {f"{head}/{name}": value for head, some in outputs.items() for name, value in some.items()}


def _of(head: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of one head, by the names that its task knows."""
    start = f"{head}/"
    return {name.removeprefix(start): value for name, value in values.items() if name.startswith(start)}


def check_head_names(names: Iterable[str]) -> None:
    """Raises a ValueError for names of joined heads that cannot be folders of results."""
    for name in names:
        if not is_plain_name(name):
            raise ValueError(f"a head is called {name!r}; allowed is what can be the name of a folder")


def join_heads(packages: Mapping[str, TaskPackage]) -> tuple[JointTaskModel, JointTask, dict[str, float]]:
    """Joins models whose backbones have equal weights and whose images are prepared alike.

    Args:
        packages: by the names of the heads; their models get a common backbone.

    Returns:
        The network, what its outputs mean, and the thresholds of scores.

    Raises:
        ValueError: naming two heads and what they differ in, or a head that cannot be joined.
    """
    check_head_names(packages)
    models: dict[str, TaskModel] = {}
    for name, package in packages.items():
        several = "reference" in package.task.inputs or package.task.max_images
        if not isinstance(package.model, TaskModel) or several:
            raise ValueError(f"{name} cannot be joined: only heads over single images can, and it looks at several")
        if package.preprocessing.resize == "original" and package.task.windowed:
            raise ValueError(
                f"{name} cannot be joined: with data.resize=original it goes over large images window by window"
            )
        models[name] = package.model
    first, *others = packages
    prints = {name: fingerprint(model.backbone) for name, model in models.items()}
    for other in others:
        both = f"{first} and {other} cannot be joined"
        if prints[first] != prints[other]:
            raise ValueError(
                f"{both}: their backbones have different weights (fingerprints {prints[first][:12]} and "
                f"{prints[other][:12]}); train both with backbone.mode=frozen on the same pretrained backbone"
            )
        for field in dataclasses.fields(packages[first].preprocessing):
            found = [getattr(packages[name].preprocessing, field.name) for name in (first, other)]
            if found[0] != found[1]:
                raise ValueError(f"{both}: their {field.name} differs ({found[0]} and {found[1]})")
        for name in _SAME_WEIGHTS:
            found = [getattr(models[head].backbone, name) for head in (first, other)]
            if found[0] != found[1]:
                raise ValueError(f"{both}: the {name} of their backbones differs ({found[0]} and {found[1]})")
        cut = [packages[name].task.windowed for name in (first, other)]
        if packages[first].preprocessing.resize != "stretch" and cut[0] != cut[1]:
            raise ValueError(
                f"{both}: with resize={packages[first].preprocessing.resize} one of them sees whole images and the "
                f"other their middle; train both with data.resize=stretch"
            )
    thresholds = {
        f"{name}/{label}": value for name, package in packages.items() for label, value in package.thresholds.items()
    }
    return JointTaskModel(models), JointTask({name: package.task for name, package in packages.items()}), thresholds
