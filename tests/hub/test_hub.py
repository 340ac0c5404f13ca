"""Constructors of released backbones, classifiers, depth and segmentation models, on files of the true layout."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2.hub import backbones, classifiers, decode_heads, depthers, detectors, segmentors, task_models
from dinov2.models import released
from dinov2.models.heads.depth import DepthBins, DPTHead, ReluDepth
from dinov2.models.heads.segmentation import BNHead
from dinov2.models.task_model import MultiScaleInference, TaskModel


@pytest.mark.parametrize("name", released.RELEASED_BACKBONES)
def test_every_backbone_has_the_released_shape(name: str) -> None:
    with torch.device("meta"):
        model = getattr(backbones, name)(pretrained=False)
    assert model.embed_dim == {"s": 384, "b": 768, "l": 1024, "g": 1536}[name[len("dinov2_vit")]]
    assert model.num_register_tokens == (4 if name.endswith("_reg") else 0)
    assert model.pos_embed.shape[1] == 1 + 37 * 37


def test_weights_of_a_file(tmp_path: Path) -> None:
    state = backbones.dinov2_vits14_reg(pretrained=False).state_dict()
    path = tmp_path / "weights.pth"
    torch.save(state, path)
    loaded = backbones.dinov2_vits14_reg(weights=path).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
    with torch.device("meta"), pytest.raises(ValueError, match=r"weights\.pth holds another architecture"):
        backbones.dinov2_vitb14_reg(weights=path)
    with pytest.raises(FileNotFoundError, match=r"nothing\.pth"), torch.device("meta"):
        backbones.dinov2_vits14(weights=tmp_path / "nothing.pth")
    with torch.device("meta"):
        backbones.dinov2_vits14_reg(backbone_weights=path)  # as models with a head call it
        with pytest.raises(ValueError, match=r"weights=a\.pth and backbone_weights=b\.pth mean the same"):
            backbones.dinov2_vits14(weights="a.pth", backbone_weights="b.pth")
        with pytest.raises(
            ValueError, match=r"pretrained=False is for random weights, and weights=a\.pth names a file"
        ):
            backbones.dinov2_vits14(weights="a.pth", pretrained=False)


WIDTHS = {"s": 384, "b": 768, "l": 1024, "g": 1536}
NUM_BLOCKS = {"s": 12, "b": 12, "l": 24, "g": 40}
SPREAD = {"s": (2, 5, 8, 11), "b": (2, 5, 8, 11), "l": (4, 11, 17, 23), "g": (9, 19, 29, 39)}
IMAGES = torch.randn(1, 3, 30, 42, generator=torch.Generator().manual_seed(0))


def last(size: str, count: int) -> tuple[int, ...]:
    return tuple(range(NUM_BLOCKS[size]))[-count:]


@pytest.fixture(autouse=True)
def no_seed_matters() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("size", WIDTHS)
def test_models_have_the_released_layout(size: str) -> None:
    width = WIDTHS[size]
    linear = {"conv_depth.weight": (256, 8 * width, 1, 1), "conv_depth.bias": (256,)}
    norm = dict.fromkeys(("bn.weight", "bn.bias", "bn.running_mean", "bn.running_var"), (4 * width,))
    expected: list[tuple[Any, str, dict[str, Any], tuple[int, ...], bool, dict[str, tuple[int, ...]]]] = [
        (classifiers, "lc", {"layers": 1}, last(size, 1), True, {"weight": (1000, 2 * width), "bias": (1000,)}),
        (classifiers, "reg_lc", {}, last(size, 4), True, {"weight": (1000, 5 * width), "bias": (1000,)}),
        (depthers, "ld", {}, SPREAD[size], False, linear),
        (depthers, "ld", {"layers": 1}, last(size, 1), False, linear | {"conv_depth.weight": (256, 2 * width, 1, 1)}),
        (
            segmentors,
            "ms",
            {"head_dataset": "ade20k"},
            last(size, 4),
            True,
            norm | {"bn.num_batches_tracked": (), "conv_seg.weight": (150, 4 * width, 1, 1), "conv_seg.bias": (150,)},
        ),
    ]
    for module, suffix, options, blocks, uses_norm, shapes in expected:
        with torch.device("meta"):
            model = getattr(module, f"dinov2_vit{size}14_{suffix}")(pretrained=False, **options)
        assert {name: tuple(tensor.shape) for name, tensor in model.head.state_dict().items()} == shapes, suffix
        assert model.blocks == blocks
        assert model.norm is uses_norm
        assert model.backbone.embed_dim == width
        assert model.backbone.num_register_tokens == (4 if suffix == "reg_lc" else 0)
        assert not model.training


def released_dpt_shapes(width: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a released DPT head, as its module prints in the published notebook."""
    shapes: dict[str, tuple[int, ...]] = {
        "project.conv.weight": (256, 256, 3, 3),
        "project.conv.bias": (256,),
        "conv_depth.head.0.weight": (128, 256, 3, 3),
        "conv_depth.head.0.bias": (128,),
        "conv_depth.head.2.weight": (32, 128, 3, 3),
        "conv_depth.head.2.bias": (32,),
        "conv_depth.head.4.weight": (1, 32, 1, 1),
        "conv_depth.head.4.bias": (1,),
    }
    blocks = "reassemble_blocks"
    for level, channels in enumerate((width // 8, width // 4, width // 2, width)):
        shapes[f"{blocks}.projects.{level}.conv.weight"] = (channels, width, 1, 1)
        shapes[f"{blocks}.projects.{level}.conv.bias"] = (channels,)
        shapes[f"{blocks}.readout_projects.{level}.0.weight"] = (width, 2 * width)
        shapes[f"{blocks}.readout_projects.{level}.0.bias"] = (width,)
        shapes[f"convs.{level}.conv.weight"] = (256, channels, 3, 3)
        if level != 2:
            kernel = (4, 2, 0, 3)[level]
            shapes[f"{blocks}.resize_layers.{level}.weight"] = (channels, channels, kernel, kernel)
            shapes[f"{blocks}.resize_layers.{level}.bias"] = (channels,)
        shapes[f"fusion_blocks.{level}.project.conv.weight"] = (256, 256, 1, 1)
        shapes[f"fusion_blocks.{level}.project.conv.bias"] = (256,)
        for unit in (1, 2)[level == 0 :]:
            for conv in (1, 2):
                shapes[f"fusion_blocks.{level}.res_conv_unit{unit}.conv{conv}.conv.weight"] = (256, 256, 3, 3)
    return shapes


@pytest.mark.parametrize("size", WIDTHS)
def test_dpt_models_have_the_released_layout(size: str) -> None:
    with torch.device("meta"):
        model = getattr(depthers, f"dinov2_vit{size}14_dd")(pretrained=False)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.head.state_dict().items()}
    assert shapes == released_dpt_shapes(WIDTHS[size])
    assert model.blocks == SPREAD[size]
    assert model.norm is False


class Fetched(Exception):
    """Stands for a download."""


@pytest.mark.parametrize(
    ("module", "name", "options", "address"),
    [
        (classifiers, "dinov2_vits14_lc", {"layers": 1}, "dinov2_vits14/dinov2_vits14_linear_head"),
        (classifiers, "dinov2_vitb14_lc", {}, "dinov2_vitb14/dinov2_vitb14_linear4_head"),
        (classifiers, "dinov2_vitl14_reg_lc", {"layers": 1}, "dinov2_vitl14/dinov2_vitl14_reg4_linear_head"),
        (classifiers, "dinov2_vitg14_reg_lc", {}, "dinov2_vitg14/dinov2_vitg14_reg4_linear4_head"),
        (depthers, "dinov2_vits14_ld", {"layers": 1}, "dinov2_vits14/dinov2_vits14_nyu_linear_head"),
        (depthers, "dinov2_vitb14_ld", {"head_dataset": "kitti"}, "dinov2_vitb14/dinov2_vitb14_kitti_linear4_head"),
        (depthers, "dinov2_vitg14_dd", {"head_dataset": "kitti"}, "dinov2_vitg14/dinov2_vitg14_kitti_dpt_head"),
        (depthers, "dinov2_vitl14_dd", {}, "dinov2_vitl14/dinov2_vitl14_nyu_dpt_head"),
        (segmentors, "dinov2_vits14_ls", {}, "dinov2_vits14/dinov2_vits14_voc2012_linear_head"),
        (segmentors, "dinov2_vitg14_ms", {"head_dataset": "ade20k"}, "dinov2_vitg14/dinov2_vitg14_ade20k_ms_head"),
    ],
)
def test_released_heads_are_fetched_from_their_address(
    monkeypatch: pytest.MonkeyPatch, module: Any, name: str, options: dict[str, Any], address: str
) -> None:
    def fetch(source: str) -> Path:
        raise Fetched(source)

    monkeypatch.setattr(task_models, "fetch_weights", fetch)
    with pytest.raises(Fetched, match=f"^https://dl.fbaipublicfiles.com/dinov2/{address}.pth$"):
        getattr(module, name)(**options)


def drawn(shapes: dict[str, tuple[int, ...]], prefix: str = "") -> dict[str, Tensor]:
    return {prefix + name: 0.02 * torch.rand(shape) for name, shape in shapes.items()}


def test_released_files_make_a_classifier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mirror of the released tree: backbone and head are found by name, and predictions follow the definition."""
    monkeypatch.setattr(released, "RELEASED_WEIGHTS", tmp_path.as_uri())
    folder = tmp_path / "dinov2_vits14"
    folder.mkdir()
    other = classifiers.dinov2_vits14_lc(pretrained=False).backbone
    torch.save(other.state_dict(), folder / "dinov2_vits14_pretrain.pth")
    heads = {layers: drawn({"weight": (1000, (1 + layers) * 384), "bias": (1000,)}) for layers in (1, 4)}
    torch.save(heads[1], folder / "dinov2_vits14_linear_head.pth")
    torch.save(heads[4], folder / "dinov2_vits14_linear4_head.pth")

    images = IMAGES[:, :, 1:29]
    with torch.no_grad():
        tokens = [other.get_intermediate_layers(images, n=4, return_class_token=True)[i] for i in range(4)]
        for layers, state in heads.items():
            rows = torch.cat([cls for _, cls in tokens[-layers:]] + [tokens[-1][0].mean(1)], dim=1)
            model = classifiers.dinov2_vits14_lc(layers=layers)
            torch.testing.assert_close(model(images), F.linear(rows, state["weight"], state["bias"]))


def mmcv_file(path: Path, state: dict[str, Tensor]) -> Path:
    meta = {"mmcv_version": "1.5.0", "iter": 38400, "CLASSES": ("wall", "floor"), "PALETTE": [[120, 120, 120]]}
    momenta = {0: {"step": 38400, "exp_avg": torch.zeros(2)}}
    optimizer = {"state": momenta, "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.999), "params": [0]}]}
    named = {f"decode_head.{name}": tensor for name, tensor in state.items()}
    torch.save({"meta": meta, "state_dict": named, "optimizer": optimizer}, path)
    return path


@pytest.mark.parametrize(("dataset", "largest"), [("nyu", 10.0), ("kitti", 80.0)])
def test_linear_depth_keeps_the_range_of_its_dataset(tmp_path: Path, dataset: str, largest: float) -> None:
    state = drawn({"conv_depth.weight": (256, 768, 1, 1), "conv_depth.bias": (256,)})
    state["conv_depth.weight"] *= 0
    state["conv_depth.bias"] = torch.zeros(256)
    state["conv_depth.bias"][-1] = 1e6  # all evidence in the last bin
    path = mmcv_file(tmp_path / "head.pth", state)
    options = {"layers": 1, "pretrained": False, "head_weights": path, "head_dataset": dataset}
    depth = depthers.dinov2_vits14_ld(**options)(IMAGES)
    assert depth.shape == (1, 1, 30, 42)
    torch.testing.assert_close(depth, torch.full_like(depth, largest), rtol=1e-3, atol=0)
    nearer = depthers.dinov2_vits14_ld(depth_range=(0.5, 2.0), **options)
    torch.testing.assert_close(nearer(IMAGES), torch.full_like(depth, 2.0), rtol=1e-3, atol=0)


def test_released_depth_and_segmentation_files_load(tmp_path: Path) -> None:
    linear = drawn({"conv_depth.weight": (256, 3072, 1, 1), "conv_depth.bias": (256,)})
    dpt = drawn(released_dpt_shapes(384))
    mask = drawn({"conv_seg.weight": (21, 1536, 1, 1), "conv_seg.bias": (21,)}) | drawn(
        dict.fromkeys(("bn.weight", "bn.bias", "bn.running_mean", "bn.running_var"), (1536,))
    )
    cases: list[tuple[Callable[..., Any], dict[str, Tensor], type]] = [
        (depthers.dinov2_vits14_ld, linear, DepthBins),
        (depthers.dinov2_vits14_dd, dpt, ReluDepth),
        (segmentors.dinov2_vits14_ms, mask, BNHead),
    ]
    for construct, state, kind in cases:
        path = mmcv_file(tmp_path / "head.pth", state)
        model = construct(pretrained=False, head_weights=path)
        assert isinstance(getattr(model.head, "output", model.head), kind)
        for name, tensor in model.head.state_dict().items():
            assert name.endswith("num_batches_tracked") or torch.equal(tensor, state[name])
        with torch.no_grad():
            assert model(IMAGES).shape == (1, 21 if kind is BNHead else 1, 30, 42)


def test_a_task_file_of_ours_fills_backbone_and_head(tmp_path: Path) -> None:
    trained = segmentors.dinov2_vits14_ls(pretrained=False, num_classes=3)
    path = tmp_path / "task_model.pth"
    torch.save({"format_version": 1, "task": "segmentation", "model": trained.state_dict()}, path)
    loaded = segmentors.dinov2_vits14_ls(num_classes=3, backbone_weights=path, head_weights=path)
    offline = segmentors.dinov2_vits14_ls(num_classes=3, pretrained=False, backbone_weights=path, head_weights=path)
    with torch.no_grad():
        torch.testing.assert_close(loaded(IMAGES), trained(IMAGES))
        torch.testing.assert_close(offline(IMAGES), trained(IMAGES))
    with pytest.raises(ValueError, match=r"task_model.pth .*conv_seg.weight is \[3, 384, 1, 1\] .* \[21, 384, 1, 1\]"):
        segmentors.dinov2_vits14_ls(backbone_weights=path, head_weights=path)


def test_detectors_give_boxes_and_take_the_head_of_a_task_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images = torch.zeros(1, 3, 56, 70)
    trained = detectors.dinov2_vits14_yolo(pretrained=False, num_classes=3, channels=16)
    assert "the head is random, for none was released" in caplog.text
    path = tmp_path / "task_model.pth"
    torch.save({"format_version": 1, "task": "detection", "model": trained.state_dict()}, path)
    loaded = detectors.dinov2_vits14_yolo(num_classes=3, channels=16, backbone_weights=path, head_weights=path)
    with torch.no_grad():
        for name in ("boxes", "scores"):
            torch.testing.assert_close(loaded(images)[name], trained(images)[name])
        queries = detectors.dinov2_vits14_detr(pretrained=False, num_classes=3, channels=16, num_queries=7)(images)
    assert queries["boxes"].shape == (1, 7, 4)
    assert queries["scores"].shape == (1, 7, 3)


def test_scales_give_an_averaging_model() -> None:
    model = segmentors.dinov2_vits14_ms(pretrained=False, scales=(1.0, 0.5))
    assert isinstance(model, MultiScaleInference)
    assert model.scales == (1.0, 0.5)
    assert model.flip
    assert not model.training
    assert isinstance(segmentors.dinov2_vits14_ms(pretrained=False), TaskModel)


def test_wrong_choices_are_named() -> None:
    for construct in (classifiers.dinov2_vits14_lc, depthers.dinov2_vits14_ld):
        with pytest.raises(ValueError, match="layers must be one of 1, 4; got 2"):
            construct(layers=2, pretrained=False)
    for construct in (depthers.dinov2_vits14_ld, depthers.dinov2_vits14_dd):
        with pytest.raises(ValueError, match="head_dataset must be one of nyu, kitti; got 'sun'"):
            construct(head_dataset="sun", pretrained=False)
    with pytest.raises(ValueError, match="voc2012, ade20k, cityscapes; got 'coco'"):
        segmentors.dinov2_vits14_ms(head_dataset="coco", pretrained=False)
    with pytest.raises(ValueError, match="no such head was released: give a file"):
        segmentors.dinov2_vits14_ls(head_dataset="cityscapes")
    with pytest.raises(ValueError, match=r"'vits16'; allowed: dinov2_vits14, dinov2_vits14_reg, dinov2_vitb14"):
        classifiers.make_classifier("vits16", pretrained=False)


def test_every_constructor_is_an_entry_point(repository: Path) -> None:
    spec = importlib.util.spec_from_file_location("hubconf", repository / "hubconf.py")
    assert spec is not None
    assert spec.loader is not None
    hubconf = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hubconf)
    constructors = {
        name: function
        for module in (backbones, classifiers, depthers, segmentors, detectors)
        for name, function in vars(module).items()
        if name.startswith("dinov2_")
    }
    assert len(constructors) == 8 + 8 + 8 + 8 + 8
    assert set(hubconf.__all__) - {"dependencies"} == set(constructors)
    for name, function in constructors.items():
        assert getattr(hubconf, name) is function
        assert function.__doc__
    assert (decode_heads.BNHead, decode_heads.DPTHead) == (BNHead, DPTHead)
    for package in hubconf.dependencies:
        assert importlib.util.find_spec(package) is not None


def test_a_model_comes_through_torch_hub(repository: Path) -> None:
    model = torch.hub.load(str(repository), "dinov2_vits14_ld", source="local", layers=1, pretrained=False)
    assert isinstance(model, TaskModel)
    assert model.blocks == (11,)
