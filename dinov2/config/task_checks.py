"""Options of a supervised run that must agree with one another."""

from dinov2.config.fields import ConfigError
from dinov2.config.task_schema import TaskConfig

HEADS = {
    "classification": ("linear", "mlp"),
    "segmentation": ("bn_linear", "multi_scale", "conv_decoder"),
    "depth": ("linear_bins", "dpt", "conv_decoder"),
}
DEFAULT_HEADS = {"classification": "linear", "segmentation": "bn_linear", "depth": "linear_bins"}
_LOSSES = {"segmentation": ("cross_entropy", "dice", "focal"), "depth": ("silog", "gradient", "mse", "l1")}
_TRANSFORMER_BLOCKS = 4  # that the DPT head fuses


def head_kind(config: TaskConfig) -> str:
    """The head that the options name, ``auto`` resolved."""
    return DEFAULT_HEADS[config.task] if config.head.kind == "auto" else config.head.kind


def check_task_consistency(config: TaskConfig) -> None:
    """Checks options that must agree with one another.

    Raises:
        ConfigError: naming the options involved and their values.
    """
    kind = head_kind(config)
    if kind not in HEADS[config.task]:
        raise ConfigError(f"head.kind={kind} does not go with task={config.task}: {', '.join(HEADS[config.task])} do")
    if kind == "dpt" and len(config.backbone.blocks) != _TRANSFORMER_BLOCKS:
        raise ConfigError(f"head.kind=dpt fuses {_TRANSFORMER_BLOCKS} blocks; backbone.blocks={config.backbone.blocks}")
    if len(set(config.backbone.blocks)) < len(config.backbone.blocks):
        raise ConfigError(f"backbone.blocks={config.backbone.blocks} names a block twice")
    if config.head.min_depth >= config.head.max_depth:
        raise ConfigError(
            f"head.min_depth={config.head.min_depth} must be less than head.max_depth={config.head.max_depth}"
        )
    if config.head.per_part and config.task != "classification":
        raise ConfigError(f"head.per_part answers one question per part; task={config.task} has one per pixel")
    if config.data.resize == "original" and config.task == "classification":
        raise ConfigError("data.resize=original is for dense tasks; classification needs stretch or shorter_side")
    if config.evaluation.scales != (1.0,) and config.task == "classification":
        raise ConfigError(
            f"evaluation.scales={list(config.evaluation.scales)} are for dense tasks: this one classifies"
        )
    losses = _LOSSES.get(config.task, ())
    if losses and all(getattr(config.loss, name) == 0 for name in losses):
        raise ConfigError(f"{', '.join(f'loss.{name}' for name in losses)} are all 0: nothing is left to learn from")
    if config.data.multi_label and config.loss.label_smoothing > 0:
        raise ConfigError("loss.label_smoothing is for one label per image, data.multi_label for several")
    if config.data.multi_label and config.head.per_part:
        raise ConfigError("head.per_part goes with one label per part, not with data.multi_label")
    augmentation = config.augmentation
    if augmentation.random_resized_crop != (0.0, 0.0) and augmentation.scale_jitter != (1.0, 1.0):
        raise ConfigError("augmentation.random_resized_crop and augmentation.scale_jitter exclude each other")
    if augmentation.foreground_crop_prob > 0 and config.task != "segmentation":
        raise ConfigError(f"augmentation.foreground_crop_prob needs masks, which task={config.task} has none of")
    for name, (low, high) in {
        "augmentation.random_resized_crop": augmentation.random_resized_crop,
        "augmentation.scale_jitter": augmentation.scale_jitter,
    }.items():
        if low > high:
            raise ConfigError(f"{name}=[{low}, {high}]: the first number must not exceed the second")
    if config.optim.warmup_epochs > config.optim.epochs:
        raise ConfigError(
            f"optim.warmup_epochs={config.optim.warmup_epochs} exceeds optim.epochs={config.optim.epochs}"
        )
    if config.optim.min_lr > config.optim.lr:
        raise ConfigError(f"optim.min_lr={config.optim.min_lr} exceeds optim.lr={config.optim.lr}")
