"""Options that somebody changed although, with the other options as they are, nothing depends on them."""

from collections.abc import Iterator
from typing import Any

from dinov2.config.rendering import leaf_values
from dinov2.config.schema import Config

_HEAD = ("head_n_prototypes", "head_bottleneck_dim", "head_nlayers", "head_hidden_dim")
_DINO_HEAD, _IBOT_HEAD = (tuple(f"{section}.{name}" for name in _HEAD) for section in ("dino", "ibot"))
_MASKS = ("ibot.mask_ratio_min_max", "ibot.exact_mask_counts")
# While the first option is 0, false or empty, the others do nothing.
_IDLE_WITHOUT = (
    ("dino.koleo_loss_weight", ("dino.koleo_half_precision", "dino.koleo_all_ranks")),
    ("ibot.loss_weight", ("ibot.mask_sample_probability", *_MASKS, "ibot.separate_head", *_IBOT_HEAD)),
    ("ibot.separate_head", _IBOT_HEAD),
    ("ibot.mask_sample_probability", _MASKS),
    ("train.cache_dataset", ("data.cache_gib",)),
    ("crops.local_crops_number", ("crops.local_crops_size", "crops.local_crops_scale")),
    ("crops.color_jitter_probability", ("crops.color_jitter",)),
    (
        "evaluation.train_dataset_path",
        ("evaluation.nb_knn", "evaluation.temperature", "evaluation.features", "evaluation.best_metric"),
    ),
)


def options_without_effect(config: Config) -> list[str]:
    """Sentences that name options which differ from their defaults and do nothing, and why."""
    values, defaults = dict(leaf_values(config)), dict(leaf_values(Config()))
    changed = {name for name, value in values.items() if value != defaults[name]}
    told: set[str] = set()
    sentences = []
    for cause, idle in _causes(values):
        names = [name for name in idle if name in changed and name not in told]
        told.update(names)
        if names:
            verb = "have" if len(names) > 1 else "has"
            sentences.append(f"{', '.join(names)} {verb} no effect: {cause}")
    return sentences


def _causes(values: dict[str, Any]) -> Iterator[tuple[str, tuple[str, ...]]]:
    for name, idle in _IDLE_WITHOUT:
        if not values[name]:
            yield f"{name} is {'empty' if values[name] == '' else str(values[name]).lower()}", idle
    if values["optim.lr"] > 0:
        yield f"optim.lr is {values['optim.lr']:g} and not scaled", ("optim.base_lr", "optim.scaling_rule")
    if not values["dino.loss_weight"] and values["ibot.separate_head"]:
        yield "dino.loss_weight is 0.0 and patches have a head of their own", _DINO_HEAD
