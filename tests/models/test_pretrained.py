"""Every known layout of a checkpoint gives the same backbone under our names."""

import logging
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dinov2.models.layouts import extract_backbone, unchunk_block_name
from dinov2.models.pretrained import load_pretrained_backbone, read_checkpoint
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.utils.files import sidecar, write_with_checksum

State = dict[str, Tensor]
BACKBONE: State = {
    name: torch.full((1,), float(number))
    for number, name in enumerate(("cls_token", "blocks.0.norm1.weight", "blocks.11.mlp.fc1.weight", "norm.bias"))
}
OTHER: State = {name: tensor + 100 for name, tensor in BACKBONE.items()}


def prefixed(prefix: str, state: State) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def wrapped(state: State, wrapper: str) -> State:
    return {name.replace("blocks.0.", f"blocks.0.{wrapper}."): tensor for name, tensor in state.items()}


HEAD: State = {"dino_head.last_layer.weight_g": torch.zeros(1)}
LAYOUTS: dict[str, dict[str, Any]] = {
    "bare": BACKBONE,
    "data parallel": prefixed("module.", BACKBONE),
    "data parallel twice": prefixed("module.module.", BACKBONE),
    "backbone": prefixed("backbone.", BACKBONE) | HEAD,
    "student.backbone": prefixed("student.backbone.", BACKBONE) | prefixed("student.", HEAD),
    "teacher before student": prefixed("student.backbone.", OTHER) | prefixed("teacher.backbone.", BACKBONE),
    "compiled": prefixed("_orig_mod.", BACKBONE),
    "compiled block": wrapped(BACKBONE, "_orig_mod"),
    "fsdp": wrapped(prefixed("_fsdp_wrapped_module.", BACKBONE), "_fsdp_wrapped_module"),
    "activation checkpointing": wrapped(BACKBONE, "_checkpoint_wrapped_module"),
    "fsdp and checkpointing": wrapped(BACKBONE, "_fsdp_wrapped_module._checkpoint_wrapped_module._orig_mod"),
    "compiled in data parallel": prefixed("_orig_mod.module.", BACKBONE),
    "teacher": {"teacher": prefixed("backbone.", BACKBONE) | HEAD},
    "teacher of data parallel": {"teacher": prefixed("module.backbone.", BACKBONE), "epoch": 3},
    "teacher without prefix": {"teacher": BACKBONE},
    "student alone": {"student": prefixed("module.backbone.", BACKBONE)},
    "both": {"student": prefixed("backbone.", OTHER), "teacher": prefixed("backbone.", BACKBONE)},
    "both, bare": {"student": OTHER, "teacher": BACKBONE},
    "model": {"model": prefixed("teacher.backbone.", BACKBONE) | prefixed("student.backbone.", OTHER), "iteration": 7},
    "model and optimizer": {"model": BACKBONE, "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}}},
    "state_dict": {"state_dict": prefixed("backbone.", BACKBONE) | {"decode_head.conv.weight": torch.zeros(1)}},
    "nested": {"model": {"teacher": {"backbone": BACKBONE}, "student": {"backbone": OTHER}}},
    "with plain values": BACKBONE | {"epoch": 3, "name": "run"},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    state = extract_backbone(LAYOUTS[layout])
    assert state.tensors.keys() == BACKBONE.keys()
    assert all(state.tensors[name] is tensor for name, tensor in BACKBONE.items())
    assert (layout in ("bare", "model and optimizer", "with plain values")) == (not state.renamed)


def test_chunked_blocks_get_their_global_number(reference: Callable[[str], Any]) -> None:
    for row in reference("schedule_fixture.json")["block_chunk_layout"]:
        if "error" in row:
            continue
        names = [unchunk_block_name(f"{key}.norm1.weight") for key in row["block_keys"]]
        assert names == [f"blocks.{index}.norm1.weight" for index in range(row["depth"])]


def test_files_without_tensors_or_with_two_names_for_one_parameter_are_errors() -> None:
    with pytest.raises(ValueError, match=r"no parameter tensors .* top-level keys: epoch, args"):
        extract_backbone({"epoch": 3, "args": {"lr": 0.1}})
    with pytest.raises(ValueError, match="top-level keys: none"):
        extract_backbone({})
    with pytest.raises(ValueError, match=r"end up as 'blocks\.0\.norm1\.weight'"):
        extract_backbone({"blocks.0.norm1.weight": torch.zeros(1), "blocks.0.0.norm1.weight": torch.zeros(1)})


OPTIONS: dict[str, Any] = {
    "img_size": 28,
    "patch_size": 7,
    "embed_dim": 16,
    "depth": 2,
    "num_heads": 2,
    "init_values": 0.5,
}


def make(**options: Any) -> DinoVisionTransformer:
    model = DinoVisionTransformer(**OPTIONS | options)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


def save(content: Any, folder: Path, name: str = "weights.pth") -> Path:
    torch.save(content, folder / name)
    return folder / name


def test_own_weights_load_completely(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source, model = make(num_register_tokens=2), make(num_register_tokens=2)
    with caplog.at_level(logging.INFO, "dinov2"):
        report = load_pretrained_backbone(model, save(source.state_dict(), tmp_path))
    for name, tensor in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)
    assert set(report.loaded) == set(source.state_dict())
    others = (report.resized, report.renamed, report.missing, report.unexpected, report.ignored)
    assert not any(others)
    total = len(report.loaded)
    path = tmp_path / "weights.pth"
    assert report.summary() == f"Loaded pretrained weights from {path}: {total} of {total} parameters of the backbone"
    assert [record.levelno for record in caplog.records] == [logging.INFO]


def test_a_file_is_verified_where_its_checksum_lies_beside_it(tmp_path: Path) -> None:
    source, model, path = make(), make(), tmp_path / "weights.pth"
    write_with_checksum(path, lambda file: torch.save(source.state_dict(), file))
    load_pretrained_backbone(model, path)
    other = make()
    torch.save(other.state_dict(), path)  # whole, but not the file that the checksum is of
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"weights\.pth is damaged: .* SHA-256 .*delete weights\.pth\.sha256 if"):
        load_pretrained_backbone(model, path)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    sidecar(path).unlink()
    load_pretrained_backbone(model, path)
    assert torch.equal(model.state_dict()["cls_token"], other.state_dict()["cls_token"])


def test_teacher_checkpoint_with_chunks(tmp_path: Path) -> None:
    source, model = make(), make()
    chunked = {f"backbone.{name.replace('blocks.', 'blocks.0.')}": t for name, t in source.state_dict().items()}
    teacher = chunked | {"dino_head.mlp.0.weight": torch.zeros(2)}
    path = save({"student": {"cls_token": torch.zeros(2)}, "teacher": teacher}, tmp_path)
    report = load_pretrained_backbone(model, str(path))
    x = torch.randn(1, 3, 28, 28)
    assert torch.equal(model(x), source(x))
    assert report.renamed["blocks.1.norm1.bias"] == "teacher.backbone.blocks.0.1.norm1.bias"
    assert report.ignored == ("student.cls_token", "teacher.dino_head.mlp.0.weight")
    assert "renamed" in report.summary()
    assert "ignored 2: student.cls_token, teacher.dino_head.mlp.0.weight" in report.summary()


@pytest.mark.parametrize("size", [(14, 21), (42, 42), 21])
@pytest.mark.parametrize(
    "options", [{"interpolate_offset": 0.1}, {"interpolate_offset": 0.0, "interpolate_antialias": True}]
)
def test_resized_model_computes_what_the_source_computes(
    size: int | tuple[int, int], options: dict[str, Any], tmp_path: Path
) -> None:
    source, model = make(**options), make(img_size=size, **options)
    report = load_pretrained_backbone(model, save(source.state_dict(), tmp_path))
    height, width = (size, size) if isinstance(size, int) else size
    x = torch.randn(2, 3, height, width)
    torch.testing.assert_close(model(x), source(x))
    num_patches = height * width // 49
    assert report.resized == {"pos_embed": ((1, 17, 16), (1, 1 + num_patches, 16))}
    assert f"resized pos_embed: [1, 17, 16] -> [1, {1 + num_patches}, 16]" in report.summary()
    assert "pos_embed" in report.loaded


def test_non_square_source_needs_its_grid(tmp_path: Path) -> None:
    source = make(img_size=(14, 35))
    path = save(source.state_dict(), tmp_path)
    same = make(img_size=(14, 35))
    assert not load_pretrained_backbone(same, path).resized
    model = make()
    with pytest.raises(ValueError, match=r"10 patches, which is not a grid of 3 x 3; pass .* source_grid"):
        load_pretrained_backbone(model, path)
    load_pretrained_backbone(model, path, source_grid=(2, 5))
    x = torch.randn(1, 3, 28, 28)
    torch.testing.assert_close(model(x), source(x))


def test_half_precision_file_fills_a_float32_model(tmp_path: Path) -> None:
    source, model = make().half(), make(img_size=14)
    load_pretrained_backbone(model, save(source.state_dict(), tmp_path))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(model.norm.weight, source.norm.weight.float())


def assert_refused(model: DinoVisionTransformer, path: Path, message: str, **options: Any) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_pretrained_backbone(model, path, **options)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


Change = Callable[[State], State]


def without(ending: str) -> Change:
    return lambda state: {name: tensor for name, tensor in state.items() if not name.endswith(ending)}


@pytest.mark.parametrize(
    ("in_file", "in_model", "message"),
    [
        ({"num_register_tokens": 4}, {}, r"num_register_tokens=4\. .*no place in the backbone: register_tokens$"),
        ({}, {"num_register_tokens": 4}, r"num_register_tokens=0\. .*lacks 1 .*: register_tokens$"),
        ({"num_register_tokens": 4}, {"num_register_tokens": 2}, r"num_register_tokens=4\. .*\[1, 4, 16\] in the file"),
        ({"ffn_layer": "swiglu"}, {}, r"student\.ffn_layer=swiglufused\. .*blocks\.0\.mlp\.w12\.weight"),
        ({}, {"ffn_layer": "swiglu"}, r"student\.ffn_layer=mlp\. .*lacks 4 .*blocks\.0\.mlp\.w12\.weight"),
        ({"depth": 3}, {}, r"width 16, 3 blocks.*14 of its parameters have no place .*blocks\.2\.norm1\.weight"),
        ({}, {"depth": 3}, r"width 16, 2 blocks.*lacks 14 parameters .*blocks\.2\.norm1\.weight"),
        ({}, {"init_values": None}, r"student\.layerscale=1e-05\. .*no place in the backbone: blocks\.0\.ls1\.gamma"),
        ({}, {"qkv_bias": False}, r"student\.qkv_bias=true\. .*no place in the backbone: blocks\.0\.attn\.qkv\.bias"),
        ({"in_chans": 1}, {}, r"proj\.weight \[16, 1, 7, 7\] in the file, \[16, 3, 7, 7\]"),
        ({"patch_size": (7, 14), "img_size": (14, 28)}, {}, r"student\.patch_size=\[7, 14\]\. "),
        (
            {"embed_dim": 192, "depth": 12, "num_heads": 3},
            {},
            r"student\.arch=vit_tiny\. Found: 34 shapes differ: (\w[^;]*; ){3}and 31 more; ",
        ),
    ],
)
def test_what_would_change_the_features_is_refused_with_the_options_that_fit(
    in_file: dict[str, Any], in_model: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = save(make(**in_file).state_dict(), tmp_path)
    assert_refused(make(**in_model), path, rf"weights\.pth holds another architecture; .*{message}")


@pytest.mark.parametrize(
    ("parameter", "message"),
    [
        ("storage_tokens", "DINOv3"),
        ("rope_embed.periods", "rotary positions"),
        ("blocks.0.attn.qkv.bias_mask", "DINOv3"),
        ("norm_pre.weight", "CLIP"),
        ("blocks.1.attn.q_norm.weight", "norms of queries and keys"),
        ("blocks.0.attn.relative_position_bias_table", "BEiT"),
        ("dist_token", "distillation token"),
        ("fc_norm.weight", "norm after pooling"),
        ("blocks.0.attn.qkv.weight_scale", "quantised"),
        ("blocks.0.attn.qkv.lora_A.weight", "low-rank additions"),
        ("something_new", "$"),
    ],
)
def test_parameters_of_other_networks_are_refused_by_name(parameter: str, message: str, tmp_path: Path) -> None:
    path = save(make().state_dict() | {parameter: torch.zeros(3)}, tmp_path)
    assert_refused(make(), path, rf"1 of its parameters have no place .*: {re.escape(parameter)}.*{message}")


def test_a_rotary_network_is_refused_although_most_of_it_fits(tmp_path: Path) -> None:
    state = without("pos_embed")(make().state_dict()) | {"rope_embed.periods": torch.rand(4)}
    path = save(state, tmp_path)
    assert_refused(
        make(), path, r"lacks 1 .*: pos_embed; 1 of its .*: rope_embed\.periods; a network without .*\. Such .* rotary"
    )


@pytest.mark.parametrize(
    ("option", "ending", "neutral"),
    [
        ({"init_values": None}, ".gamma", "layerscale=0"),
        ({"qkv_bias": False}, ".qkv.bias", "qkv_bias=false"),
        ({"proj_bias": False}, "attn.proj.bias", "proj_bias=false"),
        ({"ffn_bias": False}, "mlp.fc1.bias", "ffn_bias=false"),
    ],
)
def test_a_network_without_layer_scale_or_biases_computes_the_same_here(
    option: dict[str, Any], ending: str, neutral: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source, model = make(**option), make(init_values=1e-5)
    state = source.state_dict()
    del state["mask_token"]  # DINO, DeiT and MAE have none
    path = save({"model": state | {"head.weight": torch.zeros(2), "decoder_embed.weight": torch.zeros(2)}}, tmp_path)
    report = load_pretrained_backbone(model, path)
    x = torch.randn(1, 3, 28, 28)
    torch.testing.assert_close(model(x), source(x))
    assert (set(report.neutral), report.ignored) == ({neutral}, ("head.weight", "decoder_embed.weight"))
    assert f"student.{neutral} leaves them out" in caplog.text
    assert {record.levelno for record in caplog.records} == {logging.WARNING}
    first = next(name for name in make().state_dict() if name.endswith(ending))
    whole = make().state_dict()
    assert_refused(make(), save({name: whole[name] for name in whole if name != first}, tmp_path), f"lacks 1 .*{first}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.index_fill(0, torch.tensor([3]), torch.nan), r"1 of 35 .* NaN in teacher\.norm\.weight"),
        (lambda t: t * torch.inf, r"infinity in teacher\.norm\.weight"),
        (lambda t: t.to(torch.int8), r"norm\.weight is torch\.int8; give the file before quantisation"),
        (lambda t: t.to(torch.float8_e4m3fn), r"norm\.weight is torch\.float8_e4m3fn.*before quantisation"),
    ],
)
def test_values_that_are_no_finite_numbers_are_named(
    change: Callable[[Tensor], Tensor], message: str, tmp_path: Path
) -> None:
    state = make().state_dict()
    state["norm.weight"] = change(state["norm.weight"])
    assert_refused(make(), save({"teacher": state}, tmp_path), rf"weights\.pth: .*{message}")


def test_a_student_where_there_is_no_teacher_is_said(tmp_path: Path) -> None:
    report = load_pretrained_backbone(make(), save({"student": prefixed("backbone.", make().state_dict())}, tmp_path))
    assert "taken from student.backbone: the file holds no teacher" in report.summary()


def test_the_dry_checks_of_a_model_without_memory_are_the_same(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = DinoVisionTransformer(**OPTIONS)
    assert load_pretrained_backbone(model, save(without(".gamma")(make().state_dict()), tmp_path)).neutral
    with pytest.raises(ValueError, match="num_register_tokens=4"):
        load_pretrained_backbone(model, save(make(num_register_tokens=4).state_dict(), tmp_path))


def test_where_there_is_no_file_the_newest_teacher_of_that_run_is_named(tmp_path: Path) -> None:
    for number in (99, 199, 1099):
        (tmp_path / f"eval/training_{number}").mkdir(parents=True)
        save(make().state_dict(), tmp_path / f"eval/training_{number}").rename(
            tmp_path / f"eval/training_{number}/teacher_checkpoint.pth"
        )
    newest = re.escape(str(tmp_path / "eval/training_1099/teacher_checkpoint.pth"))
    for absent in ("eval/best/teacher_checkpoint.pth", "eval/training_7/teacher_checkpoint.pth", "best.pth"):
        with pytest.raises(
            FileNotFoundError, match=rf"no checkpoint at .*; the newest teacher of that run is {newest}"
        ):
            read_checkpoint(tmp_path / absent)
    with pytest.raises(ValueError, match=f"is a folder; name a file in it, such as {newest}"):
        read_checkpoint(tmp_path)


def test_another_architecture_lists_the_shapes(tmp_path: Path) -> None:
    path = save(make(embed_dim=24).state_dict(), tmp_path)
    assert_refused(
        make(), path, r"weights.pth holds another architecture.*cls_token \[1, 1, 24\] in the file, \[1, 1, 16\]"
    )
    path = save(make(patch_size=14).state_dict(), tmp_path)
    assert_refused(
        make(), path, r"1 shapes differ: patch_embed.proj.weight \[16, 3, 14, 14\] in the file, \[16, 3, 7, 7\]"
    )


def test_too_little_is_an_error_that_shows_both_sides(tmp_path: Path) -> None:
    state: dict[str, Tensor] = {f"layer{number}.conv.weight": torch.zeros(1) for number in range(20)}
    path = save(state, tmp_path)
    assert_refused(
        make(), path, r"fills only 0 of the \d+ .*50% .*Found: layer0\.conv\.weight, .*12 more.*such as: cls_token"
    )
    some = {name: tensor for name, tensor in make().state_dict().items() if not name.startswith("blocks.1")}
    path = save(some, tmp_path)
    assert_refused(make(), path, r"lacks 14 parameters that the backbone needs: blocks\.1\.norm1\.weight")


def test_counters_of_another_network_are_not_taken_for_quantised_weights(tmp_path: Path) -> None:
    names = {"conv1.weight": torch.zeros(3), "layer1.0.bn1.num_batches_tracked": torch.tensor(1)}
    assert_refused(make(), save(names, tmp_path), r"fills only 0 of .* a ResNet\.")


def test_a_file_that_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    model = make()
    complete = save(model.state_dict(), tmp_path).read_bytes()
    for length in (0, 1, 10, 100, len(complete) // 2, len(complete) - 1):
        (tmp_path / "cut.pth").write_bytes(complete[:length])
        assert_refused(model, tmp_path / "cut.pth", rf"cut\.pth \({length} bytes\) cannot be read as a checkpoint")
    for start, kind in {
        b"<html>404</html>": "a web page",
        b" \n<!DOCTYPE html><title>Sign in</title>": "a web page, such as that of a login",
        b"\x89PNG\r\n\x1a\n": "a PNG picture",
        b"\xff\xd8\xff\xe0": "a JPEG picture",
        b"\x1f\x8b\x08": "packed by gzip",
        b"version https://git-lfs.github.com/spec/v1\n": "a Git LFS pointer",
        b"\x89HDF\r\n": "an HDF5 file",
    }.items():
        (tmp_path / "other.pth").write_bytes(start)
        assert_refused(model, tmp_path / "other.pth", rf"other\.pth .*cannot be read as a checkpoint: it is {kind}")
    with zipfile.ZipFile(tmp_path / "packed.pth", "w") as archive:
        archive.writestr("folder/vit.pth", b"weights")
    assert_refused(model, tmp_path / "packed.pth", r"a zip archive .* \(folder/vit\.pth\): unpack it first")
    assert_refused(model, tmp_path, "is a folder")
    assert_refused(model, save([torch.zeros(1)], tmp_path), "holds a list")
    assert_refused(model, save({"epoch": 3}, tmp_path), r"weights\.pth: no parameter tensors")
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*absent\.pth"):
        load_pretrained_backbone(model, tmp_path / "absent.pth")


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("code ran while a file was read",))


def test_a_file_cannot_run_code(tmp_path: Path) -> None:
    path = save(make().state_dict() | {"extra": Evil()}, tmp_path)
    assert_refused(make(), path, "objects other than tensors")


def test_a_file_of_either_format_is_read_under_any_name(tmp_path: Path) -> None:
    source, model = make(), make()
    save_file(source.state_dict(), tmp_path / "weights.pth")
    save(source.state_dict(), tmp_path, "weights.safetensors")
    for name in ("weights.pth", "weights.safetensors"):
        assert len(load_pretrained_backbone(model, tmp_path / name).loaded) == len(source.state_dict())


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_a_patch_embedding_for_other_channels_gives_the_tokens_of_equal_ones(tmp_path: Path, channels: int) -> None:
    def network(in_chans: int) -> DinoVisionTransformer:
        return DinoVisionTransformer(img_size=16, patch_size=8, embed_dim=8, depth=1, num_heads=2, in_chans=in_chans)

    rgb, other = network(3).eval(), network(channels).eval()
    torch.save(rgb.state_dict(), tmp_path / "rgb.pth")
    report = load_pretrained_backbone(other, tmp_path / "rgb.pth")
    assert report.resized == {"patch_embed.proj.weight": ((8, 3, 8, 8), (8, channels, 8, 8))}
    grey = torch.rand(2, 1, 16, 16)
    expected = rgb(grey.expand(-1, 3, -1, -1))
    torch.testing.assert_close(other(grey.expand(-1, channels, -1, -1)), expected)
