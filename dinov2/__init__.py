"""DINOv2 self-supervised pretraining for industrial images, grouped by part.

`pretrain` trains a backbone on unlabelled images, `finetune` a model for a task on labelled ones, and `load` opens
either, or a released backbone. Importing this package imports nothing heavy: torch comes with the first call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from os import PathLike
    from pathlib import Path

    import torch

    from dinov2.config import Config
    from dinov2.predict.model import Model
    from dinov2.tasks.options import TaskConfig
    from dinov2.tasks.task import Task

__version__ = "0.1.0"
__all__ = ["__version__", "finetune", "load", "pretrain"]


def pretrain(
    config: str | Path | Mapping[str, Any] | Config | None = None, *, resume: bool = True, **overrides: Any
) -> Path:
    """Pretrains a vision transformer on unlabelled images, from scratch or from released weights (DINOv2).

    The same as the command ``dinov2 train``: the log goes to the terminal and the folder, Ctrl-C saves, and the same
    call goes on. It trains in this process; for several GPUs, call it from a script that torchrun starts.

    Args:
        config: a YAML file, a mapping of sections as such a file holds them, or a `dinov2.config.Config`; None for the
            defaults. ``configs/ssl_default_config.yaml`` shows all options.
        resume: whether to go on from the newest checkpoint of the run's folder, if there is one.
        **overrides: options that replace those of ``config``: a section with a mapping, such as
            ``train={"output_dir": "outputs/mine"}, optim={"epochs": 10}``.

    Returns:
        Folder of the run, ``train.output_dir``. ``load`` takes its ``eval/training_*/teacher_checkpoint.pth``.

    Raises:
        dinov2.config.ConfigError: an option is unknown, of a wrong type, out of range, or contradicts another.
        ValueError, FileNotFoundError, OSError: data, weights, checkpoints or the folder are wrong.
        dinov2.utils.errors.RunError: the run cannot go on; the message says what to do.
        KeyboardInterrupt: Ctrl-C; everything is saved.

    Example:
        >>> dinov2.pretrain(
        ...     "configs/train/demo_parts_cpu.yaml",
        ...     train={"dataset_path": "ImageFolder:root=/data/images", "output_dir": "outputs/mine"},
        ... )
    """
    from dinov2.config import load_config
    from dinov2.train import command

    options = load_config(config, overrides)
    return _folder_of_run(command.pretrain(options, resume=resume), options.train.output_dir)


def finetune(
    config: str | Path | Mapping[str, Any] | TaskConfig | None = None,
    *,
    tasks: Mapping[str, type[Task]] | None = None,
    resume: bool = True,
    **overrides: Any,
) -> Path:
    """Trains a head, and the backbone as far as the options say, on labelled images: classes, masks or depths.

    The same as the command ``dinov2 finetune``; what is said of `pretrain` holds.

    Args:
        config: a YAML file, a mapping of sections, or a `dinov2.tasks.options.TaskConfig`; None for the defaults.
            ``configs/task_default_config.yaml`` shows all options.
        tasks: tasks to choose from by name, ``{**TASKS, "toy": Toy}`` with `dinov2.tasks.TASKS`; by default these.
        resume: whether to go on from the newest checkpoint of the run's folder, if there is one.
        **overrides: options that replace those of ``config``, such as ``task="depth", optim={"epochs": 10}``.

    Returns:
        Folder of the run, ``train.output_dir``. ``load`` takes its ``best.pth``.

    Raises:
        dinov2.config.ConfigError: an option is unknown, of a wrong type, out of range, or contradicts another.
        ValueError, FileNotFoundError, OSError: data, labels, weights, checkpoints or the folder are wrong.
        dinov2.utils.errors.RunError: the run cannot go on; the message says what to do.
        KeyboardInterrupt: Ctrl-C; everything is saved.

    Example:
        >>> dinov2.finetune(
        ...     "configs/task/magnetic_tile_segmentation.yaml",
        ...     backbone={"pretrained_weights": "outputs/mine/eval/best/teacher_checkpoint.pth"},
        ... )
    """
    from dinov2.tasks import TASKS, engine, load_task_config

    options = load_task_config(config, overrides, TASKS if tasks is None else tasks)
    return _folder_of_run(engine.finetune(options, resume=resume), options.train.output_dir)


def load(
    path_or_name: str | PathLike[str] | Sequence[str | PathLike[str]] | Mapping[str, str | PathLike[str]],
    config: str | Path | Mapping[str, Any] | Config | None = None,
    device: str | torch.device | None = "cpu",
    *,
    tasks: Mapping[str, type[Task]] | None = None,
) -> Model:
    """Opens a trained network, to embed images and, where it has a head, to predict.

    Args:
        path_or_name: ``best.pth`` of `finetune`; a ``teacher_checkpoint.pth`` of `pretrain`, or any other file, address
            or folder of Hugging Face's with the weights of a backbone; a file of ``dinov2 export`` for a runtime
            (``.onnx``, ``.xml`` of OpenVINO, ``.engine`` of TensorRT); or the name of a released backbone,
            ``dinov2_vit{s,b,l,g}14`` or ``dinov2_vit{s,b,l,g}14_reg``, which is downloaded once. Several ``best.pth``,
            or a mapping from names to them, are heads that were trained on the same frozen backbone: it looks at
            each image once for all of them.
        config: describes the backbone where neither the file, nor the ``config.yaml`` of its run above it, nor its
            parameters do: that file, a mapping, a `dinov2.config.Config`, or the name of a released backbone.
        device: ``cpu``, ``cuda``, ``cuda:1``, ``mps``, or a torch device; ``auto`` or None for the best that is there.
        tasks: of `finetune`, where the model is of a task that was passed in there.

    Returns:
        A `dinov2.predict.model.Model`, with ``embed(images)`` and ``predict(images)``.

    Raises:
        FileNotFoundError: there is no such file.
        ConnectionError: the download failed.
        ValueError: the file is damaged or no checkpoint, does not fit the options, or nothing says what it
            holds; there is no such device; ``config`` is given for a model that describes itself; or heads cannot be
            joined, as their backbones, sizes, light or ranges of values differ.

    Example:
        >>> model = dinov2.load("dinov2_vits14_reg")
        >>> model.embed(["a.png", "b.png"]).shape
        (2, 384)
        >>> dinov2.load("outputs/tiles/best.pth").predict("part.png")[0].draw(PIL.Image.open("part.png"))
        >>> dinov2.load(["classes.pth", "masks.pth"]).predict("part.png")[0]["masks"].labels.shape
        (480, 640)
    """
    from dinov2.deploy.deployed import open_model

    return open_model(path_or_name, config, device, tasks=tasks)


def _folder_of_run(code: int, folder: str) -> Path:
    from pathlib import Path

    from dinov2.utils.errors import INTERRUPTED, StartAgainError

    if code == INTERRUPTED:
        raise KeyboardInterrupt
    if code:
        raise StartAgainError("the run was stopped by a signal; everything is saved, and the same call goes on")
    return Path(folder)
