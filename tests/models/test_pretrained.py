"""Every known layout of a checkpoint gives the same backbone under our names."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dinov2.models.pretrained import extract_backbone, load_pretrained_backbone, unchunk_block_name
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
    assert report.summary() == f"loaded {total} of {total} backbone parameters from {tmp_path / 'weights.pth'}"
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


@pytest.mark.parametrize(
    ("in_file", "in_model", "message"),
    [(4, 0, "features will differ"), (0, 4, "start untrained")],
)
def test_registers_on_one_side_only_warn(
    in_file: int, in_model: int, message: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = make(num_register_tokens=in_model)
    path = save(make(num_register_tokens=in_file).state_dict(), tmp_path)
    load_pretrained_backbone(model, path, log=False)
    assert not caplog.records
    report = load_pretrained_backbone(model, path)
    assert (report.unexpected, report.missing)[in_file == 0] == ("register_tokens",)
    assert message in caplog.text
    assert {record.levelno for record in caplog.records} == {logging.WARNING}


def assert_refused(model: DinoVisionTransformer, path: Path, message: str, **options: Any) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_pretrained_backbone(model, path, **options)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


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
    assert_refused(make(), path, "90%", min_fraction=0.9)
    assert len(load_pretrained_backbone(make(), path).missing) == 14


def test_a_file_that_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    model = make()
    complete = save(model.state_dict(), tmp_path).read_bytes()
    for length in (0, 1, 10, 100, len(complete) // 2, len(complete) - 1):
        (tmp_path / "cut.pth").write_bytes(complete[:length])
        assert_refused(model, tmp_path / "cut.pth", rf"cut\.pth \({length} bytes\) cannot be read as a checkpoint")
    (tmp_path / "page.pth").write_text("<html>404</html>")
    assert_refused(model, tmp_path / "page.pth", r"page\.pth .*cannot be read")
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
