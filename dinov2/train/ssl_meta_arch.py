"""The method: a student predicts, from crops and masked views, the outputs of its moving average for whole views."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from dinov2.checkpoint.sharding import local_part
from dinov2.config import Config, as_pair
from dinov2.data.collate import PretrainingBatch
from dinov2.fsdp import release_gathered_parameters
from dinov2.layers.dino_head import DINOHead
from dinov2.loss.dino_clstoken_loss import DINOLoss
from dinov2.loss.ibot_patch_loss import iBOTPatchLoss
from dinov2.loss.koleo_loss import KoLeoLoss
from dinov2.models.build import build_backbone
from dinov2.models.vision_transformer import DinoVisionTransformer

NUM_GLOBAL_CROPS = 2


@dataclass(frozen=True)
class Targets:
    """Outputs of the teacher: probabilities over prototypes.

    Attributes:
        cls: ``[2, B, K]`` of the two global crops.
        patches: ``[M, K']`` of the masked patches, None when the patch loss is off.
        features: class tokens before the head, ``[2B, D]``; only looked at, never a target.
    """

    cls: Tensor | None
    patches: Tensor | None
    features: Tensor


@dataclass(frozen=True)
class Predictions:
    """Outputs of the student: logits over prototypes, and the class tokens that KoLeo spreads.

    Attributes:
        global_cls: ``[2B, K]``, crop-major.
        local_cls: ``[L*B, K]``, crop-major; None without local crops.
        patches: ``[M, K']`` of the masked patches; None when the patch loss is off.
        features: class tokens before the head, ``[2B, D]``.
    """

    global_cls: Tensor | None
    local_cls: Tensor | None
    patches: Tensor | None
    features: Tensor


class SSLMetaArch(nn.Module):
    """Student, teacher and losses of DINOv2.

    ``student`` and ``teacher`` hold ``backbone``, ``dino_head`` and, with ``ibot.separate_head``, ``ibot_head``; with a
    shared head, ``dino_head`` serves class tokens and patches. The teacher starts as a copy of the student and is never
    trained. Targets come from the teacher, or from a larger, frozen network, see `distil_from`; the teacher is the
    student's moving average either way, and what a run is for.

    Attributes:
        distilled_from: fingerprint of the frozen network's weights; empty where there is none.

    Args:
        config: options of the run.
        backbones: student and teacher to use instead of those that ``config.student`` describes.

    Reference:
        Oquab et al., "DINOv2: Learning Robust Visual Features without Supervision", section 4.
    """

    def __init__(
        self, config: Config, backbones: tuple[DinoVisionTransformer, DinoVisionTransformer] | None = None
    ) -> None:
        super().__init__()
        self.do_dino = config.dino.loss_weight > 0
        self.do_ibot = config.ibot.loss_weight > 0
        self.do_koleo = config.dino.koleo_loss_weight > 0
        self.separate_head = has_separate_head(config)
        self.dino_weight = config.dino.loss_weight
        self.ibot_weight = config.ibot.loss_weight
        self.koleo_weight = config.dino.koleo_loss_weight
        self.sinkhorn = config.train.centering == "sinkhorn_knopp"
        self.distilled_from = ""
        self._frozen: tuple[nn.ModuleDict, ...] = ()

        if backbones is not None:
            student, teacher = backbones
        else:  # the teacher has no stochastic depth
            size = as_pair(config.crops.global_crops_size)
            student = build_backbone(config.student, img_size=size)
            teacher = build_backbone(config.student, img_size=size, drop_path_rate=0.0)
        self.student = make_network(config, student)
        self.teacher = make_network(config, teacher)
        self.copy_student_to_teacher()
        self.teacher.requires_grad_(False)

        ibot_prototypes = (config.ibot if self.separate_head else config.dino).head_n_prototypes
        self.dino_loss = DINOLoss(config.dino.head_n_prototypes)
        self.ibot_loss = iBOTPatchLoss(ibot_prototypes)
        self.koleo_loss = KoLeoLoss(
            half_precision=config.dino.koleo_half_precision, all_ranks=config.dino.koleo_all_ranks
        )

    def distil_from(self, network: nn.ModuleDict, fingerprint: str = "") -> None:
        """Takes all targets from a frozen network from here on, see `dinov2.train.distillation`.

        It belongs to no checkpoint: its weights never change, and the options say where they are.

        Args:
            network: ``backbone``, ``dino_head`` and, with ``ibot.separate_head``, ``ibot_head``.
            fingerprint: of its weights, by which a resumed run knows them.

        Reference:
            Oquab et al., "DINOv2", section 5: a frozen larger model as teacher, and a spare average of the student as
            the final model. Masks and stochastic depth, which they leave out, are as the options say.
        """
        self.distilled_from = fingerprint
        self._frozen = (network.requires_grad_(False).eval(),)  # in a tuple it is no part of this module

    @property
    def frozen_teacher(self) -> nn.ModuleDict | None:
        """The network of `distil_from`."""
        return self._frozen[0] if self._frozen else None

    @property
    def student_backbone(self) -> DinoVisionTransformer:
        """The network that is pretrained."""
        return cast(DinoVisionTransformer, self.student["backbone"])

    @property
    def teacher_backbone(self) -> DinoVisionTransformer:
        """Its moving average, which is what a run is for."""
        return cast(DinoVisionTransformer, self.teacher["backbone"])

    def train(self, mode: bool = True) -> "SSLMetaArch":
        """Switches the student; the teacher always evaluates."""
        super().train(mode)
        self.teacher.eval()
        return self

    def forward_backward(
        self,
        batch: PretrainingBatch,
        *,
        teacher_temp: float,
        loss_scale: float | Tensor = 1.0,
        observe: Callable[[Targets, Predictions], None] | None = None,
    ) -> dict[str, Tensor]:
        """Computes the losses of a batch and adds the objective's gradients to the student's parameters.

        Args:
            batch: crops and masks, on the model's device.
            teacher_temp: temperature of the teacher's softmax.
            loss_scale: factor on the objective in backward, for fp16.
            observe: is given the outputs of teacher and student; must change nothing.

        Returns:
            Detached scalars: ``total_loss`` is the objective, the others are its terms as upstream logs them
            (``koleo_loss`` and ``ibot_loss`` enter the objective twice).
        """
        targets = self.teacher_targets(batch, teacher_temp)
        predictions = self.student_predictions(batch)
        if observe is not None:
            observe(targets, predictions)
        losses, objective = self.losses(batch, targets, predictions)
        (objective * loss_scale).backward()
        return {name: loss.detach() for name, loss in losses.items()} | {"total_loss": objective.detach()}

    @torch.no_grad()
    def teacher_targets(self, batch: PretrainingBatch, teacher_temp: float) -> Targets:
        """The teacher's outputs for the two whole global crops, sharpened and centred or balanced over prototypes."""
        teacher = self.frozen_teacher or self.teacher
        tokens = teacher["backbone"](batch.global_crops, is_training=True)
        patches = _masked_patches(tokens["x_norm_patchtokens"], batch) if self.do_ibot else None
        cls_logits, patch_logits = self._heads(teacher, tokens["x_norm_clstoken"], patches)
        cls = patch = None
        if cls_logits is not None:
            if self.sinkhorn:
                cls = self.dino_loss.sinkhorn_knopp_teacher(cls_logits, teacher_temp)
            else:
                cls = self.dino_loss.softmax_center_teacher(cls_logits, teacher_temp)
                self.dino_loss.update_center(cls_logits)
            cls = cls.unflatten(0, (NUM_GLOBAL_CROPS, -1))
        if patch_logits is not None:
            if self.sinkhorn:
                count = torch.tensor([batch.num_masked], device=patch_logits.device)
                patch = self.ibot_loss.sinkhorn_knopp_teacher(patch_logits, teacher_temp, count)
            else:
                patch = self.ibot_loss.softmax_center_teacher(patch_logits, teacher_temp)
                self.ibot_loss.update_center(patch_logits)
        return Targets(cls, patch, tokens["x_norm_clstoken"].clone())  # a view would keep all tokens

    def student_predictions(self, batch: PretrainingBatch) -> Predictions:
        """The student looks at the masked global crops and the local crops, in one pass."""
        crops, masks = [batch.global_crops], [batch.masks]
        if batch.local_crops is not None:
            outputs = self.student["backbone"]([*crops, batch.local_crops], masks=[*masks, None], is_training=True)
        else:
            outputs = self.student["backbone"](crops, masks=masks, is_training=True)
        features = outputs[0]["x_norm_clstoken"]
        cls = torch.cat([output["x_norm_clstoken"] for output in outputs])
        patches = _masked_patches(outputs[0]["x_norm_patchtokens"], batch) if self.do_ibot else None
        cls_logits, patch_logits = self._heads(self.student, cls, patches)
        if cls_logits is None:
            return Predictions(None, None, patch_logits, features)
        global_cls, local_cls = cls_logits.split([len(features), len(cls) - len(features)])
        return Predictions(global_cls, local_cls if len(local_cls) else None, patch_logits, features)

    def losses(
        self, batch: PretrainingBatch, targets: Targets, predictions: Predictions
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The terms by name, and the objective ``local + global + 2 (koleo + ibot)``."""
        terms: dict[str, Tensor] = {}
        if targets.cls is not None and predictions.global_cls is not None:
            # Crossed global pairs and all local-global pairs, every pair weighing the same.
            local_crops = () if predictions.local_cls is None else predictions.local_cls.split(targets.cls.shape[1])
            pairs = NUM_GLOBAL_CROPS * (NUM_GLOBAL_CROPS - 1) + NUM_GLOBAL_CROPS * len(local_crops)
            if local_crops:
                local = self.dino_loss(local_crops, targets.cls)
                terms["dino_local_crops_loss"] = self.dino_weight * local / pairs
            crossed = targets.cls.flip(0).flatten(0, 1)  # student crop 0 meets teacher crop 1
            same_size = self.dino_loss([predictions.global_cls], [crossed])  # mean of the crossed pairs
            terms["dino_global_crops_loss"] = self.dino_weight * same_size * NUM_GLOBAL_CROPS / pairs
        if self.do_koleo:
            crops = predictions.features.chunk(NUM_GLOBAL_CROPS)
            koleo = torch.stack([self.koleo_loss(crop) for crop in crops]).sum()
            terms["koleo_loss"] = self.koleo_weight * koleo / NUM_GLOBAL_CROPS
        if targets.patches is not None and predictions.patches is not None:
            ibot = self.ibot_loss.forward_masked(
                predictions.patches,
                targets.patches,
                student_masks_flat=batch.masks,
                n_masked_patches=batch.num_masked,
                masks_weight=batch.mask_weights,
            )
            terms["ibot_loss"] = self.ibot_weight * ibot / NUM_GLOBAL_CROPS
        doubled = ("koleo_loss", "ibot_loss")
        objective = torch.stack([loss * (2 if name in doubled else 1) for name, loss in terms.items()]).sum()
        return terms, objective

    def _heads(
        self, network: nn.ModuleDict, cls: Tensor, patches: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Logits of class tokens ``[n, D]`` and masked patches ``[M, D]``; a shared head runs once over both."""
        if patches is None:
            return network["dino_head"](cls), None
        if self.separate_head:
            return network["dino_head"](cls) if self.do_dino else None, network["ibot_head"](patches)
        if not self.do_dino:
            return None, network["dino_head"](patches)
        cls_logits, patch_logits = network["dino_head"](torch.cat([cls, patches])).split([len(cls), len(patches)])
        return cls_logits, patch_logits

    @property
    def centers(self) -> list[Tensor]:
        """Running means of the teacher's logits; the only state of the losses, which a forward pass changes."""
        return [buffer for loss in (self.dino_loss, self.ibot_loss) for buffer in loss.buffers()]

    @torch.no_grad()
    def copy_student_to_teacher(self) -> None:
        """Makes the teacher equal to the student."""
        self.teacher.load_state_dict(self.student.state_dict())


def has_separate_head(config: Config) -> bool:
    """Whether patches have a head of their own."""
    return config.ibot.loss_weight > 0 and config.ibot.separate_head


def make_network(config: Config, backbone: DinoVisionTransformer) -> nn.ModuleDict:
    """A backbone with the heads that the losses of the options need."""
    parts: dict[str, nn.Module] = {"backbone": backbone}
    for name, options, needed in (
        ("dino_head", config.dino, config.dino.loss_weight > 0 or not has_separate_head(config)),
        ("ibot_head", config.ibot, has_separate_head(config)),
    ):
        if needed:
            parts[name] = DINOHead(
                backbone.embed_dim,
                options.head_n_prototypes,
                nlayers=options.head_nlayers,
                hidden_dim=options.head_hidden_dim,
                bottleneck_dim=options.head_bottleneck_dim,
            )
    return nn.ModuleDict(parts)


def load_heads(network: nn.ModuleDict, content: Mapping[str, Any], where: str, *, missing: str, different: str) -> None:
    """Fills the heads of a network from a teacher's file; on the meta device the file is only checked.

    Args:
        network: of `make_network`.
        content: of the file.
        where: what names the file, for messages.
        missing: what follows from a head that the file lacks, for messages.
        different: what to do about one of other sizes, for messages.

    Raises:
        ValueError: the file lacks a head, or has one of other sizes.
    """
    state: Any = content.get("teacher", {})
    for name, head in network.items():
        if name == "backbone":
            continue
        start = f"{name}."
        found: dict[str, Tensor] = {key.removeprefix(start): state[key] for key in state if key.startswith(start)}
        expected = {key: list(value.shape) for key, value in head.state_dict().items()}
        if not found:
            raise ValueError(
                f"{where} holds no {name}, and {missing}: name the teacher_checkpoint.pth of a pretraining run"
            )
        if {key: list(value.shape) for key, value in found.items()} != expected:
            raise ValueError(f"{where}: its {name} is not as its options say; {different}")
        if not next(head.parameters()).is_meta:  # of a dry run
            head.load_state_dict(found)


def _masked_patches(patches: Tensor, batch: PretrainingBatch) -> Tensor:
    """Selects the masked patches ``[M, D]`` of ``[2B, N, D]``."""
    return patches.flatten(0, 1).index_select(0, batch.mask_indices)


@torch.no_grad()
def update_teacher(student: nn.Module, teacher: nn.Module, momentum: float) -> None:
    """Moves every teacher parameter to ``momentum * teacher + (1 - momentum) * student``.

    Both must be sharded alike: each process moves the rows that it holds.
    """
    release_gathered_parameters(teacher)
    for ours, theirs in zip(teacher.parameters(), student.parameters(), strict=True):
        local_part(ours).lerp_(local_part(theirs), 1 - momentum)
