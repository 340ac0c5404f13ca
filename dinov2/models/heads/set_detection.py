"""A set of boxes from queries, each the only one that speaks for its object: nothing has to be suppressed."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Unpack

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import box_convert

from dinov2.layers.deformable_attention import DeformableAttention, MapSizes
from dinov2.layers.feed_forward import Mlp
from dinov2.models.heads.features import Features, PixelHead
from dinov2.models.heads.pyramid import FeaturePyramid, PyramidOptions

CROSS_ATTENTIONS = ("deformable", "standard")
NUM_HEADS = 8
FIRST_PROBABILITY = 0.01  # of every class: nearly all queries see background
CELLS_PER_BOX = 4  # side of a first box, in cells of its map
OCTAVES = 6  # of wavelengths: from twice the image down to 1/32 of it

NOT_AN_OBJECT = -1  # a denoising query far from its object
NO_QUERY = -2  # a place that only makes images of a batch alike

LABEL_NOISE = 0.25  # share of denoising queries that are told a random class
BOX_NOISE = (
    1.0  # of half a side: edges move by less of a query near its object, by up to twice as much of one that is far
)


class SetDetectionHead(PixelHead):
    """Queries that turn into boxes, refined by every layer of a decoder.

    Training adds queries that predictions do without, each kind seeing its own only: a second group of which several
    match one object (one-to-many), and noised ground truth (denoising). With ``two_stage`` the first boxes come from
    the maps, where every position proposes one, and else they are learnt.

    Args:
        embed_dim: width of the backbone.
        num_outputs: classes ``C``; there is none for background.
        num_queries: most boxes of an image; with ``two_stage`` fewer where the maps have fewer positions.
        num_layers: of the decoder.
        cross_attention: "deformable" looks at a few places of all maps, "standard" at all their positions, which takes
            memory and time in proportion to them.
        two_stage: whether queries begin as the best proposals of the maps.
        num_denoising: queries per image that find a noised object again, and as many that must not; 0 for none.
        one_to_many: whether training has the second group.
        dropout: share of what a decoder layer adds that is set to zero in training, in [0, 1).
        **pyramid: options of the `FeaturePyramid`; queries are as wide (``D``) as its maps: a multiple of 8.

    Raises:
        ValueError: for another ``cross_attention``, ``channels`` that 8 does not divide, a count below its least, or
            options that the pyramid does not allow.

    Reference:
        Carion et al., "End-to-End Object Detection with Transformers" (2020); Zhu et al., "Deformable DETR" (2021),
        refinement and two stages; Zhang et al., "DINO: DETR with Improved DeNoising Anchor Boxes" (2023), section 3.3;
        Jia et al., "DETRs with Hybrid Matching" (2023), section 3.2 (one-to-many).
    """

    def __init__(
        self,
        embed_dim: int,
        num_outputs: int,
        *,
        num_queries: int = 300,
        num_layers: int = 3,
        cross_attention: str = "deformable",
        two_stage: bool = True,
        num_denoising: int = 100,
        one_to_many: bool = True,
        dropout: float = 0.0,
        **pyramid: Unpack[PyramidOptions],
    ) -> None:
        super().__init__()
        self.pyramid = FeaturePyramid(embed_dim, **pyramid)
        channels = self.pyramid.channels
        if cross_attention not in CROSS_ATTENTIONS:
            raise ValueError(f"cross_attention must be one of {', '.join(CROSS_ATTENTIONS)}, got {cross_attention!r}")
        if channels % NUM_HEADS:
            raise ValueError(f"channels={channels} must be a multiple of the {NUM_HEADS} attention heads")
        if num_queries < 1 or num_layers < 1 or num_denoising < 0:
            raise ValueError(
                f"num_queries={num_queries} and num_layers={num_layers} must be 1 or more, num_denoising="
                f"{num_denoising} 0 or more"
            )
        self.num_queries = num_queries
        self.num_classes = num_outputs
        self.two_stage = two_stage
        self.num_denoising = num_denoising
        if two_stage:
            self.propose = nn.Sequential(nn.Linear(channels, channels), nn.LayerNorm(channels))
            self.classify_proposals = _class_layer(channels, num_outputs)
            self.refine_proposals = _BoxRefinement(channels)
        else:
            self.queries = nn.Parameter(torch.randn(num_queries, channels))
            centres, sides = torch.rand(num_queries, 2), torch.full((num_queries, 2), 0.1)
            self.query_boxes = nn.Parameter(_logit(torch.cat([centres, sides], dim=1)))
        self.several_may_match = nn.Parameter(torch.randn(channels)) if one_to_many else None
        self.noised_classes = nn.Embedding(num_outputs, channels) if num_denoising else None
        self.embed_boxes = nn.Sequential(
            nn.Linear(4 * 2 * (OCTAVES + 1), channels), nn.GELU(), nn.Linear(channels, channels)
        )
        places = 2 * 2 * (OCTAVES + 1)
        self.embed_places = nn.Linear(places, channels, bias=False) if cross_attention == "standard" else None
        num_levels = len(self.pyramid.strides)
        self.layers = nn.ModuleList(
            _DecoderLayer(channels, num_levels, deformable=cross_attention == "deformable", dropout=dropout)
            for _ in range(num_layers)
        )
        self.classify = nn.ModuleList(_class_layer(channels, num_outputs) for _ in range(num_layers))
        self.refine = nn.ModuleList(_BoxRefinement(channels) for _ in range(num_layers))

    def forward(
        self, features: Features, images: Tensor, targets: Mapping[str, Sequence[Tensor]] | None = None
    ) -> dict[str, Tensor]:
        """Predicts a set of boxes for every image.

        Args:
            features: of the images.
            images: ``[B, image_channels, H, W]``.
            targets: ``boxes``, float ``[n, 4]`` of every image, XYXY in pixels of ``images``, and ``box_labels``, int64
                ``[n]``; for denoising, in training only.

        Returns:
            ``scores`` ``[B, Q, C]``, logits; ``normalized_boxes`` ``[B, Q, 4]``, (cx, cy, w, h) in [0, 1]; ``boxes``
            ``[B, Q, 4]``, the same as XYXY in pixels of ``images``. In training also what `SetDetectionLoss` needs:
            ``image_size`` (width, height, width, height), and of all ``L`` decoder layers ``layer_scores``
            ``[L, B, Q, C]`` with ``layer_boxes``; as these, of the second group ``many_scores`` and ``many_boxes``, of
            noised objects ``denoising_scores`` and ``denoising_boxes`` with ``denoising_targets`` (int64, number of the
            image's object, `NOT_AN_OBJECT` or `NO_QUERY`), of all ``S`` positions of the maps ``proposal_scores``
            ``[1, B, S, C]`` and ``proposal_boxes``.

        Raises:
            ValueError: when features of another number of blocks come.
        """
        maps = self.pyramid(features, images)
        sizes = [(entry.shape[-2], entry.shape[-1]) for entry in maps]
        memory = torch.cat([entry.flatten(2).transpose(1, 2) for entry in maps], dim=1)  # [B, S, D]
        height, width = images.shape[-2:]
        image_size = torch.tensor([width, height, width, height], dtype=torch.float32, device=images.device)
        cells = _cells(sizes, self.pyramid.strides, image_size)

        extras: dict[str, Tensor] = {}
        if self.two_stage:
            queries, boxes, extras = self._best_proposals(memory, cells)
        else:
            queries = self.queries.expand(memory.shape[0], -1, -1)
            boxes = self.query_boxes.float().sigmoid().expand(memory.shape[0], -1, -1)
        count = queries.shape[1]
        groups = [_Group("layer", queries, boxes)]
        if self.training and self.several_may_match is not None:
            groups.append(_Group("many", queries + self.several_may_match, boxes))
        if self.training and self.noised_classes is not None and targets is not None:
            labels, noised, objects = noise_objects(
                [entry.to(images.device) / image_size for entry in targets["boxes"]],
                [entry.to(images.device) for entry in targets["box_labels"]],
                self.num_classes,
                self.num_denoising,
            )
            known = self.noised_classes(labels.flatten(1))
            groups.append(_Group("denoising", known, noised.flatten(1, 2), labels.shape[1]))
            extras["denoising_targets"] = objects.flatten(1)

        scores, found = self._decode(groups, memory, cells, sizes)
        outputs = {
            "scores": scores[-1, :, :count],
            "normalized_boxes": found[-1, :, :count],
            "boxes": box_convert(found[-1, :, :count], "cxcywh", "xyxy") * image_size,
        }
        if not self.training:
            return outputs
        counts = [group.queries.shape[1] for group in groups]
        for group, part, part_boxes in zip(groups, scores.split(counts, 2), found.split(counts, 2), strict=True):
            extras |= {f"{group.name}_scores": part, f"{group.name}_boxes": part_boxes}
        return outputs | extras | {"image_size": image_size}

    def _decode(
        self, groups: Sequence["_Group"], memory: Tensor, cells: Tensor, sizes: MapSizes
    ) -> tuple[Tensor, Tensor]:
        """Scores ``[L, B, Q, C]`` and boxes ``[L, B, Q, 4]`` after every layer, of the queries of all groups."""
        hidden = torch.cat([group.queries for group in groups], dim=1)
        boxes = torch.cat([group.boxes for group in groups], dim=1)
        places = None if self.embed_places is None else self.embed_places(waves(cells[:, :2]).to(memory.dtype))
        apart = _separated(groups, memory.device) if len(groups) > 1 else None
        scores, found = [], []
        for layer, classify, refine in zip(self.layers, self.classify, self.refine, strict=True):
            position = self.embed_boxes(waves(boxes).to(memory.dtype))
            hidden = layer(hidden, position, boxes, memory, places, sizes, apart)
            refined = refine(hidden, boxes)
            scores.append(classify(hidden))
            found.append(refined)
            boxes = refined.detach()
        return torch.stack(scores), torch.stack(found)

    def _best_proposals(self, memory: Tensor, cells: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Queries ``[B, Q, D]`` and boxes ``[B, Q, 4]`` of the likeliest positions; in training also all of them."""
        proposed = self.propose(memory)
        scores = self.classify_proposals(proposed)
        boxes = self.refine_proposals(proposed, cells.expand(memory.shape[0], -1, -1))
        likeliest = scores.amax(dim=-1).topk(min(self.num_queries, memory.shape[1]), dim=1).indices[..., None]
        extras = {"proposal_scores": scores[None], "proposal_boxes": boxes[None]} if self.training else {}
        # Detached, as in DINO: proposals are taught by their own loss, or they would follow those of the decoder.
        queries, chosen = (
            entry.detach().gather(1, likeliest.expand(-1, -1, entry.shape[-1])) for entry in (proposed, boxes)
        )
        return queries, chosen, extras


class _Group(NamedTuple):
    """Queries ``[B, Q, D]`` with boxes ``[B, Q, 4]``, in so many equal parts that do not see each other."""

    name: str
    queries: Tensor
    boxes: Tensor
    num_parts: int = 1


def _separated(groups: Sequence[_Group], device: torch.device) -> Tensor:
    """Bool ``[Q, Q]``: which queries must not see which others, as they are of another part."""
    widths = [group.queries.shape[1] // group.num_parts for group in groups for _ in range(group.num_parts)]
    part = torch.arange(len(widths), device=device).repeat_interleave(torch.tensor(widths, device=device))
    return part[:, None] != part


class _DecoderLayer(nn.Module):
    """Queries look at each other, then at the maps, and are mixed; each step is added and normed."""

    def __init__(self, channels: int, num_levels: int, *, deformable: bool, dropout: float) -> None:
        super().__init__()
        self.self_attention = nn.MultiheadAttention(channels, NUM_HEADS, batch_first=True)
        self.cross_attention: nn.Module = (
            DeformableAttention(channels, num_levels=num_levels, num_heads=NUM_HEADS)
            if deformable
            else nn.MultiheadAttention(channels, NUM_HEADS, batch_first=True)
        )
        self.mlp = Mlp(channels, 4 * channels)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(channels) for _ in range(3))
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        queries: Tensor,
        position: Tensor,
        boxes: Tensor,
        memory: Tensor,
        places: Tensor | None,
        sizes: MapSizes,
        apart: Tensor | None,
    ) -> Tensor:
        """Maps queries ``[B, Q, D]`` to the same; ``apart`` is true where one does not see another."""
        placed = queries + position
        seen, _ = self.self_attention(placed, placed, queries, attn_mask=apart, need_weights=False)
        queries = self.norm1(queries + self.dropout(seen))
        if places is None:
            seen = self.cross_attention(queries + position, boxes, memory, sizes)
        else:
            seen, _ = self.cross_attention(queries + position, memory + places, memory, need_weights=False)
        queries = self.norm2(queries + self.dropout(seen))
        output: Tensor = self.norm3(queries + self.dropout(self.mlp(queries)))
        return output


class _BoxRefinement(nn.Module):
    """Moves boxes by what their queries say; at first not at all."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        last = nn.Linear(channels, 4)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.move = nn.Sequential(
            nn.Linear(channels, channels), nn.GELU(), nn.Linear(channels, channels), nn.GELU(), last
        )

    def forward(self, queries: Tensor, boxes: Tensor) -> Tensor:
        """Maps boxes ``[B, Q, 4]`` of float32, (cx, cy, w, h) in [0, 1], to the same."""
        moved: Tensor = self.move(queries) + _logit(boxes)
        return moved.sigmoid()


def noise_objects(
    boxes: Sequence[Tensor], labels: Sequence[Tensor], num_classes: int, num_wanted: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Copies of the objects of every image with other boxes and classes, in groups that each show an object once.

    Each group has a query near and one far from every object. An image of more objects than ``num_wanted`` shows a
    random choice of them.

    Args:
        boxes: of every image, ``[n, 4]``, XYXY in shares of the image.
        labels: ``[n]``.
        num_classes: of which a label may become another.
        num_wanted: queries near an object that an image is to have, at most.

    Returns:
        For ``G`` groups of ``N`` queries: labels ``[B, G, N]``; boxes ``[B, G, N, 4]``, (cx, cy, w, h) in [0, 1]; and
        the object of each, ``[B, G, N]``: its number in the image, `NOT_AN_OBJECT` of one that is far, or `NO_QUERY`.
    """
    device = boxes[0].device
    most = min(max(1, *(len(entry) for entry in boxes)), num_wanted)
    chosen = [
        torch.randperm(len(entry), device=device)[:most]
        if len(entry) > most
        else torch.arange(len(entry), device=device)
        for entry in boxes
    ]
    numbers = _padded(chosen, most, NO_QUERY)
    shape = (len(boxes), num_wanted // most, 2, most)

    def copies(rows: Sequence[Tensor]) -> Tensor:
        entry = _padded([row[choice] for row, choice in zip(rows, chosen, strict=True)], most, 0)
        return entry[:, None, None].expand(*shape, *entry.shape[2:])

    true_labels, corners = copies(labels), copies(boxes)
    told = torch.rand(shape, device=device) >= LABEL_NOISE
    said = true_labels.where(told, torch.randint(num_classes, shape, device=device))

    half_sides = (corners[..., 2:] - corners[..., :2]) / 2
    distance = torch.rand(corners.shape, device=device) + torch.arange(2, device=device)[:, None, None]
    sign = 2 * torch.randint(2, corners.shape, device=device) - 1
    moved = (corners + BOX_NOISE * sign * distance * torch.cat([half_sides, half_sides], dim=-1)).clamp(0, 1)
    first, second = moved[..., :2], moved[..., 2:]  # which far ones may have swapped
    noised = torch.cat([(first + second) / 2, (second - first).abs()], dim=-1)

    near = numbers[:, None].expand(shape[0], shape[1], most)
    far = near.clamp(max=NOT_AN_OBJECT)
    return said.flatten(2), noised.flatten(2, 3), torch.cat([near, far], dim=2)


def waves(coordinates: Tensor) -> Tensor:
    """Sine and cosine of coordinates ``[..., n]`` in [0, 1] at wavelengths of 2, 1, … 1/32: ``[..., n * 14]``."""
    frequencies = math.pi * 2.0 ** torch.arange(OCTAVES + 1, device=coordinates.device)
    angles = (coordinates[..., None] * frequencies).flatten(-2)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def _cells(sizes: MapSizes, strides: Sequence[int], image_size: Tensor) -> Tensor:
    """A first box ``[S, 4]`` around every position of the maps, (cx, cy, w, h) in shares of the image, float32."""
    cells = []
    for (height, width), stride in zip(sizes, strides, strict=True):
        rows = (torch.arange(height, device=image_size.device) + 0.5) / height
        columns = (torch.arange(width, device=image_size.device) + 0.5) / width
        y, x = torch.meshgrid(rows, columns, indexing="ij")
        sides = (CELLS_PER_BOX * stride / image_size[:2]).clamp(max=0.9).expand(height * width, 2)
        cells.append(torch.cat([x.reshape(-1, 1), y.reshape(-1, 1), sides], dim=1))
    return torch.cat(cells)


def _class_layer(channels: int, num_classes: int) -> nn.Linear:
    layer = nn.Linear(channels, num_classes)
    nn.init.constant_(layer.bias, math.log(FIRST_PROBABILITY / (1 - FIRST_PROBABILITY)))
    return layer


def _logit(shares: Tensor, eps: float = 1e-5) -> Tensor:
    shares = shares.clamp(eps, 1 - eps)
    return torch.log(shares / (1 - shares))


def _padded(rows: Sequence[Tensor], length: int, value: int) -> Tensor:
    """Rows ``[n, …]`` of at most ``length`` as ``[B, length, …]``."""
    ruler = rows[0].new_full((length, *rows[0].shape[1:]), value)
    return pad_sequence([*rows, ruler], batch_first=True, padding_value=value)[:-1]
