"""Writing a backbone in the layout of another library.

A target is a function from a backbone and how images are prepared for it to the files that the library reads; a further
one is a further entry of `LIBRARIES`.
"""

import copy
import json
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from dinov2.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from dinov2.eval.features import MARGIN
from dinov2.layers.block import LAYER_NORM_EPS
from dinov2.layers.feed_forward import SwiGLUFFN, swiglu_hidden_dim
from dinov2.models.pruning import BackboneSize
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.predict.model import Model
from dinov2.utils.files import write_atomically

logger = logging.getLogger("dinov2")

WEIGHTS_NAME = "model.safetensors"  # in timm and in transformers


@dataclass(frozen=True, kw_only=True)
class ExportedBackbone:
    """What is written.

    Attributes:
        tensors: parameters by the names of the library.
        files: further files, content by name.
        usage: how the library loads the folder, with ``{folder}`` for it.
        image_size: pixels (height, width) that the position embedding is for.
    """

    tensors: Mapping[str, Tensor]
    files: Mapping[str, Mapping[str, Any]]
    usage: str
    image_size: tuple[int, int]


def native_size(backbone: DinoVisionTransformer) -> tuple[int, int]:
    """Pixels (height, width) that a backbone's position embedding is for."""
    (rows, columns), (height, width) = backbone.grid_size, backbone.patch_size
    return rows * height, columns * width


def complete_state(backbone: DinoVisionTransformer) -> dict[str, Tensor]:
    """Parameters of a backbone, with LayerScale of 1 and biases of 0 where it has none: other libraries have them."""
    state = {name: tensor.detach().float().cpu() for name, tensor in backbone.state_dict().items()}
    width = backbone.embed_dim
    for index in range(backbone.n_blocks):
        block = f"blocks.{index}."
        for scale in ("ls1", "ls2"):
            state.setdefault(f"{block}{scale}.gamma", torch.ones(width))
        for name in [name for name in state if name.startswith(block) and name.endswith(".weight")]:
            state.setdefault(name.removesuffix("weight") + "bias", torch.zeros(state[name].shape[0]))
    return state


def is_gated(backbone: DinoVisionTransformer) -> bool:
    """Whether its feed-forward networks are gated (SwiGLU)."""
    return isinstance(backbone.blocks[0].mlp, SwiGLUFFN)


def _check_heads(backbone: DinoVisionTransformer, library: str) -> None:
    """Refuses a backbone from which heads were pruned: in other libraries they share the whole width of the tokens."""
    together = backbone.state_dict()["blocks.0.attn.proj.weight"].shape[1]
    if together != backbone.embed_dim:
        raise ValueError(
            f"{library} has no network whose {backbone.num_heads} heads are {together} wide together beside tokens of "
            f"{backbone.embed_dim}: prune mlp or depth instead of heads, or export --to onnx"
        )


def to_timm(model: Model) -> ExportedBackbone:
    """The layout of timm's ``vit_*_dinov2``; with registers, the class token has no place in the position embedding.

    Raises:
        ValueError: heads were pruned.
    """
    backbone = model.backbone
    _check_heads(backbone, "timm")
    state = complete_state(backbone)
    del state["mask_token"]  # of pretraining
    registers = backbone.num_register_tokens
    if registers:
        positions = state["pos_embed"]
        state["reg_token"] = state.pop("register_tokens")
        state["cls_token"] = state["cls_token"] + positions[:, :1]
        state["pos_embed"] = positions[:, 1:]
    gated = is_gated(backbone)
    tensors = {
        name.replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2."): tensor
        for name, tensor in state.items()
    }
    size = "giant" if gated else {1024: "large", 768: "base"}.get(backbone.embed_dim, "small")
    size_of_images = native_size(backbone)
    arguments: dict[str, Any] = {
        "img_size": list(size_of_images),
        "patch_size": _number(backbone.patch_size),
        "embed_dim": backbone.embed_dim,
        "depth": backbone.n_blocks,
        "num_heads": backbone.num_heads,
        "init_values": 1.0,
        "reg_tokens": registers,
        "no_embed_class": bool(registers),
    }
    hidden = tensors["blocks.0.mlp.fc1.weight"].shape[0]  # of a gated network both halves together
    if gated or hidden != 4 * backbone.embed_dim:  # rounded down there
        arguments["mlp_ratio"] = math.nextafter(hidden / backbone.embed_dim, math.inf)
    crop = 1.0 if model.whole_image else 1 / MARGIN
    config = {
        "architecture": f"vit_{size}_patch14{'_reg4' if registers else ''}_dinov2",
        "num_classes": 0,
        "num_features": backbone.embed_dim,
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [3, *size_of_images],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": crop,
            "crop_mode": "squash" if model.whole_image else "center",
            "mean": list(IMAGENET_MEAN),
            "std": list(IMAGENET_STD),
            "num_classes": 0,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
    usage = "timm.create_model('local-dir:{folder}', pretrained=True)"
    return ExportedBackbone(tensors=tensors, files={"config.json": config}, usage=usage, image_size=size_of_images)


def _hidden_ratio(backbone: DinoVisionTransformer) -> tuple[int, int]:
    """How many times as wide as the tokens a plain hidden layer is, and how many units are left over."""
    hidden = BackboneSize.of(backbone).hidden_dim
    if is_gated(backbone):
        ratio = round(hidden * 3 / 2 / backbone.embed_dim)
        return ratio, hidden - swiglu_hidden_dim(ratio * backbone.embed_dim)
    return divmod(hidden, backbone.embed_dim)


_HUGGING_FACE = (
    ("patch_embed.proj.", "embeddings.patch_embeddings.projection."),
    ("pos_embed", "embeddings.position_embeddings"),
    ("cls_token", "embeddings.cls_token"),
    ("mask_token", "embeddings.mask_token"),
    ("register_tokens", "embeddings.register_tokens"),
    ("blocks.", "encoder.layer."),
    (".attn.proj.", ".attention.output.dense."),
    (".ls1.gamma", ".layer_scale1.lambda1"),
    (".ls2.gamma", ".layer_scale2.lambda1"),
    (".mlp.w12.", ".mlp.weights_in."),
    (".mlp.w3.", ".mlp.weights_out."),
)


def to_hugging_face(model: Model) -> ExportedBackbone:
    """The layout of ``Dinov2Model``, or of ``Dinov2WithRegistersModel`` where there are registers.

    Raises:
        ValueError: for patches, or a position embedding, that are not square, for pruned heads, and for hidden units
            that are no multiple of the width: these networks have none.
    """
    backbone = model.backbone
    _check_heads(backbone, "transformers")
    ratio, rest = _hidden_ratio(backbone)
    if rest:
        raise ValueError(
            f"hidden layers of Dinov2Model are a whole number of times as wide as its tokens (or, gated, two thirds of "
            f"that), and {rest} units are left over: prune depth alone, or use --to timm"
        )
    if len(set(backbone.patch_size)) > 1 or len(set(backbone.grid_size)) > 1:
        raise ValueError(
            f"Dinov2Model of transformers is for square patches and a square position embedding; this backbone has "
            f"patches of {backbone.patch_size} pixels and a grid of {backbone.grid_size}: use --to timm"
        )
    tensors: dict[str, Tensor] = {}
    for name, tensor in complete_state(backbone).items():
        if ".attn.qkv." in name:
            for part, piece in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                theirs = name.replace("blocks.", "encoder.layer.").replace(
                    ".attn.qkv.", f".attention.attention.{part}."
                )
                tensors[theirs] = piece
            continue
        theirs = name if not name.startswith("norm.") else f"layer{name}"
        for ours, part in _HUGGING_FACE:
            theirs = theirs.replace(ours, part)
        tensors[theirs] = tensor
    registers, size_of_images = backbone.num_register_tokens, native_size(backbone)
    config: dict[str, Any] = {
        "architectures": ["Dinov2WithRegistersModel" if registers else "Dinov2Model"],
        "model_type": "dinov2_with_registers" if registers else "dinov2",
        "hidden_size": backbone.embed_dim,
        "num_hidden_layers": backbone.n_blocks,
        "num_attention_heads": backbone.num_heads,
        "mlp_ratio": ratio,
        "hidden_act": "gelu",
        "use_swiglu_ffn": is_gated(backbone),
        "layer_norm_eps": LAYER_NORM_EPS,
        "layerscale_value": 1.0,
        "qkv_bias": True,
        "image_size": size_of_images[0],
        "patch_size": backbone.patch_size[0],
        "num_channels": 3,
        "torch_dtype": "float32",
    }
    if registers:
        config["num_register_tokens"] = registers
    height, width = model.image_size
    covered = {"height": height, "width": width}
    squeezed = model.whole_image or height != width
    processor = {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": covered if squeezed else {"shortest_edge": round(height * MARGIN)},
        "resample": 3,
        "do_center_crop": not squeezed,
        "crop_size": covered,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(IMAGENET_MEAN),
        "image_std": list(IMAGENET_STD),
    }
    return ExportedBackbone(
        tensors=tensors,
        files={"config.json": config, "preprocessor_config.json": processor},
        usage="transformers.AutoModel.from_pretrained('{folder}')",
        image_size=size_of_images,
    )


LIBRARIES: Mapping[str, Callable[[Model], ExportedBackbone]] = MappingProxyType(
    {"timm": to_timm, "huggingface": to_hugging_face}
)


def export_backbone(model: Model, to: str, output: str | Path, *, image_size: int = 0) -> ExportedBackbone:
    """Writes the backbone of a model into a folder, as another library reads it.

    At the image size of its position embedding the library computes the same features. For other sizes each library
    resizes the embedding in a way of its own: name the size that images will have.

    Args:
        model: what `dinov2.load` gives; a head is left out.
        to: one of `LIBRARIES`.
        output: folder, which is made; it must not hold weights yet.
        image_size: square images, in pixels, that the position embedding is resized for; 0 keeps it.

    Raises:
        ValueError: for an unknown target, a size that does not divide into patches, or a backbone that the library has
            no network for.
        FileExistsError: when the folder holds weights already, or is a file.
        OSError: when it cannot be written.
    """
    if to not in LIBRARIES:
        raise ValueError(f"to={to!r} is unknown; allowed: {', '.join(LIBRARIES)}")
    folder = Path(output).expanduser()
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; name a folder for the export")
    if (folder / WEIGHTS_NAME).exists():
        raise FileExistsError(f"{folder} holds {WEIGHTS_NAME} already; name another folder, or delete it")
    channels = model.backbone.patch_embed.proj.in_channels
    if channels != len(IMAGENET_MEAN):
        raise ValueError(f"the backbone takes images of {channels} channels, the networks of to={to} RGB")
    if image_size:
        model = _resized(model, image_size)
    exported = LIBRARIES[to](model)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in exported.files.items():
        text = json.dumps(content, indent=2) + "\n"
        write_atomically(folder / name, lambda file, text=text: file.write(text.encode("utf-8")))  # type: ignore[misc]
    if model.light == "standardized":
        logger.warning("the model was trained on light=standardized images, which %s does not prepare", folder)
    if model.value_range is not None:
        logger.warning(
            "the model was trained on images of more than 8 bits (%s); %s does not prepare them: give it images that "
            "were made 8 bits in that range",
            *(model.value_range, folder),
        )
    if model.preprocessing.steps:
        logger.warning(
            "the model was trained on preprocessed images, which %s does not prepare: %s",
            *(folder, model.preprocessing.to_values()),
        )
    tensors = {name: tensor.contiguous().clone() for name, tensor in exported.tensors.items()}
    write_atomically(folder / WEIGHTS_NAME, lambda file: file.write(save(tensors, {"format": "pt"})))
    return exported


def _resized(model: Model, image_size: int) -> Model:
    """The same with a position embedding for square images of another size."""
    backbone = copy.deepcopy(model.backbone)
    grid = backbone.patch_embed.grid_size(image_size, image_size)
    with torch.no_grad():
        backbone.pos_embed = torch.nn.Parameter(backbone.interpolate_pos_encoding(grid).clone(), requires_grad=False)
    backbone.grid_size = grid
    return replace(model, backbone=backbone, image_size=(image_size, image_size))


def _number(pair: tuple[int, int]) -> int | list[int]:
    return pair[0] if pair[0] == pair[1] else list(pair)
