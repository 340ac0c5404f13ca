"""Head files in the layouts that they come in, and those that must be refused."""

import logging
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dinov2.hub.task_models import load_head_weights
from dinov2.models.heads.classification import LinearClassifier
from dinov2.models.heads.depth import DepthBins, LinearDepthHead
from dinov2.models.heads.segmentation import BNHead


def depth_head(embed_dim: int = 8) -> LinearDepthHead:
    return LinearDepthHead(embed_dim, DepthBins(0.001, 10.0, num_bins=5))


def drawn_state(head: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.rand(tensor.shape, generator=generator).to(tensor.dtype)
        for name, tensor in head.state_dict().items()
    }


def behind(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


LAYOUTS: dict[str, Any] = {
    "bare": lambda state: state,
    "released": lambda state: {"meta": {"epoch": 3}, "state_dict": behind("decode_head.", state), "optimizer": {}},
    "without a container": lambda state: behind("decode_head.", state),
    "task file": lambda state: {
        "format_version": 1,
        "task": "depth",
        "model": behind("head.", state) | {"backbone.norm.weight": torch.zeros(8)},
    },
    "wrapped": lambda state: {"model": behind("module.head._orig_mod.", state)},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["depth", "segmentation", "classification"])
def test_every_layout_fills_the_head(tmp_path: Path, layout: str, kind: str) -> None:
    head: nn.Module = {
        "depth": depth_head(),
        "segmentation": BNHead(8, 3, num_blocks=2),
        "classification": LinearClassifier(8, 3),
    }[kind]
    state = drawn_state(head)
    torch.save(LAYOUTS[layout](state), tmp_path / "head.pth")
    load_head_weights(head, tmp_path / "head.pth")
    for name, tensor in head.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def rename_numpy(path: Path, package: str) -> None:
    """Makes a file name NumPy's functions by a package of another version."""
    with zipfile.ZipFile(path) as file:
        entries = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(path, "w") as file:
        for name, content in entries.items():
            renamed = re.sub(rb"numpy\._?core(?=\.multiarray\n)", package.encode(), content)
            assert not name.endswith("data.pkl") or package.encode() in renamed
            file.writestr(name, renamed)


@pytest.mark.parametrize("former_name", [False, True])
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.int64])
def test_scores_that_numpy_wrote_do_not_hinder(tmp_path: Path, former_name: bool, dtype: type) -> None:
    """Released depth heads keep their best score so, under the module name of NumPy 1."""
    head = depth_head()
    state = drawn_state(head)
    path = tmp_path / "dinov2_vits14_nyu_linear_head.pth"
    meta = {"hook_msgs": {"best_score": dtype(1), "best_ckpt": "best_abs_rel.pth"}}
    torch.save({"meta": meta, "state_dict": behind("decode_head.", state)}, path)
    rename_numpy(path, "numpy.core" if former_name else "numpy._core")
    before = torch.serialization.get_safe_globals()
    load_head_weights(head, path)
    assert torch.equal(head.conv_depth.weight, state["conv_depth.weight"])
    assert set(torch.serialization.get_safe_globals()) == set(before)


class Harmful:
    """Would write a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_nothing_read_can_run_code(tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "meta": Harmful(tmp_path / "touched")}, tmp_path / "head.pth")
    with pytest.raises(ValueError, match=r"head\.pth .* holds objects other than tensors and plain values"):
        load_head_weights(depth_head(), tmp_path / "head.pth")
    assert not (tmp_path / "touched").exists()


def test_a_head_of_another_backbone_is_refused_and_nothing_changes(tmp_path: Path) -> None:
    path = tmp_path / "wide.pth"
    torch.save({"state_dict": behind("decode_head.", depth_head(12).state_dict())}, path)
    head = depth_head(8)
    before = {name: tensor.clone() for name, tensor in head.state_dict().items()}
    told = r"wide\.pth .*conv_depth.weight is \[5, 24, 1, 1\] in the file and \[5, 16, 1, 1\]"
    with pytest.raises(ValueError, match=told):
        load_head_weights(head, path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in head.state_dict().items())


def test_a_head_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "segmentation.pth"
    torch.save({"state_dict": behind("decode_head.", BNHead(8, 3).state_dict())}, path)
    told = r"segmentation\.pth does not hold a LinearDepthHead: 2 of its 2 .*conv_depth.weight.*conv_seg.weight"
    with pytest.raises(ValueError, match=told):
        load_head_weights(depth_head(), path)
    torch.save({"state_dict": {}, "epoch": 1}, path)
    with pytest.raises(ValueError, match="found: no tensors"):
        load_head_weights(depth_head(), path)


def test_counts_of_steps_may_be_missing_and_surplus_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    head = BNHead(8, 3)
    state = drawn_state(head)
    del state["bn.num_batches_tracked"]
    torch.save(state | {"conv_more.weight": torch.zeros(1)}, tmp_path / "head.pth")
    with caplog.at_level(logging.WARNING, logger="dinov2"):
        load_head_weights(head, tmp_path / "head.pth")
    assert torch.equal(head.bn.running_var, state["bn.running_var"])
    assert "1 tensors that the head does not have: conv_more.weight" in caplog.text


def test_missing_and_truncated_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.pth"):
        load_head_weights(depth_head(), tmp_path / "nothing.pth")
    torch.save(depth_head().state_dict(), tmp_path / "head.pth")
    content = (tmp_path / "head.pth").read_bytes()
    (tmp_path / "head.pth").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"head\.pth .*truncated"):
        load_head_weights(depth_head(), tmp_path / "head.pth")
