"""Which parts of a backbone are trained, and which stay as they are."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from dinov2.layers.lora import DEFAULT_TARGETS, apply_lora, lora_parameters
from dinov2.models.vision_transformer import DinoVisionTransformer

TRAINING_MODES = ("frozen", "lora", "last_blocks", "full")


@dataclass(frozen=True, kw_only=True)
class TrainableParts:
    """What `choose_trainable` has decided.

    Attributes:
        mode: one of ``TRAINING_MODES``.
        num_trainable: parameters of the backbone that are trained.
        num_frozen: parameters that are not.
        lora_layers: names of the layers with a low-rank addition.
        eval_modules: names of the modules that must stay in evaluation mode while the rest trains, so that stochastic
            depth leaves frozen features alone; "" is the whole backbone.
    """

    mode: str
    num_trainable: int
    num_frozen: int
    lora_layers: tuple[str, ...]
    eval_modules: tuple[str, ...]

    def set_train_mode(self, backbone: nn.Module) -> None:
        """Puts the backbone into training mode, but for the modules that must stay in evaluation mode.

        To be called after every ``train()`` of a module that holds the backbone.
        """
        backbone.train()
        for name in self.eval_modules:
            backbone.get_submodule(name).eval()

    def __str__(self) -> str:
        """One line for the log."""
        total = self.num_trainable + self.num_frozen
        layers = f", {len(self.lora_layers)} low-rank additions" if self.lora_layers else ""
        share = f"{self.num_trainable / total:.2%}"
        return f"backbone {self.mode}: {self.num_trainable:,} of {total:,} parameters are trained ({share}{layers})"


def choose_trainable(
    backbone: DinoVisionTransformer,
    mode: str,
    *,
    last_blocks: int = 0,
    lora_rank: int = 8,
    lora_alpha: float = 16.0,
    lora_dropout: float = 0.0,
    lora_targets: Sequence[str] = DEFAULT_TARGETS,
) -> TrainableParts:
    """Sets ``requires_grad`` of every parameter of the backbone, and training or evaluation mode of its modules.

    ``frozen`` trains nothing. ``lora`` adds low-rank layers, in place, and trains these alone. ``last_blocks`` trains
    so many blocks from the top, and the final norm. ``full`` trains everything but the mask token, which no task uses.

    Args:
        backbone: with its weights loaded.
        mode: one of ``TRAINING_MODES``.
        last_blocks: 1 to the number of blocks, for ``last_blocks``.
        lora_rank: see `LoRALinear`, for ``lora``, like the following.
        lora_alpha: strength of the additions.
        lora_dropout: in training.
        lora_targets: last parts of the names of the layers that get an addition.

    Raises:
        ValueError: for an unknown mode, or a number or a target that is impossible for this backbone; nothing is
            changed then.
    """
    if mode not in TRAINING_MODES:
        raise ValueError(f"unknown mode {mode!r} of training the backbone; allowed: {', '.join(TRAINING_MODES)}")
    if mode == "last_blocks" and not 1 <= last_blocks <= backbone.n_blocks:
        raise ValueError(
            f"last_blocks must lie in 1..{backbone.n_blocks}, the blocks of the backbone, got {last_blocks}"
        )
    lora_layers: list[str] = []
    if mode == "lora":
        lora_layers = apply_lora(backbone, lora_targets, rank=lora_rank, alpha=lora_alpha, dropout=lora_dropout)
    backbone.requires_grad_(mode == "full")
    backbone.mask_token.requires_grad_(False)
    eval_modules: tuple[str, ...] = ("",) if mode == "frozen" else ()
    if mode == "lora":
        for parameter in lora_parameters(backbone):
            parameter.requires_grad_(True)
    if mode == "last_blocks":
        first = backbone.n_blocks - last_blocks
        for module in (*backbone.blocks[first:], backbone.norm):
            module.requires_grad_(True)
        eval_modules = ("patch_embed", *(f"blocks.{number}" for number in range(first)))
    parts = TrainableParts(
        mode=mode,
        num_trainable=sum(parameter.numel() for parameter in backbone.parameters() if parameter.requires_grad),
        num_frozen=sum(parameter.numel() for parameter in backbone.parameters() if not parameter.requires_grad),
        lora_layers=tuple(lora_layers),
        eval_modules=eval_modules,
    )
    parts.set_train_mode(backbone)
    return parts
