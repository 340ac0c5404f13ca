"""Files of linear classifiers: a checkpoint of all to go on from, and the best one alone."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinov2.distributed import all_gather_objects, is_main_process
from dinov2.eval.linear.classifiers import ClassifierSettings, ClassifierStack, unstack
from dinov2.eval.linear.features import FeatureKind
from dinov2.eval.linear.training import LinearTrainer
from dinov2.models.pretrained import read_checkpoint
from dinov2.utils.files import write_atomically

CHECKPOINT_FILE = "linear_checkpoint.pth"
HEAD_FILE = "linear_head.pth"
CHECKPOINT_KEYS = ("classifiers", "settings", "trainer", "probe")
HEAD_KEYS = ("weight", "bias", "blocks", "avgpool", "classes")

_ANEW = "start anew (--no-resume) or in another folder (--output-dir)"

Classifiers = dict[ClassifierSettings, tuple[Tensor, Tensor]]


class LinearCheckpoint:
    """The file from which a training of linear classifiers goes on, exactly as if it had not been stopped.

    Args:
        folder: of the run; its file is ``linear_checkpoint.pth``.
        settings: plain values that decide the classifiers; a file with others is not resumed from.
        probe: features of an image, by which another backbone of the same width is noticed.
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, Any], probe: Tensor) -> None:
        self.path = Path(folder) / CHECKPOINT_FILE
        self.settings = dict(settings)
        self.probe = probe.clone()

    def save(self, trainer: LinearTrainer) -> None:
        """Writes the state of a training; to be called by every process, of which the main one writes."""
        if not is_main_process():
            return
        content = {
            "classifiers": unstack(trainer.stacks),
            "settings": self.settings,
            "trainer": trainer.state_dict(),
            "probe": self.probe,
        }
        write_atomically(self.path, lambda file: torch.save(content, file))

    def resume(self, trainer: LinearTrainer) -> bool:
        """Takes a training to where the file is; to be called by every process.

        Returns:
            Whether there is such a file.

        Raises:
            ValueError: when the file is damaged, of other settings or another backbone, or not seen by all processes.
        """
        if self.path.exists():
            content = read_checkpoint(self.path)
            _check_keys(content, CHECKPOINT_KEYS, self.path)
            self._check_same(content)
            try:
                trainer.load_state_dict(content["trainer"], content["classifiers"])
            except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
                raise ValueError(
                    f"{self.path} is damaged, its classifiers and their training do not fit ({error!r}): {_ANEW}"
                ) from error
        if len(iterations := set(all_gather_objects(trainer.iteration))) > 1:
            raise ValueError(f"not all processes see the same {self.path}: they would start at {sorted(iterations)}")
        return trainer.iteration > 0

    def _check_same(self, content: Mapping[str, Any]) -> None:
        saved = content["settings"]
        differing = [
            f"{name} is {saved.get(name)!r} there and {self.settings.get(name)!r} now"
            for name in dict.fromkeys([*saved, *self.settings])
            if saved.get(name) != self.settings.get(name)
        ]
        same_shape = content["probe"].shape == self.probe.shape
        if not differing and not (same_shape and torch.allclose(content["probe"], self.probe, rtol=0.05, atol=0.05)):
            differing = ["the features of the first validation image differ, so the backbone is another"]
        if differing:
            raise ValueError(f"{self.path} cannot be resumed from, as {'; '.join(differing)}: {_ANEW}")


def write_head(folder: str | Path, stack: ClassifierStack, place: int, classes: tuple[str, ...]) -> None:
    """Writes one classifier alone into ``linear_head.pth``.

    The file holds ``weight`` ``[C, F]``, ``bias`` ``[C]``, ``blocks`` and ``avgpool`` (the features that it sees, see
    `FeatureKind`), and the names of its ``classes``.
    """
    content = {
        "weight": stack.weight[place].detach().cpu().clone(),
        "bias": stack.bias[place].detach().cpu().clone(),
        "blocks": stack.kind.blocks,
        "avgpool": stack.kind.avgpool,
        "classes": list(classes),
    }
    write_atomically(Path(folder) / HEAD_FILE, lambda file: torch.save(content, file))


def read_classifiers(path: str | Path) -> tuple[Classifiers, tuple[str, ...]]:
    """Reads trained classifiers and the names of their classes, from a checkpoint or the file of one alone.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it is damaged or holds something else.
    """
    content = read_checkpoint(path)
    if "classifiers" in content:
        _check_keys(content, CHECKPOINT_KEYS, path)
        _check_keys(content["settings"], ("classes",), path)
        entries, classes = content["classifiers"].values(), content["settings"]["classes"]
    else:
        _check_keys(content, HEAD_KEYS, path)
        entries, classes = [content], content["classes"]
    classifiers = {}
    for entry in entries:
        _check_types(entry, path)
        kind = FeatureKind(entry["blocks"], entry["avgpool"])
        classifiers[ClassifierSettings(kind, entry.get("learning_rate"))] = (entry["weight"], entry["bias"])
        fits = entry["weight"].ndim == 2 and entry["weight"].shape[1] % kind.width(1) == 0
        if not fits or entry["bias"].shape != entry["weight"].shape[:1] or len(entry["weight"]) != len(classes):
            raise ValueError(
                f"{path}: weight {tuple(entry['weight'].shape)} and bias {tuple(entry['bias'].shape)} do not fit "
                f"{len(classes)} classes and features of {kind}"
            )
    return classifiers, tuple(classes)


def _check_types(entry: Any, path: str | Path) -> None:
    kinds = {"weight": Tensor, "bias": Tensor, "blocks": int, "avgpool": bool}
    is_classifier = isinstance(entry, Mapping) and all(isinstance(entry.get(key), kinds[key]) for key in kinds)
    if not is_classifier or entry["blocks"] < 1:
        raise ValueError(f"{path} is damaged: a classifier must have the tensors weight and bias, blocks and avgpool")


def _check_keys(content: Mapping[str, Any], keys: tuple[str, ...], path: str | Path) -> None:
    missing = [key for key in keys if key not in content]
    if missing:
        raise ValueError(f"{path} is no file of linear classifiers: it lacks {', '.join(missing)}")
