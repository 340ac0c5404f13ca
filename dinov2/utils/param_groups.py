"""Parameter groups of the optimiser: layer-wise learning rates, exceptions from weight decay, the frozen last layer."""

import re
from typing import Any

from torch import nn
from torch.optim import Optimizer

_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:module|_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")


def strip_wrappers(name: str) -> str:
    """Removes what data parallelism, FSDP, activation checkpointing and ``torch.compile`` put into parameter names."""
    return _WRAPPERS.sub("", name)


_BACKBONE_PREFIX = "backbone."
_INPUT_PREFIXES = ("pos_embed", "patch_embed.", "cls_token", "mask_token", "register_tokens")
_BLOCK = re.compile(r"blocks\.(?:\d+\.)?(?P<index>\d+)\.")  # an optional chunk number comes first


def layer_decay(name: str, *, decay: float, num_layers: int, is_backbone: bool) -> float:
    """Learning-rate multiplier ``decay ** (num_layers + 1 - id)`` of a parameter, by its depth.

    The id is 0 for the patch embedding, the position embedding and all tokens, ``i + 1`` for block ``i``, and
    ``num_layers + 1`` for the final norm, heads and everything outside a backbone. Blocks are recognised with and
    without a chunk number (``blocks.<chunk>.<block>.…``), so no flag has to tell which (upstream's flag, where it does
    not fit the name, takes the chunk for the block).

    Args:
        name: without wrappers; names that start with ``backbone.`` are a backbone's in any case.
        decay: multiplier per layer, 1 for none.
        num_layers: number of blocks.
        is_backbone: whether the names are those of a backbone itself.

    Reference:
        Clark et al., "ELECTRA: Pre-training Text Encoders as Discriminators Rather Than Generators", appendix B;
        Bao et al., "BEiT: BERT Pre-Training of Image Transformers", appendix.
    """
    if not is_backbone and not name.startswith(_BACKBONE_PREFIX):
        return 1.0
    name = name.removeprefix(_BACKBONE_PREFIX)
    if name.startswith(_INPUT_PREFIXES):
        return decay ** (num_layers + 1)
    block = _block_index(name)
    return 1.0 if block is None else decay ** (num_layers - block)


def parameter_traits(
    module: nn.Module, *, layerwise_decay: float = 1.0, patch_embed_lr_mult: float = 1.0
) -> dict[str, dict[str, Any]]:
    """How each trainable parameter of a backbone, a head, or a container with a child named ``backbone`` is optimised.

    Args:
        module: may be compiled, checkpointed or sharded.
        layerwise_decay: see ``layer_decay``.
        patch_embed_lr_mult: further learning-rate multiplier of the patch embedding.

    Returns:
        By name without wrappers, in the module's order: ``lr_multiplier``, ``wd_multiplier``, which is 0 for biases,
        norms and layer scale, and ``is_last_layer``, whether the parameter starts frozen.
    """
    is_trainable = {strip_wrappers(name): parameter.requires_grad for name, parameter in module.named_parameters()}
    is_backbone = any(_block_index(name) is not None for name in is_trainable)
    blocks = [_block_index(name.removeprefix(_BACKBONE_PREFIX)) for name in is_trainable]
    num_layers = 1 + max((block for block in blocks if block is not None), default=-1)
    return {
        name: {
            "lr_multiplier": layer_decay(name, decay=layerwise_decay, num_layers=num_layers, is_backbone=is_backbone)
            * (patch_embed_lr_mult if "patch_embed" in name else 1.0),
            "wd_multiplier": 0.0 if name.endswith(".bias") or "norm" in name or "gamma" in name else 1.0,
            "is_last_layer": "last_layer" in name,
        }
        for name, trainable in is_trainable.items()
        if trainable
    }


def make_param_groups(
    module: nn.Module, *, layerwise_decay: float = 1.0, patch_embed_lr_mult: float = 1.0, prefix: str = ""
) -> list[dict[str, Any]]:
    """Groups the trainable parameters of ``module`` by equal traits, for a torch optimiser.

    Args:
        module: see ``parameter_traits``.
        layerwise_decay: see ``layer_decay``.
        patch_embed_lr_mult: further learning-rate multiplier of the patch embedding.
        prefix: put before every entry of ``param_names``, so that the names of several modules stay apart.

    Returns:
        Groups in the order of their first parameter, each with ``params``, their ``param_names`` in the same order
        (without wrappers), ``lr_multiplier``, ``wd_multiplier`` and ``is_last_layer``.
    """
    traits = parameter_traits(module, layerwise_decay=layerwise_decay, patch_embed_lr_mult=patch_embed_lr_mult)
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for wrapped_name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        name = strip_wrappers(wrapped_name)
        group = groups.setdefault(tuple(traits[name].values()), {"params": [], "param_names": [], **traits[name]})
        group["params"].append(parameter)
        group["param_names"].append(prefix + name)
    return list(groups.values())


def apply_step(optimizer: Optimizer, *, lr: float, weight_decay: float, last_layer_lr: float) -> None:
    """Sets learning rate and weight decay of every group made by ``make_param_groups`` to a step's values."""
    for group in optimizer.param_groups:
        group["lr"] = (last_layer_lr if group["is_last_layer"] else lr) * group["lr_multiplier"]
        group["weight_decay"] = weight_decay * group["wd_multiplier"]


def _block_index(name: str) -> int | None:
    """Number of the block that a backbone's parameter belongs to; ``None`` outside the blocks."""
    match = _BLOCK.match(name)
    return None if match is None else int(match["index"])
