"""A backbone and a task head as one network from images to classes, masks or depth, for images of any size."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2.models.heads.classification import PartClassifier
from dinov2.models.heads.features import BlockFeatures, PixelHead, resize_maps
from dinov2.models.vision_transformer import DinoVisionTransformer


class TaskModel(nn.Module):
    """Features of some blocks of a backbone, and a head on top.

    Images whose sides are no multiples of the patch are padded with zeros, half on each side (the odd pixel below or to
    the right), and what is predicted for the padding is cut off again.

    Args:
        backbone: its parameters may be frozen or not; nothing here stops gradients.
        head: takes one pair (map ``[B, D, h, w]``, class token ``[B, D]``) per block, and the padded images if it is a
            `PixelHead`, and gives ``[B, C]`` or a dense ``[B, C, h', w']``.
        blocks: numbers of the blocks, from 0, in the order in which the head expects them.
        norm: whether the backbone's final norm is applied to the features of each block. The released classifiers and
            segmentation heads need it, the released depth heads must not have it.
        output: name of the output of a head that gives a tensor; a head may also give a dict of its own.

    Raises:
        ValueError: when ``blocks`` is empty or names a block that does not exist.
    """

    def __init__(
        self,
        backbone: DinoVisionTransformer,
        head: nn.Module,
        *,
        blocks: Sequence[int],
        norm: bool = True,
        output: str = "logits",
    ) -> None:
        super().__init__()
        if not blocks or min(blocks) < 0 or max(blocks) >= backbone.n_blocks:
            raise ValueError(f"blocks must be numbers from 0 to {backbone.n_blocks - 1}, got {list(blocks)}")
        self.backbone = backbone
        self.head = head
        self.blocks = tuple(blocks)
        self.norm = norm
        self.output = output
        self.patch_size = backbone.patch_size

    def forward(self, images: Tensor, valid: Tensor | None = None, **for_head: Any) -> dict[str, Tensor]:
        """Predicts for images, or for parts of several images.

        Args:
            images: normalised ``[B, 3, H, W]``; for a head over parts also ``[parts, images, 3, H, W]``.
            valid: bool ``[parts, images]``, false for places without an image, whose content is not looked at; None
                when all are images.
            **for_head: what a head of single images takes beside features and images, by name.

        Returns:
            Outputs by name. Of a head that gives a tensor, one: ``[B, C]`` (one row per part for parts), or a dense
            prediction ``[B, C, H, W]``, enlarged bilinearly (corners not aligned): logits, or depth with C = 1. What a
            head gives by name comes as it is, about the padded image.

        Raises:
            ValueError: for images of another shape or without pixels, for parts when the head takes single images, or
                for a part without an image.
        """
        if images.ndim == 5:
            if not isinstance(self.head, PartClassifier):
                raise ValueError(
                    f"images of parts ({list(images.shape)}) need a head over parts; {type(self.head).__name__} takes "
                    f"single images [B, 3, H, W]"
                )
            valid = images.new_ones(images.shape[:2]).bool() if valid is None else valid
            if valid.shape != images.shape[:2]:
                raise ValueError(
                    f"images {list(images.shape)} need a mask {list(images.shape[:2])} of valid images, "
                    f"got {list(valid.shape)}"
                )
            return {self.output: self.head(self.features(images[valid]), valid)}
        if valid is not None:
            raise ValueError(f"a mask of valid images needs images [parts, images, 3, H, W], got {list(images.shape)}")
        return self._predict(images, for_head)

    def _predict(self, images: Tensor, for_head: dict[str, Any]) -> dict[str, Tensor]:
        size = _image_size(images)
        padded = F.pad(images, centre_padding(*size, self.patch_size))
        return self.head_outputs(self.features(padded), padded, size, **for_head)

    def head_outputs(
        self, features: Sequence[BlockFeatures], padded: Tensor, size: tuple[int, int], **for_head: Any
    ) -> dict[str, Tensor]:
        """Outputs of the head as `forward` names them, for features that are there already.

        Args:
            features: of the padded images, a pair per block, see `features`.
            padded: the images ``[B, 3, H', W']``, whose sides are multiples of the patch.
            size: height and width of the images before they were padded.
            **for_head: see `forward`.
        """
        pixels = [self._pixels(padded)] if isinstance(self.head, PixelHead) else []
        output: Tensor | dict[str, Tensor] = self.head(tuple(features), *pixels, **for_head)
        if isinstance(output, dict):
            return output
        if output.ndim == 2:
            return {self.output: output}
        left, _, top, _ = centre_padding(*size, self.patch_size)
        dense = resize_maps(output, (padded.shape[-2], padded.shape[-1]))
        return {self.output: dense[..., top : top + size[0], left : left + size[1]]}

    def _pixels(self, images: Tensor) -> Tensor:
        """What a `PixelHead` gets of padded images."""
        return images

    def features(self, images: Tensor) -> tuple[BlockFeatures, ...]:
        """Features of the padded images ``[B, 3, H, W]``: per block a map ``[B, D, h, w]`` and class tokens ``[B, D]``.

        Raises:
            ValueError: for images of another shape or without pixels.
        """
        padded = F.pad(images, centre_padding(*_image_size(images), self.patch_size))
        features = self.backbone.get_intermediate_layers(
            padded, n=self.blocks, reshape=True, return_class_token=True, norm=self.norm
        )
        return cast(tuple[BlockFeatures, ...], features)


class JointTaskModel(nn.Module):
    """Several heads on one backbone, which looks at each image once.

    Args:
        models: by the names of the heads; their backbones have equal weights, and that of the first becomes that of
            all, so that the others' memory is free.
    """

    def __init__(self, models: Mapping[str, TaskModel]) -> None:
        super().__init__()
        self.names = tuple(models)
        self.backbone = next(iter(models.values())).backbone
        for model in models.values():
            model.backbone = self.backbone
        self.models = nn.ModuleList(models.values())
        self.blocks = tuple(sorted({block for model in models.values() for block in model.blocks}))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Maps normalised images ``[B, 3, H, W]`` to the outputs of every head, see `TaskModel`, as ``HEAD/OUTPUT``.

        Raises:
            ValueError: for images of another shape or without pixels.
        """
        backbone, size = self.backbone, _image_size(images)
        padded = F.pad(images, centre_padding(*size, backbone.patch_size))
        height, width = backbone.patch_size
        grid = (padded.shape[-2] // height, padded.shape[-1] // width)
        tokens = backbone.get_intermediate_layers(padded, n=self.blocks, return_class_token=True, norm=False)
        outputs: dict[str, Tensor] = {}
        features: dict[tuple[int, bool], BlockFeatures] = {}  # by block, and whether normalised
        for name, model in zip(self.names, cast(Sequence[TaskModel], self.models), strict=True):
            for block in model.blocks:
                patches, cls = cast(BlockFeatures, tokens[self.blocks.index(block)])
                if (block, model.norm) not in features:
                    patches, cls = (backbone.norm(patches), backbone.norm(cls)) if model.norm else (patches, cls)
                    maps = patches.transpose(1, 2).unflatten(2, grid)
                    features[block, model.norm] = maps, cls
            chosen = [features[block, model.norm] for block in model.blocks]
            outputs |= {f"{name}/{key}": value for key, value in model.head_outputs(chosen, padded, size).items()}
        return outputs


class TensorTaskModel(TaskModel):
    """A `TaskModel` whose single output comes without a name, as users of released models know it."""

    def forward(self, images: Tensor, valid: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """The output of `TaskModel.forward`."""
        (output,) = super().forward(images, valid).values()
        return output


class ComparingTaskModel(TaskModel):
    """A `TaskModel` that sees every image together with one without a defect, by the same backbone.

    Its head gets features of twice the width: those of the image, and beside each how far it is from that of the
    reference (an absolute difference, for heads may be linear, and a mean over patches would cancel signs). A
    `PixelHead` gets images ``[B, 6, H, W]``: the pixels, and how they differ, image minus reference.

    Reference:
        Daudt, Le Saux, Boulch, "Fully Convolutional Siamese Networks for Change Detection" (2018), section 3.2.
    """

    def forward(self, images: Tensor, reference: Tensor, **for_head: Any) -> dict[str, Tensor]:  # type: ignore[override]
        """Predicts for images, each compared with another.

        Args:
            images: normalised ``[B, 3, H, W]``.
            reference: of each image one without a defect, which shows the same in the same place; alike.
            **for_head: see `TaskModel.forward`.

        Returns:
            As `TaskModel.forward`.

        Raises:
            ValueError: for images of another shape or without pixels, or references of another shape than the images.
        """
        if reference.shape != images.shape or images.ndim != 4:
            raise ValueError(
                f"images and references must both be [B, 3, H, W] of the same size, got {list(images.shape)} and "
                f"{list(reference.shape)}"
            )
        return self._predict(torch.cat([images, reference], dim=1), for_head)

    def _pixels(self, images: Tensor) -> Tensor:
        own, reference = images.chunk(2, dim=1)
        return torch.cat([own, own - reference], dim=1)

    def features(self, images: Tensor) -> tuple[BlockFeatures, ...]:
        """Features, of width ``2 D``, of padded images and their references ``[B, 6, H, W]``."""
        both = super().features(torch.cat(images.chunk(2, dim=1)))
        return tuple((_beside_difference(maps), _beside_difference(tokens)) for maps, tokens in both)


def _beside_difference(both: Tensor) -> Tensor:
    """Maps images ``[2 B, D, …]``, the second half of references, to ``[B, 2 D, …]``."""
    own, reference = both.unflatten(0, (2, -1)).unbind()  # chunk would fix the size of the batch at export
    return torch.cat([own, (own - reference).abs()], dim=1)


def centre_padding(height: int, width: int, patch_size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Pixels to add on the left, right, top and bottom to reach multiples of ``patch_size`` (height, width)."""
    vertical, horizontal = -height % patch_size[0], -width % patch_size[1]
    left, top = horizontal // 2, vertical // 2
    return left, horizontal - left, top, vertical - top


def _image_size(images: Tensor) -> tuple[int, int]:
    if images.ndim != 4:
        raise ValueError(f"images must be [B, 3, H, W], got {list(images.shape)}")
    height, width = images.shape[-2:]
    if height == 0 or width == 0:
        raise ValueError(f"images of {height} x {width} pixels (height x width) have no pixels")
    return height, width


# Of the published evaluations.
PUBLISHED_SCALES = (1.0, 1.32, 1.73, 2.28, 3.0)


class MultiScaleInference(nn.Module):
    """Mean class probabilities over scaled and mirrored copies of each image.

    Args:
        model: gives logits ``[B, C, H, W]``.
        scales: factors on height and width.
        flip: whether each scale is also predicted mirrored left to right.

    Raises:
        ValueError: when ``scales`` is empty or holds one that is not positive.
    """

    def __init__(
        self, model: TensorTaskModel, *, scales: Sequence[float] = PUBLISHED_SCALES, flip: bool = True
    ) -> None:
        super().__init__()
        if not scales or min(scales) <= 0:
            raise ValueError(f"scales must be one or more positive numbers, got {scales}")
        self.model = model
        self.scales = tuple(scales)
        self.flip = flip

    def forward(self, images: Tensor) -> Tensor:
        """Maps images ``[B, 3, H, W]`` to log-probabilities ``[B, C, H, W]``, whose softmax is the mean."""
        size = (images.shape[-2], images.shape[-1])
        probabilities = []
        for scale in self.scales:
            scaled = images
            if scale != 1:
                target = [max(round(side * scale), 1) for side in size]
                scaled = F.interpolate(images, target, mode="bilinear", align_corners=False, antialias=scale < 1)
            probabilities.append(resize_maps(self.model(scaled), size).softmax(dim=1))
            if self.flip:
                mirrored = self.model(scaled.flip(-1)).flip(-1)
                probabilities.append(resize_maps(mirrored, size).softmax(dim=1))
        mean = torch.stack(probabilities).mean(dim=0)
        return mean.clamp_min(torch.finfo(mean.dtype).tiny).log()
